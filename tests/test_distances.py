"""Distances by hand, over dense leaves and over factored ones that are never formed."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grab_jax import distances, leaves
from grab_jax.leaves import Outer

WHOLE = ("l2+l1", "l2", "squared", "squared+l1")
NAMES = (*WHOLE, "normalised", "cosine")
SHAPES = {"layer/kernel": (4, 3), "layer/bias": (3,), "attention/key/bias": (5,), "scale": (4,)}


def norm(x):
    return np.sqrt((np.asarray(x, np.float64) ** 2).sum())


def cos(a, b):
    return (a * b).sum() / (norm(a) * norm(b))


BY_HAND = {
    "l2+l1": lambda a, b, w: norm(a - b) + w * np.abs(a - b).sum(),
    "l2": lambda a, b, _: norm(a - b),
    "squared": lambda a, b, _: norm(a - b) ** 2,
    "squared+l1": lambda a, b, w: norm(a - b) ** 2 + w * np.abs(a - b).sum(),
    "normalised": lambda a, b, w: norm(a / norm(a) - b / norm(b)) + w * np.abs(a / norm(a) - b / norm(b)).sum(),
    "cosine": lambda a, b, _: 1 - cos(a, b),
}


def updates(seed=0):
    rng = np.random.default_rng(seed)
    return [{path: rng.normal(size=shape) for path, shape in SHAPES.items()} for _ in range(2)]


def arrays(update):
    return {path: jnp.asarray(value, jnp.float32) for path, value in update.items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weight", [0.01, 0.5])
def test_values_by_hand(name, weight):
    a, b = updates()
    scored = [p for p in SHAPES if name in WHOLE or not p.endswith("key/bias")]
    expected = sum(BY_HAND[name](a[p], b[p], weight) for p in scored) / (len(scored) if name == "cosine" else 1)
    np.testing.assert_allclose(distances.by_name(name, weight)(arrays(a), arrays(b)), expected, rtol=1e-5)
    default = {"l2+l1": distances.l2_l1, "normalised": distances.normalised}.get(name)
    if default and weight == 0.01:  # Grab's weight is the default
        np.testing.assert_allclose(default(arrays(a), arrays(b)), expected, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_key_biases_count_only_where_nothing_is_normalised(name):
    a, b = map(arrays, updates())
    changed = a | {"attention/key/bias": a["attention/key/bias"] + 10.0}
    distance = distances.by_name(name)
    moved = abs(float(distance(changed, b) - distance(a, b)))
    assert moved > 1 if name in WHOLE else moved == 0


@pytest.mark.parametrize("name", NAMES)
def test_tensors_the_candidate_does_not_have_are_ignored(name):
    a, b = map(arrays, updates())
    fewer = {path: a[path] for path in ("layer/kernel", "scale")}
    only = {path: b[path] for path in fewer}
    assert distances.by_name(name)(fewer, b) == distances.by_name(name)(fewer, only)


def reference(name, matrix, observed, weight=0.01):
    """One tensor's distance, written out a second time for its derivative."""
    size = lambda m: jnp.sqrt((m * m).sum())  # noqa: E731
    if name == "cosine":
        return 1 - (matrix * observed).sum() / (size(matrix) * size(observed))
    if name == "normalised":
        matrix, observed = matrix / size(matrix), observed / size(observed)
    gap = size(matrix - observed) ** (2 if name.startswith("squared") else 1)
    return gap + (0 if name in ("l2", "squared") else weight * jnp.abs(matrix - observed).sum())


def factors(shape, seed=0, leading=()):
    rows, i, o = shape
    rng = np.random.default_rng(seed)
    draw = lambda *s: jnp.asarray(rng.normal(size=(*leading, *s)), jnp.float32)  # noqa: E731
    return draw(rows, i), draw(rows, o), draw(i, o)


def close(found, expected, tolerance):
    assert norm(np.asarray(found) - np.asarray(expected)) <= tolerance * norm(expected)


@pytest.mark.parametrize("nested", [False, True], ids=["jit", "jit of vmap of vmap"])
@pytest.mark.parametrize("shape", [(2, 9, 7), (12, 4, 3)], ids=["gram", "matrix"])
def test_factored_leaves_agree_with_the_matrix_in_value_and_gradient(shape, nested):
    args = factors(shape, leading=(2, 3) if nested else ())

    def factored(name, x, dy, observed):
        return distances.by_name(name)({"kernel": Outer(x, dy)}, {"kernel": observed})

    def dense(name, x, dy, observed):
        return reference(name, x.T @ dy, observed)

    def values_and_slopes(function):
        def run(*args):
            return {name: jax.value_and_grad(partial(function, name), argnums=(0, 1))(*args) for name in NAMES}

        return jax.jit(jax.vmap(jax.vmap(run)) if nested else run)(*args)

    found, expected = values_and_slopes(factored), values_and_slopes(dense)
    for name in NAMES:
        close(found[name][0], expected[name][0], 1e-5)
        for slope, wanted in zip(found[name][1], expected[name][1], strict=True):
            close(slope, wanted, 1e-4)


def test_an_eager_vmap_of_a_factored_residual_is_a_loop_over_its_rows():
    x, dy, observed = factors((5, 4, 3), leading=(3,))
    square, absolute = jax.vmap(lambda *args: leaves.residual_norms(Outer(*args[:2]), args[2]))(x, dy, observed)
    residual = np.einsum("kni,kno->kio", x, dy) - observed
    np.testing.assert_allclose(square, (residual**2).sum((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(absolute, np.abs(residual).sum((1, 2)), rtol=1e-5)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_leaf_operations_on_any_shape(rows, i, o, seed):
    """Thin factors take the Gram route, square ones the matrix: the numbers are the same."""
    x, dy, observed = factors((rows, i, o), seed)
    full = np.asarray(x, np.float64).T @ np.asarray(dy, np.float64)
    other = np.asarray(observed, np.float64)
    leaf, bound = Outer(x, dy), 1e-5 * (np.abs(full).sum() + 1) ** 2
    np.testing.assert_allclose(leaves.dense(leaf), full, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(leaves.square_norm(leaf), (full**2).sum(), rtol=1e-4, atol=bound)
    np.testing.assert_allclose(leaves.inner(leaf, observed), (full * other).sum(), rtol=1e-4, atol=bound)
    np.testing.assert_allclose(leaves.dense(leaves.scale(leaf, jnp.float32(3))), 3 * full, rtol=1e-4, atol=1e-5)
    square, absolute = leaves.residual_norms(leaf, observed)
    np.testing.assert_allclose(square, ((full - other) ** 2).sum(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(absolute, np.abs(full - other).sum(), rtol=1e-4, atol=1e-5)


def test_square_norm_turns_to_gram_matrices_where_they_are_smaller():
    """The route is visible in the program: Gram matrices where rows * (i + o) < i * o, else a loop over blocks."""

    def steps_in(shape):
        program = jax.make_jaxpr(lambda x, dy: leaves.square_norm(Outer(x, dy)))(*factors(shape)[:2])
        return {equation.primitive.name for equation in program.eqns}

    assert steps_in((2, 9, 7)) == {"custom_jvp_call"}
    assert steps_in((12, 4, 3)) == {"custom_vjp_call"}


@partial(jax.jit, static_argnums=0)
def slopes(kind, x, dy, observed):
    def value(name, x, dy):
        leaf = Outer(x, dy) if kind == "factored" else x.T @ dy
        return distances.by_name(name)({"kernel": leaf}, {"kernel": observed})

    return {name: jax.value_and_grad(partial(value, name), argnums=(0, 1))(x, dy) for name in NAMES}


@pytest.mark.parametrize("kind", ["dense", "factored"])
@pytest.mark.parametrize("case", ["equal", "zero candidate", "zero observed", "both zero"])
def test_values_and_gradients_are_finite_at_equality_and_at_zero(case, kind):
    """Squares of the gradient too: Adam accumulates them."""
    rng = np.random.default_rng(0)
    x, dy = (rng.integers(-2, 3, size=(2, n)).astype(np.float32) for n in (4, 3))  # products are exact
    observed = x.T @ dy * (case in ("equal", "zero candidate"))
    x = x * (case in ("equal", "zero observed"))
    for name, (value, gradient) in slopes(kind, *map(jnp.asarray, (x, dy, observed))).items():
        assert np.isfinite(value), name
        assert case != "equal" or abs(value) < 1e-6, name
        assert all((np.abs(slope) < 1e15).all() for slope in gradient), name  # False for NaN


def test_root_is_the_square_root_with_gradient_zero_at_zero():
    value, slope = jax.value_and_grad(distances.root)(jnp.float32(0.0))
    assert (value, slope) == (0, 0)
    value, slope = jax.value_and_grad(distances.root)(jnp.float32(4.0))
    np.testing.assert_allclose((value, slope), (2, 0.25), rtol=1e-6)
