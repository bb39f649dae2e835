"""The ports against PyTorch goldens: logits, every parameter gradient, and gradients assembled from taps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from goldens import golden as goldens
from goldens.golden import MODES, error, from_hf

from grab_jax import leaves, models
from grab_jax.models import taps
from grab_jax.types import InputError


def mean_loss(logits, labels):
    """Mean cross-entropy over the labels that are not -100."""
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return -jnp.where(labels >= 0, logp, 0).sum() / (labels >= 0).sum()


def loaded(golden, dtype):
    """Model, parameters and masks in `dtype`."""
    model, params, _, notes = vars(models.load(str(golden.folder), task=golden.task)).values()
    assert notes == ()
    cast = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)  # noqa: E731
    return model, cast(params), cast(golden.masks)


def inputs(golden):
    return jnp.asarray(golden.ids), jnp.asarray(golden.attention), jnp.asarray(golden.labels)


def flat(tree):
    return {"/".join(path): leaf for path, leaf in flatten_dict(tree).items()}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-8), ("float32", 1e-4)])
@pytest.mark.parametrize("mode", MODES)
def test_logits_and_every_gradient_equal_pytorch(golden, mode, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        model, params, masks = loaded(golden, dtype)
        ids, attention, labels = inputs(golden)

        def objective(params):
            logits = model.apply(params, ids, attention, masks if mode == "masked" else None)
            return mean_loss(logits, labels), logits

        grads, logits = jax.grad(objective, has_aux=True)(params)
        assert logits.dtype == dtype
    grads = {path: np.asarray(grad, np.float64) for path, grad in flat(grads).items()}
    expected = {path: from_hf(golden.family, path, golden.grads[mode]) for path in grads}
    assert len(expected) == len(golden.grads[mode])
    real = golden.attention if logits.ndim == 3 else np.s_[:]  # padding's token logits mean nothing
    whole = np.sqrt(sum((grad**2).sum() for grad in expected.values()))
    errors = {"logits": error(logits[real], golden.logits[mode][real])}
    for path, grad in grads.items():
        if path.endswith("key/bias"):  # zero in theory
            errors[path] = float(np.linalg.norm(grad - expected[path]) / whole)
            assert errors[path] < (1e-12 if dtype == "float64" else 1e-6)
        else:
            errors[path] = error(grad, expected[path])
    worst = max(errors, key=errors.get)
    print(f"ERR {golden.family} {golden.task} {mode} {dtype} {worst} {errors[worst]:.2e}")
    assert errors[worst] <= tolerance, worst


def assemble(params, sown, cotangents):
    """Gradient of every parameter of one batch, from layer inputs and output cotangents alone."""
    sown, cotangents, rows = flat(sown), flat(cotangents), lambda x: x.reshape(-1, x.shape[-1])
    grads = {}
    for path, value in flat(params).items():
        layer, leaf = path.rsplit("/", 1)
        dy = rows(cotangents[f"{layer}/dy"])
        if leaf == "kernel":
            grads[path] = rows(sown[f"{layer}/x"]).T @ dy
        elif leaf == "bias":
            grads[path] = dy.sum(0)
        elif leaf == "scale":
            grads[path] = (rows(sown[f"{layer}/xhat"]) * dy).sum(0)
        else:
            grads[path] = jax.nn.one_hot(sown[f"{layer}/ids"].ravel(), len(value), dtype=dy.dtype).T @ dy
            if f"{layer}/head_x" in sown:
                grads[path] += rows(cotangents[f"{layer}/head_dy"]).T @ rows(sown[f"{layer}/head_x"])
    return grads


@pytest.mark.parametrize("per_example", [False, True], ids=["batch", "vmap"])
def test_gradients_assembled_from_taps_equal_dense_ones(golden, per_example):
    with jax.enable_x64(True):
        model, params, masks = loaded(golden, "float64")
        data = (*inputs(golden), masks)

        def both(ids, attention, labels, masks):
            def objective(params, perturbations):
                logits, sown = model.apply_tapped(params, perturbations, ids, attention, masks)
                return mean_loss(logits, labels), sown

            zeros = model.zero_perturbations(params, ids, attention)
            (dense, cotangents), sown = jax.grad(objective, argnums=(0, 1), has_aux=True)(params, zeros)
            return flat(dense), assemble(params, sown, cotangents)

        if per_example:
            data = jax.tree.map(lambda x: x[:, None], data)
            both = jax.jit(jax.vmap(both))
        expected, found = both(*data)
    assert found.keys() == expected.keys()
    for path in expected:
        if path.endswith("key/bias"):
            np.testing.assert_allclose(found[path], expected[path], atol=1e-12, err_msg=path)
        else:
            assert error(found[path], expected[path]) < 1e-10, path
            if not per_example:  # the taps leave the model as it is
                pytorch = from_hf(golden.family, path, golden.grads["masked"])
                assert error(found[path], pytorch) < 1e-8, path


@pytest.mark.parametrize("by", ["ids", "embeds"])
def test_factored_gradient_equals_pytorch(golden, by):
    with jax.enable_x64(True):
        model, params, masks = loaded(golden, "float64")
        ids, attention, labels = inputs(golden)
        words = flat(params)[model.word_table]
        wanted = {path: leaf for path, leaf in flat(params).items() if by == "ids" or leaf is not words}
        given = ids if by == "ids" else words[ids]
        loss = lambda logits: mean_loss(logits, labels)  # noqa: E731
        found = taps.factored_gradient(model, loss, params, wanted, given, attention, masks)
        assert found.keys() == wanted.keys()
        for path, leaf in found.items():
            if not path.endswith("key/bias"):
                leaf = leaves.dense(leaf)
                assert error(leaf, from_hf(golden.family, path, golden.grads["masked"])) < 1e-8, path


def test_word_embeddings_as_input_equal_ids(golden):
    model, params, masks = loaded(golden, "float32")
    ids, attention, _ = inputs(golden)
    embeds = flat(params)[model.word_table][ids]
    assert flat(params)[model.position_table].shape == (24, 32)
    for given, mode in ((None, "eval"), (masks, "masked")):
        found = model.apply(params, embeds, attention, given)
        real = golden.attention if found.ndim == 3 else np.s_[:]
        assert error(found[real], golden.logits[mode][real]) < 1e-5


def test_sites_are_called_by_pytorch_in_this_order_with_these_rates_and_shapes(golden):
    model = models.build(goldens.config(golden.family), golden.task)
    assert list(model.sites) == list(golden.masks) == list(golden.rates)
    length = golden.ids.shape[1]
    for name, site in model.sites.items():
        assert site.rate == golden.rates[name]
        assert site.shape(length) == golden.masks[name].shape[1:]


@pytest.mark.parametrize(
    ("family", "layers", "count"),
    [("bert", 12, 38), ("bert", 24, 74), ("roberta", 12, 39), ("gpt2", 12, 37)],
)
def test_number_of_sites(family, layers, count):
    assert len(models.build(goldens.config(family, num_hidden_layers=layers)).sites) == count


def test_dropout_argument_replaces_every_rate():
    for family, task in goldens.KINDS:
        sites = models.build(goldens.config(family), task, dropout=0.25).sites
        assert {site.rate for site in sites.values()} == {0.25}


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_dropout_outside_the_unit_interval_is_refused(bert_config, rate):
    with pytest.raises(InputError, match=r"dropout rate .* is not in \[0, 1\)"):
        models.build(bert_config, dropout=rate)


def test_classification_logits_do_not_depend_on_padding(golden):
    if golden.task != "classification":
        pytest.skip("token logits are per position")
    model, params, masks = loaded(golden, "float32")
    ids, attention, _ = inputs(golden)
    rng = np.random.default_rng(0)
    more = lambda x: jnp.pad(x, [(0, 0), (0, 5)], constant_values=model.config.pad_token_id)  # noqa: E731
    wider = {  # arbitrary masks on the padding
        name: jnp.asarray(rng.integers(0, 2, (3, *model.sites[name].shape(ids.shape[1] + 5))), jnp.float32)
        .at[tuple(map(slice, mask.shape))]
        .set(mask)
        for name, mask in masks.items()
    }
    padded = more(ids), jnp.pad(attention, [(0, 0), (0, 5)])
    for given, mode in ((None, "eval"), (wider, "masked")):
        assert error(model.apply(params, *padded, given), golden.logits[mode]) < 1e-5


def test_init_has_the_shapes_of_the_checkpoint(golden):
    model = models.build(goldens.config(golden.family), golden.task)
    shapes = {path: leaf.shape for path, leaf in flat(jax.eval_shape(model.init, jax.random.key(0))).items()}
    assert shapes == {path: from_hf(golden.family, path, golden.grads["eval"]).shape for path in shapes}
    assert len(shapes) == len(golden.grads["eval"])


def test_init_is_normal_with_the_original_scale_and_repeats(bert_config):
    model = models.build(bert_config)
    params, again, other = (flat(model.init(jax.random.key(seed))) for seed in (0, 0, 1))
    for path, leaf in params.items():
        if path.endswith(("kernel", "word_embeddings/embedding")):
            assert abs(float(leaf.mean())) < 0.01
            assert 0.015 < float(leaf.std()) < 0.025
            assert (leaf != other[path]).any()
        else:
            assert path.endswith("embedding") or (leaf == (1 if path.endswith("scale") else 0)).all()
        assert (leaf == again[path]).all()
