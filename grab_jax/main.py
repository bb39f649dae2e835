"""Command line: `python -m grab_jax.main --flagfile=experiments/quickstart.flags [overrides]`.

Simulates federated clients, attacks their updates and writes a run folder with a report; `--helpshort` lists the
flags, `--mode=report --run_dir=...` rebuilds a report, `--dry_run` prints the plan.
"""

from __future__ import annotations

import os
import sys

import jax
from absl import app, logging
from absl import flags as absl_flags

from grab_jax import dry_run, flags, interrupts, run
from grab_jax.config import Config
from grab_jax.types import InputError

INTERRUPTED = 130


def main(argv: list[str]) -> int:
    """Run what the flags say; 0 when done, 2 for bad input, 130 when interrupted."""
    if len(argv) > 1:
        return refuse(f"unexpected argument {argv[1]!r}; settings are given as --name=value")
    interrupts.install()
    logging.set_verbosity(logging.WARNING)  # orbax tells a page per save
    try:
        config = flags.parsed()
        if config.mode == "report":
            print(run.rebuild(config))
        elif config.dry_run:
            print(dry_run.describe(config))
        else:
            run.run(config)
    except InputError as error:
        return refuse(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted; nothing finished is lost: the same command continues here", file=sys.stderr)
        return INTERRUPTED
    return 0


def refuse(sentence: str) -> int:
    """Say what is wrong with the input, in one line."""
    print(f"grab_jax: {sentence}", file=sys.stderr)
    return 2


def parse(args: list[str]) -> list[str]:
    """Read the command line; a wrong flag ends the program with one line."""
    try:
        return absl_flags.FLAGS(args)
    except absl_flags.Error as error:
        sys.exit(refuse(" ".join(str(error).split()) + " (--helpshort lists all flags)"))


def entry() -> None:
    """Define the flags and start."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install PyTorch
    # Each CPU core is a device of its own: independent client batches then run side by side.
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    flags.define(Config())
    absl_flags.adopt_module_key_flags(flags)  # --helpshort shows them
    app.run(main, flags_parser=parse)


if __name__ == "__main__":
    entry()
