"""Live comparison with Hugging Face PyTorch: more configs and seeds than the goldens, and a real checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from goldens import golden as goldens
from goldens.golden import MODES, error, from_hf

from grab_jax import models

pytestmark = pytest.mark.parity
pytest.importorskip("torch")

from goldens import make_goldens  # noqa: E402  # needs torch

VARIANTS = [
    ("bert", "classification", {"num_labels": 2, "classifier_dropout": None, "hidden_act": "gelu_new"}),
    ("bert", "classification", {"hidden_act": "relu", "layer_norm_eps": 1e-5, "num_hidden_layers": 3}),
    ("bert", "masked_lm", {"num_attention_heads": 1, "vocab_size": 77, "type_vocab_size": 1}),
    ("roberta", "classification", {"type_vocab_size": 1, "classifier_dropout": None, "layer_norm_eps": 1e-5}),
    ("roberta", "classification", {"pad_token_id": 3, "num_attention_heads": 8, "hidden_size": 48}),
    ("gpt2", "classification", {"n_inner": None, "activation_function": "gelu", "layer_norm_epsilon": 1e-3}),
    ("gpt2", "causal_lm", {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3}),
    ("gpt2", "causal_lm", {"scale_attn_weights": False, "activation_function": "relu", "n_embd": 48}),
    ("gpt2", "causal_lm", {"reorder_and_upcast_attn": True}),
]


def mean_loss(logits, labels):
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return -jnp.where(labels >= 0, logp, 0).sum() / (labels >= 0).sum()


def compare(theirs, folder, task, seed, lengths, tolerance=1e-4):
    """Largest relative error over logits and every gradient, in both modes, in float32."""
    config = theirs.config
    loaded = models.load(str(folder), task=task)
    assert loaded.notes == ()
    batch = make_goldens.batch(config, task, seed, lengths)
    drawn = make_goldens.masks_of(config, task, batch["ids"].shape, seed)
    assert {name: site.rate for name, site in loaded.model.sites.items()} == {
        name: rate for name, (_, rate) in make_goldens.sites_of(config, task).items()
    }
    ids, attention, labels = (jnp.asarray(batch[name]) for name in ("ids", "attention", "labels"))

    def objective(params, masks):
        logits = loaded.model.apply(params, ids, attention, masks)
        return mean_loss(logits, labels), logits

    worst = 0.0
    for mode in MODES:
        ours = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), drawn) if mode == "masked" else None
        expected, tensors = make_goldens.run(theirs, task, **batch, masks=drawn if mode == "masked" else None)
        grads, logits = jax.jit(jax.grad(objective, has_aux=True))(loaded.params, ours)
        real = batch["attention"] if logits.ndim == 3 else np.s_[:]
        errors = {"logits": error(logits[real], expected[real])}
        whole = np.sqrt(sum((value.astype(np.float64) ** 2).sum() for value in tensors.values()))
        flat = {"/".join(path): leaf for path, leaf in flatten_dict(grads).items()}
        assert len(flat) == len(tensors)
        for path, grad in flat.items():
            pytorch = from_hf(config.model_type, path, tensors)
            if path.endswith("key/bias"):  # zero in theory: both are rounding noise
                assert max(np.linalg.norm(grad), np.linalg.norm(pytorch)) < 1e-6 * whole, path
            else:
                errors[path] = error(grad, pytorch)
        for name, found in errors.items():
            assert found <= tolerance, (mode, name, found)
        worst = max(worst, *errors.values())
    return worst


@pytest.mark.parametrize(("family", "task", "changes"), VARIANTS)
def test_random_models(family, task, changes, tmp_path):
    seed = 100 + VARIANTS.index((family, task, changes))
    theirs = make_goldens.model_of(goldens.config(family, **changes), task, seed)
    theirs.save_pretrained(tmp_path)
    worst = compare(theirs, tmp_path, task, seed, lengths=(3, 12, 7, 1))
    print(f"ERR {family} {task} {changes} {worst:.1e}")


@pytest.mark.parametrize("task", ["classification", "masked_lm"])
def test_minilm(minilm, task, tmp_path):
    """The real body; its random head comes from PyTorch, so that both have the same."""
    import torch

    torch.manual_seed(0)
    cls = make_goldens.CLASSES["bert", task]
    theirs = cls.from_pretrained(minilm, attn_implementation="eager")
    theirs.save_pretrained(tmp_path)
    worst = compare(theirs, tmp_path, task, 0, lengths=(32, 17, 5))
    print(f"ERR minilm {task} {worst:.1e}")


def test_minilm_loads_from_its_own_folder(minilm):
    """Its tensors have the bare body's names; only the head is new."""
    loaded = models.load(str(minilm))
    (note,) = loaded.notes
    assert set(note.split(": ")[1].split(", ")) == {"classifier.weight", "classifier.bias"}
    theirs = make_goldens.CLASSES["bert", "classification"].from_pretrained(minilm).state_dict()
    tensors = {name: value.numpy() for name, value in theirs.items()}
    for path, leaf in flatten_dict(loaded.params, sep="/").items():
        if not path.startswith("classifier/"):
            np.testing.assert_array_equal(leaf, from_hf("bert", path, tensors), err_msg=path)
