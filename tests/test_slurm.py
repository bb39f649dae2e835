"""`launch/slurm.sh` against stand-ins for Slurm's commands, and (long) against a real cluster of two nodes."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import slurm_cluster
import slurm_standin

ROOT = Path(__file__).parents[1]
SCRIPT = str(ROOT / "launch" / "slurm.sh")
ODD = ["--run_dir=runs/a b", "--data=it's $HOME ä.jsonl", "--seed=1"]
SWEEP = """--model=builtin:bert-mini --num_batches=2 --attack=span --run_progress=lines --sweep_seed=0,1,2
    --sweep_defense_noise=0,0.0001"""
CELLS = 6


def submit(*args, cwd=ROOT, **env):
    return subprocess.run(
        [SCRIPT, *args], capture_output=True, text=True, cwd=cwd, env=os.environ | env, timeout=900
    )  # fmt: skip


@pytest.fixture
def slurm(tmp_path):
    """The environment of stand-ins for Slurm's commands, which leave their traces in `tmp_path / "slurm"`."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    return slurm_standin.install(folder) | {"PATH": f"{folder}:{os.environ['PATH']}"}


def program(folder, text):
    """A stand-in for python."""
    path = folder / "python"
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("args", [["--seed=1"], ["--dry-run", "--flagfile=x"], ["--dry-run"], ["--run_dir=r", "--"]])
def test_a_run_folder_is_wanted(args):
    done = submit(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--run_dir" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_dry_run_prints_what_bash_would_do(slurm, tmp_path):
    """The printed command, given to bash, does the same as the script."""
    shown = submit("--dry-run", "--gres=gpu:1", "--comment=a b", "--", *ODD)
    assert shown.returncode == 0
    python = program(tmp_path, 'printf "%s\\n" "$@"')
    env, log = slurm | {"PYTHON": python}, tmp_path / "slurm" / "job.log"
    subprocess.run(["bash", "-c", shown.stdout], env=os.environ | env, check=True, capture_output=True)
    first = log.read_text()
    log.unlink()
    assert submit("--gres=gpu:1", "--comment=a b", "--", *ODD, **env).returncode == 0
    assert log.read_text() == first == "\n".join(["-m", "grab_jax.main", *ODD, ""])
    options = (tmp_path / "slurm" / "options").read_text().splitlines()
    assert {"--requeue", "--nodes=1", "--gres=gpu:1", "--comment=a b", "--signal=TERM@60"} <= set(options)


def test_a_task_per_host_with_its_number(slurm, tmp_path):
    """Tasks that fail do not end the others; the job has the highest exit code."""
    python = program(tmp_path, 'echo "$SLURM_PROCID of $SLURM_NTASKS"; exit "$SLURM_PROCID"')
    done = submit("--nodes=3", "--cpus-per-task=2", "--", "--run_dir=r", PYTHON=python, **slurm)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "slurm"
    assert sorted((folder / "job.log").read_text().splitlines()) == ["0 of 3", "1 of 3", "2 of 3"]
    assert (folder / "ended").read_text() == "2 1\n"
    step = shlex.split((folder / "steps").read_text())
    assert {"--kill-on-bad-exit=0", "--wait=0", "--cpus-per-task=2"} <= set(step)


@pytest.mark.parametrize(("code", "starts"), [(130, 2), (2, 1), (0, 1)])
def test_only_an_interrupted_job_is_requeued(slurm, tmp_path, code, starts):
    """Exit code 130 (state saved) puts the job back in the queue; any other one is the job's."""
    again = tmp_path / "again"
    python = program(tmp_path, f'[ -e "{again}" ] && exit 0; touch "{again}"; exit {code}')
    submit("--run_dir=r", PYTHON=python, **slurm)
    assert (tmp_path / "slurm" / "ended").read_text() == f"{0 if starts == 2 else code} {starts}\n"


# --- long: sweeps --------------------------------------------------------------------------------------------


def quick(folder):
    return {
        "PYTHON": sys.executable, "HF_HUB_OFFLINE": "1", "GRAB_JAX_CACHE": str(folder / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip


def check(base, log):
    """Every cell was run once, by one of two tasks, and is on the page."""
    listed = json.loads((base / "sweep.json").read_text())["cells"]
    assert [row["state"] for row in listed] == ["done"] * CELLS, log
    for row in listed:
        lines = (base / row["id"] / "results.jsonl").read_text().splitlines()
        ids = json.loads((base / row["id"] / "run.json").read_text())["ids"]
        assert sorted(json.loads(line)["id"] for line in lines) == sorted(ids)
    page = (base / "report.html").read_text()
    assert all(row["id"] in page for row in listed)
    assert log.count("sweep: ") >= 2, "both tasks end with the page"


@pytest.mark.long
def test_a_sweep_on_two_hosts_that_stand_in(slurm, tmp_path):
    base = tmp_path / "s"
    done = submit("--nodes=2", "--", f"--run_dir={base}", *SWEEP.split(), **slurm, **quick(tmp_path))
    log = (tmp_path / "slurm" / "job.log").read_text()
    assert (done.returncode, (tmp_path / "slurm" / "ended").read_text()) == (0, "0 1\n"), log
    check(base, log)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A real Slurm cluster."""
    if absent := slurm_cluster.missing():
        pytest.skip(f"Slurm is not installed: no {', '.join(absent)} (Debian: slurmctld slurmd slurm-client munge)")
    if os.geteuid():
        pytest.skip("slurmd runs as root only")
    with slurm_cluster.running(tmp_path_factory.mktemp("slurm")) as env:
        yield env


def done(base):
    """How many cells are done; a begun one has its note too."""
    return sum(json.loads(note.read_text())["state"] == "done" for note in base.glob("cells/*.json"))


def job(cluster, number):
    """What Slurm knows of a job."""
    text = subprocess.run(
        ["scontrol", "show", "job", number, "--oneliner"], env=os.environ | cluster, capture_output=True, text=True
    ).stdout
    return dict(word.partition("=")[::2] for word in text.split())


@pytest.mark.long
def test_a_sweep_on_two_nodes_of_a_real_cluster(cluster, tmp_path):
    base, log = tmp_path / "s", tmp_path / "log.txt"
    options = ["--nodes=2", "--parsable", f"--output={log}"]
    number = submit(*options, "--", f"--run_dir={base}", *SWEEP.split(), **cluster, **quick(tmp_path)).stdout.strip()
    slurm_cluster.wait(lambda: job(cluster, number)["JobState"] in ("COMPLETED", "FAILED"), 900)
    assert job(cluster, number)["ExitCode"] == "0:0", log.read_text()
    check(base, log.read_text())


@pytest.mark.long
def test_a_real_job_that_nears_its_end_goes_on_after_requeueing(cluster, tmp_path):
    """SIGTERM to its tasks, as before the time limit: they save and exit with 130, and the job is queued again."""
    base, log = tmp_path / "s", tmp_path / "log.txt"
    options = ["--nodes=2", "--parsable", f"--output={log}"]
    number = submit(*options, "--", f"--run_dir={base}", *SWEEP.split(), **cluster, **quick(tmp_path)).stdout.strip()
    slurm_cluster.wait(lambda: done(base), 600)
    subprocess.run(["scancel", "--signal=TERM", number], env=os.environ | cluster, check=True)
    slurm_cluster.wait(lambda: job(cluster, number)["JobState"] in ("COMPLETED", "FAILED"), 900)
    ended = job(cluster, number)
    assert (ended["ExitCode"], ended["Restarts"]) == ("0:0", "1"), log.read_text()
    assert "already done" in log.read_text()
    check(base, log.read_text())
