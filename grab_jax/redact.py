"""What is private in a sentence, and how the page and the terminal hide it.

Private are mail addresses, phone numbers, other numbers, and names: capitalised words that start no sentence. What
the true sentences hold of these is hidden wherever a prediction repeats it. Names in lower case are not recognised.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from grab_jax.pieces import Piece, of_record

_MAIL = re.compile(r"[\w.+-]+ ?@ ?[\w-]+(?: ?\. ?[\w-]+)+")
_PHONE = re.compile(r"(?:\+ ?)?\(? ?\d(?:[ ()./-]*\d){6,}")
_NUMBER = re.compile(r"\w*\d\w*(?:[.,:]\d+)*")
_NAME = re.compile(r"[^\W\d_][\w’'-]*")
_QUOTES = " \t\n\"'“”‘’()[]-"
_TITLE = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr)\.\s*$")
_COMMON = frozenset(
    re.findall(r"\S+", "a an the of in on at to for and or but with by from is i i'm i'd i'll i've mr mrs ms dr prof")
)


class Private(NamedTuple):
    """What to hide: `names` as spelled in the truth, `tokens` by (glue, case-folded text) with their kind."""

    names: frozenset[str]
    tokens: Mapping[tuple[bool, str], str]


def private(records: Iterable[Mapping[str, Any]]) -> Private:
    """The private names and tokens of the true sentences of some records."""
    records = list(records)
    texts = [sentence["text"] for record in records for sentence in record["sentences"]]
    names = frozenset(t[s.start : s.end] for t in texts for s in private_spans(t) if s.kind == "name")
    tokens: dict[tuple[bool, str], str] = {}
    for record in records:
        for row, sentence in zip(of_record(record)[0], record["sentences"], strict=True):
            for piece, kind in zip(row, _kinds(row, sentence["text"], names), strict=True):
                if kind and any(c.isalnum() for c in piece.text):
                    tokens[_key(piece)] = kind
    return Private(names, tokens)


def readable(record: Mapping[str, Any], hide: Private | None) -> tuple[list[list[Piece]], list[list[Piece]]]:
    """The pieces of each sentence and of each prediction, one per token, private ones replaced.

    What `hide` lists is hidden in every prediction, besides what a text shows by itself. Of several hidden
    neighbours the first shows the kind, the others a dot.
    """
    truth, found = of_record(record)
    if hide is None:
        return truth, found
    texts = [[item["text"] for item in record[part]] for part in ("sentences", "predictions")]
    hidden = [_hide(row, _kinds(row, text, hide.names)) for row, text in zip(truth, texts[0], strict=True)]
    return hidden, [_hide(row, _guess(row, text, hide)) for row, text in zip(found, texts[1], strict=True)]


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
        if not word:  # part of a character, or an accent: it goes with the piece before it
            kinds.append(kinds[-1] if kinds else None)
            continue
        start = flat.find(word, cursor)
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
