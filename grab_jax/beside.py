"""Another run on the same sentences, for the page that shows two attacks side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from grab_jax import summary
from grab_jax.highlight import Line, highlight
from grab_jax.redact import private
from grab_jax.types import InputError

Record = Mapping[str, Any]


class Beside(NamedTuple):
    """The other run: its attack, its summary, and its lines by the tokens of the true sentence."""

    attack: str
    summary: dict[str, Any]
    lines: dict[tuple[str, ...], list[Line]]

    def take(self, tokens: Sequence[str]) -> Line | None:
        """The next line on this sentence; None where the other run did not attack it."""
        left = self.lines.get(tuple(tokens))
        return left.pop(0) if left else None


def beside(run: Mapping[str, Any], records: Sequence[Record], mine: Sequence[Record], *, redact: bool) -> Beside:
    """The run `records` prepared to stand beside the run `mine`.

    Raises:
      InputError: they have no sentence in common.
    """
    attacked = [record for record in records if not record.get("control")]
    hide = private([*attacked, *mine]) if redact else None
    lines = defaultdict(list)
    for record in attacked:
        for line in highlight(record, hide):
            lines[tuple(record["sentences"][line.score["sentence"]]["tokens"])].append(line)
    if not any(tuple(sentence["tokens"]) in lines for record in mine for sentence in record["sentences"]):
        raise InputError("--report_beside names a run on other sentences; give one on the same data and tokenizer")
    return Beside(str(run.get("attack") or "other"), summary.summarise(records, run), dict(lines))


def row(found: Mapping[str, Any]) -> dict[str, Any]:
    """One line of the table of attacks, from a summary: percent, counts, seconds per sentence."""
    n = found["n_sentences"]
    return {
        "attack": found["attack"] or "attack",
        "rouge": found["rouge"]["one_to_one"],
        "exact": round((found["exact_match"] or 0) * n / 100),
        "certified": found["certified"],
        "n": n,
        "seconds": found["seconds"]["attack"] / n if n else None,
    }
