"""Command line: `python -m grab_jax.main --flagfile=experiments/quickstart.flags [overrides]`.

Simulates federated clients, attacks their updates and writes a run folder with a report; `--helpshort` lists the
flags, `--mode=report --run_dir=...` rebuilds a report, `--dry_run` prints the plan. Any flag of a setting also takes
several values as `--sweep_<flag>=a,b,c`; several such flags run every combination.
"""

from __future__ import annotations

import os
from pathlib import Path

import jax

from grab_jax import command, comparison, dry_run, flags, run, sharding, sweep, sweep_table
from grab_jax.config import Config


def main(argv: list[str]) -> int:
    """Run what the flags say; 0 when done, 1 where cells of a sweep failed, 2 for bad input, 130 when interrupted."""
    return command.guarded(argv, lambda: _start(flags.attacks()))


def _start(attacks: tuple[str, ...]) -> int:
    if swept := flags.swept():
        return sweep.start(swept, lambda changed: flags.parsed(changed=changed))
    if len(attacks) > 1 or attacks == (flags.AUTO,):
        comparison.start(attacks, lambda name: flags.parsed(attack=name))
        return 0
    config = flags.parsed()
    world = sharding.initialize(config.run.distributed)
    if world.process and (config.dry_run or config.mode != "simulate"):
        return 0  # said once, by the first process
    if config.mode == "status" and comparison.is_folder(config):
        print(comparison.status(config))
    elif config.mode == "status":
        print(sweep_table.status(Path(config.run.dir or "")))
    elif config.mode == "report" and sweep.is_folder(config):
        print(sweep.rebuild(Path(config.run.dir)))
    elif config.mode == "report":
        print(comparison.rebuild(config) if comparison.is_folder(config) else run.rebuild(config))
    elif config.dry_run:
        print(dry_run.describe(config))
    else:
        run.run(config, world)
    return 0


def entry() -> None:
    """Define the flags and start."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install PyTorch
    # Each CPU core is a device of its own: independent client batches then run side by side.
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    command.entry(main, Config())


if __name__ == "__main__":
    entry()
