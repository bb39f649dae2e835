"""What every command line of grab_jax has in common: flags, exit codes, one sentence for bad input."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from absl import app, logging
from absl import flags as absl_flags

from grab_jax import compilation_cache, flags, interrupts
from grab_jax.types import InputError

INTERRUPTED = 130


def guarded(argv: list[str], work: Callable[[], int | None]) -> int:
    """Do `work`; what it returns (None is 0) when done, 2 for bad input, 130 when interrupted."""
    if len(argv) > 1:
        return refuse(f"unexpected argument {argv[1]!r}; settings are given as --name=value")
    interrupts.install()
    logging.set_verbosity(logging.WARNING)  # orbax tells a page per save
    try:
        return work() or 0
    except InputError as error:
        return refuse(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted; nothing finished is lost: the same command continues here", file=sys.stderr)
        return INTERRUPTED


def refuse(sentence: str) -> int:
    """Say what is wrong with the input, in one line."""
    print(f"grab_jax: {sentence}", file=sys.stderr)
    return 2


def entry(main: Callable[[list[str]], int], settings: Any) -> None:
    """Define the flags of a tree of settings, read the command line, and start."""
    flags.define(settings)
    for leaf in flags.leaves(settings):  # --helpshort shows those of the program that was started
        absl_flags.FLAGS.register_key_flag_for_module(sys.argv[0], absl_flags.FLAGS[leaf.flag])
    compilation_cache.use()
    app.run(main, flags_parser=_parse)


def _parse(args: list[str]) -> list[str]:
    try:
        return absl_flags.FLAGS(args)
    except absl_flags.Error as error:
        sys.exit(refuse(" ".join(str(error).split()) + " (--helpshort lists all flags)"))
