"""Sentences in, padded client batches out; the only place that knows tokenizers and data sets."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from grab_jax.config import DataConfig
from grab_jax.types import Batch, InputError, Vocabulary

BUCKETS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Padded lengths: a sweep compiles a handful of shapes."""

LAMP_SEED = 101
"""NumPy seed of LAMP's sampling order (arXiv 2202.08827): the first CoLA training row is 2310."""

_NAMED = {
    "cola": ("nyu-mll/glue", "cola"),
    "sst2": ("nyu-mll/glue", "sst2"),
    "rotten_tomatoes": ("cornell-movie-review-data/rotten_tomatoes", None),
}
_TEXT_COLUMNS = ("text", "sentence")


class Sentence(NamedTuple):
    """One labelled sentence; `row` is its 0-based row in the source, `label` None where the source has none."""

    text: str
    label: int | None
    row: int


class ClientBatch(NamedTuple):
    """A tokenised batch with what a report needs: sentences, their tokens without special ones, which were cut."""

    index: int
    sentences: tuple[Sentence, ...]
    tokens: tuple[tuple[str, ...], ...]
    truncated: tuple[bool, ...]
    batch: Batch


def sentences(config: DataConfig) -> list[Sentence]:
    """All non-empty sentences of a source, in the order batches are taken from it.

    Named sets come in LAMP's sampling order, everything else in its own.

    Raises:
      InputError: the source is missing, empty or malformed (which line, what was expected).
    """
    found = [s for s in _read(config) if s.text.strip()]
    if not found:
        raise InputError(f"--data={config.name} holds no non-empty sentence; expected at least one")
    if len(found) <= config.start:
        raise InputError(
            f"--data_start={config.start} is past the end of --data={config.name} ({len(found)} sentences)"
        )
    if config.shuffle is not None:
        found = [found[i] for i in np.random.default_rng(config.shuffle).permutation(len(found))]
    return found[config.start :]


def _read(config: DataConfig) -> list[Sentence]:
    if config.name == "builtin":
        return list(_jsonl(Path(str(resources.files("grab_jax") / "builtin" / "sentences.jsonl"))))
    path = Path(config.name).expanduser()
    readers = {".jsonl": _jsonl, ".csv": _csv, ".txt": _txt}
    if path.suffix in readers:
        if not path.is_file():
            raise InputError(f"data file {config.name} does not exist")
        try:
            return list(readers[path.suffix](path))
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 text ({error})") from error
    if path.exists():
        raise InputError(f"--data={config.name}: expected a .jsonl, .csv or .txt file")
    return _from_hub(config)


def _jsonl(path: Path) -> Iterator[Sentence]:
    for row, line in enumerate(_lines(path)):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {row + 1}: not JSON ({error.msg})") from error
        yield _sentence(record, row, f"{path}, line {row + 1}")


def _csv(path: Path) -> Iterator[Sentence]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        try:
            for row, record in enumerate(reader):
                yield _sentence(record, row, f"{path}, line {reader.line_num}")
        except csv.Error as error:
            raise InputError(f"{path}, line {reader.line_num}: not CSV ({error})") from error


def _txt(path: Path) -> Iterator[Sentence]:
    for row, line in enumerate(_lines(path)):
        yield Sentence(line.strip(), None, row)


def _lines(path: Path) -> list[str]:
    """Lines end at line breaks only: `str.splitlines` would also cut at U+2028 and its kin inside a sentence."""
    return path.read_text("utf-8-sig").split("\n")


def _sentence(record: Any, row: int, where: str) -> Sentence:
    column = next((name for name in _TEXT_COLUMNS if isinstance(record, dict) and name in record), None)
    if column is None or not isinstance(record[column], str):
        raise InputError(f'{where}: expected a record with "text" (a string) and "label", got {str(record)[:80]}')
    label = record.get("label")
    try:
        number = None if label in (None, "") else int(label)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{where}: label {label!r} is not an integer") from error
    if isinstance(label, float) and number != label:
        raise InputError(f"{where}: label {label!r} is not an integer")
    return Sentence(record[column].strip(), number, row)


def _from_hub(config: DataConfig) -> list[Sentence]:
    import datasets

    name, subset = _NAMED.get(config.name, (config.name, None))
    if config.name not in _NAMED and ":" in name:
        name, subset = name.split(":", 1)
    try:
        rows = datasets.load_dataset(name, subset, split=config.split)
    except Exception as error:  # the library raises many kinds: offline, unknown set, unknown split, needs a subset
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"--data={config.name} (split {config.split}) could not be loaded: {reason}; "
            "give builtin, a .jsonl, .csv or .txt file, or a hub id (owner/name or owner/name:subset)"
        ) from error
    found = [_sentence(record, row, f"{config.name}, row {row}") for row, record in enumerate(rows)]
    return [found[i] for i in lamp_order(len(found))] if config.name in _NAMED else found


def lamp_order(count: int) -> list[int]:
    """Row order of LAMP and Grab: all indices shuffled with NumPy's seed 101."""
    order = list(range(count))
    np.random.RandomState(LAMP_SEED).shuffle(order)
    return order


def load_tokenizer(folder: str) -> Any:
    """The tokenizer of a model folder; a missing padding token becomes the end-of-text one (GPT-2)."""
    from transformers import AutoTokenizer

    # Without these files transformers makes up a tokenizer that knows no word.
    if not any((Path(folder) / name).is_file() for name in ("tokenizer.json", "vocab.txt", "vocab.json")):
        raise InputError(f"{folder} has no tokenizer; expected tokenizer.json, vocab.txt or vocab.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for missing and damaged tokenizer files
        raise InputError(
            f"{folder} has no usable tokenizer ({type(error).__name__}); expected tokenizer.json"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise InputError(f"the tokenizer of {folder} has neither a padding nor an end token; name one in it")
    return tokenizer


def vocabulary(tokenizer: Any) -> Vocabulary:
    """The facts an attack may use."""
    ids = tokenizer("a")["input_ids"]
    wrapped = tokenizer.cls_token_id is not None and ids[0] == tokenizer.cls_token_id
    return Vocabulary(
        pad=tokenizer.pad_token_id,
        cls=tokenizer.cls_token_id if wrapped else None,
        sep=tokenizer.sep_token_id if wrapped else None,
        special=frozenset(tokenizer.all_special_ids),
    )


def bucket(length: int) -> int:
    """The padded length of a sentence."""
    return next((size for size in BUCKETS if size >= length), length)


def batches(
    found: Sequence[Sentence], tokenizer: Any, *, batch_size: int, count: int, longest: int, num_labels: int
) -> list[ClientBatch]:
    """The first `count` client batches of `batch_size` consecutive sentences, padded to buckets.

    Raises:
      InputError: too few sentences, or a label outside `[0, num_labels)`.
    """
    if len(found) < count * batch_size:
        raise InputError(
            f"{count} batches of {batch_size} need {count * batch_size} sentences, the data has {len(found)}; "
            "lower --num_batches or --batch_size"
        )
    groups = [found[i * batch_size : (i + 1) * batch_size] for i in range(count)]
    return [encode(group, tokenizer, index, longest, num_labels) for index, group in enumerate(groups)]


def encode(group: Sequence[Sentence], tokenizer: Any, index: int, longest: int, num_labels: int) -> ClientBatch:
    """One padded client batch; sentences of more than `longest` tokens are cut, and marked so."""
    for sentence in group:
        if sentence.label is not None and not 0 <= sentence.label < num_labels:
            raise InputError(
                f"label {sentence.label} in row {sentence.row} is out of range: the model has {num_labels} classes "
                f"(0 to {num_labels - 1}); set --model_num_labels"
            )
    full = [len(tokenizer(s.text, verbose=False)["input_ids"]) for s in group]
    rows = [tokenizer(s.text, truncation=True, max_length=longest)["input_ids"] for s in group]
    width = bucket(max(map(len, rows)))
    ids = np.full((len(rows), min(width, max(longest, max(map(len, rows))))), tokenizer.pad_token_id, np.int32)
    attention = np.zeros(ids.shape, bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)], attention[i, : len(row)] = row, True
    labels = jnp.asarray([s.label or 0 for s in group], jnp.int32)
    special = set(tokenizer.all_special_ids)
    return ClientBatch(
        index=index,
        sentences=tuple(group),
        tokens=tuple(tuple(tokenizer.convert_ids_to_tokens([t for t in row if t not in special])) for row in rows),
        truncated=tuple(n > longest for n in full),
        batch=Batch(jnp.asarray(ids), jnp.asarray(attention), labels),
    )


def decode(tokenizer: Any, ids: Sequence[int] | Int[np.ndarray, " t"]) -> tuple[str, list[str]]:
    """Text and tokens of one reconstructed row without special tokens, a padding token inside the text among them.

    An id that the tokenizer does not know (a model's table may be longer) becomes the token `<id>`.
    """
    row = [int(i) for i in ids]
    special = set(tokenizer.all_special_ids)
    kept = [i for i in row if i not in special]
    tokens = [token or f"<{i}>" for i, token in zip(kept, tokenizer.convert_ids_to_tokens(kept), strict=True)]
    return tokenizer.decode(kept, clean_up_tokenization_spaces=not _keeps_spaces(tokenizer)).strip(), tokens


def _keeps_spaces(tokenizer: Any) -> bool:
    """Whether spaces are part of the tokens (BPE), so that those before punctuation are the text's own."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and type(backend.model).__name__ == "BPE"
