"""The run folder: whose configuration it is, and results that survive a kill at any moment.

Processes that share a run add to `results.<process>.jsonl` each; `merge` makes `results.jsonl` of all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from grab_jax import flags
from grab_jax.config import Config, identity
from grab_jax.types import InputError

RESULTS = "results.jsonl"


def default_folder(config: Config, attack: str | None = None) -> Path:
    """`runs/<attack>-<model>-<data>-<hash of the settings>`; `attack` stands in for the config's."""
    short = lambda name: Path(name.replace(":", "-")).stem or "x"  # noqa: E731
    digest = hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:8]
    return (
        Path("runs") / f"{attack or config.attack.name}-{short(config.model.name)}-{short(config.data.name)}-{digest}"
    )


def open_folder(config: Config, about: Callable[[], dict[str, Any]]) -> Path:
    """Create the run folder with its `run.json` (made by `about`), or go on in one of the same configuration."""
    folder = Path(config.run.dir) if config.run.dir else default_folder(config)
    described = folder / "run.json"
    fresh = _fresh(folder)  # before the file is looked for, which another process may be about to write
    if described.is_file():
        old = read_json(described)
        _check_same(folder, old, config)
        kept = {name: old[name] for name in ("started", "programs") if name in old}
        write_json(described, {**about(), **kept})
    elif not fresh:
        raise InputError(f"--run_dir={folder} exists and is not a run folder; give an empty or new folder")
    else:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--run_dir={folder} cannot be created ({error.strerror}); give another folder") from error
        write_json(described, about())
    write_text(folder / "flags.txt", flags.flagfile(dataclasses.replace(config, dry_run=False)))
    return folder


def _fresh(folder: Path) -> bool:
    """Whether a folder is still to be made, or holds nothing but locks and files that were being written."""
    if not folder.exists():
        return True
    return folder.is_dir() and all(path.suffix in (".partial", ".lock") for path in folder.iterdir())


def count(folder: Path, programs: dict[str, int]) -> None:
    """Add to the numbers of XLA programs in `run.json`; those of an interrupted group of batches are not in it."""
    run = read_json(folder / "run.json")
    total = {name: run.get("programs", {}).get(name, 0) + number for name, number in programs.items()}
    write_json(folder / "run.json", {**run, "programs": total})


def _check_same(folder: Path, about: dict[str, Any], config: Config) -> None:
    old, new = _flat(about.get("identity", {})), _flat(json.loads(json.dumps(identity(config))))
    changed = [f"{name} {old.get(name)!r} there, {new.get(name)!r} here" for name in new if old.get(name) != new[name]]
    if changed:
        raise InputError(
            f"run folder {folder} belongs to another configuration ({'; '.join(changed[:3])}); "
            "choose another --run_dir or repeat its settings"
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def write_json(path: Path, value: Any) -> None:
    """Atomically, so that a kill never leaves half a file."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Atomically, and beside other processes that write the same file."""
    partial = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def begin_several(folder: Path, listed: str) -> None:
    """Create the folder of several runs, or go on in one, which holds a file `listed`.

    Raises:
      InputError: it holds something else, or cannot be created.
    """
    fresh = _fresh(folder)  # first, as in `open_folder`
    if (folder / "run.json").is_file():
        raise InputError(f"--run_dir={folder} is the folder of a single run; give several runs a new folder")
    if not fresh and not (folder / listed).is_file():
        raise InputError(f"--run_dir={folder} exists and holds something else; give an empty or new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--run_dir={folder} cannot be created ({error.strerror}); give another folder") from error


@contextlib.contextmanager
def alone(path: Path, patience: float = 0.0) -> Iterator[bool]:
    """Hold a lock file; yields False where another process does. A process that is killed lets it go.

    Args:
      patience: seconds to wait for it; infinity for a lock that is only held for moments.

    Raises:
      InputError: the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience
    with path.open("a") as file:
        while not (mine := _locked(file)) and time.monotonic() < deadline:
            time.sleep(0.02)
        yield mine


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise InputError(
            f"{file.name} cannot be locked ({error.strerror}); processes that share a folder need a file system with "
            "locks, such as NFS, or Lustre mounted with flock"
        ) from error
    return True


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a run folder; InputError where it is damaged."""
    return _object(path.read_text("utf-8", "replace"), str(path))


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where} is damaged ({error}); delete it, or give another --run_dir") from error
    if not isinstance(value, dict):
        raise InputError(f"{where} is damaged (no JSON object); delete it, or give another --run_dir")
    return value


def finished(folder: Path) -> dict[str, dict[str, Any]]:
    """The records of a run folder by id, those of processes that may still run among them."""
    found = records(folder / RESULTS)
    for shard in shards(folder):
        found = {**records(shard), **found}
    return found


def shards(folder: Path) -> list[Path]:
    """The files of results of single processes."""
    return sorted(folder.glob("results.*.jsonl"))


def append(folder: Path, record: dict[str, Any], suffix: str = "") -> None:
    """Add one record to a run folder, in the file of the process with this suffix."""
    add(folder / f"results{suffix}.jsonl", record)


def merge(folder: Path, ids: Sequence[str]) -> bool:
    """Bring the results of single processes into `results.jsonl`; whether it holds all of `ids`, and so no more come.

    Only where every result is there, the files of the processes are removed.
    """
    kept, parts = records(folder / RESULTS), shards(folder)
    found = finished(folder)
    complete = all(one in found for one in ids)
    if parts:
        new = sorted((found[one] for one in found.keys() - kept.keys()), key=lambda record: record.get("index", 0))
        lines = (json.dumps(record, allow_nan=False) + "\n" for record in [*kept.values(), *new])
        write_text(folder / RESULTS, "".join(lines))
    for part in parts if complete else ():
        part.unlink(missing_ok=True)
    return complete


def records(path: Path) -> dict[str, dict[str, Any]]:
    """Lines of a file by their id, without an incomplete last one: left by a kill, or being written."""
    if not path.is_file():
        return {}
    content = path.read_bytes()
    lines = content[: content.rfind(b"\n") + 1].decode("utf-8", "replace").split("\n")
    found = [_object(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line]
    return {record.get("id"): record for record in found}


def add(path: Path, record: dict[str, Any]) -> None:
    """Add one line to a file and force it to disk; an incomplete last line, left by a kill, is dropped."""
    with path.open("ab+") as file:
        if end := file.tell():
            file.seek(end - 1)
            if file.read() != b"\n":
                file.truncate(path.read_bytes().rfind(b"\n") + 1)
        file.write((json.dumps(record, allow_nan=False) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())
