"""Training a prior on a few lines: what it prefers, the folder it writes, continuing after a kill, bad input."""

import itertools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import golden as goldens
from transformers import AutoConfig
from words import VOCABULARY, save_tokenizer

from grab_jax import data, flags, interrupts, models, train_prior
from grab_jax.attacks import prior
from grab_jax.config import TrainPriorConfig
from grab_jax.types import InputError, Vocabulary

pytestmark = pytest.mark.usefixtures("quick_compilation")
LINES = [f"the {a} {n} {v} on a {m} ." for a, n, v, m in itertools.product(
    ("old", "red", "big"), ("cat", "dog", "man"), ("sat", "ran"), ("mat", "box")
)]  # fmt: skip
SPECIAL = Vocabulary(0, 2, 3, frozenset(range(5)))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Settings of a small training, for the tokenizer of a small model."""
    folder = tmp_path_factory.mktemp("prior")
    model = models.build(goldens.config("bert", vocab_size=len(VOCABULARY)), "classification")
    models.save(str(folder / "model"), model, jax.jit(model.init)(jax.random.key(0)))
    save_tokenizer(folder / "model")
    (folder / "text.txt").write_text(" ".join(line.capitalize() for line in LINES[:4]) + "\n" + "\n".join(LINES[4:]))
    return TrainPriorConfig(
        data=str(folder / "text.txt"), model=str(folder / "model"), out=str(folder / "out"), steps=120, batch=8,
        length=12, positions=16, layers=1, width=16, heads=2, lr=1e-2, held_out=0.1, save_every=50,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(config):
    return train_prior.train(config)


def weights(folder):
    loaded = models.load(folder, task="causal_lm")
    return loaded.model, loaded.params


def test_the_prior_prefers_text_like_its_own(config, trained):
    """Against the same words in another order, and against a model that knows nothing."""
    judge = prior.load(config.out, len(VOCABULARY), 12)
    tokenizer = data.load_tokenizer(judge.folder)
    rng = np.random.default_rng(0)
    score = jax.jit(lambda ids: prior.loss(judge.model, judge.params, ids, SPECIAL))
    for line in LINES[::4]:
        mixed = " ".join(rng.permutation(line.split()))
        values = [float(score(jnp.asarray(tokenizer([text])["input_ids"]))) for text in (line, mixed)]
        assert values[0] + 0.5 < values[1], (line, mixed)
    assert 1 < trained < len(VOCABULARY) / 4


def test_the_folder_says_what_it_is_and_transformers_reads_it(config, trained):
    said = json.loads((train_prior.Path(config.out) / "prior.json").read_text())
    assert said["perplexity"] == trained
    assert said["steps"] == 120
    assert not (train_prior.Path(config.out) / "state").exists()
    theirs = AutoConfig.from_pretrained(config.out)
    assert (theirs.vocab_size, theirs.bos_token_id, theirs.pad_token_id) == (len(VOCABULARY), 2, 0)
    with pytest.raises(InputError, match="is finished"):
        train_prior.train(config)


def test_a_training_stopped_midway_ends_the_same(config, trained, monkeypatch, capfd):
    stopped, checks = replace(config, out=config.out + "-stopped"), itertools.count(1)

    def stop_at_step_70():
        if next(checks) == 70:
            raise KeyboardInterrupt

    monkeypatch.setattr(interrupts, "check", stop_at_step_70)
    with pytest.raises(KeyboardInterrupt):
        train_prior.train(stopped)
    with pytest.raises(InputError, match=r"other settings \(seed\)"):
        train_prior.train(replace(stopped, seed=1))
    assert train_prior.train(stopped) == trained
    assert "continuing from step 70" in capfd.readouterr().err
    jax.tree.map(np.testing.assert_array_equal, weights(stopped.out)[1], weights(config.out)[1])


def test_paragraphs_become_sentences_and_long_ones_several_rows(config):
    found = train_prior.sentences(config.data)
    assert len(found) == len(LINES)
    rows = train_prior.encode(["the cat sat on the mat", "a dog"], data.load_tokenizer(config.model), 6)
    the, cat, sat, on, mat, a, dog = (VOCABULARY[word] for word in ["the", "cat", "sat", "on", "mat", "a", "dog"])
    np.testing.assert_array_equal(rows, [[2, the, cat, sat, on, 3], [2, the, mat, 3, 0, 0], [2, a, dog, 3, 0, 0]])


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"data": ""}, "--data must be given"),
        ({"out": ""}, "--out must be given"),
        ({"data": "none.txt", "out": "new"}, "none.txt does not exist"),
        ({"model": "builtin:none", "out": "new"}, "unknown model"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(config, tmp_path, monkeypatch, capfd, change, part):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(interrupts, "install", lambda: None)
    monkeypatch.setattr(flags, "parsed", lambda kind: replace(config, **change))
    assert train_prior.main(["train_prior"]) == 2
    said = capfd.readouterr().err
    assert part in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("change", [{"steps": 0}, {"width": 15}, {"length": 3}, {"held_out": 1.0}, {"lr": 0.0}])
def test_out_of_range(config, change):
    with pytest.raises(InputError, match=f"--{next(iter(change))}="):
        replace(config, **change)


def test_agreed_flags():
    agreed = "data model out steps width layers seed"
    assert {leaf.flag for leaf in flags.leaves(TrainPriorConfig())} >= set(agreed.split())
