"""What `run.json` says about a run: its configuration, versions, device, and the version of the code."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from grab_jax import summary, threat_model
from grab_jax.attacks import NEEDS
from grab_jax.config import Config, identity

RESULT_CODE = (
    "models/*.py", "search/*.py", "span/*.py", "attacks/*.py", "kernels/*.py", "masks.py", "losses.py", "tuning.py",
    "client.py", "local_training.py", "simulate.py", "defenses.py", "leaves.py", "views.py", "distances.py",
    "matching.py", "data.py", "record.py",
)  # fmt: skip
"""What can change a reconstruction; reports and progress cannot."""


def about(
    config: Config,
    model: Any,
    parameters: int,
    notes: list[str],
    ids: list[str],
    privacy: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of `run.json`; `ids` are those of the results that belong to it, `privacy` is `privacy.account`."""
    packages = ("jax", "jaxlib", "flax", "optax", "transformers", "numpy", "grab-jax")
    return {
        "schema": "grab_jax.run/1",
        "config": dataclasses.asdict(config),
        "identity": identity(config),
        "attack": config.attack.name,
        "model": config.model.name,
        "data": config.data.name,
        "seed": config.seed,
        "parameters": parameters,
        "versions": {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}},
        "device": device(),
        "git": _git(),
        "code": code_version(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "setting": threat_model.setting(config, model),
        "assumptions": threat_model.assumptions(config, model),
        "needs": NEEDS[config.attack.name]._asdict(),
        "privacy": privacy and summary.finite(privacy),  # an infinite epsilon is null
        "notes": notes,
        "ids": ids,
        "flags_file": "flags.txt",
    }


def device() -> str:
    """The devices of this process, in words."""
    device = jax.local_devices()[0]
    return f"{jax.local_device_count()} x {device.device_kind} ({device.platform}), {os.cpu_count()} host cores"


def _git() -> str | None:
    root = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def code_version() -> str:
    """Hash of the sources that decide a result: part of every result's identity."""
    root = Path(__file__).parent
    files = [file for name in RESULT_CODE for file in sorted(root.glob(name))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
