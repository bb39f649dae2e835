"""LoRA: what adapters compute and share, and PEFT's folders, against PEFT itself where it is installed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from span_client import VOCABULARY, random_model

from grab_jax import client, leaves, masks, models, simulate, tuning
from grab_jax.attacks import dager
from grab_jax.config import AttackConfig, ClientConfig, Config
from grab_jax.models import lora, peft
from grab_jax.models.lora import Lora
from grab_jax.types import InputError

IDS = jnp.array([[2, 10, 20, 30, 3], [2, 15, 25, 35, 3]], jnp.int32)
REAL = IDS > 0
LABELS = jnp.eye(3)[jnp.array([2, 0])]
SETTING = Lora(rank=3, alpha=6.0, dropout=0.25)


@pytest.fixture(scope="module", autouse=True)
def quickly(quick_compilation):
    return quick_compilation


@pytest.fixture(scope="module", params=["bert", "gpt2"])
def made(request):
    """A one-layer model without and with adapters, and its layers that have one."""
    model, params = random_model(request.param, layers=1)
    adapted, more = lora.add(jax.random.key(0), model, params, SETTING)
    return model, params, adapted, more, lora.adapted(model, list(tuning.flatten(params)))


def trained(params, seed=0):
    """The same adapters with B that is not zero."""
    rng = np.random.default_rng(seed)
    flat = tuning.flatten(params)
    return tuning.unflatten(
        {p: jnp.asarray(rng.normal(size=v.shape) * 0.1, jnp.float32) if p.endswith("lora_b") else v
         for p, v in flat.items()}
    )  # fmt: skip


def merged(params, layers, factor):
    """Adapters folded into the kernels: W + factor * A B."""
    flat = dict(tuning.flatten(params))
    for layer in layers:
        a, b = (np.asarray(flat[f"{layer}/lora_{name}"], np.float64) for name in "ab")
        flat[f"{layer}/kernel"] = jnp.asarray(flat[f"{layer}/kernel"] + factor * a @ b, jnp.float32)
    return tuning.unflatten({path: v for path, v in flat.items() if "lora_" not in path})


def test_a_new_adapter_changes_nothing_and_a_trained_one_is_a_change_of_the_kernel(made):
    model, params, adapted, more, layers = made
    assert len(layers) == (1 if model.family == "gpt2" else 2)
    plain = model.apply(params, IDS, REAL)
    np.testing.assert_allclose(adapted.apply(more, IDS, REAL), plain, atol=1e-6)
    whole = model.apply(merged(trained(more), layers, 6.0 / 3), IDS, REAL)
    found = adapted.apply(trained(more), IDS, REAL)
    np.testing.assert_allclose(found, whole, atol=2e-5)
    assert float(jnp.abs(found - plain).max()) > 1e-3


def test_adapters_have_dropout_of_their_own(made):
    """Masks of ones scale the adapter by 1 / (1 - rate); a mask of zeros takes it away."""
    model, params, adapted, more, layers = made
    sites = [site for site in adapted.sites if site.endswith("lora_dropout")]
    assert sites == [f"{layer}/lora_dropout" for layer in layers]
    kept = masks.relax(masks.ones(adapted.sites, *IDS.shape), adapted.sites, 1.0)  # changes no activation
    none = {**kept, **{site: jnp.zeros_like(kept[site]) for site in sites}}
    full = {**kept, **{site: jnp.ones_like(kept[site]) for site in sites}}
    apply = jax.jit(adapted.apply)
    np.testing.assert_allclose(apply(trained(more), IDS, REAL, none), model.apply(params, IDS, REAL), atol=1e-5)
    whole = model.apply(merged(trained(more), layers, 2.0 / 0.75), IDS, REAL)
    np.testing.assert_allclose(apply(trained(more), IDS, REAL, full), whole, atol=5e-5)


def test_the_first_gradient_is_the_kernels_seen_through_a_and_factors_agree(made):
    model, params, adapted, more, layers = made
    drawn = masks.sample(jax.random.split(jax.random.key(1), 2), model.sites, IDS.shape[1])
    drawn = masks.hold(masks.relax(masks.ones(adapted.sites, *IDS.shape), adapted.sites, 1.0), drawn)
    base = tuning.split(params, lambda path: not path.endswith("kernel"))
    full = jax.jit(client.fedsgd(model))(*base, IDS, REAL, LABELS, {name: drawn[name] for name in model.sites})
    parts = tuning.split(more, lora.is_frozen)
    found = jax.jit(client.fedsgd(adapted))(*parts, IDS, REAL, LABELS, drawn)
    heads = [path for path in tuning.flatten(params) if lora.is_head(path)]
    assert sorted(found) == sorted([*heads, *(f"{layer}/lora_{name}" for layer in layers for name in "ab")])
    for layer in layers:
        assert not np.asarray(found[f"{layer}/lora_a"]).any()
        expected = 2.0 * np.asarray(tuning.flatten(more)[f"{layer}/lora_a"]).T @ np.asarray(full[f"{layer}/kernel"])
        np.testing.assert_allclose(found[f"{layer}/lora_b"], expected, atol=1e-6)
    parts = tuning.split(trained(more), lora.is_frozen)
    dense, factored = (
        jax.jit(client.fedsgd(adapted, factored=factored))(*parts, IDS, REAL, LABELS, drawn)
        for factored in (False, True)
    )
    for path, value in dense.items():
        np.testing.assert_allclose(leaves.dense(factored[path]), value, atol=2e-6, err_msg=path)
        assert np.asarray(value).any(), path


def test_dager_says_that_factors_tell_it_nothing():
    from test_local_training import IDS as rows
    from test_local_training import batch_of

    model, params = random_model("bert", layers=2)
    model, params = lora.add(jax.random.key(0), model, params, Lora(4, 8.0))
    parts = tuning.split(params, lora.is_frozen)
    config = Config(batch_size=2, client=ClientConfig(dropout=0.1, lora_rank=4), attack=AttackConfig(name="dager"))
    problem = simulate.simulate(jax.random.key(1), model, *parts, batch_of(rows), VOCABULARY["bert"], config).problem
    assert "LoRA shares" in dager.recover(problem, config.attack).evidence["not_testable"]


def test_targets_that_are_not_there_and_settings_that_contradict_are_refused(made):
    model, params, *_ = made
    with pytest.raises(InputError, match="no linear layer of that name; this model has"):
        lora.add(jax.random.key(0), model, params, Lora(2, 4.0, ("q_proj",)))
    with pytest.raises(InputError, match="contradicts LoRA"):
        ClientConfig(lora_rank=2, frozen="none")


def test_a_folder_comes_back_as_it_was_written(made, tmp_path):
    model, _, adapted, more, _ = made
    written = Lora(3, 6.0, dropout=0.25, rank_stabilised=True)
    peft.write(str(tmp_path), adapted, trained(more), written, "somewhere")
    read = peft.read_config(str(tmp_path))
    assert read == Lora(3, 6.0, lora.TARGETS[model.family], 0.25, True)
    fresh = lora.add(jax.random.key(9), model, tuning.unflatten(tuning.flatten(made[1])), read)[1]
    back = tuning.flatten(peft.read(str(tmp_path), adapted, fresh))
    for path, value in tuning.flatten(trained(more)).items():
        if not path.endswith("lora_scale"):
            np.testing.assert_array_equal(back[path], value, err_msg=path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for change, said in [
        ({"use_dora": True}, "use_dora=True"),
        ({"peft_type": "IA3"}, "type IA3"),
        ({"r": 0}, "r=0 should be 1 or more"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan should be a positive number"),
        ({"lora_dropout": 1.5}, "lora_dropout=1.5 should be a rate"),
    ]:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=said):
            peft.read_config(str(tmp_path))
    narrow = lora.add(jax.random.key(0), model, made[1], Lora(2, 6.0))[1]
    with pytest.raises(InputError, match="the model wants"):
        peft.read(str(tmp_path), model, narrow)
    with pytest.raises(InputError, match="no adapter_config"):
        peft.read_config(str(tmp_path / "nowhere"))


@pytest.mark.parity
@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
@pytest.mark.parametrize("stabilised", [False, True], ids=["alpha/r", "alpha/sqrt(r)"])
def test_parity_with_peft_both_ways(family, stabilised, tmp_path):
    """PEFT's folder gives its logits here, and a folder written here gives the same logits there."""
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("peft")
    from transformers import AutoModelForSequenceClassification

    model, params = random_model(family, layers=2)
    models.save(str(tmp_path / "base"), model, params)
    ids = torch.tensor(np.asarray(IDS + 3 if family != "bert" else IDS))

    def base():
        return AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").eval()

    def logits(network):
        with torch.no_grad():
            return network(input_ids=ids.long(), attention_mask=torch.ones_like(ids)).logits.numpy()

    config = theirs.LoraConfig(
        task_type="SEQ_CLS", r=4, lora_alpha=10, use_rslora=stabilised, lora_dropout=0.1,
        target_modules=list(lora.TARGETS[family]), fan_in_fan_out=family == "gpt2",
    )  # fmt: skip
    torch.manual_seed(0)
    network = theirs.get_peft_model(base(), config).eval()
    with torch.no_grad():
        for name, value in network.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                value.normal_(0, 0.1)
    network.save_pretrained(tmp_path / "theirs")
    said = peft.read_config(str(tmp_path / "theirs"))
    assert (said.rank, said.alpha, said.rank_stabilised) == (4, 10.0, stabilised)
    adapted, ours = lora.add(jax.random.key(0), model, params, said)
    ours = peft.read(str(tmp_path / "theirs"), adapted, ours)
    found = adapted.apply(ours, jnp.asarray(ids.numpy()), jnp.ones(ids.shape, bool))
    np.testing.assert_allclose(found, logits(network), atol=2e-4)
    assert np.abs(logits(network) - logits(base())).max() > 1e-2
    peft.write(str(tmp_path / "ours"), adapted, ours, said, str(tmp_path / "base"))
    np.testing.assert_allclose(
        logits(theirs.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()), found, atol=2e-4
    )
