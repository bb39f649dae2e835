"""Every documented command: that its flags, files and targets exist, and (long) that it runs on a small setting."""

import ast
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from absl import flags as absl_flags

from grab_jax import flags
from grab_jax.config import Config, TrainPriorConfig

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / name for name in ("README.md", "BUILD.md", "experiments/README.md")]
PRESETS = sorted((ROOT / "experiments").glob("*.flags"))
SCRIPTS = sorted((ROOT / "experiments").glob("*.py"))
SMALL = """--model=builtin:bert-mini --data=builtin --num_batches=2 --batch_size=1 --attack_rounds=1 --attack_steps=10
    --attack_candidates=4 --attack_permutations=4 --attack_sweeps=1"""
RUNS = ("as_bfloat16.py",)
"""Scripts that take the flags of a run."""

SMALL_SCRIPTS = {
    "as_bfloat16.py": SMALL + " --run_dir={tmp}/run",
    "bench_batching.py": "--model=builtin:bert-mini --together=2 --length=8 --steps=2 --repeats=1",
    "bench_matching.py": "--sizes=tiny --lengths=8 --restarts=1 --repeats=1",
    "bench_throughput.py": """--num_batches=2 --together=2 --attacks=grab --settings='--attack_rounds=1
        --attack_steps=10 --attack_candidates=4 --attack_permutations=4 --attack_sweeps=1'""",
    "compare.py": "--a={run} --b={run}",
    "span_decoys.py": "--problems=2 --sizes=1 --out={tmp}/decoys.jsonl",
    "span_reliability.py": "--batches=1 --sizes=1 --noise=0 --figure={tmp}/reliability.png",
    "span_table.py": "--cell=small=builtin:0.1:1:2 --folder={tmp}/cells",
    "train_builtin.py": """--text={root}/grab_jax/builtin/sentences.jsonl --held_out= --vocabulary_text=
        --out={tmp}/model --vocab=300 --layers=1 --width=32 --heads=2 --positions=16 --length=16 --batch=4 --steps=2
        --minutes=1""",
}
"""What makes each experiment script small; a new script needs a line here."""


PROGRAMS = {"grab_jax.main": Config, "grab_jax.train_prior": TrainPriorConfig}
SMALL_PRIOR = """--data=builtin --model=builtin:bert-mini --steps=2 --batch=2 --length=12 --width=16 --heads=2
    --layers=1 --out={tmp}/prior"""


class Command(NamedTuple):
    """A documented command line, split into words, and where it stands."""

    where: str
    words: tuple[str, ...]

    def __str__(self):
        return f"{self.where}: {shlex.join(self.words)}"


def commands(path):
    """The commands of a document's bash blocks, a preset's head, or a script's docstring."""
    text = path.read_text()
    if path.suffix == ".md":
        lines = "\n".join(re.findall(r"^```(?:bash|console|sh)\n(.*?)^```", text, re.M | re.S))
    elif path.suffix == ".flags":
        lines = "\n".join(re.findall(r"^# Command:(.*)$", text, re.M))
    else:
        lines = "\n".join(re.findall(r"^ {4}(python .*(?:\\\n.*)*)", ast.get_docstring(ast.parse(text)) or "", re.M))
    found = []
    for line in lines.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words and words[0] in (".venv/bin/python", "python3"):
            words[0] = "python"
        if words and ours(words):
            found.append(Command(str(path.relative_to(ROOT)), tuple(words)))
    return found


def ours(words):
    if words[0] == "python":
        return (words[1] == "-m" and words[2] in PROGRAMS) or words[1].startswith("experiments/")
    return words[0] == "make" or words[0].startswith("launch/")


def program_flags(words):
    """The flags of the program, without a launch script's options in front of `--`."""
    return words[words.index("--") + 1 :] if "--" in words else words[1:]


def every():
    """All documented commands, each once."""
    found = [command for path in [*DOCS, *PRESETS, *SCRIPTS] if path.is_file() for command in commands(path)]
    return list({command.words: command for command in found}.values())


def config(args, kind=Config):
    """Check a command line's flags: every attack it names takes them."""
    values = absl_flags.FlagValues()
    flags.define(kind(), values)
    assert values(["grab_jax", *args]) == ["grab_jax"], "an argument that is no flag"
    if kind is not Config:
        flags.parsed(values, kind)
        return
    named = flags.attacks(values)
    for name in named:
        flags.parsed(values, attack=None if len(named) == 1 and name != flags.AUTO else name.replace("auto", "span"))


@cache
def defined(script):
    """Names of the flags that a script defines."""
    calls = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)]
    return {c.args[0].value for c in calls if getattr(c.func, "attr", "").startswith("DEFINE_")}


@pytest.mark.parametrize("doc", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_have_commands(doc):
    assert doc.is_file(), f"{doc} is missing"
    assert commands(doc), f"{doc} shows no command in a bash block"


def test_readme_links():
    """Every relative link of a document leads to a file."""
    for doc in filter(Path.is_file, [*DOCS, ROOT / "RESPONSIBLE_USE.md"]):
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", doc.read_text()):
            assert re.match(r"\w+:", link) or (doc.parent / link).exists(), f"{doc.name} links to {link}"


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_presets_say_how(preset):
    """The head comment: a command that uses this very file, what to expect, how long it takes."""
    (command,) = commands(preset)
    assert f"--flagfile=experiments/{preset.name}" in command.words
    assert re.search(r"^# Expected:", preset.read_text(), re.M)
    assert re.search(r"^# Time:", preset.read_text(), re.M)


@pytest.mark.parametrize("command", every(), ids=str)
def test_commands_parse(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    first, *rest = command.words
    if command.words[:2] == ("python", "-m"):
        config(rest[2:], PROGRAMS[rest[1]])
    elif first == "python":
        script = ROOT / rest[0]
        assert script in SCRIPTS, f"{rest[0]} does not exist"
        if script.name in RUNS:
            config(rest[1:])
            return
        for arg in rest[1:]:
            name = re.fullmatch(r"--(?:no)?(\w+)(=.*)?", arg)
            assert name, f"{arg} is no flag"
            assert {name[1], f"no{name[1]}"} & defined(script), f"{rest[0]} has no flag {arg}"
    elif first == "make":
        targets = re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert rest, "make without a target"
        assert {arg for arg in rest if "=" not in arg} <= set(targets)
    else:
        assert os.access(ROOT / first, os.X_OK), f"{first} is no program"
        config([arg for arg in program_flags(command.words) if arg not in ("--help", "--dry-run")])


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("python -m grab_jax.main --no_such_flag=1", absl_flags.Error),
        ("python -m grab_jax.main --flagfile=experiments/none.flags", absl_flags.Error),
        ("python -m grab_jax.train_prior --attack=lamp", absl_flags.Error),
        ("python experiments/bench_batching.py --bogus=1", AssertionError),
        ("python experiments/none.py", AssertionError),
        ("make none", AssertionError),
        ("launch/none.sh --seed=1", AssertionError),
    ],
)
def test_wrong_commands_are_found(words, complaint, monkeypatch):
    with pytest.raises(complaint):
        test_commands_parse(Command("a test", tuple(words.split())), monkeypatch)


def test_blocks_are_read(tmp_path, monkeypatch):
    """Comments, prompts, variables and continued lines; other programs are left alone."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    doc = tmp_path / "a.md"
    lines = [
        "```bash",
        "pip install x",
        "$ A=1 python -m grab_jax.main \\",
        "  --seed=1  # why",
        "```",
        "```",
        "make no",
    ]
    doc.write_text("\n".join(lines))
    assert commands(doc) == [Command("a.md", ("python", "-m", "grab_jax.main", "--seed=1"))]


# --- long: run them ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Compiled programs are shared between the commands."""
    cache_folder = tmp_path_factory.mktemp("xla")
    return os.environ | {
        "HF_HUB_OFFLINE": "1", "PYTHON": sys.executable, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_COMPILATION_CACHE_DIR": str(cache_folder),
        "TPU_NAME": "tpu-1", "ZONE": "us-central2-b", "CLUSTER": "c", "WORKLOAD": "w",  # documented before commands
    }  # fmt: skip


def execute(environment, *words):
    words = [sys.executable if word == "python" else word for word in words]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def finished(environment, tmp_path_factory):
    """A finished small run."""
    folder = tmp_path_factory.mktemp("docs") / "run"
    execute(environment, "python", "-m", "grab_jax.main", *SMALL.split(), f"--run_dir={folder}")
    return folder


def runnable():
    return [command for command in every() if command.words[0] != "make"]


@pytest.mark.long
@pytest.mark.parametrize("command", runnable(), ids=str)
def test_commands_run(command, environment, finished, tmp_path):
    if "--dry-run" in command.words:
        assert execute(environment, *command.words).strip()
        return
    words = [word for word in command.words if not word.startswith("--run_dir=")]
    report = "--mode=report" in words
    if words[0] == "python" and words[1] != "-m":
        small = SMALL_SCRIPTS[Path(words[1]).name].format(run=finished, root=ROOT, tmp=tmp_path)
        assert execute(environment, *words, *shlex.split(small))
        return
    if "grab_jax.train_prior" in words:
        assert execute(environment, *words, *SMALL_PRIOR.format(tmp=tmp_path).split())
        return
    folder = finished if report else tmp_path / "run"
    shared = ["--batch_size=3"] if any("span_aggregation" in word for word in words) else []  # one for each client
    output = execute(environment, *words, *SMALL.split(), *shared, f"--run_dir={folder}")
    if "--dry_run" not in words:
        assert (folder / "report.html").is_file()
    assert output.strip()
