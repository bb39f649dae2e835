"""Word pieces as a person reads them: `##ing`, `Ġthe` and `▁the` turned back into text, one piece per token."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

SIGNS = {"\n": "↵", "\t": "⇥"}
BLANK = "␣"


class Piece(NamedTuple):
    """A token for the eye: its text, and whether it joins on to the token before it."""

    glue: bool
    text: str


def pieces(tokens: Sequence[str], byte_level: bool | None = None) -> list[Piece]:
    """Undo the word-piece spelling; what cannot be seen becomes a sign (`↵`, `␣`, `\ufffd`).

    A character spread over several byte-level tokens is shown with the last of them, the others are empty.
    """
    byte_level = any(token.startswith("Ġ") for token in tokens) if byte_level is None else byte_level
    if byte_level:
        return [_spaced(i, text, pending) for i, (text, pending) in enumerate(_byte_texts(tokens))]
    if any(token.startswith("▁") for token in tokens):
        return [_spaced(i, token.replace("▁", " ")) for i, token in enumerate(tokens)]
    return [_unspaced(i, tokens) for i in range(len(tokens))]


def of_record(record: Mapping[str, Any]) -> tuple[list[list[Piece]], list[list[Piece]]]:
    """The pieces of each sentence and of each prediction of a record."""
    groups = [[item["tokens"] for item in record[part]] for part in ("sentences", "predictions")]
    byte_level = any(token.startswith("Ġ") for group in groups for tokens in group for token in tokens)
    truth, found = ([pieces(tokens, byte_level) for tokens in group] for group in groups)
    return truth, found


def _spaced(i: int, text: str, pending: bool = False) -> Piece:
    """A piece of a spelling that writes the space before a word; `pending` where its last character goes on."""
    bare = text.strip(" ")
    return Piece(i > 0 and not text.startswith(" "), _visible(bare) if bare or pending else BLANK)


def _unspaced(i: int, tokens: Sequence[str]) -> Piece:
    """A piece of BERT's spelling, which marks the pieces inside a word."""
    token = tokens[i]
    inside = token.startswith("##") and len(token) > 2
    return Piece(inside or (i > 0 and _hugs(tokens, i)), _visible(token.removeprefix("##") or token))


def _visible(text: str) -> str:
    return "".join(c if c.isprintable() else SIGNS.get(c, "\ufffd") for c in text)


def _hugs(tokens: Sequence[str], i: int) -> bool:
    """Whether token i reads better without a space before it: closing marks, `'s` and the like."""
    tail = ("s", "t", "d", "m", "re", "ve", "ll")
    apostrophe = tokens[i] in ("'", "’") and i + 1 < len(tokens) and tokens[i + 1] in tail
    return apostrophe or tokens[i] in set(".,;:!?)]%") or (tokens[i] in tail and tokens[i - 1] in ("'", "’"))


def _byte_texts(tokens: Sequence[str]) -> list[tuple[str, bool]]:
    """The text that each byte-level token completes, and whether a character has begun and goes on."""
    table, decoder, out = _byte_of(), codecs.getincrementaldecoder("utf-8")("replace"), []
    for i, token in enumerate(tokens):
        spelled = all(char in table for char in token)
        raw = bytes(table[char] for char in token) if spelled else b""
        text = decoder.decode(raw, final=not spelled or i == len(tokens) - 1)
        out.append((text if spelled else text + token, bool(decoder.getstate()[0])))
    return out


@lru_cache(maxsize=1)
def _byte_of() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters, inverted."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}
