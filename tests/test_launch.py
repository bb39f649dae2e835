"""The shell scripts: help, dry run, refusals, and that every argument arrives unbroken."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
ODD = ["--run_dir=runs/a b", "--data=it's $HOME.jsonl", "--seed=1"]


def sh(script, *args, cwd=ROOT, **env):
    command = [str(ROOT / "launch" / script), *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | env, timeout=120)


@pytest.fixture
def teller(tmp_path):
    """A program that prints its arguments, one a line."""

    def make(name):
        path = tmp_path / name
        path.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        path.chmod(0o755)
        return path

    return make


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_house_rules(script):
    text = script.read_text()
    assert len(text.splitlines()) <= 60
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text
    assert os.access(script, os.X_OK)


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
def test_shellcheck():
    done = subprocess.run([SHELLCHECK, *SCRIPTS, ROOT / ".ci" / "run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("args", [["--help"], []], ids=["help", "nothing"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help(script, args):
    """The head comment, with the command and the variables."""
    done = sh(script.name, *args)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"launch/{script.name}" in done.stdout
    assert "Environment:" in done.stdout
    assert "#" not in done.stdout


def test_local_passes_everything_on(teller, tmp_path):
    """From any folder; python is started in the repository."""
    done = sh("local.sh", *ODD, cwd=tmp_path, PYTHON=str(teller("python")))
    assert done.stdout.splitlines() == ["-m", "grab_jax.main", *ODD]


def test_local_runs_the_program(tmp_path):
    done = sh("local.sh", "--helpshort", cwd=tmp_path, PYTHON=sys.executable, GRAB_JAX_CACHE=str(tmp_path))
    assert "--attack_rounds" in done.stdout, done.stderr
    assert "Traceback" not in done.stderr


def test_local_keeps_the_exit_code(teller):
    broken = teller("broken")
    broken.write_text("#!/bin/sh\nexit 7\n")
    assert sh("local.sh", "--seed=1", PYTHON=str(broken)).returncode == 7


@pytest.mark.parametrize("args", [["--seed=1"], ["--dry-run", "--flagfile=x"], ["--dry-run"]], ids=" ".join)
def test_slurm_wants_a_run_folder(args):
    done = sh("slurm.sh", *args)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "--run_dir" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_slurm_dry_run():
    done = sh("slurm.sh", "--dry-run", "--run_dir=r", GRAB_SBATCH="--partition=gpu --gres=gpu:1")
    words = shlex.split(done.stdout)
    assert done.returncode == 0
    assert words[0] == "sbatch"
    assert {"--partition=gpu", "--gres=gpu:1", "--requeue", "--nodes=1"} <= set(words)
    assert words[-2] == "--wrap"
    step = ["srun", "--ntasks=1", str(ROOT / "launch" / "local.sh"), "--run_dir=r"]
    assert shlex.split(words[-1])[: len(step)] == step
    assert "--signal=TERM@60" in words


def test_slurm_requeues_an_interrupted_job(teller, tmp_path):
    """Exit code 130 (state saved) puts the job back in the queue; any other code is passed on."""
    teller("sbatch")
    done = sh("slurm.sh", "--run_dir=r", PATH=f"{tmp_path}:{os.environ['PATH']}")
    job = done.stdout.splitlines()[-1]
    for code in (130, 2, 0):
        (tmp_path / "srun").write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / "scontrol").write_text('#!/bin/sh\necho "$@"\n')
        for name in ("srun", "scontrol"):
            (tmp_path / name).chmod(0o755)
        env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
        ran = subprocess.run(["sh", "-c", job], capture_output=True, text=True, env=env)
        assert ran.returncode == code
        assert ran.stdout.strip() == ("requeue 7" if code == 130 else "")


def test_slurm_submits(teller, tmp_path):
    """What sbatch is told to run passes odd arguments through two shells unbroken."""
    teller("sbatch")
    done = sh("slurm.sh", *ODD, PATH=f"{tmp_path}:{os.environ['PATH']}")
    options = done.stdout.splitlines()
    assert "--job-name=grab_jax" in options
    (tmp_path / "srun").write_text('#!/bin/sh\nshift\nexec "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    env = os.environ | {"PYTHON": str(teller("python")), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ran = subprocess.run(["sh", "-c", options[-1]], capture_output=True, text=True, env=env)
    assert ran.stdout.splitlines() == ["-m", "grab_jax.main", *ODD], ran.stderr
