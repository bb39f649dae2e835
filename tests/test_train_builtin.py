"""experiments/train_builtin.py on a few lines of text, and the two folders it made for the package."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

from grab_jax import data, models
from grab_jax.attacks import prior

ROOT = Path(__file__).parents[1]
BUILTIN = Path(str(resources.files("grab_jax") / "builtin"))
TASKS = {"bert": "masked_lm", "gpt2": "causal_lm"}
SMALL = ["--vocab=300", "--layers=1", "--width=32", "--heads=2", "--positions=16", "--length=16", "--batch=4"]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    """One file of each kind; the held-out rule needs more than eight sentences."""
    folder = tmp_path_factory.mktemp("text")
    people, things = (
        ("Anna", "Ben", "the nurse", "my brother"),
        ("the red car", "a cold", "two letters", "it"),
    )
    lines = [f"{p} had {t} on {d}." for p in people for t in things for d in ("Monday", "Friday", "day 7")]
    (folder / "a.txt").write_text(" = Heading = \n" + " ".join(s[0].upper() + s[1:] for s in lines[:16]))
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": s, "label": 0}) + "\n" for s in lines[16:32]))
    (folder / "c.csv").write_text("label,text\n" + "".join(f'1,"{s}"\n' for s in lines[32:]))
    return ",".join(str(folder / name) for name in ("a.txt", "b.jsonl", "c.csv"))


def start(kind: str, text: str, out: Path, *more: str) -> subprocess.Popen:
    """The script in a process of its own, on the CPU."""
    command = [
        sys.executable,
        "experiments/train_builtin.py",
        f"--kind={kind}",
        f"--text={text}",
        f"--out={out}",
    ]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen([*command, *SMALL, *more], cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen) -> str:
    """Its output, once it has ended well."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output


def check_folder(folder: Path, kind: str) -> None:
    """Weights and tokenizer load, fit each other, and give finite logits."""
    loaded = models.load(str(folder), task=TASKS[kind])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert loaded.model.config.vocab_size == len(tokenizer)
    assert not loaded.notes
    ids = jnp.asarray(tokenizer("Ben had a cold on Monday.", return_tensors="np")["input_ids"])
    assert ids.max() < len(tokenizer)
    logits = loaded.model.apply(loaded.params, ids, jnp.ones(ids.shape, bool))
    assert logits.shape == (*ids.shape, len(tokenizer))
    assert np.isfinite(logits).all()
    roles = ("pad", "cls", "sep", "mask") if kind == "bert" else ("pad", "bos", "eos")
    for role in roles:
        assert getattr(tokenizer, f"{role}_token_id") in tokenizer.all_special_ids
    assert loaded.model.config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.long
def test_trains_from_text_to_a_loadable_folder(text, tmp_path):
    out = tmp_path / "model"
    output = finish(start("bert", text, out, "--steps=60", "--learning_rate=0.01"))
    first, *_, last = (float(x) for x in re.findall(r"^step .*: loss ([\d.]+)", output, re.MULTILINE))
    assert last < first - 0.5
    held_out = float(re.search(r"held out text: loss ([\d.]+)", output)[1])
    assert held_out < first - 0.5
    assert f"{held_out:.3f}"[:-1] in (out / "README.md").read_text()
    assert not (out / "state").exists()
    check_folder(out, "bert")


@pytest.mark.long
def test_a_killed_run_resumes_at_its_last_checkpoint(text, tmp_path):
    out = tmp_path / "model"
    killed = start("gpt2", text, out, "--steps=1000000", "--save_seconds=0")
    deadline = time.monotonic() + 200
    while not saved_steps(out) and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    killed.kill()
    first = float(re.search(r"^step 1 .*: loss ([\d.]+)", killed.communicate()[0], re.MULTILINE)[1])
    saved = max(saved_steps(out))
    output = finish(start("gpt2", text, out, f"--steps={saved + 60}", "--learning_rate=0.01"))
    assert f"resuming at step {saved}\n" in output
    assert "step 1 " not in output
    last = float(re.search(rf"^step {saved + 60} \(100.0 %.*: loss ([\d.]+)", output, re.MULTILINE)[1])
    assert last < first - 0.5
    check_folder(out, "gpt2")


def saved_steps(out: Path) -> list[int]:
    """Steps with a finished checkpoint."""
    return [int(p.name) for p in (out / "state").glob("*") if p.name.isdigit()]


def test_a_missing_file_ends_in_one_sentence(tmp_path):
    process = start("bert", "nowhere.txt", tmp_path / "model", "--steps=1")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith("error: text file 'nowhere.txt' does not exist")
    assert "Traceback" not in errors


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
class TestShipped:
    def test_folder_is_complete_small_and_impersonal(self, kind):
        folder = BUILTIN / f"{kind}-mini"
        files = {p.name: p for p in folder.iterdir()}
        assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(files)
        assert sum(p.stat().st_size for p in files.values()) <= 12_000_000
        for name in set(files) - {"model.safetensors"}:
            found = re.search(r"/(work|home|root|tmp|Users)/|name_or_path", files[name].read_text("utf-8"))
            assert not found, f"{name}: {found}"

    def test_weights_are_finite_float16(self, kind):
        with safe_open(BUILTIN / f"{kind}-mini" / "model.safetensors", framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                value = tensors.get_tensor(name)
                assert value.dtype == np.float16
                assert np.isfinite(value).all()

    def test_loads_for_language_modelling_and_classification(self, kind):
        check_folder(BUILTIN / f"{kind}-mini", kind)
        loaded = models.load(f"builtin:{kind}-mini", task="classification", num_labels=2)
        logits = loaded.model.apply(loaded.params, jnp.ones((1, 3), jnp.int32), jnp.ones((1, 3), bool))
        assert logits.shape == (1, 2)

    def test_tokenizer_gives_the_bundled_sentences_back(self, kind):
        tokenizer = AutoTokenizer.from_pretrained(BUILTIN / f"{kind}-mini")
        rows = (BUILTIN / "sentences.jsonl").read_text("utf-8").splitlines()
        for sentence in (json.loads(row)["text"] for row in rows):
            ids = tokenizer(sentence)["input_ids"]
            back = tokenizer.decode(ids, skip_special_tokens=True)
            if kind == "gpt2":
                assert back == sentence
            else:  # WordPiece keeps neither case nor the spaces around punctuation
                assert tokenizer.unk_token_id not in ids
                assert "".join(back.split()) == "".join(sentence.lower().split())
            assert tokenizer(back)["input_ids"] == ids

    def test_beats_token_frequencies_on_every_held_out_set(self, kind):
        card = (BUILTIN / f"{kind}-mini" / "README.md").read_text("utf-8")
        rows = re.findall(r"^\| [\w-]+ \| \d+ \| ([\d.]+) \| [\d.]+ \| ([\d.]+) \|$", card, re.MULTILINE)
        assert rows
        assert all(float(loss) < float(baseline) for loss, baseline in rows)


class TestShippedPrior:
    """The language model that judges LAMP's moves on builtin:bert-mini."""

    folder = BUILTIN / "bert-mini-prior"

    def test_folder_is_small_and_impersonal(self):
        files = list(self.folder.iterdir())
        assert sum(p.stat().st_size for p in files) <= 8_000_000
        for file in files:
            assert file.suffix == ".safetensors" or not re.search(
                r"/(work|home|root|tmp|Users)/|name_or_path", file.read_text("utf-8")
            ), file.name

    def test_it_has_the_models_tokenizer(self):
        theirs, ours = (AutoTokenizer.from_pretrained(p).get_vocab() for p in (self.folder, BUILTIN / "bert-mini"))
        assert theirs == ours

    def test_it_prefers_the_bundled_sentences_to_their_words_shuffled(self):
        """It saw none of them; a judge of word order must tell most of them from a shuffled copy."""
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        judge = prior.load("builtin:bert-mini-prior", tokenizer.vocab_size, 60)
        texts = [json.loads(row)["text"] for row in (BUILTIN / "sentences.jsonl").read_text("utf-8").splitlines()[:60]]
        rows = np.array(tokenizer(texts, padding=True)["input_ids"])
        rng, shuffled = np.random.default_rng(0), rows.copy()
        for row in shuffled:
            words = slice(1, int((row != tokenizer.pad_token_id).sum()) - 1)
            row[words] = rng.permutation(row[words])
        words = data.vocabulary(tokenizer)
        loss = jax.jit(jax.vmap(lambda row: prior.loss(judge.model, judge.params, row[None], words)))
        assert (loss(jnp.asarray(rows)) < loss(jnp.asarray(shuffled))).mean() > 0.8
