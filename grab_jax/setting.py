"""What a setting of a config is: a dataclass field with a default and a help text, and the check of its value."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from grab_jax.types import InputError


def setting(default: Any, text: str) -> Any:
    """A dataclass field with a default and a help text."""
    return field(default=default, metadata={"help": text})


def own(text: str) -> Any:
    """A field of the attack whose default, None, stands for the attack's own (`OWN`)."""
    return field(default=None, metadata={"help": text, "own": True})


def require(ok: bool, flag: str, value: Any, expected: str) -> None:
    """Raise `InputError`, naming the flag, where a value is not what was expected."""
    if not ok:
        raise InputError(f"--{flag}={value}: expected {expected}")
