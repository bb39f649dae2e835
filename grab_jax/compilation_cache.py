"""Where compiled programs are kept between runs: a folder of the user's own, so that a second run begins at once.

`JAX_COMPILATION_CACHE_DIR` (JAX's own variable) decides; else `GRAB_JAX_CACHE`; else `$XDG_CACHE_HOME/grab_jax/xla` or
`~/.cache/grab_jax/xla`. `none` in either keeps nothing. The folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

import jax

OFF = "none"


def use(environment: Mapping[str, str] = os.environ) -> None:
    """Keep the programs compiled from now on where `environment` says; a folder that cannot be made is said."""
    if environment.get("JAX_COMPILATION_CACHE_DIR") == OFF:
        jax.config.update("jax_compilation_cache_dir", None)
    elif not jax.config.jax_compilation_cache_dir and (chosen := folder(environment)):
        try:
            chosen.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            said = f"{chosen} cannot be created ({error.strerror}); set GRAB_JAX_CACHE to another folder, or to {OFF}"
            print(f"grab_jax: compiled programs are not kept: {said}", file=sys.stderr)
            return
        jax.config.update("jax_compilation_cache_dir", str(chosen))


def folder(environment: Mapping[str, str]) -> Path | None:
    """The folder where JAX was told none; None where nothing is to be kept, or the user has no home."""
    given = environment.get("GRAB_JAX_CACHE")
    if given:
        return None if given == OFF else Path(given).expanduser()
    try:
        home = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    # Programs for a CPU are machine code: hosts of several kinds may share a home.
    return home / "grab_jax" / "xla" / _cpu()


def _cpu() -> str:
    """A short name for what the CPU can do."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.is_file() else [platform.processor()]
    able = sorted({line for line in lines if line.startswith(("flags", "Features"))} or set(lines[:1]))
    return f"{platform.machine()}-{hashlib.sha256(' '.join(able).encode()).hexdigest()[:8]}"
