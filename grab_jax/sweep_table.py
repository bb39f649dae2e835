"""The cells of a sweep as a table: states, scores with intervals, seconds, compiled programs; how far it is.

`sweep.json` and `sweep.csv` hold one row per cell; scores are in percent, intervals are 95 % (`metrics`), `seconds` are
of the whole cell. What a process notes of a cell lies in `cells/<id>.json`, next to the lock it held.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grab_jax import folder as folders
from grab_jax.report import duration, number
from grab_jax.types import InputError

LISTED = "sweep.json"
SCHEMA = "grab_jax.sweep/1"
BEGUN = "begun"
"""What is noted of a cell before it runs; where no process holds it, the one that did died in it, or was stopped."""
SCORES = ("rouge1", "rouge2", "rougeL", "token_accuracy", "exact_match")
"""Each with the ends of its interval, `<score>_low` and `<score>_high`."""


def words(values: Mapping[str, Any]) -> str:
    """The swept values of a cell, as a person reads them."""
    return ", ".join(f"{name}={word(value)}" for name, value in values.items())


def word(value: Any) -> str:
    """One value as its flag takes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


# --- what a sweep keeps of its cells ------------------------------------------------------------------------


def enlist(base: Path, swept: Mapping[str, Sequence[Any]], cells: Mapping[str, Mapping[str, Any]]) -> None:
    """Begin `sweep.json`: what is swept, and the values of every cell by its id; cells of an earlier command stay.

    To be called by one process at a time.

    Raises:
      InputError: it lists cells of other swept flags, or of other settings.
    """
    before = folders.read_json(base / LISTED) if (base / LISTED).is_file() else {}
    others = [row for row in before.get("cells", []) if row["id"] not in cells]
    for row in others:
        if row["values"].keys() != swept.keys() or row["values"] in map(dict, cells.values()):
            raise InputError(
                f"--run_dir={base} holds a sweep with other settings (its cell {words(row['values'])} is none of "
                "these); give another folder, or repeat its settings"
            )
    rows = [{"id": cell, "values": dict(values)} for cell, values in cells.items()]
    rows += [{"id": row["id"], "values": row["values"]} for row in others]
    known = {name: list(dict.fromkeys([*swept[name], *(row["values"][name] for row in others)])) for name in swept}
    _save(base, {"schema": SCHEMA, "swept": known, "cells": rows})


def listed(base: Path) -> dict[str, Any]:
    """The content of `sweep.json`.

    Raises:
      InputError: the folder is not that of a sweep, or the file is damaged.
    """
    if not (base / LISTED).is_file():
        raise InputError(f"{base} holds no {LISTED}, so it is not the folder of a sweep; give one with --run_dir")
    return folders.read_json(base / LISTED)


def lock(base: Path, cell: str) -> Path:
    """The file that the process that runs a cell holds."""
    return base / "cells" / f"{cell}.lock"


def noted(base: Path, cell: str) -> dict[str, Any]:
    """What was noted of a cell: state, error, tries, seconds, programs compiled and read from the cache."""
    path = base / "cells" / f"{cell}.json"
    return folders.read_json(path) if path.is_file() else {}


def note(base: Path, cell: str, value: Mapping[str, Any]) -> None:
    """Keep what is known of a cell."""
    folders.write_json(base / "cells" / f"{cell}.json", dict(value))


def _save(base: Path, value: Mapping[str, Any]) -> None:
    folders.write_json(base / LISTED, value)


# --- the table ----------------------------------------------------------------------------------------------


def collect(base: Path) -> list[dict[str, Any]]:
    """One row per cell, in the order of the sweep."""
    return [_row(base, cell["id"], cell["values"]) for cell in listed(base)["cells"]]


def _row(base: Path, cell: str, values: Mapping[str, Any]) -> dict[str, Any]:
    known = noted(base, cell)
    row = {"id": cell, "values": dict(values), "state": _state(base, cell, known), "error": known.get("error")}
    row |= {name: known.get(name) for name in ("tries", "seconds", "compiled", "from_cache")}
    summary = base / cell / "summary.json"
    if row["state"] != "done" or not summary.is_file():
        return row
    return row | _scores(folders.read_json(summary)) | _utility(base / cell / "utility.json")


def _utility(path: Path) -> dict[str, Any]:
    """Held-out accuracy with its interval, and the share of the commonest label, where they were measured."""
    if not path.is_file():
        return {}
    found = folders.read_json(path)
    return {name: found[name] for name in ("accuracy", "accuracy_low", "accuracy_high", "accuracy_before", "majority")}


def _scores(summary: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: summary.get(name) for name in ("outcome", "n_sentences", "n_batches", "certified", "masks_auc")}
    values = {**summary["rouge"]["one_to_one"], **{name: summary.get(name) for name in SCORES[3:]}}
    for name in SCORES:
        low, high = summary["intervals"].get(name) or (None, None)
        found |= {name: values.get(name), f"{name}_low": low, f"{name}_high": high}
    found["baseline_rougeL"] = (summary.get("baseline") or {}).get("rougeL")
    return found | {f"seconds_{part}": value for part, value in summary["seconds"].items()}


def _state(base: Path, cell: str, known: Mapping[str, Any]) -> str:
    if (base / "cells").is_dir():
        with folders.alone(lock(base, cell)) as free:
            if not free and known.get("state") != "done":
                return "running"
    state = known.get("state", "pending")
    return "pending" if state == BEGUN else state


def write(base: Path) -> list[dict[str, Any]]:
    """Bring `sweep.json` and `sweep.csv` up to date; returns the rows."""
    rows = collect(base)
    _save(base, {**listed(base), "cells": rows})
    flat = [{**row["values"], **{name: value for name, value in row.items() if name != "values"}} for row in rows]
    columns = list(dict.fromkeys(name for row in sorted(flat, key=len, reverse=True) for name in row))
    file = io.StringIO()
    table = csv.DictWriter(file, columns, restval="", lineterminator="\n")
    table.writeheader()
    table.writerows(flat)
    folders.write_text(base / "sweep.csv", file.getvalue())
    return rows


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table for a terminal."""
    swept = list(rows[0]["values"])
    trained = any("accuracy" in row for row in rows)
    lines = [
        [
            *swept,
            "ROUGE-L",
            "word for word",
            *(["accuracy"] if trained else []),
            "sentences",
            "time",
            "compiled",
            "outcome",
        ]
    ]
    for row in rows:
        accuracy = [span(row, "accuracy")] if trained else []
        shown = [span(row, "rougeL"), span(row, "exact_match"), *accuracy, str(row.get("n_sentences", "–"))]
        said = row.get("outcome") or row["state"] + (f": {row['error']}" if row["error"] else "")
        cost = [duration(row["seconds"]), "–" if row["compiled"] is None else str(row["compiled"])]
        lines.append([*(word(row["values"][name]) for name in swept), *shown, *cost, said])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def span(row: Mapping[str, Any], score: str) -> str:
    """A score and its interval: `71.2 [60.1, 80.4]`."""
    low, high = row.get(f"{score}_low"), row.get(f"{score}_high")
    return number(row.get(score)) + ("" if low is None else f" [{number(low)}, {number(high)}]")


# --- how far it is ------------------------------------------------------------------------------------------


def status(base: Path) -> str:
    """Cells by state, one line each, and the time left; of a single run, its finished batches."""
    if (base / "run.json").is_file():
        done, total = _batches(base.parent, base.name)
        return f"{base}: {done} of {total} batches are done"
    rows = collect(base)
    counts = Counter(row["state"] for row in rows)
    said = ", ".join(f"{counts[state]} {state}" for state in ("done", "running", "failed", "pending"))
    lines = [f"{row['state']:8s} {row['id']}  {words(row['values'])}{_progress(base, row)}" for row in rows]
    return "\n".join([f"{base}: {len(rows)} cells: {said}; {_left(base, rows)}", *lines])


def _progress(base: Path, row: Mapping[str, Any]) -> str:
    if row["state"] == "failed":
        return f": {row['error']} (tried {row['tries']} times)"
    if row["state"] == "done":
        return f": {duration(row['seconds'])}, ROUGE-L {number(row.get('rougeL'))}"
    done, total = _batches(base, row["id"])
    return f": {done} of {total} batches" if total else ""


def _batches(base: Path, cell: str) -> tuple[int, int]:
    """Client batches of a cell that are finished, and how many there are (0 before it began)."""
    described = base / cell / "run.json"
    if not described.is_file():
        return 0, 0
    ids, done = folders.read_json(described).get("ids", []), folders.finished(base / cell)
    return sum(one in done for one in ids), len(ids)


def _left(base: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """Time left, if the cells to come take as long as those done of their attack; several processes share it."""
    waiting = [row for row in rows if row["state"] in ("pending", "running")]
    if not waiting:
        return "nothing left to run"
    running = sum(row["state"] == "running" for row in rows)
    done = [row for row in rows if row["state"] == "done"]
    if not done:
        return "time left unknown until the first cell is done"
    seconds = 0.0
    for row in waiting:
        alike = [one for one in done if one["values"].get("attack") == row["values"].get("attack")] or done
        finished, total = _batches(base, row["id"])
        seconds += sum(one["seconds"] for one in alike) / len(alike) * (1 - finished / total if total else 1)
    text = f"about {duration(seconds / max(1, running))} left"
    return text if running else f"{text}, but no process runs it: the same command goes on"
