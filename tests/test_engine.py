"""The paths of the matching engine agree: factored, blocked and dense, for every distance, family, view and tuning."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import golden as goldens
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from grab_jax import client, distances, leaves, matching, models, tuning, views
from grab_jax.kernels import residual_norms as kernel
from grab_jax.leaves import LowRank, Outer, Pruned, Rows, Signs
from grab_jax.types import InputError

NAMES = ("cosine", "l2", "l2+l1", "normalised", "squared", "squared+l1")
VIEWS = ("all", "not factored", "layers", "unpruned", "signs")
SIZES = {"thin": (1, 6), "wide": (3, 9)}
"""Token rows on both sides of the turn: 6 and 27, where kernels of 32 x 32 turn at 16."""


def distance(name):
    return distances.by_name(name)


def viewed(view, observed, rows):
    """The observed update as the engine sees it."""
    layers = "layer_0|h_0" if view == "layers" else ""
    if view in ("unpruned", "signs"):
        observed = {p: jnp.asarray(np.where(np.abs(g) < np.median(np.abs(g)), 0, g)) for p, g in observed.items()}
        return views.seen([observed], rows, view)[0]
    return observed if view == "not factored" else views.seen([observed], rows, layers=layers)[0]


SOON = {("bert", "embeddings", "thin")}
"""The case of the ordinary suite; the others take minutes together."""
CASES = [
    pytest.param(*case, marks=() if case in SOON else pytest.mark.long)
    for case in itertools.product(("bert", "roberta", "gpt2"), ("embeddings", "none"), SIZES)
]


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(("family", "frozen", "size"), CASES)
def test_factored_blocked_and_dense_paths_agree(family, frozen, size):
    layers = {"n_layer": 1} if family == "gpt2" else {"num_hidden_layers": 1}
    model, (b, t) = models.build(goldens.config(family, **layers)), SIZES[size]
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda v: jnp.asarray(rng.normal(scale=0.3, size=v.shape), jnp.float32), shapes)
    trainable, held = some(*tuning.split(params, tuning.freezes(model, frozen)))
    ids = rng.integers(5, 50, (2, b, t))
    ids[:, 0, 2] = ids[:, 0, 1]  # a repeated token: two cotangents in one row of a table
    attention, labels = jnp.ones((b, t), bool), jnp.eye(3)[jnp.arange(b)]
    masks = {name: jnp.asarray(rng.random((b, *s.shape(t))) < 0.8, jnp.float32) for name, s in model.sites.items()}
    observed = jax.jit(client.fedsgd(model))(trainable, held, jnp.asarray(ids[0]), attention, labels, masks)
    seen = {view: viewed(view, observed, b * t) for view in VIEWS}
    arrays = {view: jax.tree.map(lambda v: v, leaf) for view, leaf in seen.items()}
    for view in ("all", "layers"):
        assert any(isinstance(leaf, LowRank) for leaf in seen[view].values()) == (size == "thin")
        arrays[view] = {path: observed[path] for path in seen[view]}

    @jax.jit
    def both(ids, relaxed, seen, arrays):
        def update(factored):
            simulate = client.fedsgd(model, factored=factored)
            return lambda masks: simulate(trainable, held, ids, attention, labels, masks)

        return slopes(update(True), relaxed, seen), slopes(update(False), relaxed, arrays)

    relaxed = {name: 0.7 * mask + 0.2 for name, mask in masks.items()}
    ours, wanted = both(jnp.asarray(ids[1]), relaxed, seen, arrays)
    np.testing.assert_allclose(ours[0], wanted[0], rtol=1e-5)
    for i, label in enumerate((name, view) for name in NAMES for view in VIEWS):
        a, b = (np.concatenate([np.ravel(v[i]) for v in jax.tree.leaves(side[1])]) for side in (ours, wanted))
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b), label


def some(trainable, held):
    """One tensor of every kind is enough: the others are constants here, and programs a quarter of the size."""
    kinds = "query/kernel|key/bias|intermediate/dense/kernel|c_attn|c_fc/kernel|/embedding$|classifier|score|ln_1/scale"
    return (
        {path: value for path, value in trainable.items() if re.search(kinds, path)},
        held | {path: value for path, value in trainable.items() if not re.search(kinds, path)},
    )


def slopes(simulate, relaxed, targets):
    """Value and candidate's gradient of every distance and view, from one reverse pass vmapped over them."""

    shapes, form = jax.tree.flatten(jax.eval_shape(simulate, relaxed))
    real = [jnp.issubdtype(shape.dtype, jnp.floating) for shape in shapes]  # a table's ids have no derivative

    def split(relaxed):
        found = jax.tree.leaves(simulate(relaxed))
        return [[leaf for leaf, r in zip(found, real, strict=True) if bool(r) is kind] for kind in (True, False)]

    def value(floats, name, view):
        sources = {True: iter(floats), False: iter(fixed)}
        return distance(name)(jax.tree.unflatten(form, [next(sources[bool(r)]) for r in real]), targets[view])

    floats, pull, fixed = jax.vjp(lambda masks: tuple(split(masks)), relaxed, has_aux=True)
    found = [jax.value_and_grad(value)(floats, name, view) for name in NAMES for view in VIEWS]
    cotangents = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[gradient for _, gradient in found])
    return jnp.stack([value for value, _ in found]), jax.vmap(pull)(cotangents)[0]


def draw(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@jax.jit
def products(leaf, seen):
    return leaves.inner(leaf, seen), leaves.residual_square(leaf, seen), *leaves.residual_norms(leaf, seen)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(2, 20), st.integers(2, 20), st.integers(0, 99))
def test_low_rank_products_of_any_shape_and_rank(rows, rank, i, o, seed):
    """Against the matrices in float64; the residual too where it is small beside them."""
    x, dy, u, v = draw(seed, (rows, i), (rows, o), (rank, i), (rank, o))
    seen = views.low_rank(u.T @ v, rank)
    assert (seen is not None) == leaves.thin(rank, i, o)
    if seen is None:
        return
    np.testing.assert_allclose(seen.u @ seen.u.T, np.eye(rank), atol=1e-5)
    other, size = np.asarray(seen.u, np.float64).T @ np.asarray(seen.v, np.float64), np.linalg.norm(u.T @ v) + 1
    for far in (1.0, 1e-3):
        x2, dy2 = np.concatenate([u, far * x]), np.concatenate([v, dy])
        exact = x2.T.astype(np.float64) @ dy2
        inner, square, square_too, absolute = products(Outer(jnp.asarray(x2), jnp.asarray(dy2)), seen)
        np.testing.assert_allclose(inner, (exact * other).sum(), rtol=1e-4, atol=1e-4 * size**2)
        norm, total = np.linalg.norm(exact - other), np.abs(exact - other).sum()
        np.testing.assert_allclose(np.sqrt([square, square_too]), norm, rtol=1e-4, atol=1e-5 * size)
        np.testing.assert_allclose(absolute, total, rtol=1e-4, atol=1e-5 * size * np.sqrt(i * o))


def test_a_matrix_of_more_rank_stays_dense():
    low = draw(0, (3, 40), (3, 30))
    (noise,) = draw(1, (40, 30))
    matrix = low[0].T @ low[1]
    array = jnp.asarray(matrix)
    assert views.low_rank(matrix, 3) is not None
    assert views.low_rank(matrix, 5) is not None
    assert views.low_rank(matrix, 2) is None
    assert views.low_rank(matrix + 1e-4 * noise, 3) is None
    assert views.low_rank(matrix * np.nan, 3) is None
    assert views.low_rank(matrix, 18) is None  # exact, but no cheaper
    assert np.isfinite(views.low_rank(0 * matrix, 3).v).all()
    noisy = {"a/kernel": jnp.asarray(noise), "b/scale": array}
    assert isinstance(views.factored([{"a/kernel": array}], 3)[0]["a/kernel"], LowRank)
    mixed = views.factored([{"a/kernel": array, "b/scale": array}, noisy], 3)
    assert not any(isinstance(leaf, LowRank) for update in mixed for leaf in update.values())


def test_only_names_what_is_wrong():
    one = jnp.ones(1)
    observed = {"layer_0/kernel": one, "layer_1/kernel": one}
    assert views.only(observed, "layer_1") == {"layer_1/kernel": one}
    assert views.only(observed, "") == observed
    for pattern, said in (("layer_7", "layer_0/kernel"), ("(", "regular expression")):
        with pytest.raises(InputError, match=said):
            views.only(observed, pattern)


@pytest.mark.parametrize("name", ["cosine", "l2", "l2+l1", "normalised"])
def test_gradients_are_finite_at_equality_with_factors(name):
    x, dy = (np.round(3 * a) for a in draw(0, (2, 9), (2, 8)))
    seen = views.low_rank(x.T @ dy, 2)
    value = lambda x, dy: distances.by_name(name)({"kernel": Outer(x, dy)}, {"kernel": seen})  # noqa: E731
    found, slopes = jax.jit(jax.value_and_grad(value, argnums=(0, 1)))(x, dy)
    assert abs(found) < 1e-3
    assert all((np.abs(slope) < 1e6).all() for slope in slopes)


IDS = np.array([3, 1, 3, 0])


@pytest.mark.parametrize("kind", [lambda a: a, Pruned, Signs], ids=["all", "unpruned", "signs"])
def test_rows_of_a_table_are_the_table(kind):
    """A row looked up twice, rows nobody looked up, entries not sent."""
    dy, table = draw(0, (4, 5), (6, 5))
    table[2], table[:, 1] = 0, 0
    table = np.sign(table) if kind is Signs else table
    leaf, seen = Rows(jnp.asarray(IDS), jnp.asarray(dy), 6), kind(jnp.asarray(table))
    full = np.zeros((6, 5), np.float32)
    np.add.at(full, IDS, dy)
    np.testing.assert_allclose(leaves.dense(leaf), full)
    np.testing.assert_allclose(leaves.dense(leaves.scale(leaf, jnp.float32(2))), 2 * full)
    for function in (leaves.inner, leaves.square_norm, leaves.residual_square, leaves.residual_norms):
        np.testing.assert_allclose(function(leaf, seen), function(jnp.asarray(full), seen), rtol=1e-5)


def test_views_by_hand():
    ours, seen = jnp.array([[1.0, -2.0], [3.0, 4.0]]), jnp.array([[0.0, -1.0], [-1.0, 1.0]])
    assert leaves.residual_norms(ours, Pruned(seen)) == (1 + 16 + 9, 1 + 4 + 3)
    assert leaves.residual_norms(ours, Signs(seen)) == (9, 3)
    assert leaves.square_norm(ours, Pruned(seen)) == 4 + 9 + 16
    assert leaves.square_norm(ours, Signs(seen)) == 30
    assert leaves.inner(ours, Signs(seen)) == 2 - 3 + 4
    assert leaves.scale(Signs(seen), jnp.float32(3)).array is seen


@pytest.mark.parametrize("block", [1, 7, 24, 10**6])
@pytest.mark.parametrize("target", ["none", "array", "factors"])
def test_blocks_of_any_size_give_the_matrix(monkeypatch, target, block):
    """Value and gradient, alone and under vmap, where rows do and do not divide into blocks."""
    monkeypatch.setattr(kernel, "BLOCK", block)
    x, dy, u, v = map(jnp.asarray, draw(3, (2, 3, 10), (2, 3, 6), (4, 10), (4, 6)))
    g = {"none": None, "array": u.T @ v, "factors": (u, v)}[target]

    def blocked(x, dy):
        return jnp.stack(kernel.residual_norms(x, dy, g)) @ jnp.array([0.5, 2.0])

    def formed(x, dy):
        residual = x.T @ dy - (0 if g is None else u.T @ v)
        return 0.5 * (residual**2).sum() + 2 * jnp.abs(residual).sum()

    for wrap in (lambda f: lambda x, dy: f(x[0], dy[0]), jax.vmap):
        found, wanted = (jax.jit(wrap(jax.value_and_grad(f, argnums=(0, 1))))(x, dy) for f in (blocked, formed))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_no_gradient_of_a_kernel_is_formed_in_a_step():
    """The program of a cosine step against a factored update forms no product as large as a weight."""
    model = models.build(goldens.config("bert", num_hidden_layers=1, hidden_size=64, intermediate_size=128))
    trainable, held = tuning.split(jax.jit(model.init)(jax.random.key(0)), tuning.freezes(model, "embeddings"))
    ids, attention, labels = jnp.array([[5, 6, 7]]), jnp.ones((1, 3), bool), jnp.eye(3)[:1]
    (seen,) = views.factored([jax.jit(client.fedsgd(model))(trainable, held, ids, attention, labels)], 3)
    simulate = client.fedsgd(model, factored=True)
    step = jax.grad(lambda e: distances.cosine(simulate(trainable, held, e, attention, labels), seen))
    made = [
        v.aval.shape
        for e in equations(jax.make_jaxpr(step)(held[model.word_table][ids]).jaxpr)
        for v in e.outvars
        if e.primitive.name == "dot_general"
    ]
    assert (3, 64) in made
    assert not {(64, 64), (64, 128), (128, 64)} & set(made)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_precision_is_that_of_the_models_products_only(precision):
    """Those of the second order too; the distance's own follow the process."""
    model = models.build(goldens.config("bert", num_hidden_layers=1))
    trainable, held = tuning.split(jax.jit(model.init)(jax.random.key(0)), tuning.freezes(model, "embeddings"))
    attention, labels = jnp.ones((1, 3), bool), jnp.eye(3)[:1]
    simulate = matching.simulation(model, precision)
    value = lambda e: distances.cosine(simulate(trainable, held, e, attention, labels, None), trainable)  # noqa: E731
    program = jax.make_jaxpr(jax.grad(value))(jnp.ones((1, 3, 32)))
    found = [str(e.params["precision"]) for e in equations(program.jaxpr) if e.primitive.name == "dot_general"]
    wanted = {"float32": "Precision.HIGHEST", "bfloat16": "BF16_BF16_F32"}[precision]
    assert sum(wanted in one for one in found) >= 40  # ten products forward, as many cotangents, and both reversed
    assert "None" in found
    assert all(wanted in one or one == "None" for one in found)


def equations(jaxpr):
    """Those of inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)
