"""Truth against reconstruction, token by token: which tokens are right, moved, wrong or missing.

`highlight` is what the page and the terminal both show; `terminal` writes it with ANSI colours, or with marks alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from grab_jax import metrics, summary
from grab_jax.pieces import Piece
from grab_jax.redact import Private, private, readable

ANSI = {"right": "1;30;43", "moved": "4;33", "wrong": "9;2", "missing": "2"}
MARK = {"right": "{}", "moved": "~{}~", "wrong": "!{}!", "missing": "_{}_"}
LEGEND = {"right": "right", "moved": "right token, wrong place", "wrong": "wrong", "missing": "missing"}


class Line(NamedTuple):
    """A sentence and its reconstruction: scores (a row of `summary.score_batch`), pieces and the mark of each.

    `found` is None where the sentence got no prediction.
    """

    score: dict[str, Any]
    truth: list[tuple[Piece, str]]
    found: list[tuple[Piece, str]] | None


def highlight(record: Mapping[str, Any], hide: Private | None = None) -> list[Line]:
    """One line per sentence of a record; what `hide` lists is replaced, the marks compare what is behind it."""
    truth, found = readable(record, hide)
    lines = []
    for score in summary.score_batch(record):
        i, j = score["sentence"], score["prediction"]
        guess = [] if j is None else record["predictions"][j]["tokens"]
        marks = metrics.align(record["sentences"][i]["tokens"], guess)
        shown = None if j is None else list(zip(found[j], marks.prediction, strict=True))
        lines.append(Line(score, list(zip(truth[i], marks.truth, strict=True)), shown))
    return lines


def terminal(record: Mapping[str, Any], *, colour: bool, redact: bool = False) -> str:
    """Truth against reconstruction: marks on every token but the right ones, ANSI codes too if `colour`."""
    out = []
    for line in highlight(record, private([record]) if redact else None):
        right = sum(mark == "right" for _, mark in line.truth)
        head = f"batch {line.score['batch']}, sentence {line.score['sentence']}: ROUGE-L {line.score['rougeL']:.1f}"
        sure = f", {line.score['proof']}" if line.score["proof"] else ""
        out.append(f"{head}, {right} of {len(line.truth)} tokens in place{sure}")
        out.append(f"  truth {_words(line.truth, colour)}")
        out.append(f"  found {_words(line.found, colour) if line.found else ' (nothing)'}")
    legend = "   ".join(_paint(text, mark, colour) for mark, text in LEGEND.items())
    return "\n".join([*out, f"  legend: {legend}"])


def _words(row: Iterable[tuple[Piece, str]], colour: bool) -> str:
    return "".join(("" if piece.glue else " ") + _paint(piece.text, mark, colour) for piece, mark in row)


def _paint(text: str, mark: str, colour: bool) -> str:
    text = MARK[mark].format(text)
    return f"\x1b[{ANSI[mark]}m{text}\x1b[0m" if colour else text
