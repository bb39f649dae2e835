"""A Slurm cluster of two nodes on this very machine, in a folder of its own: munged, slurmctld and two slurmd."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import time

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")
CONF = """ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=120
SlurmdTimeout=0
SchedulerParameters=batch_sched_delay=0,sched_interval=1
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=1
PartitionName=all Nodes=ALL Default=YES
"""


def missing():
    """The programs that are not installed."""
    return [name for name in PROGRAMS if not shutil.which(name, path=_path())]


def _path():
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _ports():
    """Three free ports, the last two one after the other."""
    while True:
        with contextlib.ExitStack() as stack:
            try:
                taken = [stack.enter_context(socket.socket()) for _ in range(3)]
                taken[0].bind(("127.0.0.1", 0))
                taken[1].bind(("127.0.0.1", 0))
                taken[2].bind(("127.0.0.1", taken[1].getsockname()[1] + 1))
            except (OSError, OverflowError):
                continue
            return [one.getsockname()[1] for one in taken]


@contextlib.contextmanager
def running(folder):
    """Start the cluster; yields what the environment must hold to use it."""
    folder.chmod(0o755)
    (folder / "state").mkdir()
    key, conf = folder / "key", folder / "slurm.conf"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    conf.write_text(CONF.format(host=socket.gethostname().split(".")[0], folder=folder, user=user, ports=_ports()))
    env = os.environ | {"SLURM_CONF": str(conf), "PATH": _path()}
    files = [f"--{name}={folder / name}" for name in ("pid-file", "seed-file", "log-file")]
    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.sock", f"--key-file={key}", *files]
    daemons = [munged, ["slurmctld", "-D", "-i"], *(["slurmd", "-D", "-N", node] for node in ("n1", "n2"))]
    with contextlib.ExitStack() as stack, (folder / "daemons.log").open("w") as log:
        for command in daemons:
            daemon = subprocess.Popen(command, env=env, stdout=log, stderr=log)
            stack.callback(daemon.wait)
            stack.callback(daemon.terminate)
            wait(lambda: (folder / "munge.sock").exists(), 60)
        state = ["sinfo", "--noheader", "--format=%D %t"]
        wait(lambda: subprocess.run(state, env=env, capture_output=True, text=True).stdout == "2 idle\n", 120)
        yield {"SLURM_CONF": str(conf), "PATH": _path()}


def wait(done, seconds):
    """Until `done()`."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.2)
