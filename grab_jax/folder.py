"""The run folder: whose configuration it is, and results that survive a kill at any moment."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grab_jax import flags
from grab_jax.config import Config, identity
from grab_jax.types import InputError


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
    if described.is_file():
        old = _object(described.read_text("utf-8", "replace"), str(described))
        _check_same(folder, old, config)
        write_json(described, {**about(), "started": old.get("started")})
    elif folder.exists() and (not folder.is_dir() or any(path != _partial(described) for path in folder.iterdir())):
        raise InputError(f"--run_dir={folder} exists and is not a run folder; give an empty or new folder")
    else:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--run_dir={folder} cannot be created ({error.strerror}); give another folder") from error
        write_json(described, about())
    (folder / "flags.txt").write_text(flags.flagfile(dataclasses.replace(config, dry_run=False)))
    return folder


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
    partial = _partial(path)
    partial.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where} is damaged ({error}); delete it, or give another --run_dir") from error
    if not isinstance(value, dict):
        raise InputError(f"{where} is damaged (no JSON object); delete it, or give another --run_dir")
    return value


def finished(folder: Path) -> dict[str, dict[str, Any]]:
    """The records of a run folder by id."""
    return records(folder / "results.jsonl")


def append(folder: Path, record: dict[str, Any]) -> None:
    """Add one record to a run folder."""
    add(folder / "results.jsonl", record)


def records(path: Path) -> dict[str, dict[str, Any]]:
    """Lines of a file by their id; an incomplete last line, left by a kill, is dropped."""
    if not path.is_file():
        return {}
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    lines = content[:whole].decode("utf-8", "replace").split("\n")
    found = [_object(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line]
    return {record.get("id"): record for record in found}


def add(path: Path, record: dict[str, Any]) -> None:
    """Add one line to a file and force it to disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
