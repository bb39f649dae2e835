"""A run folder made readable: `report.html`, one file without scripts or external loads.

`render` needs `run.json` and `results.jsonl` only, so a report can be rebuilt without running anything. The layout
is `report.html.jinja`; this module computes what it shows, with `highlight`, `redact`, `chart`, `bars`, `evidence`,
`spectrum` and `advice`. Private words are hidden in the page unless `config.report.redact` of the run is false.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, Template

from grab_jax import advice, bars, chart, evidence, spectrum, summary
from grab_jax.beside import Beside
from grab_jax.beside import beside as beside_run
from grab_jax.beside import row as beside_row
from grab_jax.highlight import highlight
from grab_jax.metrics import known
from grab_jax.pieces import Piece
from grab_jax.redact import Private, private, readable
from grab_jax.types import InputError

Record = Mapping[str, Any]

SHOWN_OPEN = 12  # sentences in sight where a long report folds the others away
FOLD_FROM = 64  # sentences from which it does
MAX_TOKENS = 36_000  # tokens shown at most: keeps the page below 5 MB
METRICS = {"rougeL": "ROUGE-L", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "token_accuracy": "Tokens in place"}


def render(
    run_dir: str | os.PathLike[str],
    beside: Sequence[str | os.PathLike[str]] = (),
    *,
    page: Path | None = None,
    skipped: Mapping[str, str] | None = None,
) -> Path:
    """Rebuild `report.html` from the run folder (owner-only, replaced at once) and return its path.

    Args:
      beside: folders of other runs on the same sentences, whose reconstructions are shown under this run's.
      page: where to write instead.
      skipped: attacks that were not run, and why.

    Raises:
      InputError: a folder has no results, one of its files is damaged, or the runs have no sentence in common.
    """
    folder = Path(run_dir)
    run, records = read(folder)
    attacked = [record for record in records if not record.get("control")]
    hide = advice.settings(run).get("report_redact") is not False
    # Scores of a run in which nothing could be tested would read as a protected client.
    tested = any(evidence.tested(record) for record in attacked)
    others = [beside_run(*read(Path(one), "--report_beside"), attacked, redact=hide) for one in beside]
    cards = _cards(attacked, private(attacked) if hide else None, others) if tested else []
    found = summary.summarise(records, run)
    text = template("report.html.jinja").render(
        run=run,
        summary=found,
        attacks=[beside_row(one) for one in (found, *(other.summary for other in others))] if others or skipped else [],
        skipped=skipped or {},
        glance=_glance(attacked, records) if tested else [],
        labels=_labels(attacked),
        cards=cards,
        n_open=SHOWN_OPEN if len(cards) >= FOLD_FROM else len(cards),
        n_hidden=sum(max(1, len(r["sentences"])) for r in attacked) - len(cards),
        redacted=hide,
        evidence=evidence.table(attacked),
        searched=any(evidence.searched(record) for record in attacked),
        contextual=any(evidence.of(record).get("contextual") for record in attacked),
        merged=advice.settings(run).get("client_dropout") == 0,
        spectrum=spectrum.chart(attacked),
        trajectory=chart.trajectory(attacked),
        layers=bars.layers(attacked),
        sites=bars.sites(attacked),
        advice=advice.advice(run, run_dir, attacked),
        repeat=advice.command(run, run_dir, "again"),
        notes=_notes(run, attacked),
        n_control=len(records) - len(attacked),
    )
    return write(page or folder / "report.html", text)


# --- reading and writing a run folder ---------------------------------------------------------------------


def read(folder: Path, flag: str = "--run_dir") -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`run.json` and those records of `results.jsonl` that belong to it (older code leaves others behind).

    Args:
      flag: what named the folder, for the error messages.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give the folder of a finished run with {flag}.")
    for name in ("run.json", "results.jsonl"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} holds no {name}, so it is no run with results; give another {flag}.")
    run = _parse((folder / "run.json").read_text("utf-8", "replace"), f"{folder / 'run.json'}")
    where = folder / "results.jsonl"
    lines = where.read_text("utf-8", "replace").split("\n")
    records = [_record(line, f"{where}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not records:
        raise InputError(f"{where} is empty, so there is nothing to report; run an attack into {folder} first.")
    mine = [record for record in records if record.get("id") in run.get("ids", [record.get("id")])]
    if not mine:
        raise InputError(f"{where} holds only results of other code or data; run an attack into {folder} again.")
    return run, mine


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is damaged ({error}); repair or delete it and run again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{where} holds {type(value).__name__}, expected a JSON object.")
    return value


def _record(line: str, where: str) -> dict[str, Any]:
    """One line of results, with the parts every reader relies on checked."""
    record = _parse(line, where)
    for part in ("sentences", "predictions"):
        items = record.get(part)
        if not isinstance(items, list) or not all(map(_is_text, items)):
            raise InputError(f"{where} is damaged: {part!r} is not a list of objects with text and tokens.")
    return record


def _is_text(item: Any) -> bool:
    """Whether it is an object with a text and its tokens."""
    if not isinstance(item, dict) or not isinstance(item.get("text"), str):
        return False
    return isinstance(item.get("tokens"), list) and all(isinstance(token, str) for token in item["tokens"])


def write(path: Path, text: str) -> Path:
    """Write a page for the owner only, then put in place in one step."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    draft.replace(path)
    return path


def template(name: str) -> Template:
    """A page's template; `page.css` is the style of all."""
    loader = FileSystemLoader(Path(__file__).parent)
    env = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"duration": duration, "number": number, "share": share, "small": small}
    return env.get_template(name)


# --- what the page shows ----------------------------------------------------------------------------------


def _glance(attacked: Sequence[Record], records: Sequence[Record]) -> list[dict[str, Any]]:
    """Rows of the first table: per metric the value of each sentence, and the baseline where there is one."""
    rows = [row for record in attacked for row in summary.score_batch(record)]
    base = summary.baseline(records) or {}
    return [
        {"key": key, "name": name, "values": sorted(row[key] for row in rows), "baseline": base.get(key)}
        for key, name in METRICS.items()
        if rows
    ]


def _cards(attacked: Sequence[Record], hide: Private | None, others: Sequence[Beside]) -> list[dict[str, Any]]:
    """One entry per sentence, the most leaked first, as many as the page can hold."""
    # One wrong certificate leaves the others a claim, not a proof.
    word = "certified" if evidence.counts(attacked)["certified_wrong"] else "proven"
    cards = [card for record in attacked for card in _batch_cards(record, hide, word, others)]
    cards.sort(key=lambda card: -1.0 if card["score"] is None else -card["score"]["rougeL"])
    total, kept = 0, []
    for card in cards:
        total += len(card["truth"]) + len(card["found"])
        if total > MAX_TOKENS and kept:
            break
        kept.append(card)
    return kept


def _batch_cards(record: Record, hide: Private | None, word: str, others: Sequence[Beside]) -> list[dict[str, Any]]:
    """Truth against reconstruction; where no truth is known, the reconstructions alone."""
    guesses, proofs = record["predictions"], evidence.words(record, word)
    if not record["sentences"]:
        rows = zip(readable(record, hide)[1], guesses, proofs, strict=True)
        return [
            {"score": None, "batch": record.get("index"), "truth": [], "proof": proof, "tested": True}
            | {"found": _tokens([(piece, "") for piece in row], guess)}
            for row, guess, proof in rows
        ]
    return [
        {
            "score": line.score,
            "truncated": record["sentences"][line.score["sentence"]].get("truncated"),
            "batch": record.get("index"),
            "tested": evidence.tested(record),
            "proof": "" if line.score["prediction"] is None else proofs[line.score["prediction"]],
            "truth": _tokens(line.truth),
            "found": [] if line.found is None else _tokens(line.found, guesses[line.score["prediction"]]),
            "beside": _beside(others, record["sentences"][line.score["sentence"]]["tokens"]),
        }
        for line in highlight(record, hide)
    ]


def _beside(others: Sequence[Beside], tokens: Sequence[str]) -> list[dict[str, Any]]:
    """What the other runs made of a sentence; those that did not attack it are left out."""
    lines = [(other.attack, other.take(tokens)) for other in others]
    return [
        {"attack": attack, "found": _tokens(line.found or []), "score": line.score} for attack, line in lines if line
    ]


def _tokens(row: Sequence[tuple[Piece, str]], guess: Record | None = None) -> list[tuple]:
    """(glue, text, mark, confidence in percent or None) of each token."""
    values = (guess or {}).get("confidence")
    percent = [None if (c := known(value)) is None else round(100 * c) for value in values or []]
    percent += [None] * (len(row) - len(percent))
    return [(piece.glue, piece.text, mark, c) for (piece, mark), c in zip(row, percent, strict=False)]


def _labels(attacked: Sequence[Record]) -> tuple[int, int] | None:
    """How many class labels the attack inferred right, and of how many; None where it was told them."""
    hits = total = 0
    for record in attacked:
        labels = record.get("labels") or []
        for score in summary.score_batch(record) if labels else []:
            j, true = score["prediction"], record["sentences"][score["sentence"]].get("label")
            total += 1
            hits += j is not None and j < len(labels) and labels[j] == true
    return (hits, total) if total else None


def _notes(run: Mapping[str, Any], attacked: Sequence[Record]) -> list[tuple[str, int]]:
    """Each note once, with the number of batches that carry it (0 for notes on the run)."""
    counts = Counter(note for record in attacked for note in dict.fromkeys(record.get("notes") or []))
    return [(note, 0) for note in dict.fromkeys(run.get("notes") or [])] + list(counts.items())


# --- numbers for people -----------------------------------------------------------------------------------


def number(value: float | int | None, digits: int = 1) -> str:
    """A number with fixed digits, never a minus before zero; an en dash for what is unknown."""
    return "–" if value is None else f"{value:z.{digits}f}".replace("-", "−")


def duration(seconds: float | int | None) -> str:
    """`4.2 s`, `12 min 30 s`, `3 h 05 min`."""
    if seconds is None:
        return "–"
    if seconds < 59.95:
        return "less than 0.1 s" if 0 < seconds < 0.05 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def share(value: float | None) -> str:
    """A share in percent, rounded down: what is not quite everything never reads 100 %."""
    return "–" if value is None else f"{number(math.floor(1000 * min(value, 1)) / 10, 0 if value >= 1 else 1)} %"


def small(value: float | None) -> str:
    """A power of ten with one digit before it: `3.7·10⁻⁷`."""
    if value is None:
        return "–"
    digits, power = f"{value:.1e}".split("e")
    return f"{digits}·10{str(int(power)).translate(chart.SUPERSCRIPT)}" if value else "0"
