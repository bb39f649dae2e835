"""Visible progress: a tqdm bar on a terminal, plain lines elsewhere, and a log file; compile time is counted aside."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
from tqdm import tqdm

from grab_jax.attacks.state import Progress

EVERY = 10.0
"""Seconds between two plain lines of one phase."""


class CompileClock:
    """XLA programs since it was made, and the seconds they took; those read from the persistent cache apart."""

    _seconds = 0.0
    _requests = 0
    _hits = 0
    _listening = False

    def __init__(self):
        if not CompileClock._listening:
            jax.monitoring.register_event_duration_secs_listener(CompileClock._on_duration)
            jax.monitoring.register_event_listener(CompileClock._on_event)
            CompileClock._listening = True
        self._from = (CompileClock._seconds, CompileClock._requests, CompileClock._hits)

    @staticmethod
    def _on_duration(event: str, duration: float, **_kwargs) -> None:
        # Of a program read from the cache too: it is the time to get an executable.
        if event == "/jax/core/compile/backend_compile_duration":
            CompileClock._seconds += duration
            CompileClock._requests += 1

    @staticmethod
    def _on_event(event: str, **_kwargs) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            CompileClock._hits += 1

    @property
    def seconds(self) -> float:
        """Seconds spent compiling, or reading compiled programs."""
        return CompileClock._seconds - self._from[0]

    @property
    def count(self) -> int:
        """Programs compiled, small ones included."""
        return CompileClock._requests - self._from[1] - self.hits

    def take(self) -> dict[str, int]:
        """Programs `compiled` and read `from_cache` since the last call; the clock begins anew."""
        found = {"compiled": self.count, "from_cache": self.hits}
        self._from = (CompileClock._seconds, CompileClock._requests, CompileClock._hits)
        return found

    @property
    def hits(self) -> int:
        """Programs read from the persistent compilation cache."""
        return CompileClock._hits - self._from[2]


class Display:
    """Shows `Progress` records; `say` prints a whole line. Everything also goes to the log file, without bars."""

    def __init__(self, style: str, log: Path | None):
        if style == "auto":
            style = "bar" if sys.stderr.isatty() else "lines"
        self._style = style
        self._log = log.open("a", encoding="utf-8") if log else None
        self._bar: tqdm | None = None
        self._total = 0
        self._last = (None, 0.0)
        self._line = ""

    def say(self, text: str) -> None:
        """One line, above the bar if there is one."""
        if self._style != "off":
            tqdm.write(text, file=sys.stderr)
        if self._log:
            self._log.write(text + "\n")
            self._log.flush()

    def begin(self, title: str, total: int) -> None:
        """A new group of batches, `total` continuous steps long."""
        self.say(title)
        self._total = total
        if self._style == "bar":
            self._bar = tqdm(total=total, unit="step", leave=False, dynamic_ncols=True, file=sys.stderr)

    def show(self, progress: Progress, rounds: int, text: Callable[[], str]) -> None:
        """The latest progress; `text()` is only called when something is shown."""
        phase, now = (progress.round, progress.phase), time.monotonic()
        finished = progress.step == progress.steps
        if self._bar is not None and progress.phase == "rows":
            self._bar.total, self._bar.n, self._bar.unit = progress.steps, progress.step, "row"
            self._bar.refresh()
        elif self._bar is not None:
            done = progress.round * self._total // rounds
            if progress.phase != "select":
                done += progress.step if progress.phase == "continuous" else self._total // rounds
            self._bar.total, self._bar.n, self._bar.unit = self._total, done, "step"
            self._bar.set_postfix_str(self._words(progress, rounds, text), refresh=True)
        if phase == self._last[0] and now - self._last[1] < EVERY and not finished:
            return
        self._last = (phase, now)
        line = "  " + self._words(progress, rounds, text) if self._bar is None else ""
        if line and line != self._line:  # what goes on without finding more says nothing new
            self.say(line)
        self._line = line

    def _words(self, progress: Progress, rounds: int, text: Callable[[], str]) -> str:
        if progress.phase == "rows":
            return f"{progress.step} of {progress.steps} input rows found"
        unit = "step" if progress.phase == "continuous" else "batch"
        loss = [value for value in progress.loss.tolist() if value == value and value != float("inf")]
        mean = f", loss {sum(loss) / len(loss):.4g}" if loss else ""
        shown = text() if progress.ids is not None else ""
        scored = f", {progress.scored} scored" if progress.scored else ""
        where = f"{unit} {progress.step}/{progress.steps}"
        said = f"round {progress.round + 1}/{rounds} {progress.phase} {where}{mean}{scored}"
        return f"{said}: {shown[:80]}" if shown else said

    def end(self) -> None:
        """The group is finished."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def close(self) -> None:
        """Close the log."""
        self.end()
        if self._log:
            self._log.close()
