"""Checkpoints in and out: names, layouts, heads, and one-sentence errors for everything that does not fit."""

import json
import shutil
import sys
import time
from functools import reduce

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from goldens import golden as goldens
from goldens.golden import error, from_hf, hf_name
from safetensors.numpy import load_file, save_file

from grab_jax import models
from grab_jax.types import InputError


def flat(tree):
    return {"/".join(path): np.asarray(leaf) for path, leaf in flatten_dict(tree).items()}


def logits(loaded, golden):
    return loaded.model.apply(loaded.params, jnp.asarray(golden.ids), jnp.asarray(golden.attention))


def assert_same(found, expected):
    found, expected = flat(found), flat(expected)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def assert_sentence(caught):
    """One sentence, not a traceback's worth."""
    said = str(caught.value)
    assert "\n" not in said
    assert 20 < len(said) < 600
    return said


@pytest.fixture
def bert(tmp_path):
    """A copy of the BERT classification golden that a test may spoil."""
    return goldens.read("bert", "classification")._replace(folder=copy_of("bert-classification", tmp_path))


def copy_of(name, tmp_path):
    """Config and weights of a golden in a folder of the test's own."""
    folder = tmp_path / name
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(goldens.HERE / name / file, folder)
    return folder


def rewrite(folder, change):
    """Replace the tensors of a folder by `change(tensors)`."""
    file = folder / "model.safetensors"
    save_file({k: np.ascontiguousarray(v) for k, v in change(load_file(file)).items()}, file)


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without_heads(tensors):
    """The bare body, whose names lack the base prefix."""
    return {
        name.split(".", 1)[1]: value
        for name, value in tensors.items()
        if name.startswith(("bert.", "roberta.", "transformer."))
    }


def test_load_reads_every_tensor_and_save_writes_the_same_file(golden, tmp_path):
    loaded = models.load(str(golden.folder), task=golden.task)
    disk = load_file(golden.folder / "model.safetensors")
    for path, leaf in flat(loaded.params).items():
        np.testing.assert_array_equal(leaf, from_hf(golden.family, path, disk), err_msg=path)
    assert {hf_name(path) for path in flat(loaded.params)} == set(disk)
    models.save(str(tmp_path), loaded.model, loaded.params)
    again = load_file(tmp_path / "model.safetensors")
    assert again.keys() == disk.keys()
    for name, value in disk.items():
        assert again[name].dtype == np.float32
        np.testing.assert_array_equal(again[name], value, err_msg=name)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == json.loads((golden.folder / "config.json").read_text())["architectures"]


def test_save_half_stores_float16(bert, tmp_path):
    loaded = models.load(str(bert.folder))
    models.save(str(tmp_path / "half"), loaded.model, loaded.params, half=True)
    disk, half = (load_file(f / "model.safetensors") for f in (bert.folder, tmp_path / "half"))
    for name, value in disk.items():
        np.testing.assert_array_equal(half[name], value.astype(np.float16), err_msg=name)
    assert all(leaf.dtype == np.float32 for leaf in flat(models.load(str(tmp_path / "half")).params).values())


def test_bfloat16_is_read(bert):
    expected = models.load(str(bert.folder)).params
    rewrite(bert.folder, lambda ts: {k: v.astype(ml_dtypes.bfloat16) for k, v in ts.items()})
    found = models.load(str(bert.folder)).params
    assert_same(found, jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float32), expected))


def test_shards(bert):
    expected = models.load(str(bert.folder)).params
    tensors = load_file(bert.folder / "model.safetensors")
    names, weight_map = sorted(tensors), {}
    for i in range(3):
        file = f"model-0000{i + 1}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[i::3]}, bert.folder / file)
        weight_map |= dict.fromkeys(names[i::3], file)
    (bert.folder / "model.safetensors").unlink()
    index = bert.folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same(models.load(str(bert.folder)).params, expected)

    (bert.folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match="model-00002-of-00003") as caught:
        models.load(str(bert.folder))
    assert_sentence(caught)
    for text in ("{", "[]", "{}", '{"weight_map": 1}'):
        index.write_text(text)
        with pytest.raises(InputError, match=r"index.json is not a readable index") as caught:
            models.load(str(bert.folder))
        assert_sentence(caught)


def test_gamma_and_beta_are_norms(bert):
    expected = models.load(str(bert.folder)).params
    pairs = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
    old = lambda name: reduce(lambda name, pair: name.replace(*pair), pairs, name)  # noqa: E731
    rewrite(bert.folder, lambda tensors: {old(name): value for name, value in tensors.items()})
    assert any(name.endswith("gamma") for name in load_file(bert.folder / "model.safetensors"))
    assert_same(models.load(str(bert.folder)).params, expected)


@pytest.mark.parametrize("name", ["bert-classification", "roberta-classification", "gpt2-classification"])
def test_bare_body_gets_a_new_head_from_the_key(name, tmp_path):
    folder = copy_of(name, tmp_path)
    complete = flat(models.load(str(folder)).params)
    rewrite(folder, without_heads)
    a, b, c = (models.load(str(folder), key=jax.random.key(seed)) for seed in (1, 1, 2))
    first, again, other = flat(a.params), flat(b.params), flat(c.params)
    heads = {path for path in first if path.startswith(("classifier/", "score/"))}
    assert heads
    for path, value in complete.items():
        if path in heads:
            assert first[path].shape == value.shape
            assert (first[path] == again[path]).all()
            assert path.endswith("bias") or (first[path] != other[path]).any()
        else:
            np.testing.assert_array_equal(first[path], value, err_msg=path)
    (note,) = a.notes
    assert all(hf_name(path) in note for path in heads)
    assert_same(models.load(str(folder)).params, models.load(str(folder), key=jax.random.key(0)).params)


def test_bare_body_as_language_model_needs_no_head(tmp_path):
    golden = goldens.read("gpt2", "causal_lm")
    folder = copy_of("gpt2-causal_lm", tmp_path)
    rewrite(folder, without_heads)
    loaded = models.load(str(folder), task="causal_lm")
    assert loaded.notes == ()
    real = golden.attention
    assert error(logits(loaded, golden)[real], golden.logits["eval"][real]) < 1e-5


def test_head_of_another_task_is_left_out_and_said(tmp_path):
    folder = copy_of("bert-classification", tmp_path)
    loaded = models.load(str(folder), task="masked_lm")
    fresh, left = loaded.notes
    assert "cls.predictions.bias" in fresh
    assert "classifier.weight" in left
    assert "bert.pooler.dense.bias" in left
    folder = copy_of("bert-masked_lm", tmp_path)
    fresh, left = models.load(str(folder)).notes
    assert "classifier.weight" in fresh
    assert "bert.pooler.dense.weight" in fresh
    assert "cls.predictions.transform.dense.weight" in left


def test_tied_copies_and_old_buffers_are_ignored(tmp_path):
    folder = copy_of("gpt2-causal_lm", tmp_path)
    expected = models.load(str(folder), task="causal_lm").params
    more = {
        "transformer.h.0.attn.bias": np.ones((1, 1, 24, 24)),
        "transformer.h.1.attn.masked_bias": np.ones(()),
    }
    rewrite(folder, lambda ts: ts | more | {"lm_head.weight": ts["transformer.wte.weight"]})
    loaded = models.load(str(folder), task="causal_lm")
    assert loaded.notes == ()
    assert_same(loaded.params, expected)


def test_number_of_labels_sizes_a_new_head(bert):
    rewrite(bert.folder, without_heads)
    loaded = models.load(str(bert.folder), num_labels=5)
    assert loaded.model.num_labels == 5
    assert logits(loaded, bert).shape == (3, 5)


def test_missing_unused_and_misshapen_stand_in_one_sentence(bert):
    def spoil(tensors):
        del tensors["bert.encoder.layer.1.output.dense.bias"]
        tensors["bert.encoder.layer.2.output.dense.bias"] = np.zeros(32, np.float32)
        tensors["bert.encoder.layer.0.intermediate.dense.weight"] = np.zeros((29, 32), np.float32)
        return tensors

    rewrite(bert.folder, spoil)
    with pytest.raises(InputError) as caught:
        models.load(str(bert.folder))
    said = assert_sentence(caught)
    missing, unused, misshapen = (said.index(word) for word in ("missing: ", "unused: ", "misshapen: "))
    assert said[missing:unused].count("bert.") == 1
    assert "bert.encoder.layer.1.output.dense.bias" in said[missing:unused]
    assert "bert.encoder.layer.2.output.dense.bias" in said[unused:misshapen]
    assert "bert.encoder.layer.0.intermediate.dense.weight is (29, 32), config.json says (28, 32)" in said


def test_many_missing_tensors_are_counted(bert):
    edit_config(bert.folder, num_hidden_layers=4)
    with pytest.raises(InputError, match=r"missing: .* and 24 more") as caught:  # 2 layers of 16 tensors, 8 named
        models.load(str(bert.folder))
    assert_sentence(caught)


@pytest.mark.parametrize("num_labels", [2, 5])
def test_a_head_of_another_size_is_refused(bert, num_labels):
    with pytest.raises(InputError, match=rf"classifier.weight is \(3, 32\).*\({num_labels}, 32\)") as caught:
        models.load(str(bert.folder), num_labels=num_labels)
    assert_sentence(caught)


def test_no_weights(bert):
    (bert.folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no weights.*model.safetensors") as caught:
        models.load(str(bert.folder))
    assert_sentence(caught)


@pytest.mark.parametrize("size", [0, 4, 5000])
def test_damaged_safetensors(bert, size):
    file = bert.folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(InputError, match=r"model.safetensors is not a readable") as caught:
        models.load(str(bert.folder))
    assert_sentence(caught)


def test_bin_without_torch_says_so(bert, monkeypatch):
    (bert.folder / "model.safetensors").rename(bert.folder / "pytorch_model.bin")
    edit_config(bert.folder, dtype=None)  # else transformers imports torch to read the config, if it is installed
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"pytorch_model.bin needs PyTorch.*install torch") as caught:
        models.load(str(bert.folder))
    assert_sentence(caught)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no config.json"),
        ("{", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ('{"hidden_size": 32}', "architecture None.*supported: bert, roberta, gpt2"),
        ('{"model_type": "llama"}', "architecture 'llama'.*supported: bert, roberta, gpt2"),
        ('{"model_type": ["bert"]}', "supported: bert, roberta, gpt2"),
        (
            '{"model_type": "bert", "hidden_size": "wide"}',
            "config.json is not a valid bert config.*hidden_size",
        ),
        ('{"model_type": "bert", "hidden_size": 30}', "30.*12"),
    ],
)
def test_bad_config(bert, text, said):
    file = bert.folder / "config.json"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(InputError, match=said) as caught:
        models.load(str(bert.folder))
    assert_sentence(caught)


@pytest.mark.parametrize(
    ("name", "changes", "task", "said"),
    [
        ("bert-classification", {}, "causal_lm", r"'bert' for causal_lm.*gpt2 \(causal_lm\)"),
        ("bert-classification", {"hidden_act": "silu"}, "classification", "'silu'.*gelu_new"),
        (
            "bert-classification",
            {"position_embedding_type": "relative_key"},
            "classification",
            "only 'absolute'",
        ),
        ("bert-classification", {"is_decoder": True}, "classification", "is_decoder=true"),
        ("gpt2-classification", {"activation_function": "silu"}, "classification", "'silu'.*gelu_new"),
        ("gpt2-causal_lm", {"tie_word_embeddings": False}, "causal_lm", "tie_word_embeddings=false"),
        ("bert-masked_lm", {"tie_word_embeddings": False}, "masked_lm", "tie_word_embeddings=false"),
    ],
)
def test_variants_that_would_be_computed_wrongly_are_refused(tmp_path, name, changes, task, said):
    folder = copy_of(name, tmp_path)
    edit_config(folder, **changes)
    with pytest.raises(InputError, match=said) as caught:
        models.load(str(folder), task=task)
    assert_sentence(caught)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("builtin:bert-huge", "builtin:bert-huge.*builtin:bert-mini"),
        ("/no/such/folder", "/no/such/folder' does not exist"),
        ("./no-such-folder", "does not exist"),
        ("", "does not exist"),
        ("no-such-org/no-such-model", "no-such-org/no-such-model.*builtin:bert-mini"),
        ("no-such-org--x/..", "no-such-org--x/.."),
    ],
)
def test_unknown_names_offline(name, said, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    start = time.perf_counter()
    with pytest.raises(InputError, match=said) as caught:
        models.load(name)
    assert_sentence(caught)
    assert time.perf_counter() - start < 10


def test_hub_cache_is_found_offline_also_by_revision(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    expected = {}
    for revision, commit, scale in (("main", "a" * 40, 1.0), ("v2", "b" * 40, 2.0)):
        (repo / "refs" / revision).write_text(commit)
        (repo / "snapshots" / commit).mkdir(parents=True)
        folder = copy_of("bert-classification", repo / "snapshots" / commit)
        for file in folder.iterdir():
            file.rename(folder.parent / file.name)
        folder.rmdir()
        rewrite(repo / "snapshots" / commit, lambda ts, scale=scale: {k: scale * v for k, v in ts.items()})
        expected[revision] = (
            scale * load_file(goldens.HERE / "bert-classification" / "model.safetensors")["classifier.bias"]
        )
    found = models.load("org/name")
    np.testing.assert_array_equal(found.params["classifier"]["bias"], expected["main"])
    assert found.folder == str(repo / "snapshots" / ("a" * 40))
    for revision in ("v2", "b" * 40):
        found = models.load("org/name", revision=revision)
        np.testing.assert_array_equal(found.params["classifier"]["bias"], expected["v2"])
    with pytest.raises(InputError, match="revision 'v3'") as caught:
        models.load("org/name", revision="v3")
    assert_sentence(caught)


@pytest.mark.parity
def test_pytorch_loads_what_we_save(golden, tmp_path):
    torch = pytest.importorskip("torch")
    from goldens.make_goldens import CLASSES, run

    loaded = models.load(str(golden.folder), task=golden.task)
    models.save(str(tmp_path), loaded.model, loaded.params)
    theirs, info = CLASSES[golden.family, golden.task].from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == torch.float32
    found, _ = run(theirs.double(), golden.task, golden.ids, golden.attention, golden.labels)
    assert error(found, golden.logits["eval"]) < 1e-12


@pytest.mark.parity
@pytest.mark.parametrize("size", ["20KB", "1GB"])
def test_shards_and_bin_as_pytorch_writes_them(golden, tmp_path, size):
    torch = pytest.importorskip("torch")
    from goldens.make_goldens import CLASSES

    theirs = CLASSES[golden.family, golden.task].from_pretrained(golden.folder)
    expected = models.load(str(golden.folder), task=golden.task).params
    theirs.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (size == "20KB")
    assert_same(models.load(str(tmp_path), task=golden.task).params, expected)
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    assert_same(models.load(str(tmp_path), task=golden.task).params, expected)
    (tmp_path / "pytorch_model.bin").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"pytorch_model.bin could not be read") as caught:
        models.load(str(tmp_path), task=golden.task)
    assert_sentence(caught)
