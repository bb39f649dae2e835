"""The shell scripts: help, dry run, refusals, and that every argument arrives unbroken."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grab_jax import folder

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


def test_local_dry_run(tmp_path):
    """The printed lines do in bash what the script does."""
    python = tmp_path / "py thon"
    python.write_text('#!/bin/sh\npwd; printf "%s\\n" "$@"\n')
    python.chmod(0o755)
    shown = sh("local.sh", "--dry-run", *ODD, PYTHON=str(python))
    ran = subprocess.run(["bash", "-c", shown.stdout], capture_output=True, text=True, cwd=tmp_path)
    assert ran.stdout == sh("local.sh", *ODD, PYTHON=str(python)).stdout


# --- sweeps -------------------------------------------------------------------------------------------------


def test_a_sweep_starts_processes_of_one_command(teller):
    done = sh("sweep.sh", "--processes=3", "--", *ODD, "--sweep_seed=0,1", PYTHON=str(teller("python")))
    assert done.stdout.splitlines() == ["-m", "grab_jax.main", *ODD, "--sweep_seed=0,1"] * 3


def test_flagfiles_run_in_folders_of_their_own(teller, tmp_path):
    """As many at once as there are processes; the highest exit code is the sweep's."""
    python = teller("python")
    python.write_text(
        f'#!/bin/sh\necho + >>"{tmp_path}/now"; sleep 0.5; echo - >>"{tmp_path}/now"\n'
        f'echo "$*" >>"{tmp_path}/said"\ncase "$*" in *b.flags*) exit 3;; *d.flags*) exit 1;; esac\n'
    )
    files = ["x/a.flags", "b.flags", "c d.flags", "d.flags"]
    done = sh("sweep.sh", "--processes=2", *files, "--", "--run_dir=r s", "--seed=1", PYTHON=str(python))
    assert done.returncode == 3
    said = {f"-m grab_jax.main --flagfile={f} --run_dir=r s --seed=1 --run_dir=r s/{Path(f).stem}" for f in files}
    assert set((tmp_path / "said").read_text().splitlines()) == said
    steps = [1 if line == "+" else -1 for line in (tmp_path / "now").read_text().split()]
    assert max(sum(steps[:i]) for i in range(len(steps) + 1)) == 2


STOPPABLE = """#!{python}
import os, signal, sys, time
said = lambda number, _frame: os.write(1, b"signal %d\\n" % number)
for number in (signal.SIGINT, signal.SIGTERM):  # as grab_jax does: the second one would stop it at once
    signal.signal(number, said)
open(f"{place}/{{os.getpid()}}.begun", "w").close()
signal.pause()
time.sleep(0.5)
sys.exit(130)
"""


@pytest.mark.parametrize("files", [[], ["a.flags", "b.flags", "c.flags"]], ids=["cells", "files"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "term"])
def test_processes_are_asked_to_stop_once_and_no_other_begins(teller, tmp_path, number, files):
    """Ctrl-C goes to the script and to what is in its group; a file that waits for its turn is not begun."""
    python = teller("python")
    python.write_text(STOPPABLE.format(python=sys.executable, place=tmp_path))
    command = [str(ROOT / "launch" / "sweep.sh"), "--processes=2", *files, "--", "--run_dir=r"]
    # A shell starts what is in the background with SIGINT ignored, which bash passes on and traps cannot undo.
    terminal = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    )
    pipe = {"stdout": subprocess.PIPE, "text": True, "env": os.environ | {"PYTHON": str(python)}}
    process = subprocess.Popen([sys.executable, "-c", terminal, *command], start_new_session=True, **pipe)
    begun = lambda: [int(path.stem) for path in tmp_path.glob("*.begun")]  # noqa: E731
    try:
        wait(lambda: len(begun()) == 2)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 130
        assert said == "signal 15\n" * 2
        assert len(begun()) == 2
    finally:
        for one in [process.pid, *begun()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)


def wait(done):
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_sweep_on_gpus_gives_each_process_its_own(teller, tmp_path):
    python, gpus = teller("python"), teller("nvidia-smi")
    python.write_text('#!/bin/sh\necho "gpu $CUDA_VISIBLE_DEVICES"\n')
    gpus.write_text("#!/bin/sh\necho 0\necho 1\n")
    env = {"PYTHON": str(python), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    run = lambda count, **more: sh("sweep.sh", f"--processes={count}", "--", "--run_dir=r", **env, **more)  # noqa: E731
    assert sorted(run(2).stdout.splitlines()) == ["gpu 0", "gpu 1"]
    assert sorted(run(3).stdout.splitlines()) == ["gpu 0", "gpu 1"]
    assert run(3).stderr == "launch/sweep.sh: one process per GPU, so 2 at a time\n"
    assert run(1).stdout == "gpu \n"  # all of them
    assert sorted(run(2, CUDA_VISIBLE_DEVICES="3,GPU-b,7").stdout.splitlines()) == ["gpu 3", "gpu GPU-b"]
    assert run(2, CUDA_VISIBLE_DEVICES="").stdout == "gpu \n" * 2
    gpus.write_text("#!/bin/sh\necho NVIDIA-SMI has failed; exit 9\n")
    assert run(2).stdout == "gpu \n" * 2


def test_no_two_flagfiles_have_one_gpu_at_once(teller, tmp_path):
    """The second of three is done first: the third gets its GPU."""
    python = teller("python")
    python.write_text(
        '#!/bin/sh\necho "$3 $CUDA_VISIBLE_DEVICES"\n'
        f'cd "{tmp_path}"; case "$3" in *a.flags) until [ -e c ]; do sleep 0.1; done;; *c.flags) touch c;; esac\n'
    )
    files = ["a.flags", "b.flags", "c.flags"]
    done = sh("sweep.sh", "--processes=2", *files, "--", "--run_dir=r", PYTHON=str(python), CUDA_VISIBLE_DEVICES="4,5")
    assert sorted(done.stdout.splitlines()) == [f"--flagfile={n}.flags {g}" for n, g in zip("abc", "455", strict=True)]


def test_a_sweep_through_slurm_is_one_job():
    """The script named by --via gets its options and the flags."""
    through = sh("sweep.sh", "--via=slurm.sh", "--nodes=4", "--dry-run", "--", *ODD)
    assert through.stdout == sh("slurm.sh", "--dry-run", "--nodes=4", "--", *ODD).stdout
    files = sh("sweep.sh", "--dry-run", "--via=slurm.sh", "a.flags", "b.flags", "--", "--run_dir=r")
    jobs = [sh("slurm.sh", "--dry-run", "--", f"--flagfile={n}.flags", "--run_dir=r", f"--run_dir=r/{n}") for n in "ab"]
    assert files.stdout == "".join(job.stdout for job in jobs)


@pytest.mark.parametrize(
    "args",
    ["--run_dir=r", "--processes=0 -- --run_dir=r", "--via=none.sh -- --run_dir=r", "-- --seed=1"],
)
def test_a_sweep_that_is_not_understood(args):
    done = sh("sweep.sh", *args.split())
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)


# --- TPU slices and GKE ---------------------------------------------------------------------------------------

GCLOUD = r"""#!/usr/bin/env bash
# A slice whose two workers are folders; options are remembered in $CLOUD/commands.
printf '%s\n' "$*" >>"$CLOUD/commands"
verb=$4 worker=all command="" code=0
for word in "${@:5}"; do
  case "$word" in
    --worker=*) worker="${word#*=}" ;;
    --command=*) command="${word#*=}" ;;
    --format=*state*) echo ACTIVE; exit ;;
    --format=*len*) echo 2; exit ;;
    -*) ;;
    *) paths+=("$word") ;;
  esac
done
[ "$worker" = all ] && workers=(0 1) || workers=("$worker")
case "$verb" in
  describe) [ -e "$CLOUD/made" ] ;;
  create) touch "$CLOUD/made" ;;
  ssh)
    for w in "${workers[@]}"; do
      (cd "$CLOUD/$w" && HOME="$CLOUD/$w" WORKER=$w bash -c "$command") || code=$?
    done
    exit "$code" ;;
  scp)
    for w in "${workers[@]}"; do
      cp -r "${paths[0]/#tpu-1:/$CLOUD/$w/}" "${paths[1]/#tpu-1:/$CLOUD/$w/}" || exit
    done ;;
esac
"""
PYTHON = r"""#!/bin/sh
uv=$HOME/.local/bin/uv
[ "$2" = pip ] && { printf '#!/bin/sh\necho "uv $*" >>$HOME/uv.log\n' >"$uv"; chmod +x "$uv"; exit; }
for word; do case "$word" in --run_dir=*) folder="${word#*=}" ;; esac; done
mkdir -p "$folder"
printf '%s\n' "$@" >"$folder/said.${WORKER:-here}"
"""


@pytest.fixture
def cloud(tmp_path):
    """The environment of a stand-in for gcloud, and for python on workers and here; a copy of the scripts to start."""
    for place in ("0/.local/bin", "1/.local/bin", "bin", "repo/launch"):
        (tmp_path / place).mkdir(parents=True)
    for name in ("grab_jax", "experiments", "pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / "repo" / name).touch()
    for script in SCRIPTS:
        shutil.copy(script, tmp_path / "repo" / "launch")
    for name, text in {"gcloud": GCLOUD, "python3": PYTHON}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return os.environ | {"CLOUD": str(tmp_path), "PATH": path, "TPU_NAME": "tpu-1", "ZONE": "us-central2-b"}


def tpu(cloud, *args):
    script = Path(cloud["CLOUD"]) / "repo" / "launch" / "tpu.sh"
    return subprocess.run([str(script), *args], capture_output=True, text=True, env=cloud, timeout=120)


FLAGS = ["--run_dir=runs/s", "--data=my data.jsonl", "--client_lora_targets=it's $HOME"]


def test_a_slice_runs_the_command_and_its_results_come_back(cloud, tmp_path):
    """Created once; data and unfinished results go along; every worker gets the flags unbroken."""
    repo = tmp_path / "repo"
    (repo / "my data.jsonl").write_text("{}")
    (repo / "runs" / "s").mkdir(parents=True)
    (repo / "runs" / "s" / "results.jsonl").write_text("old\n")
    done = tpu(cloud, "--accelerator-type=v4-16", "--version=v", "--spot", "--", *FLAGS)
    assert done.returncode == 0, done.stderr
    for worker in "01":
        assert (repo / "runs/s" / f"said.{worker}").read_text().splitlines() == ["-m", "grab_jax.main", *FLAGS]
        assert (tmp_path / worker / "grab_jax" / "my data.jsonl").is_file()
        assert (tmp_path / worker / "grab_jax/runs/s/results.sent.jsonl").read_text() == "old\n"
        assert "uv pip install -q -e .[tpu]" in (tmp_path / worker / "uv.log").read_text()
    assert (repo / "runs/s/said.here").read_text().split() == ["-m", "grab_jax.main", "--mode=report", FLAGS[0]]
    assert tpu(cloud, "--accelerator-type=v4-16", "--version=v", "--", *FLAGS).returncode == 0
    made = [line for line in (tmp_path / "commands").read_text().splitlines() if " create " in line]
    assert made == ["compute tpus tpu-vm create tpu-1 --zone=us-central2-b --accelerator-type=v4-16 --version=v --spot"]


@pytest.mark.parametrize("ahead", "01")
def test_no_worker_takes_the_place_of_results_of_another(cloud, tmp_path, ahead):
    """A start before left one worker with every result, in one file, and the other behind; both go on with theirs."""
    repo = tmp_path / "repo/runs/s"
    places = {worker: tmp_path / worker / "grab_jax/runs/s" for worker in "01"}
    for place, found in ((repo, "ab"), (places["0"], "ab"), (places["1"], "ab"), (places[ahead], "abcd")):
        place.mkdir(parents=True, exist_ok=True)
        (place / "results.jsonl").write_text("".join(f'{{"id": "{one}"}}\n' for one in found))
    behind = places["1" if ahead == "0" else "0"]
    (behind / "results.0.jsonl").write_text('{"id": "e"}\n')
    (repo / "results.0.jsonl").write_text('{"id": "f"}\n')
    os.utime(places[ahead] / "results.jsonl", (time.time() - 1000,) * 2)  # older than the copy here, and yet more
    for _start in range(2):
        done = tpu(cloud, *FLAGS[:1])
        assert done.returncode == 0, done.stderr
        assert folder.finished(repo).keys() == set("abcdef")
        assert folder.finished(places[ahead]).keys() >= set("abcdf")
        assert folder.finished(behind).keys() >= set("abef")
    names = {path.name for path in repo.iterdir()}
    assert tpu(cloud, *FLAGS[:1]).returncode == 0
    assert {path.name for path in repo.iterdir()} == names  # nothing piles up


def test_results_are_gathered_from_a_run_that_failed(cloud, tmp_path):
    python = tmp_path / "bin" / "python3"
    python.write_text(PYTHON + '[ "${WORKER:-}" != 0 ] || exit 130\n')
    assert tpu(cloud, *FLAGS[:1]).returncode == 130
    assert (tmp_path / "repo/runs/s/said.0").is_file()
    assert (tmp_path / "repo/runs/s/said.1").is_file()


def test_a_dry_run_of_a_slice_is_what_bash_would_do(cloud, tmp_path):
    shown = tpu(cloud, "--dry-run", "--queued", "--accelerator-type=v4-16", "--runtime-version=v", "--", *FLAGS)
    assert not (tmp_path / "commands").exists()
    ran = subprocess.run(["bash", "-euo", "pipefail", "-c", shown.stdout], capture_output=True, text=True, env=cloud)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "repo/runs/s/said.1").read_text().splitlines() == ["-m", "grab_jax.main", *FLAGS]
    commands = (tmp_path / "commands").read_text()
    assert "queued-resources create --node-id=tpu-1 tpu-1 --zone=us-central2-b --accelerator-type=v4-16" in commands


def test_a_shared_folder_is_not_gathered(cloud, tmp_path):
    flags = [f"--run_dir={tmp_path}/shared", "--sweep_seed=0,1"]
    assert tpu(cloud, *flags).returncode == 0
    assert {path.name for path in (tmp_path / "shared").iterdir()} == {"said.0", "said.1"}
    assert "--recurse" not in (tmp_path / "commands").read_text()


@pytest.mark.parametrize(
    "args", [["--seed=1"], ["--run_dir=r", "--sweep_seed=0,1"], ["--run_dir=a b"], ["--dry-run"]], ids=" ".join
)
def test_a_slice_wants_a_name_a_zone_and_a_folder(cloud, args):
    for env in (cloud, cloud | {"ZONE": ""}):
        done = tpu(env, *args)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not installed")
@pytest.mark.parametrize("queued", [[], ["--queued"]], ids=["", "queued"])
def test_gcloud_knows_every_option(cloud, queued, tmp_path):
    """gcloud's own static check of the commands; nothing is contacted."""
    version = "--runtime-version=v" if queued else "--version=v"
    assert tpu(cloud, *queued, "--accelerator-type=v4-16", version, "--spot", "--", *FLAGS).returncode == 0
    commands = [f"gcloud {line}" for line in (tmp_path / "commands").read_text().splitlines()]
    assert {line.split()[4] for line in commands} == {"describe", "create", "scp", "ssh"}
    for command in commands:
        words = command.split(" --command=")  # one word, whatever is in it
        text = shlex.join([*words[0].split(), *(f"--command={word}" for word in words[1:])])
        env = os.environ | {"CLOUDSDK_CONFIG": str(tmp_path), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}
        lint = ["gcloud", "meta", "lint-gcloud-commands", f"--command-string={text}"]
        (found,) = json.loads(subprocess.run(lint, capture_output=True, text=True, env=env, timeout=300).stdout)
        assert found["success"], f"{command}: {found['error_message']}"


GKE = {"CLUSTER": "c", "WORKLOAD": "w"}


def test_a_workload_runs_the_program_with_its_flags(teller, tmp_path):
    """The pod's shell gets back every flag unbroken; options of xpk come before the command."""
    teller("xpk")
    flags = ["--run_dir=/data/a b", '--data=it\'s "$HOME" ä.jsonl']
    done = sh("xpk.sh", "--tpu-type=v4-16", "--", *flags, PATH=f"{tmp_path}:{os.environ['PATH']}", **GKE)
    *options, command = done.stdout.splitlines()
    assert {"workload", "create", "--cluster=c", "--workload=w", "--tpu-type=v4-16"} <= set(options)
    teller("python")
    pod = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ran = subprocess.run(["bash", "-c", command.removeprefix("--command=")], capture_output=True, text=True, env=pod)
    assert ran.stdout.splitlines() == ["-m", "grab_jax.main", *flags]
    shown = sh("xpk.sh", "--dry-run", "--tpu-type=v4-16", "--", *flags, **GKE)
    assert shlex.split(shown.stdout) == ["xpk", *done.stdout.splitlines()]


@pytest.mark.parametrize("args", [["--seed=1"], ["--", "--run_dir=relative"], ["--", "--run_dir=/a\nb"]])
def test_a_workload_wants_a_cluster_a_name_and_a_folder(args):
    for env in (GKE, {"CLUSTER": "", "WORKLOAD": ""}):
        done = sh("xpk.sh", *args, **env)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("launch/xpk.sh: set CLUSTER")


@pytest.mark.long
@pytest.mark.skipif(shutil.which("xpk") is None, reason="xpk is not installed")
def test_xpk_makes_a_manifest_of_it(tmp_path):
    """xpk's own dry run: the manifest that GKE would get runs the program."""
    manifest = tmp_path / "m.yaml"
    options = ["--tpu-type=v5litepod-16", "--docker-image=i:1", "--project=p", "--zone=us-west4-a", "--dry-run"]
    options += ["--skip-validation", f"--output-manifest-file={manifest}"]
    done = sh("xpk.sh", *options, "--", "--run_dir=/data/a b", HOME=str(tmp_path), CLOUDSDK_CONFIG=str(tmp_path), **GKE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert r"(exec python -m grab_jax.main --run_dir=/data/a\ b) & PID=$!" in manifest.read_text()
    assert "maxRestarts: 10" in manifest.read_text()
