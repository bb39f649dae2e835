"""Benchmark: client batches per hour of whole attacks, many together against one at a time, and the time to begin.

    python experiments/bench_throughput.py --num_batches=64

Each line of the table is a run of `grab_jax.main` in a process of its own: the same sentences and settings with
`--run_group` as given and with 1, for Grab (`grab_reduced.flags`) and for span decoding, which always takes one
batch at a time. Batches per hour count attacking, without compilation. The first run starts with an empty compilation
cache; the same run is started a second time with the cache it filled, and stopped at its first step. Seconds to that
step, as shown on the terminal, are from the start of the process, imports and loading included.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import common
from absl import app, flags

MODEL = flags.DEFINE_string("model", "builtin:bert-mini", "model to attack")
DATA = flags.DEFINE_string("data", "builtin", "sentences, as --data of grab_jax.main")
BATCHES = flags.DEFINE_integer("num_batches", 64, "client batches of one sentence each", lower_bound=1)
TOGETHER = flags.DEFINE_integer("together", 8, "client batches in one program", lower_bound=2)
ATTACKS = flags.DEFINE_list("attacks", ["grab", "span"], "attacks to run")
SETTINGS = flags.DEFINE_string("settings", "", "further flags of grab_jax.main for Grab, such as --attack_steps=100")

ROOT = Path(__file__).parents[1]
BEGUN = {"grab": " continuous step ", "span": " input rows found"}
"""What the first progress that an attack shows says."""


class Run(NamedTuple):
    """One run: seconds to its first step, of the whole process, of attacking; sentences recovered word for word.

    All but the first are NaN where it was stopped there.
    """

    first: float
    whole: float
    attack: float
    exact: float


def measure(attack: str, group: int, folder: Path, cache: Path, *, whole: bool = True) -> Run:
    """Run an attack in a new process, with a compilation cache; not `whole` stops it at its first step."""
    given = [f"--model={MODEL.value}", f"--data={DATA.value}", f"--num_batches={BATCHES.value}", "--batch_size=1"]
    preset = "grab_reduced" if attack == "grab" else "span"
    command = [
        sys.executable, "-m", "grab_jax.main", f"--flagfile={ROOT}/experiments/{preset}.flags", *given,
        f"--run_group={group}", f"--run_dir={folder}", "--run_progress=lines",
        *(shlex.split(SETTINGS.value) if attack == "grab" else ()),
    ]  # fmt: skip
    env = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    begin, first, said = time.perf_counter(), None, []
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as one:
        for line in one.stderr:
            said.append(line)
            if first is None and BEGUN[attack] in line:
                first = time.perf_counter() - begin
                if not whole:
                    one.kill()
                    return Run(first, *[float("nan")] * 3)
    seconds = time.perf_counter() - begin
    if one.returncode or first is None:
        sys.exit(f"{shlex.join(command)} ended with {one.returncode}:\n{''.join(said[-20:])}")
    summary = json.loads((folder / "summary.json").read_text())
    return Run(first, seconds, summary["seconds"]["attack"], summary["exact_match"])


def hourly(run: Run) -> float:
    """Client batches attacked in an hour."""
    return 3600 * BATCHES.value / run.attack


def compare(attack: str, base: Path) -> None:
    """Measure one attack and print its lines of the table."""
    cache = base / f"{attack}-cache"
    groups = [TOGETHER.value, 1] if attack == "grab" else [1]
    cold = measure(attack, groups[0], base / f"{attack}-{groups[0]}", cache)
    print(common.line(attack, groups[0], "first", *_shown(cold)), flush=True)
    warm = measure(attack, groups[0], base / f"{attack}-again", cache, whole=False)
    print(common.line(attack, groups[0], "again", *_shown(warm)), flush=True)
    for group in groups[1:]:
        run = measure(attack, group, base / f"{attack}-{group}", cache)
        print(common.line(attack, group, "alone", *_shown(run)), flush=True)
        print(f"\n{attack}: {hourly(cold) / hourly(run):.2f} x as many batches an hour in groups of {groups[0]}\n")
    print(f"\n{attack}: first step after {cold.first:.1f} s, with a filled cache after {warm.first:.1f} s")
    print(f"{cold.first / warm.first:.2f} x sooner\n", flush=True)


def _shown(run: Run) -> tuple[str, ...]:
    if math.isnan(run.whole):
        return "", f"{run.first:.1f}", "", ""
    return f"{hourly(run):.0f}", f"{run.first:.1f}", f"{run.whole:.1f}", f"{run.exact:.0f} %"


def main(_argv: list[str]) -> None:
    """Measure and print."""
    where = f"{MODEL.value}, {DATA.value}, {os.cpu_count()} cores"
    print(f"{BATCHES.value} client batches of one sentence, {where} {SETTINGS.value}".rstrip())
    print(common.header("attack", "together", "run", "batches an hour", "s to first step", "s in all", "word for word"))
    with tempfile.TemporaryDirectory() as base:
        for attack in ATTACKS.value:
            compare(attack, Path(base))


if __name__ == "__main__":
    app.run(main)
