"""A run folder made readable: `report.html`, terminal highlight, `curves.npz`, redaction of private words.

`render` needs `run.json` and `results.jsonl` only, so a report can be rebuilt without running anything. The
page is one file without scripts or external loads; its layout is `report.html.jinja`, this module computes
what the layout shows. Private words are hidden in the page unless `config.report.redact` of the run is false.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader

from grab_jax import metrics
from grab_jax.types import InputError

Record = Mapping[str, Any]

SHOWN_OPEN = 12  # sentences in sight where a long report folds the others away
FOLD_FROM = 64  # sentences from which it does
MAX_TOKENS = 36_000  # tokens shown at most: keeps the page below 5 MB
MAX_LINES, MAX_POINTS = 100, 240  # thin lines of the loss chart, points of each


def render(run_dir: str | os.PathLike[str]) -> Path:
    """Rebuild `report.html` from the run folder (owner-only, replaced at once) and return its path.

    Raises:
      InputError: the folder has no results, or one of its files is damaged.
    """
    folder = Path(run_dir)
    run, records = read(folder)
    attacked = [record for record in records if not record.get("control")]
    hide = _flags(run).get("report_redact") is not False
    cards = _cards(attacked, private(attacked) if hide else None)
    page = _template().render(
        run=run,
        summary=metrics.summarise(records, run),
        glance=_glance(attacked, records),
        labels=_labels(attacked),
        cards=cards,
        n_open=SHOWN_OPEN if len(cards) >= FOLD_FROM else len(cards),
        n_hidden=sum(max(1, len(r["sentences"])) for r in attacked) - len(cards),
        redacted=hide,
        trajectory=trajectory(attacked),
        layers=_layers(attacked),
        sites=_sites(attacked),
        advice=_advice(run, str(run_dir)),
        repeat=_command(run_dir, run, "again"),
        notes=_notes(run, attacked),
        n_control=len(records) - len(attacked),
    )
    return _write(folder / "report.html", page)


# --- reading and writing a run folder ---------------------------------------------------------------------


def read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`run.json` and the records of `results.jsonl`."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give the folder of a finished run with --run_dir.")
    for name in ("run.json", "results.jsonl"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} holds no {name}, so it is no run with results; give another --run_dir.")
    run = _parse((folder / "run.json").read_text("utf-8", "replace"), f"{folder / 'run.json'}")
    lines = (folder / "results.jsonl").read_text("utf-8", "replace").split("\n")
    where = folder / "results.jsonl"
    records = [_record(line, f"{where}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not records:
        raise InputError(f"{where} is empty, so there is nothing to report; run an attack into {folder} first.")
    return run, records


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
        good = isinstance(items, list) and all(
            isinstance(item, dict) and isinstance(item.get("text"), str) and _is_words(item.get("tokens"))
            for item in items
        )
        if not good:
            raise InputError(f"{where} is damaged: {part!r} is not a list of objects with text and tokens.")
    return record


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(token, str) for token in value)


def _write(path: Path, text: str) -> Path:
    """Write for the owner only, then put in place in one step."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    draft.replace(path)
    return path


def _template() -> Any:
    loader = FileSystemLoader(Path(__file__).parent)
    env = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"duration": duration, "number": number}
    return env.get_template("report.html.jinja")


def save_curves(run_dir: str | os.PathLike[str], records: Sequence[Record]) -> Path:
    """Write `curves.npz`, one row per trace entry and one `cosine` row per record, and return its path.

    `batch`, `round`, `phase` ("continuous" or "discrete"), `step` and `loss` describe the trace;
    `cosine[i, j]` belongs to record `cosine_batch[i]` and tensor `cosine_name[j]` and is NaN where unknown.
    Control records are left out.
    """
    attacked = [record for record in records if not record.get("control")]
    rows = [(record.get("index", i), entry) for i, record in enumerate(attacked) for entry in record.get("trace") or []]
    names = sorted({name for record in attacked for name in record.get("cosine") or {}})
    cosine = [[_float((record.get("cosine") or {}).get(name)) for name in names] for record in attacked]
    path = Path(run_dir) / "curves.npz"
    np.savez_compressed(
        path,
        batch=np.array([index for index, _ in rows], np.int64),
        round=np.array([entry.get("round", 0) for _, entry in rows], np.int64),
        phase=np.array([str(entry.get("phase", "")) for _, entry in rows], "U16"),
        step=np.array([entry.get("step", 0) for _, entry in rows], np.int64),
        loss=np.array([_float(entry.get("loss")) for _, entry in rows], np.float64),
        cosine_batch=np.array([record.get("index", i) for i, record in enumerate(attacked)], np.int64),
        cosine_name=np.array(names, "U256"),
        cosine=np.array(cosine, np.float64).reshape(len(attacked), len(names)),
    )
    return path


# --- word pieces as a person reads them -------------------------------------------------------------------


class Piece(NamedTuple):
    """A token for the eye: its text, and whether it joins on to the token before it."""

    glue: bool
    text: str


def pieces(tokens: Sequence[str], byte_level: bool | None = None) -> list[Piece]:
    """Undo the word-piece spelling (`##ing`, `Ġthe`, `▁the`); unprintable characters become `\ufffd`."""
    byte_level = any(token.startswith("Ġ") for token in tokens) if byte_level is None else byte_level
    marked = byte_level or any(token.startswith("▁") for token in tokens)
    out: list[Piece] = []
    for i, token in enumerate(tokens):
        text = _bytes_text(token) if byte_level else token.replace("▁", " ")
        if marked:
            glue, text = i > 0 and not text.startswith(" "), text.strip(" ")
        else:
            glue, text = token.startswith("##") and len(token) > 2, token.removeprefix("##") or token
            glue = glue or (i > 0 and _hugs(tokens, i))
        out.append(Piece(glue, "".join(c if c.isprintable() else "\ufffd" for c in text)))
    return out


def _hugs(tokens: Sequence[str], i: int) -> bool:
    """Whether token i reads better without a space before it: closing marks, `'s` and the like."""
    tail = ("s", "t", "d", "m", "re", "ve", "ll")
    apostrophe = tokens[i] in ("'", "’") and i + 1 < len(tokens) and tokens[i + 1] in tail
    return apostrophe or tokens[i] in set(".,;:!?)]%") or (tokens[i] in tail and tokens[i - 1] in ("'", "’"))


@lru_cache(maxsize=1)
def _byte_of() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters, inverted."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def _bytes_text(token: str) -> str:
    table = _byte_of()
    if not all(char in table for char in token):
        return token
    return bytes(table[char] for char in token).decode("utf-8", "replace")


# --- redaction --------------------------------------------------------------------------------------------

_MAIL = re.compile(r"[\w.+-]+ ?@ ?[\w-]+(?: ?\. ?[\w-]+)+")
_PHONE = re.compile(r"(?:\+ ?)?\(? ?\d(?:[ ()./-]*\d){6,}")
_NUMBER = re.compile(r"\w*\d\w*(?:[.,:]\d+)*")
_NAME = re.compile(r"[^\W\d_][\w’'-]*")
_QUOTES = " \t\n\"'“”‘’()[]-"
_TITLE = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr)\.\s*$")
_COMMON = frozenset(
    re.findall(r"\S+", "a an the of in on at to for and or but with by from is i i'm i'd i'll i've mr mrs ms dr prof")
)


class Span(NamedTuple):
    """Characters `[start, end)` of a text to hide, and what they are."""

    start: int
    end: int
    kind: str


def private_spans(text: str, names: Iterable[str] = ()) -> list[Span]:
    """Mails, phones, numbers, names: capitalised words that start no sentence, or that are in `names`."""
    spans: list[Span] = []

    def add(start: int, end: int, kind: str) -> None:
        if all(end <= other.start or other.end <= start for other in spans):
            spans.append(Span(start, end, kind))

    for kind, pattern in (("mail", _MAIL), ("phone", _PHONE), ("number", _NUMBER)):
        for match in pattern.finditer(text):
            add(*match.span(), kind)
    known = {name.casefold() for name in names}
    for match in _NAME.finditer(text):
        word, before = match[0], text[: match.start()].rstrip(_QUOTES)
        if word[0].isupper() and word.lower().replace("’", "'") not in _COMMON:
            starts = not before or (before[-1] in ".!?…" and not _TITLE.search(before[-6:]))
            if not starts or word.casefold() in known:
                add(*match.span(), "name")
    return sorted(spans)


def redact_text(text: str) -> str:
    """The text with each private span replaced by its kind in brackets."""
    for span in reversed(private_spans(text)):
        text = f"{text[: span.start]}[{span.kind}]{text[span.end :]}"
    return text


class Private(NamedTuple):
    """What to hide: `names` as spelled in the truth, `tokens` by (glue, case-folded text) with their kind."""

    names: frozenset[str]
    tokens: Mapping[tuple[bool, str], str]


def private(records: Iterable[Record]) -> Private:
    """The private names and tokens of the true sentences of some records."""
    records = list(records)
    texts = [sentence["text"] for record in records for sentence in record["sentences"]]
    names = frozenset(t[s.start : s.end] for t in texts for s in private_spans(t) if s.kind == "name")
    tokens: dict[tuple[bool, str], str] = {}
    for record in records:
        for row, sentence in zip(_rows(record)[0], record["sentences"], strict=True):
            for piece, kind in zip(row, _kinds(row, sentence["text"], names), strict=True):
                if kind and any(c.isalnum() for c in piece.text):
                    tokens[_key(piece)] = kind
    return Private(names, tokens)


def display(record: Record, hide: Private | None) -> tuple[list[list[Piece]], list[list[Piece]]]:
    """The pieces of each sentence and of each prediction, one per token, private ones replaced.

    What `hide` lists is hidden in every prediction, besides what a text shows by itself. Of several hidden
    neighbours the first shows the kind, the others a dot.
    """
    truth, found = _rows(record)
    if hide is None:
        return truth, found
    texts = [[item["text"] for item in record[part]] for part in ("sentences", "predictions")]
    hidden = [_hide(row, _kinds(row, text, hide.names)) for row, text in zip(truth, texts[0], strict=True)]
    return hidden, [_hide(row, _guess(row, text, hide)) for row, text in zip(found, texts[1], strict=True)]


def _rows(record: Record) -> list[list[list[Piece]]]:
    """Pieces of the sentences, pieces of the predictions."""
    groups = [[item["tokens"] for item in record[part]] for part in ("sentences", "predictions")]
    byte_level = any(token.startswith("Ġ") for group in groups for tokens in group for token in tokens)
    return [[pieces(tokens, byte_level) for tokens in group] for group in groups]


def _guess(row: list[Piece], text: str, hide: Private) -> list[str | None]:
    """Kinds to hide in a prediction: what its text shows, listed tokens, punctuation between two of them."""
    own = _kinds(row, text, hide.names)
    kinds = [kind or hide.tokens.get(_key(piece)) for kind, piece in zip(own, row, strict=True)]
    for i in range(1, len(row) - 1):
        if not any(c.isalnum() for c in row[i].text) and kinds[i - 1] == kinds[i + 1]:
            kinds[i] = kinds[i] or kinds[i - 1]
    return kinds


def _key(piece: Piece) -> tuple[bool, str]:
    return piece.glue, piece.text.casefold()


def _hide(row: list[Piece], kinds: list[str | None]) -> list[Piece]:
    out = []
    for i, (piece, kind) in enumerate(zip(row, kinds, strict=True)):
        again = i > 0 and kind == kinds[i - 1]
        out.append(piece if kind is None else Piece(again, "·" if again else f"[{kind}]"))
    return out


def _kinds(row: list[Piece], text: str, names: Iterable[str]) -> list[str | None]:
    """For each piece, looked up from left to right, the kind of the private span it lies in, or None."""
    spans, plain, at = private_spans(text, names), [], []
    for i, char in enumerate(text):
        bare = _bare(char)
        plain.append(bare)
        at += [i] * len(bare)
    flat, cursor, kinds = "".join(plain), 0, []
    for piece in row:
        word = _bare(piece.text)
        start = flat.find(word, cursor) if word else -1
        if start < 0:
            kinds.append("number" if any(c.isdigit() for c in piece.text) else None)
            continue
        cursor = start + len(word)
        first, last = at[start], at[cursor - 1]
        kinds.append(next((s.kind for s in spans if s.start <= last and first < s.end), None))
    return kinds


@lru_cache(maxsize=1 << 14)
def _bare(text: str) -> str:
    """Lower case, without accents and white space: what an uncased tokenizer leaves of a text."""
    parts = unicodedata.normalize("NFD", text.lower())
    return "".join(c for c in parts if unicodedata.category(c) != "Mn" and not c.isspace())


# --- the terminal -----------------------------------------------------------------------------------------

_ANSI = {"right": "1;30;43", "moved": "4;33", "wrong": "9;2", "missing": "2"}
_MARK = {"right": "{}", "moved": "~{}~", "wrong": "!{}!", "missing": "_{}_"}
_LEGEND = (
    ("right", "right"),
    ("moved", "right token, wrong place"),
    ("wrong", "wrong"),
    ("missing", "missing"),
)


def terminal(record: Record, *, colour: bool, redact: bool = False) -> str:
    """Truth against reconstruction: marks on every token but the right ones, ANSI codes too if `colour`."""

    def line(row: list[Piece], marks: list[str]) -> str:
        words = ((p.glue, paint(p.text, mark)) for p, mark in zip(row, marks, strict=True))
        return "".join(("" if glue else " ") + word for glue, word in words)

    def paint(text: str, mark: str) -> str:
        text = _MARK[mark].format(text)
        return f"\x1b[{_ANSI[mark]}m{text}\x1b[0m" if colour else text

    truth, found = display(record, private([record]) if redact else None)
    out = []
    for score in metrics.score_batch(record):
        i, j = score["sentence"], score["prediction"]
        tokens = [] if j is None else record["predictions"][j]["tokens"]
        marks = metrics.align(record["sentences"][i]["tokens"], tokens)
        head = f"batch {score['batch']}, sentence {i}: ROUGE-L {score['rougeL']:.1f}, "
        out.append(f"{head}{marks.truth.count('right')} of {len(marks.truth)} tokens in place")
        out.append(f"  truth {line(truth[i], marks.truth)}")
        out.append(f"  found {line(found[j], marks.prediction) if j is not None else ' (nothing)'}")
    legend = "   ".join(paint(label, mark) for mark, label in _LEGEND)
    return "\n".join([*out, f"  legend: {legend}"])


# --- what the page shows ----------------------------------------------------------------------------------


def _cards(attacked: Sequence[Record], hide: Private | None) -> list[dict[str, Any]]:
    """One entry per sentence, the most leaked first, as many as the page can hold."""
    cards = [card for record in attacked for card in _batch_cards(record, hide)]
    cards.sort(key=lambda card: -1.0 if card["score"] is None else -card["score"]["rougeL"])
    total, kept = 0, []
    for card in cards:
        total += len(card["truth"]) + len(card["found"])
        if total > MAX_TOKENS and kept:
            break
        kept.append(card)
    return kept


def _batch_cards(record: Record, hide: Private | None) -> list[dict[str, Any]]:
    truth, found = display(record, hide)
    cards = []
    for score in metrics.score_batch(record):
        i, j = score["sentence"], score["prediction"]
        guess = {"tokens": []} if j is None else record["predictions"][j]
        marks = metrics.align(record["sentences"][i]["tokens"], guess["tokens"])
        card = {
            "score": score,
            "truncated": record["sentences"][i].get("truncated"),
            "batch": record.get("index"),
        }
        card["truth"] = [(p.glue, p.text, mark, None) for p, mark in zip(truth[i], marks.truth, strict=True)]
        card["found"] = [] if j is None else _found(found[j], marks.prediction, guess.get("confidence"))
        cards.append(card)
    if not record["sentences"]:
        for row, guess in zip(found, record["predictions"], strict=True):
            shown = _found(row, [""] * len(row), guess.get("confidence"))
            cards.append({"score": None, "batch": record.get("index"), "truth": [], "found": shown})
    return cards


def _found(row: list[Piece], marks: Sequence[str], confidence: Any) -> list[tuple]:
    values = confidence if isinstance(confidence, list) else []
    percent = [None if math.isnan(c := _float(value)) else round(100 * c) for value in values]
    percent += [None] * (len(row) - len(percent))
    return [(p.glue, p.text, mark, c) for p, mark, c in zip(row, marks, percent, strict=False)]


def _glance(attacked: Sequence[Record], records: Sequence[Record]) -> list[dict[str, Any]]:
    """Rows of the first table: per metric the value of each sentence, and the baseline where there is one."""
    rows = [row for record in attacked for row in metrics.score_batch(record)]
    base = metrics.baseline(records) or {}
    names = {
        "rougeL": "ROUGE-L",
        "rouge1": "ROUGE-1",
        "rouge2": "ROUGE-2",
        "token_accuracy": "Tokens in place",
    }
    return [
        {"key": key, "name": name, "values": sorted(row[key] for row in rows), "baseline": base.get(key)}
        for key, name in names.items()
        if rows
    ]


def _labels(attacked: Sequence[Record]) -> tuple[int, int] | None:
    """How many class labels the attack inferred right, and of how many; None where it was told them."""
    hits = total = 0
    for record in attacked:
        labels = record.get("labels") or []
        for score in metrics.score_batch(record) if labels else []:
            j = score["prediction"]
            total += 1
            hits += (
                j is not None and j < len(labels) and labels[j] == record["sentences"][score["sentence"]].get("label")
            )
    return (hits, total) if total else None


def _layers(attacked: Sequence[Record]) -> list[dict[str, Any]]:
    """Mean cosine per part of the model, its lowest tensor beside it."""
    tensors: dict[str, list[float]] = {}
    for record in attacked:
        for name, value in (record.get("cosine") or {}).items():
            if not math.isnan(_float(value)):
                tensors.setdefault(name, []).append(float(value))
    parts: dict[str, dict[str, float]] = {}
    for name, values in tensors.items():
        parts.setdefault(_part(name), {})[name] = float(np.mean(values))
    return [
        {"name": part, "mean": float(np.mean([*group.values()])), "low": min(group.values()), "n": len(group)}
        | {"lowest": min(group, key=group.__getitem__)}
        for part, group in parts.items()
    ]


def _part(path: str) -> str:
    """`bert/encoder/layer_3/output/dense/kernel` -> `layer 3`; outside layers, the part that says most."""
    steps = path.split("/")
    for i, step in enumerate(steps):
        if match := re.fullmatch(r"(?:layer|layers|h|block|blocks)_?(\d+)", step):
            return f"layer {match[1]}"
        if step in ("layer", "layers", "h") and i + 1 < len(steps) and steps[i + 1].isdigit():
            return f"layer {steps[i + 1]}"
    inner = [step for step in steps[:-1] if step not in ("bert", "roberta", "transformer", "params")]
    return inner[0] if inner else path


def _sites(attacked: Sequence[Record]) -> list[dict[str, Any]]:
    """Mean AUC of the learned masks per dropout site."""
    found: dict[str, list[float]] = {}
    for record in attacked:
        for name, value in ((record.get("masks") or {}).get("auc") or {}).items():
            if not math.isnan(_float(value)):
                found.setdefault(name, []).append(float(value))
    return [
        {"name": re.sub(r"[_./]+", " ", name), "mean": float(np.mean(values)), "low": min(values)}
        for name, values in found.items()
    ]


def _notes(run: Mapping[str, Any], attacked: Sequence[Record]) -> list[tuple[str, int]]:
    """Notes with the number of batches that carry them (0 for notes on the run)."""
    counts = Counter(note for record in attacked for note in dict.fromkeys(record.get("notes") or []))
    return [(note, 0) for note in run.get("notes") or []] + list(counts.items())


# --- commands ---------------------------------------------------------------------------------------------


def _flags(run: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by flag name: the nested keys joined with `_`."""

    def walk(tree: Mapping[str, Any], path: str) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in tree.items():
            out |= walk(value, f"{path}{key}_") if isinstance(value, Mapping) else {f"{path}{key}": value}
        return out

    config = run.get("config")
    return walk(config, "") if isinstance(config, Mapping) else {}


def _command(run_dir: str | os.PathLike[str], run: Mapping[str, Any], suffix: str, *flags: str) -> str:
    """The command that repeats the run into a new folder, with some flags changed."""
    folder = str(run_dir).rstrip("/")
    flagfile = f"{folder}/{run.get('flags_file') or 'flags.txt'}"
    parts = [
        "python",
        "-m",
        "grab_jax.main",
        f"--flagfile={flagfile}",
        f"--run_dir={folder}-{suffix}",
        *flags,
    ]
    return shlex.join(parts)


def _advice(run: Mapping[str, Any], run_dir: str) -> list[dict[str, str]]:
    """Changes of the client worth measuring, each with its command; those already in force are left out."""
    flags = _flags(run)

    def look(*names: str) -> tuple[str, Any]:
        return next(((name, flags[name]) for name in names if name in flags), (names[0], None))

    out = []

    def offer(title: str, why: str, flag: str, value: Any) -> None:
        command = _command(run_dir, run, f"{flag.rsplit('_', 1)[-1]}{value}", f"--{flag}={value}")
        out.append({"title": title, "why": why, "command": command})

    flag, rate = look("client_dropout")
    if not isinstance(rate, int | float) or rate < 0.3:
        why = "The attacker then has to find the dropout masks as well as the text."
        offer("Does more dropout in the client's training leak less?", why, flag, 0.3)
    flag, size = look("batch_size", "data_batch_size", "client_batch_size")
    size = size if isinstance(size, int) and size > 0 else 1
    larger = 8 if size < 8 else 2 * size
    why = f"An update averaged over {larger} sentences instead of {size} says less about each of them."
    offer("Do larger client batches leak less?", why, flag, larger)
    flag, frozen = look("client_frozen")
    if not frozen or "embeddings" not in str(frozen):
        why = "The gradient of a word embedding tells which words were in the batch; frozen, it is never sent."
        offer("Does it help to keep the embeddings frozen?", why, flag, "embeddings")
    return out


# --- the loss chart ---------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 840, 280, 56, 26, 24


def trajectory(attacked: Sequence[Record]) -> dict[str, Any] | None:
    """The loss chart in SVG units: bands (rounds, phases), ticks, thin lines, mean; None without a trace."""
    traces = [trace for record in attacked if (trace := _trace(record))]
    if not traces:
        return None
    order = sorted({(r, _phase_rank(p), p) for trace in traces for r, p, _, _ in trace})
    segments = [(r, p) for r, _, p in order]
    spans, bands = _bands(segments, traces)
    losses = [loss for trace in traces for *_, loss in trace]
    low, high = min(losses), max(losses)
    log = low > 0 and high / low > 30

    def place(point: tuple) -> tuple[float, float]:
        left, width, first, last = spans[point[:2]]
        across = (point[2] - first) / (last - first) if last > first else 0.5
        return left + width * across, _height(point[3], low, high, log)

    lines = [_path(trace, place) for trace in traces[:MAX_LINES]]
    return {
        "bands": bands,
        "ticks": [(_height(tick, low, high, log), label) for tick, label in _ticks(low, high, log)],
        "lines": {phase: [d[phase] for d in lines if phase in d] for phase in dict.fromkeys(p for _, p in segments)},
        "mean": _path(_mean_trace(traces, segments, log), place),
        "log": log,
        "n": len(traces),
        "size": (WIDTH, HEIGHT, LEFT, TOP, HEIGHT - BOTTOM),
    }


def _trace(record: Record) -> list[tuple[int, str, int, float]]:
    """The finite entries of a trace as (round, phase, step, loss)."""
    entries = (e for e in record.get("trace") or [] if isinstance(e, Mapping) and math.isfinite(_float(e.get("loss"))))
    return [(e.get("round", 0), str(e.get("phase", "")), e.get("step", 0), float(e["loss"])) for e in entries]


def _phase_rank(phase: str) -> int:
    return 1 if phase == "discrete" else 0


def _bands(segments: list, traces: list) -> tuple[dict, list[dict[str, Any]]]:
    """Where each (round, phase) lies along x: (left, width, first step, last step), and its band to draw."""
    shares = [1.0 if phase == "discrete" else 2.5 for _, phase in segments]
    unit, left, spans, bands = (WIDTH - LEFT - 8) / sum(shares), float(LEFT), {}, []
    every = max(1, math.ceil(len({r for r, _ in segments}) / 10))
    for (round_, phase), share in zip(segments, shares, strict=True):
        steps = [step for trace in traces for r, p, step, _ in trace if (r, p) == (round_, phase)]
        width, pad = unit * share, min(3.0, 0.1 * unit)
        spans[round_, phase] = (left + pad, width - 2 * pad, min(steps), max(steps))
        first = all(band["round"] != round_ for band in bands)
        label = f"round {round_ + 1}" if first and round_ % every == 0 else ""
        bands.append({"x": left, "width": width, "phase": phase, "round": round_, "label": label})
        left += width
    return spans, bands


def _mean_trace(traces: list, segments: list, log: bool) -> list[tuple]:
    """Mean over batches (of logarithms if `log`); a batch that stopped early keeps its last loss."""
    rank = {segment: i for i, segment in enumerate(segments)}
    events = sorted((rank[r, p], step, i, loss) for i, trace in enumerate(traces) for r, p, step, loss in trace)
    last: dict[int, float] = {}
    out: dict[tuple, tuple] = {}
    for segment, step, i, loss in events:
        last[i] = math.log(loss) if log else loss
        mean = sum(last.values()) / len(last)
        out[segment, step] = (*segments[segment], step, math.exp(mean) if log else mean)
    return list(out.values())


def _path(trace: list, place: Any) -> dict[str, str]:
    """SVG path data per phase, broken between segments."""
    groups: dict[tuple, list] = {}
    for point in trace:
        groups.setdefault(point[:2], []).append(point)
    out: dict[str, str] = {}
    for (_, phase), points in groups.items():
        stride = max(1, math.ceil(len(points) * len(groups) / MAX_POINTS))
        kept = points[:-1][::stride] + points[-1:]
        moves = [f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(map(place, kept))]
        out[phase] = out.get(phase, "") + "".join(moves) + ("h0" if len(kept) == 1 else "")
    return out


def _height(loss: float, low: float, high: float, log: bool) -> float:
    """The y coordinate of a loss."""
    if log:
        loss, low, high = math.log(loss), math.log(low), math.log(high)
    share = (loss - low) / (high - low) if high > low else 0.5
    return HEIGHT - BOTTOM - 6 - (HEIGHT - BOTTOM - TOP - 12) * share


def _ticks(low: float, high: float, log: bool) -> list[tuple[float, str]]:
    """Round numbers inside [low, high] and their labels."""
    if high <= low:
        return [(low, f"{low:.3g}")]
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        factors = (1,) if len(decades) > 3 else (1, 3)
        values = [factor * 10.0**power for power in decades for factor in factors]
        kept = [value for value in values if low <= value <= high]
        kept = kept[:: max(1, len(kept) // 8 + (len(kept) > 8))]
    else:
        raw = (high - low) / 4
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(f * power for f in (1, 2, 5, 10) if f * power >= raw)
        kept = [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [(value, f"{value:.3g}") for value in kept]


# --- numbers for people -----------------------------------------------------------------------------------


def number(value: float | int | None, digits: int = 1) -> str:
    """A number with fixed digits, an en dash for what is unknown."""
    return "–" if value is None else f"{value:.{digits}f}"


def duration(seconds: float | int | None) -> str:
    """`4.2 s`, `12 min 30 s`, `3 h 05 min`."""
    if seconds is None:
        return "–"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _float(value: Any) -> float:
    """A float, NaN for anything that is no number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
