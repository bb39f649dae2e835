"""Several processes, started by a cluster on many hosts, share the work of one command.

Cells of a sweep and groups of client batches depend on nothing of each other, so a process needs to know no more than
its number and how many there are, and the launcher says both in the environment. `jax.distributed.initialize` is not
called, on purpose: its service joins the fates of processes. Tried with jax 0.10.2: where one of two was killed, the
other was aborted; with `jax_enable_recoverability` the first process's death, or its mere end, aborted the second. All
would also have to wait for the last to start. Here a process waits for nobody, uses its local devices only, and shares
nothing but the run folder; what a dead one leaves undone is done when the same command is given again, to any number
of processes.
"""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from grab_jax.types import InputError

T = TypeVar("T")
Env = MutableMapping[str, str]
Found = tuple[int, int] | None
"""Number of a process and count of processes, where a launcher says so."""

EVERY_WORKER = "start this command on every worker"
METADATA = "computeMetadata/v1/instance/attributes"
TIMEOUT = 5.0
"""Seconds for a TPU VM's metadata server, which is on the same machine."""


class World(NamedTuple):
    """This process, numbered from 0, and how many share the work."""

    process: int = 0
    count: int = 1

    @property
    def several(self) -> bool:
        """Whether others share the work."""
        return self.count > 1

    @property
    def suffix(self) -> str:
        """What tells this process's files from those of the others: `.3`, or nothing where there are none."""
        return f".{self.process}" if self.several else ""

    def share(self, items: Sequence[T]) -> list[T]:
        """Every `count`-th item: the same split in every process and in every start, without asking anyone.

        Neighbours, which tend to cost the same, go to different processes.
        """
        return list(items[self.process :: self.count])


ALONE = World()


def initialize(wanted: Literal["auto", "on", "off"], env: Env = os.environ) -> World:
    """The place of this process; to be called before any device is used.

    Args:
      wanted: `auto` looks for the variables of a launcher, `on` insists that there are some, `off` ignores them.

    Raises:
      InputError: the variables contradict each other, or `on` finds none.
    """
    found = None if wanted == "off" else _detected(env)
    if found is None and wanted == "on":
        raise InputError(
            f"--run_distributed=on finds no launcher's variables; {EVERY_WORKER}, with srun, Open MPI's mpirun, or "
            "JAX_PROCESS_ID and JAX_NUM_PROCESSES set"
        )
    if found is None:
        return ALONE
    process, count = found
    if not 0 <= process < count:
        raise InputError(
            f"this is process {process} of {count}: expected a number from 0 to {count - 1}; {EVERY_WORKER}, each with "
            "its own number"
        )
    if count > 1:
        _own_slice(len(_chips()), env)
    return World(process, count)


def _detected(env: Env) -> Found:
    """What the first launcher that is recognised says."""
    finders: tuple[Callable[[Env], Found], ...] = (_jax, _slurm, _open_mpi, _gke_tpu, _tpu_vm)
    return next((found for finder in finders if (found := finder(env)) is not None), None)


def _numbers(env: Env, process: str, count: str) -> Found:
    """The values of two variables; None where both are missing."""
    given = env.get(process), env.get(count)
    if given == (None, None):
        return None
    try:
        return int(given[0] or ""), int(given[1] or "")
    except ValueError as error:
        raise InputError(
            f"{process}={given[0]} and {count}={given[1]}: expected two numbers; {EVERY_WORKER}, each with its own"
        ) from error


def _jax(env: Env) -> Found:
    return _numbers(env, "JAX_PROCESS_ID", "JAX_NUM_PROCESSES")


def _slurm(env: Env) -> Found:
    """Only inside a step: the batch script itself, outside srun, has the variables of the whole job."""
    if "SLURM_STEP_NODELIST" not in env or "SLURM_PROCID" not in env:
        return None
    return _numbers(env, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS")


def _open_mpi(env: Env) -> Found:
    return _numbers(env, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")


def _gke_tpu(env: Env) -> Found:
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    if hosts is None or "TPU_WORKER_ID" not in env:
        return None
    return _of_slice(env["TPU_WORKER_ID"], hosts, env)


def _tpu_vm(env: Env) -> Found:
    """A worker of a Cloud TPU slice learns its number from the machine's metadata server."""
    if "TPU_SKIP_MDS_QUERY" in env or not _chips():
        return None  # GKE says to ask nobody, and so does JAX, when imported, on hosts without chips
    server = env.get("GCE_METADATA_IP", "metadata.google.internal")
    try:
        return _of_slice(_attribute(server, "agent-worker-number"), _attribute(server, "worker-network-endpoints"), env)
    except OSError:
        return None  # a TPU that is no Cloud TPU VM


def _attribute(server: str, name: str) -> str:
    request = urllib.request.Request(f"http://{server}/{METADATA}/{name}", headers={"Metadata-Flavor": "Google"})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        return answer.read().decode()


def _of_slice(worker: str, hosts: str, env: Env) -> Found:
    """The number over all slices of a multislice job, of a worker of one with comma-separated hosts."""
    names = {"worker": worker, "slice": env.get("MEGASCALE_SLICE_ID") or "0"}
    names["slices"] = env.get("MEGASCALE_NUM_SLICES") or "1"
    each, (own, of, slices) = len(hosts.split(",")), (_numbers(names, name, name)[0] for name in names)
    return own + of * each, each * slices


def _chips() -> list[Path]:
    """The TPU chips of this host."""
    return [*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*")]


def _own_slice(chips: int, env: Env) -> None:
    """Make a host's chips a slice of their own: libtpu otherwise waits for every host of the pod, and dies with it."""
    if (bounds := {1: "1,1,1", 4: "2,2,1", 8: "2,4,1"}.get(chips)) is not None:
        env.setdefault("TPU_PROCESS_BOUNDS", "1,1,1")
        env.setdefault("TPU_CHIPS_PER_PROCESS_BOUNDS", bounds)
        env.setdefault("TPU_VISIBLE_CHIPS", ",".join(map(str, range(chips))))
        _leave_slice(bounds, env)


def _leave_slice(bounds: str, env: Env) -> None:
    """What GKE says of the whole slice becomes what it says of a slice of one host."""
    axes = len(env.get("TPU_TOPOLOGY", "").split("x"))
    own = {"TPU_HOST_BOUNDS": "1,1,1", "TPU_CHIPS_PER_HOST_BOUNDS": bounds, "TPU_WORKER_ID": "0"}
    own |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_TOPOLOGY": "x".join(bounds.split(",")[:axes])}
    own |= {"TPU_TOPOLOGY_WRAP": ",".join(["false"] * 3)}
    env.update({name: value for name, value in own.items() if name in env})
    for name in list(env):
        if name.startswith("MEGASCALE_") or name == "TPU_PROCESS_ADDRESSES":
            del env[name]
