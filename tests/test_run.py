"""Whole runs: what a run folder holds, resuming after kills, controls, and one sentence for every bad input.

A one-layer random BERT that the tests make; programs are compiled fast, once per shape, and shared through a cache.
"""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from absl import flags as absl_flags
from goldens import golden as goldens
from jax.experimental.compilation_cache import compilation_cache
from safetensors.numpy import load_file, save_file
from test_flags import parse
from words import SPECIAL, VOCABULARY, save_tokenizer

from grab_jax import comparison, dry_run, flags, main, models, run, sharding
from grab_jax import folder as folders
from grab_jax import session as sessions
from grab_jax.config import Config
from grab_jax.types import Batch, InputError

ROOT = Path(__file__).parents[1]
TEXTS = ["the old cat sat.", "a big dog ran on", "the red hat, a mat", "dogs saw the man"]
SMALL = """--num_batches=2 --attack_rounds=1 --attack_steps=60 --attack_candidates=4 --attack_permutations=4
    --attack_sweeps=1 --attack_beam=2 --attack_chunk=8"""
CACHE = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def xla(tmp_path_factory):
    """Folder of the compilation cache."""
    return tmp_path_factory.mktemp("xla")


@pytest.fixture(scope="module", autouse=True)
def quick(xla):
    """Fast compilation and a cache; `run` changes process-wide settings, which are put back.

    The check for reused keys is off: an attack takes one key per client batch out of an array again and again, which
    the check counts as reuse of the array.
    """
    settings = {  # while these tests run, and afterwards
        "jax_compilation_cache_dir": (str(xla), None), "jax_persistent_cache_min_compile_time_secs": (0.0, 1.0),
        "jax_persistent_cache_min_entry_size_bytes": (-1, 0), "jax_disable_most_optimizations": (True, False),
        "jax_debug_key_reuse": (False, True), "jax_default_matmul_precision": (None, None),
    }  # fmt: skip
    umask = os.umask(0o022)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    compilation_cache.reset_cache()
    for name, (during, _) in settings.items():
        jax.config.update(name, during)
    yield
    for name, (_, after) in settings.items():
        jax.config.update(name, after)
    compilation_cache.reset_cache()
    os.umask(umask)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A Hugging Face folder; its word table has 4 rows more than its tokenizer has tokens, as padded tables do."""
    folder = tmp_path_factory.mktemp("bert")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": len(VOCABULARY) + 4, "num_labels": 2}
    model = models.build(goldens.config("bert", **size))
    models.save(str(folder), model, model.init(jax.random.key(0)))
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "four.jsonl"
    path.write_text("".join(json.dumps({"text": text, "label": i % 2}) + "\n" for i, text in enumerate(TEXTS)))
    return path


@pytest.fixture(scope="module")
def small(bert, texts):
    """Arguments of the small run, without a run folder."""
    return [f"--model={bert}", f"--data={texts}", *SMALL.split()]


def do(*args):
    """Run in this process; returns what was said."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        run.run(parse(*args))
    return said.getvalue()


def cli(*args, **more):
    return subprocess.Popen(
        [sys.executable, "-m", "grab_jax.main", *map(str, args)],
        cwd=ROOT, env=os.environ | CACHE | more, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def records(folder):
    """The lines of results.jsonl without what a clock says."""
    lines = (folder / "results.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def assert_alike(found, expected):
    """Equal, but for the rounding of fractions; the gradient of a key bias is nothing but rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            if not name.endswith("key/bias"):
                assert_alike(found[name], expected[name])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_alike(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
    else:
        assert found == expected


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """A finished run, not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    do(*small, f"--run_dir={folder}")
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "copy")


# --- a finished run ------------------------------------------------------------------------------------------


def test_run_folder(finished):
    names = {"flags.txt", "run.json", "results.jsonl", "summary.json", "curves.npz", "report.html", "log.txt", "ckpt"}
    names |= {"run.own.lock"}
    assert {path.name for path in finished.iterdir()} == names
    assert not list((finished / "ckpt").iterdir())
    assert "continuous step 60/60" in (finished / "log.txt").read_text()


def test_owner_only(finished):
    for path in [finished, *finished.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_summary(finished, bert):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["schema"].startswith("grab_jax.summary/")
    assert summary["attack"] == "grab"
    assert summary["model"] == str(bert)
    assert summary["n_sentences"] == 2
    for matching in ("one_to_one", "paper"):
        scores = summary["rouge"][matching]
        assert set(scores) >= {"rouge1", "rouge2", "rougeL"}
        assert all(0 <= value <= 100 for value in scores.values())
    assert {"exact_match", "token_accuracy", "longest_span", "outcome", "reason"} <= set(summary)
    assert summary["seconds"]["attack"] > 0
    assert summary["seconds"]["compile"] > 0


def test_results(finished):
    """One line per client batch, in order, the truth as it was given, the reconstruction without special tokens."""
    found = records(finished)
    assert [r["index"] for r in found] == [0, 1]
    assert [r["sentences"][0]["text"] for r in found] == TEXTS[:2]
    assert found[0]["sentences"][0]["tokens"] == ["the", "old", "cat", "sat", "."]
    assert [r["sentences"][0]["label"] for r in found] == [0, 1]
    for r in found:
        (prediction,) = r["predictions"]
        # A special token may stay in a reconstruction (the search covers the whole vocabulary); it is not shown.
        assert len(prediction["tokens"]) == len(prediction["confidence"]) <= 5
        assert not set(prediction["tokens"]) & set(SPECIAL)
        assert 0 <= r["masks"]["mean"] <= 1
        assert {point["phase"] for point in r["trace"]} == {"continuous", "tokens", "discrete"}


def test_flags_repeat_the_run(finished, small):
    assert parse(f"--flagfile={finished / 'flags.txt'}") == parse(*small, f"--run_dir={finished}")


def test_again_is_instant(copied, small):
    before = {path.name: path.read_bytes() for path in copied.iterdir() if path.is_file()}
    stamp = (copied / "results.jsonl").stat().st_mtime_ns
    begin = time.monotonic()
    said = do(*small, f"--run_dir={copied}")
    assert time.monotonic() - begin < 10
    assert said.count("already done") == 1
    assert "continuous" not in said
    assert (copied / "results.jsonl").stat().st_mtime_ns == stamp
    for name in ("results.jsonl", "summary.json"):
        assert (copied / name).read_bytes() == before[name]
    now, then = json.loads((copied / "run.json").read_bytes()), json.loads(before["run.json"])
    assert now["config"].pop("run")["dir"] == str(copied)
    then["config"].pop("run")
    assert now == then


@pytest.mark.parametrize("left", [1.5, 0.5], ids=["second line cut", "first line cut"])
def test_cut_results_are_repaired(finished, copied, small, left):
    """What is whole stays; what is missing, and no more, is redone: the same seed gives the same results.

    Up to rounding, as the second batch is now attacked alone.
    """
    path = copied / "results.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: int(left)]) + lines[int(left)][:700])
    said = do(*small, f"--run_dir={copied}")
    assert f"batches {'0, 1: 2' if left < 1 else '1: 1'} x [1, 8]" in said
    assert_alike(records(copied), records(finished))
    assert path.read_bytes().startswith(b"".join(lines[: int(left)]))


def test_report_is_rebuilt(copied):
    """From the results alone."""
    for name in ("report.html", "summary.json"):
        (copied / name).unlink()
    page = run.rebuild(parse("--mode=report", f"--run_dir={copied}"))
    assert page == copied / "report.html"
    assert page.stat().st_size > 5000
    assert json.loads((copied / "summary.json").read_text())["n_sentences"] == 2
    test_owner_only(copied)


def test_report_of_processes_that_are_not_done(copied):
    """What is there is shown, and what the processes still add to stays theirs."""
    lines = (copied / "results.jsonl").read_text().splitlines(keepends=True)
    (copied / "results.jsonl").unlink()
    (copied / "results.1.jsonl").write_text(lines[1])
    run.rebuild(parse("--mode=report", f"--run_dir={copied}"))
    assert json.loads((copied / "summary.json").read_text())["n_sentences"] == 1
    assert (copied / "results.1.jsonl").read_text() == lines[1]


def test_one_batch_and_a_control(finished, bert, texts, small, tmp_path):
    """A single batch gets a control of unrelated text, which no score counts; another seed gives other results."""
    folder = tmp_path / "one"
    do(*small, "--num_batches=1", "--seed=1", f"--run_dir={folder}")
    attacked, control = records(folder)
    assert (attacked["control"], control["control"]) == (False, True)
    assert control["sentences"][0]["text"] not in TEXTS
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["n_sentences"], summary["n_batches"]) == (1, 1)
    other = records(finished)[0]
    assert attacked["sentences"] == other["sentences"]
    assert attacked["trace"] != other["trace"]


def test_long_sentences_are_cut_and_counted(bert, tmp_path):
    """The model has 24 positions: [CLS], 22 words, [SEP]."""
    path = tmp_path / "long.txt"
    path.write_text("the " * 30 + "\n" + "the " * 22 + "\n")
    session = sessions.prepare(parse(f"--model={bert}", f"--data={path}", "--num_batches=2"))
    assert "warning: 1 sentence(s) longer than 24 tokens were cut" in session.notes
    assert [batch.truncated for batch in session.batches] == [(True,), (False,)]
    assert {batch.batch.ids.shape for batch in session.batches} == {(1, 24)}


def test_dry_run(small, tmp_path, monkeypatch):
    """The plan in words, and nothing written."""
    monkeypatch.chdir(tmp_path)
    said = dry_run.describe(parse(*small, "--dry_run", "--run_dir=here"))
    for part in ("5 dropout sites", "2 x [1, 8]", "60 steps", "GiB", "compilations", "candidate scores", "time"):
        assert part in said, said
    assert not list(tmp_path.iterdir())


SPAN = ["--model=builtin:bert-mini", "--data=builtin", "--attack=span", "--num_batches=2", "--dry_run"]


def test_dry_run_of_span_decoding():
    """It has no rounds, no candidates and no timed score; what counts is tokens against the width."""
    said = dry_run.describe(parse(*SPAN, "--batch_size=2"))
    for part in ("span: exact decoding", "fewer than the width 256: testable", "2 x [2, ", "GiB", "bucket of tokens"):
        assert part in said, said
    for part in ("rounds", "candidate", "masks learn", "steps"):
        assert part not in said, said
    many = dry_run.describe(parse(*SPAN, "--batch_size=40"))
    assert "2 of 2 batches not testable: the width 256 or more\n" in many
    assert "no batch is testable" in many


def test_dry_run_of_span_decoding_of_adapters():
    """Their ranks count, not the width."""
    adapters = lambda *args: dry_run.describe(parse(*SPAN, "--client_lora_rank=16", *args))  # noqa: E731
    assert "not testable: the adapters' B is zero, and the client trains with dropout" in adapters()
    assert "fewer than the adapters' rank 16: testable" in adapters("--client_dropout=0")
    later = adapters("--client_algorithm=fedavg", "--client_epochs=2")
    assert "fewer than the 32 ranks of the first attention layer's adapters: testable" in later


@pytest.mark.long
def test_the_adapter_that_utility_trained_is_audited_next(tmp_path):
    """Under dropout a new adapter tells nothing, and a trained one every sentence."""
    span = ["--model=builtin:bert-mini", "--attack=span", "--num_batches=2", "--run_progress=lines"]
    new, later = tmp_path / "new", tmp_path / "later"
    more = ["--client_lora_rank=16", "--utility", "--utility_rounds=2", f"--run_dir={new}"]
    assert f"trained adapter: {new / 'adapter'}" in do(*span, *more)
    assert json.loads((new / "summary.json").read_text())["outcome"] == "not testable"
    again = *span, f"--client_lora_from={new / 'adapter'}", f"--run_dir={later}"
    do(*again)
    assert json.loads((later / "summary.json").read_text())["certified"] == 2
    do(*again)
    assert len(records(later)) == 2
    moved = {name: 1.5 * value for name, value in load_file(new / "adapter/adapter_model.safetensors").items()}
    save_file(moved, new / "adapter/adapter_model.safetensors", metadata={"format": "pt"})
    do(*again)
    assert len(records(later)) == 4, "another adapter under the same name"


def test_dry_run_of_a_search_that_span_decoding_begins(small):
    said = dry_run.describe(parse(*small, "--attack_init=span", "--dry_run"))
    for part in ("60 steps", "what span decoding proves; at most 7 in a batch, fewer than the width 16", "candidate"):
        assert part in said, said


def test_rows_of_a_batch():
    """Tokens; without dropout, equal tokens at one position count once, and padding never."""
    ids, real = [[2, 7, 7, 3], [2, 7, 3, 0]], [[1, 1, 1, 1], [1, 1, 1, 0]]
    batch = Batch(np.array(ids), np.array(real, bool), np.array([0, 1]))
    assert dry_run.rows(batch, dropout=True) == 7
    assert dry_run.rows(batch, dropout=False) == 5


@pytest.mark.parametrize("model", ["builtin:bert-mini", "builtin:gpt2-mini"])
def test_builtin_models_are_planned(model):
    session = sessions.prepare(parse(f"--model={model}"))
    assert len(session.batches) == 8
    assert session.loaded.model.width == 256


@pytest.mark.long
def test_gpt2(tmp_path):
    do("--model=builtin:gpt2-mini", *SMALL.split(), "--attack_steps=5", f"--run_dir={tmp_path / 'gpt2'}")
    assert len(records(tmp_path / "gpt2")) == 2


# --- interrupted runs ----------------------------------------------------------------------------------------


def wait_for(process, text, seen):
    """Read the error stream until a line holds `text`."""
    for line in process.stderr:
        seen.append(line)
        if text in line:
            return
    raise AssertionError(f"{text!r} never came:\n{''.join(seen)}")


def wait_for_state(folder, process):
    """Until a state is on disk."""
    deadline = time.monotonic() + 120
    while not any(path.name.isdigit() for path in folder.glob("ckpt/*/*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.long
def test_interrupted_runs_resume(small, tmp_path):
    """Killed, terminated and interrupted in turn, a run ends with the very results of an undisturbed one."""
    steps = [*small, "--attack_steps=4000", "--attack_rounds=2"]
    quiet, folder = tmp_path / "quiet", tmp_path / "disturbed"
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla")}
    whole = cli(*steps, f"--run_dir={quiet}", **cache)
    errors = whole.communicate(timeout=600)[1]
    assert whole.returncode == 0, errors
    disturbed = [*steps, f"--run_dir={folder}", "--run_checkpoint_minutes=0.001"]
    for number, how in enumerate((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)):
        process, seen = cli(*disturbed, **cache), []
        wait_for(process, "continuous step", seen)
        wait_for_state(folder, process)
        process.send_signal(how)
        seen += process.communicate(timeout=120)[1].splitlines(keepends=True)
        assert process.returncode == (-9 if how == signal.SIGKILL else 130), "".join(seen)
        assert ("continuing from round" in "".join(seen)) == (number > 0)
        assert "Traceback" not in "".join(seen)
        said = [line for line in seen if line.startswith("interrupted; ")]
        assert len(said) == (how != signal.SIGKILL), "".join(seen)
        assert not (folder / "results.jsonl").exists()
    last = cli(*disturbed, **cache)
    errors = last.communicate(timeout=600)[1]
    assert last.returncode == 0, errors
    assert "continuing from round" in errors
    assert records(folder) == records(quiet)
    assert not list((folder / "ckpt").iterdir())


@pytest.fixture
def interrupted(small, tmp_path, monkeypatch):
    """The folder of a run that was interrupted between its two segments of 50 and 10 steps."""

    def show(_display, progress, *_args):
        if progress.step == progress.steps == 60:
            raise KeyboardInterrupt

    folder = tmp_path / "interrupted"
    with monkeypatch.context() as patch:
        patch.setattr(run.Display, "show", show)
        with pytest.raises(KeyboardInterrupt):
            do(*small, f"--run_dir={folder}")
    return folder


def test_state_is_saved_and_used(interrupted, finished, small):
    """The state before the interruption; then the results are those of the undisturbed run."""
    said = do(*small, f"--run_dir={interrupted}")
    assert "continuing from round 1" in said
    assert "step 50/60" not in said
    assert "step 60/60" in said
    assert records(interrupted) == records(finished)


@pytest.mark.long
def test_state_of_other_groups_is_left_alone(interrupted, finished, small):
    """A state saved for two batches together is no use to a run that attacks them one by one."""
    assert "continuing" not in do(*small, "--run_group=1", f"--run_dir={interrupted}")
    assert [r["id"] for r in records(interrupted)] == [r["id"] for r in records(finished)]


# --- refusals ------------------------------------------------------------------------------------------------


@pytest.fixture
def refuse(monkeypatch, capfd):
    """The one line that the program says about these arguments."""

    def ask(*args):
        monkeypatch.setattr(
            main,
            "flags",
            SimpleNamespace(parsed=lambda: parse(*args), attacks=lambda: ("grab",), swept=dict, AUTO="auto"),
        )
        assert main.main(["grab_jax"]) == 2
        said = capfd.readouterr().err
        assert said.startswith("grab_jax: ")
        assert len(said.splitlines()) == 1, said
        return said

    return ask


@pytest.fixture
def spoiled(bert, tmp_path):
    """A copy of the model folder that a test may spoil."""
    return shutil.copytree(bert, tmp_path / "model")


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ("--model=builtin:bert-huge", ("builtin:bert-huge", "builtin:bert-mini", "builtin:gpt2-mini")),
        ("--model=./no/such/folder", ("./no/such/folder", "does not exist")),
        ("--model=no-such-owner/no-such-model", ("no-such-owner/no-such-model", "builtin:bert-mini")),
        ("--data=none.jsonl", ("none.jsonl", "does not exist")),
        ("--data=no-such-owner/no-such-set", ("no-such-owner/no-such-set", "could not be loaded")),
        ("--data_start=9999", ("--data_start=9999",)),
        ("--num_batches=9999", ("--num_batches", "need 9999")),
        ("--data_shuffle=-1", ("--data_shuffle=-1", "0 or more")),
        ("--model=builtin:gpt2-mini --model_task=causal_lm", ("--model_task=classification", "--attack=span")),
        ("--noknown_rate", ("--noknown_rate", "--attack=span")),
        ("--attack=dlg --attack_prior=builtin:gpt2-mini", ("--attack_prior=builtin:gpt2-mini", "--attack=lamp")),
        ("--attack=lamp --attack_prior=builtin:gpt2-mini", ("another vocabulary", "grab_jax.train_prior")),
        ("--attack=lamp --attack_prior=builtin:bert-mini", ("no causal language model", "'bert'")),
        ("--attack=lamp --attack_prior=no/such", ("--attack_prior=no/such", "'no/such'")),
        ("--attack=lamp --attack_init=span", ("--attack_init=span", "--attack=grab")),
        ("--attack=span --attack_init=span", ("--attack_init=span", "--attack=grab")),
        ("--attack_init=span --attack_masks=true", ("--attack_init=span", "--attack_masks=true")),
        ("--attack_init=span --attack_tokens=true", ("--attack_init=span", "--attack_tokens=true")),
        ("--attack=span --model=builtin:bert-mini --model_task=causal_lm", ("causal_lm", "not supported")),
        ("--attack_rounds=0", ("--attack_rounds=0",)),
        ("--client_dropout=1.5", ("--client_dropout=1.5",)),
        ("--mode=report", ("--run_dir",)),
        ("--mode=report --run_dir=no/such/run", ("no/such/run",)),
        ("--run_dir=/dev/null", ("--run_dir=/dev/null", "not a run folder")),
        ("--run_dir=/dev/null/below", ("--run_dir=/dev/null/below", "Not a directory")),
    ],
)
def test_refused(refuse, args, parts):
    said = refuse(*args.split())
    for part in parts:
        assert part in said


def test_refused_models(refuse, spoiled, texts):
    """A folder loses or breaks one thing after the other."""
    args = (f"--model={spoiled}", f"--data={texts}", "--num_batches=2", "--dry_run")
    config, weights = spoiled / "config.json", spoiled / "model.safetensors"
    settings, tensors = json.loads(config.read_text()), load_file(weights)

    config.write_text(json.dumps(settings | {"intermediate_size": 29}))
    said = refuse(*args)
    assert "intermediate" in said
    assert "(28, 16)" in said
    assert "(29, 16)" in said

    config.write_text(json.dumps(settings | {"vocab_size": 7}))
    table = "bert.embeddings.word_embeddings.weight"
    save_file(tensors | {table: tensors[table][:7]}, weights)
    assert "token id" in refuse(*args)

    config.write_text(json.dumps(settings | {"model_type": "t5"}))
    said = refuse(*args)
    for part in ("'t5'", "bert", "roberta", "gpt2"):
        assert part in said

    config.write_text(json.dumps(settings))
    weights.unlink()
    assert "model.safetensors" in refuse(*args)
    (spoiled / "tokenizer.json").unlink()
    save_file(tensors, weights)
    assert "has no tokenizer" in refuse(*args)
    config.unlink()
    assert "config.json" in refuse(*args)


@pytest.mark.parametrize(
    ("content", "part"),
    [("", "no non-empty sentence"), ('{"text": "a cat", "label": 2}\n', "--model_num_labels"), ("{", "line 1")],
)
def test_refused_data(refuse, bert, tmp_path, content, part):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    assert part in refuse(f"--model={bert}", f"--data={path}", "--num_batches=1", f"--run_dir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


def test_a_second_process_in_the_folder_is_refused(refuse, copied, small):
    """Unless they have numbers, which must differ."""
    before = (copied / "results.jsonl").read_bytes()
    with folders.alone(copied / "run.own.lock"):
        assert "is being run by another process; wait for it" in refuse(*small, f"--run_dir={copied}")
    with folders.alone(copied / "run.1.own.lock"), pytest.raises(InputError, match="another process with the number 1"):
        run.run(parse(*small, f"--run_dir={copied}"), sharding.World(1, 2))
    assert (copied / "results.jsonl").read_bytes() == before


def test_two_processes_of_unequal_memory_share_a_run(finished, small, tmp_path):
    for process, memory in enumerate(("--run_memory_gb=64", "--run_memory_gb=0.001")):
        assert not (tmp_path / "summary.json").exists()
        run.run(parse(*small, memory, f"--run_dir={tmp_path}"), sharding.World(process, 2))
    found = records(tmp_path)
    assert [r["predictions"][0]["text"] for r in found] == [r["predictions"][0]["text"] for r in records(finished)]
    assert (tmp_path / "report.html").is_file()
    assert not folders.shards(tmp_path)


def test_the_report_is_rebuilt_while_nobody_adds_results(copied, monkeypatch):
    """A process that merges its results at the same time would lose them, or lose those of others."""
    (copied / "results.jsonl").rename(copied / "results.1.jsonl")
    merge, held = folders.merge, []

    def watched(*args):
        with folders.alone(copied / "run.lock") as free:
            held.append(not free)
        return merge(*args)

    monkeypatch.setattr(folders, "merge", watched)
    run.rebuild(parse("--mode=report", f"--run_dir={copied}"))
    assert held == [True]


def test_a_lone_process_takes_the_lock_while_there_are_results_of_others(tmp_path):
    with run._together(tmp_path, sharding.ALONE):
        assert not list(tmp_path.iterdir())
    (tmp_path / "results.1.jsonl").touch()
    with run._together(tmp_path, sharding.ALONE), folders.alone(tmp_path / "run.lock") as free:
        assert not free


def test_refused_run_folders(refuse, copied, small, tmp_path):
    """Another configuration (names what differs), a folder of something else, damaged files; nothing is changed."""
    before = (copied / "results.jsonl").read_bytes()
    said = refuse(*small, f"--run_dir={copied}", "--seed=5", "--attack_lr=0.5")
    assert "seed 0 there, 5 here" in said
    assert "attack.lr 0.01 there, 0.5 here" in said
    with (copied / "results.jsonl").open("a") as file:
        file.write("half a line{\n")
    assert "results.jsonl, line 3" in refuse(*small, f"--run_dir={copied}")
    assert (copied / "results.jsonl").read_bytes().startswith(before)
    (copied / "run.json").write_text("")
    assert "run.json is damaged" in refuse(*small, f"--run_dir={copied}")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    assert "not a run folder" in refuse(*small, f"--run_dir={tmp_path / 'other'}")
    assert "run.json" in refuse("--mode=report", f"--run_dir={tmp_path / 'other'}")


def test_killed_before_the_first_result(finished, small, tmp_path):
    """A folder with nothing but a half-written description is taken over."""
    folder = tmp_path / "begun"
    folder.mkdir()
    (folder / "run.json.partial").write_text('{"sche')
    run.folders.open_folder(parse(*small, f"--run_dir={folder}"), lambda: {"identity": {}})
    assert json.loads((folder / "run.json").read_text()) == {"identity": {}}


def test_interrupt_in_words(monkeypatch, capfd):
    def stopped(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(
        main, "flags", SimpleNamespace(parsed=parse, attacks=lambda: ("grab",), swept=dict, AUTO="auto")
    )
    monkeypatch.setattr(run, "run", stopped)
    assert main.main(["grab_jax"]) == 130
    assert "the same command continues" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["--attack_rounds=x"], "attack_rounds"),
        (["--client_dropout=1.5"], "--client_dropout=1.5"),
        (["--no_such_setting=1"], "no_such_setting"),
        (["--flagfile=none.flags"], "none.flags"),
        (["run", "--seed=1"], "unexpected argument 'run'"),
        (["--model=tests/goldens", "--dry_run"], "config.json"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_refused_on_the_command_line(args, part):
    """As a user meets it: one line, exit code 2."""
    process = cli(*args)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert output == ""
    assert errors.startswith("grab_jax: ")
    assert len(errors.splitlines()) == 1, errors
    assert part in errors


# --- several attacks -----------------------------------------------------------------------------------------


def several(*args):
    """Run several attacks in this process; returns what was said."""
    values = absl_flags.FlagValues()
    flags.define(Config(), values)
    values(["grab_jax", *map(str, args)])
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        comparison.start(flags.attacks(values), lambda name: flags.parsed(values, attack=name))
    return said.getvalue()


@pytest.fixture(scope="module")
def compared(small, tmp_path_factory):
    """Grab and span decoding of the same batches (too small a model for a proof), and what was said."""
    folder = tmp_path_factory.mktemp("runs") / "several"
    return folder, several(*small, "--client_dropout=0", "--attack=grab,span", f"--run_dir={folder}")


@pytest.mark.long
def test_several_attacks_are_compared_on_one_page(compared):
    folder, said = compared
    assert {path.name for path in folder.iterdir()} == {"grab", "span", "comparison.json", "report.html"}
    assert said.index("grab must be told: labels: told") < said.index("span must be told: labels: no")
    page = re.sub(r"<[^>]*>", " ", (folder / "report.html").read_text())
    assert "Side by side" in page
    assert re.search(r"grab\s+\d of 2", page)
    assert re.search(r"span\s+\d of 2", page)
    assert [r["id"] for r in records(folder / "grab")] != [r["id"] for r in records(folder / "span")]
    assert [r["sentences"] for r in records(folder / "grab")] == [r["sentences"] for r in records(folder / "span")]
    for path in [folder, *folder.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_a_comparison_goes_on_and_its_pages_can_be_made_again(compared, small):
    folder, _ = compared
    args = [*small, "--client_dropout=0", "--attack=grab,span", f"--run_dir={folder}"]
    before = {name: records(folder / name) for name in ("grab", "span")}
    assert several(*args).count("already done") == 3  # grab attacks both batches together
    (folder / "report.html").unlink()
    several(f"--run_dir={folder}", "--mode=report", "--attack=grab,span")
    assert "Side by side" in (folder / "report.html").read_text()
    assert {name: records(folder / name) for name in ("grab", "span")} == before


@pytest.mark.parametrize(
    ("args", "chosen", "skipped"),
    [
        (("--client_dropout=0",), [("span", "none"), ("dager", "none"), ("grab", "span")], {}),
        (("--client_dropout=0.1",), [("span", "none"), ("grab", "span")], {"dager": "the client uses dropout"}),
        (
            ("--client_dropout=0.1", "--noknown_rate"),
            [("span", "none")],
            {"dager": "the client uses dropout", "grab": "--noknown_rate needs"},
        ),
        (
            ("--client_dropout=0", "--model_task=causal_lm"),
            [("span", "none"), ("dager", "none")],
            {"grab": "--attack=grab needs"},
        ),
    ],
)
def test_auto_takes_what_the_settings_allow_the_strongest_first(args, chosen, skipped):
    values = absl_flags.FlagValues()
    flags.define(Config(), values)
    values(["grab_jax", "--attack=auto", *args])
    found, left = comparison.allowed(lambda name: flags.parsed(values, attack=name))
    assert [(config.attack.name, config.attack.init) for config in found] == chosen
    assert left.keys() == skipped.keys()
    assert all(left[name].startswith(reason) for name, reason in skipped.items())


def test_auto_stops_where_every_sentence_is_proven(compared, small, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "_all_proven", lambda folder: folder.name == "span")
    said = several(*small, "--client_dropout=0", "--attack=auto", f"--run_dir={tmp_path / 'auto'}")
    assert "attack grab not run: span proved every sentence" in said
    page = re.sub(r"<[^>]*>", " ", (tmp_path / "auto" / "report.html").read_text())
    assert re.search(r"grab\s+not run: span proved every sentence", page)
    assert not (tmp_path / "auto" / "grab").exists()


@pytest.mark.parametrize("named", ["grabb", "grab,auto", "span,,grab", ""])
def test_attacks_that_do_not_exist_are_named(named):
    values = absl_flags.FlagValues()
    flags.define(Config(), values)
    values(["grab_jax", f"--attack={named}"])
    with pytest.raises(InputError, match=re.escape(f"--attack={named} is not understood")):
        flags.attacks(values)


@pytest.mark.long
def test_several_attacks_take_no_folder_of_a_single_one(copied, small):
    with pytest.raises(InputError, match="the folder of a single run"):
        several(*small, "--attack=grab,span", f"--run_dir={copied}")
