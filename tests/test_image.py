"""The container image's recipe, as far as it can be checked without a container engine."""

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECIPE = (ROOT / "Dockerfile").read_text()
STEPS = [line for line in RECIPE.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]


def install(device, tmp_path):
    """What the recipe's shell asks of pip, from a stand-in."""
    (step,) = (line.removeprefix("RUN ") for line in STEPS if "pip install" in line)
    (tmp_path / "pip").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "pip").chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "DEVICE": device}
    return subprocess.run(["sh", "-c", step], capture_output=True, text=True, env=env)


@pytest.mark.parametrize("device", ["cpu", "cuda", "tpu"])
def test_each_device_installs_extras_that_exist(device, tmp_path):
    done = install(device, tmp_path)
    assert done.returncode == 0, done.stderr
    wanted = re.fullmatch(r"\.\[(.*)\]", done.stdout.splitlines()[-1])[1].split(",")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(wanted) <= set(extras)
    assert any(device in extra for extra in wanted) == (device != "cpu")


def test_another_device_is_refused(tmp_path):
    done = install("npu", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "DEVICE=npu: expected cpu, cuda or tpu\n"


def test_what_is_copied_is_there_and_nothing_else_is_sent():
    """Run folders hold private text: the context of a build is a list of what is wanted."""
    ignored, *kept = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] not in "#"]
    assert ignored == "*"
    kept = {line[1:] for line in kept if line.startswith("!")}
    copied = {word for line in STEPS if line.startswith("COPY ") for word in line.split()[1:-1]}
    assert copied
    for source in copied:
        assert (ROOT / source).exists()
        assert source.split("/")[0] in kept


def test_it_runs_the_program_and_not_as_root():
    steps = dict(line.split(" ", 1) for line in STEPS)
    assert json.loads(steps["ENTRYPOINT"]) == ["python", "-m", "grab_jax.main"]
    assert int(steps["USER"]) > 0
    assert steps["VOLUME"] in re.search(r"GRAB_JAX_CACHE=(\S+)", RECIPE)[1]


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_hadolint():
    done = subprocess.run(["hadolint", str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
