"""What a run's evidence says: which reconstructions are proven, and which batches could not be tested.

A record's `evidence` is written by an attack that proves what it finds (`attacks.span`) and None for any other. It
holds input rows, each one token at one position, and sentences made of them, with a certificate for either. Where a
search took over what was not found (`attacks.handover`), the record has a `trace` too: that batch was tested.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grab_jax.metrics import known

Record = Mapping[str, Any]

PROVEN_ROW = 0.98  # certificate from which a row counts without a sentence around it
SPARE = 32  # unfitted coordinates without which a row may pass by chance
ENDS = 2  # rows of a sentence that tell nothing: its first and last token are the same everywhere


def of(record: Record) -> Record:
    """The record's evidence, empty where the attack gives none."""
    found = record.get("evidence")
    return found if isinstance(found, Mapping) else {}


def proven(record: Record) -> list[bool]:
    """Whether each prediction carries a certificate that holds, in the order of `predictions`."""
    said = [bool(sentence.get("certified")) for sentence in of(record).get("sentences") or []]
    count = len(record["predictions"])
    return (said + [False] * count)[:count]


def open_ends(record: Record) -> list[str | None]:
    """What is said of each prediction's last token: None (nothing special), `proven`, `likely` or `unknown`.

    Under a next-token loss (`open_end`) a certificate does not hold for that token, unless it says so.
    """
    found = of(record)
    default = "unknown" if found.get("open_end") else None
    said = [sentence.get("last", default) for sentence in found.get("sentences") or []]
    count = len(record["predictions"])
    return (said + [None] * count)[:count]


def contradicted(record: Record) -> list[bool]:
    """Whether each prediction is proven and yet no true sentence, each of which answers for one prediction."""
    told, ends = proven(record), open_ends(record)
    left = [tuple(sentence["tokens"]) for sentence in record["sentences"]]
    out = [False] * len(told)
    # Those with an open end last: they might take a sentence that another names in full.
    for i in sorted(
        (i for i, sure in enumerate(told) if sure and left), key=lambda i: ends[i] in ("likely", "unknown")
    ):
        tokens = tuple(record["predictions"][i]["tokens"])
        answer = next((true for true in left if _agrees(tokens, true, ends[i])), None)
        out[i] = answer is None
        if answer is not None:
            left.remove(answer)
    return out


def _agrees(tokens: tuple[str, ...], true: tuple[str, ...], end: str | None) -> bool:
    """Whether what is proven of a prediction's tokens is true."""
    if end not in ("likely", "unknown"):
        return tokens == true
    return (tokens[:-1] if end == "likely" else tokens) == true[:-1]


def words(record: Record, word: str = "proven") -> list[str]:
    """What each prediction's certificate comes to: `word`, the same except its last token, or a warning, or nothing."""
    open_ = {"likely": f"{word} except its last token", "unknown": f"{word} except its last token"}
    rows = zip(proven(record), contradicted(record), open_ends(record), strict=True)
    return ["certificate wrong" if wrong else sure * open_.get(end or "", word) for sure, wrong, end in rows]


def counts(attacked: Sequence[Record]) -> dict[str, int | None]:
    """`certified` of `certified_of` reconstructions are proven, `certified_wrong` of them against the truth.

    None without certificates, the last one also without a truth.
    """
    given = [record for record in attacked if of(record)]
    if not given:
        return dict.fromkeys(("certified", "certified_of", "certified_wrong"))
    compared = [record for record in given if record["sentences"]]
    return {
        "certified": sum(sum(proven(record)) for record in given),
        "certified_of": sum(len(of(record).get("sentences") or []) for record in given),
        "certified_wrong": sum(sum(contradicted(record)) for record in compared) if compared else None,
    }


# --- what could not be tested -----------------------------------------------------------------------------


def searched(record: Record) -> bool:
    """Whether a search looked at the batch, whatever was proven before it."""
    return bool(record.get("trace"))


def barred(record: Record) -> str | None:
    """Why the attack could not even begin; None where it did."""
    return None if searched(record) else of(record).get("not_testable") or None


def blind(record: Record) -> bool:
    """Whether the attack began and found not one input row: then it assumed something false."""
    return bool(of(record)) and not searched(record) and not barred(record) and not of(record).get("rows")


def tested(record: Record) -> bool:
    """Whether what came back says something about the client."""
    return not barred(record) and not blind(record)


def why_untested(attacked: Sequence[Record]) -> str:
    """One sentence for a run without any tested batch."""
    missed = [record for record in attacked if blind(record)]
    if missed:
        total = sum(of(record).get("rank") or 0 for record in missed)
        wrong = "the dropout rate, the weights or the embeddings assumed are not the client's"
        hidden = next((said for record in missed if (said := _noise(of(record)))), None)
        why = f"{hidden} hides them, unless {wrong}" if hidden else wrong
        return f"None of the {total} input rows was found: {why}."
    reasons = list(dict.fromkeys(barred(record) or "" for record in attacked))
    more = "" if len(reasons) == 1 else f", and the like in {len(attacked)} batches"
    return f"{reasons[0][:1].upper()}{reasons[0][1:].rstrip('.')}{more}."


def _noise(found: Record) -> str | None:
    """What an update carries besides the client's own gradient, in words; None where nothing is known of it."""
    if sigma := known(found.get("sigma")):
        return f"noise of standard deviation {sigma:.2g}"
    if (wire := found.get("wire") or "float32") != "float32":
        return f"rounding to {wire}"
    return "rounding" if known(found.get("noise")) else None


def remarks(attacked: Sequence[Record]) -> list[str]:
    """Sentences for a run with some batches that were not tested or some certificates that are wrong."""
    out = []
    if stopped := [why for record in attacked if (why := barred(record))]:
        reason = stopped[0].split(": ", 1)[-1].rstrip(".") + (" or the like" if len(set(stopped)) > 1 else "")
        out.append(f"{_of_batches(stopped, attacked)} not testable: {reason}.")
    if missed := [record for record in attacked if blind(record)]:
        out.append(f"{_of_batches(missed, attacked)} not testable: none of the input rows was found.")
    if wrong := counts(attacked)["certified_wrong"]:
        verb = "reconstruction differs" if wrong == 1 else "reconstructions differ"
        out.append(f"Warning: {wrong} certified {verb} from the truth, so no certificate of this run can be relied on.")
    return out


def _of_batches(some: Sequence[Any], attacked: Sequence[Record]) -> str:
    plural = "" if len(attacked) == 1 else "es"
    return f"{len(some)} of {len(attacked)} batch{plural} {'was' if len(some) == 1 else 'were'}"


# --- rows -------------------------------------------------------------------------------------------------


def loose_rows(attacked: Sequence[Record]) -> tuple[int, int, int]:
    """Certified rows, how many of them tell a word, and how many rows there are."""
    sure = telling = total = 0
    for record in attacked:
        found = of(record)
        rank, width = found.get("rank") or 0, found.get("width") or 0
        rows = [row for row in found.get("rows") or [] if (known(row.get("certificate")) or 0) > PROVEN_ROW]
        rows = rows if rank + SPARE <= width else []
        sure, total = sure + len(rows), total + rank
        telling += max(0, len(rows) - ENDS * len(record["sentences"]))
    return sure, telling, total


def placed(attacked: Sequence[Record]) -> tuple[int, int, int]:
    """Tokens that rows name right, with their positions; all that they name; and how many there are."""
    told = [record.get("placed") or {} for record in attacked]
    return tuple(sum(one.get(key, 0) for one in told) for key in ("right", "found", "of"))


def unused(attacked: Sequence[Record]) -> str:
    """A further sentence on the rows that belong to no sentence found; empty where there are none."""
    rows = [row for record in attacked for row in of(record).get("rows") or [] if not row.get("used", True)]
    count = sum((known(row.get("certificate")) or 0) > PROVEN_ROW for row in rows)
    if count == 1:
        return " 1 further input row, a token with its position, was found without the sentence around it."
    found = (
        f" {count} further input rows, each a token with its position, were found without the sentences around them."
    )
    return found if count else ""


def table(attacked: Sequence[Record]) -> list[dict[str, Any]]:
    """One row per batch with evidence: what was found of what there is, and the weakest certificates.

    `weakest` is the least certificate of a certified row (of any row, if none is), `residual` the largest of a
    certified sentence; None without any.
    """
    return [_line(record) for record in attacked if of(record)]


def _line(record: Record) -> dict[str, Any]:
    found = of(record)
    rows, sentences = found.get("rows") or [], found.get("sentences") or []
    sure = [sentence for sentence in sentences if sentence.get("certified")]
    certificates = [c for row in rows if (c := known(row.get("certificate"))) is not None]
    return {
        "batch": record.get("index"),
        **{key: found.get(key) for key in ("rank", "gap_rank", "width", "not_testable")},
        "rows": len(rows),
        "weakest": min((c for c in certificates if c > PROVEN_ROW), default=min(certificates, default=None)),
        "sentences": len(sentences),
        "certified": len(sure),
        "residual": max((r for s in sure if (r := known(s.get("residual"))) is not None), default=None),
    }


def widest(attacked: Sequence[Record]) -> tuple[int, int] | None:
    """The largest rank of a batch and the width of the model; None where they are unknown."""
    sizes = [(of(record).get("rank"), of(record).get("width")) for record in attacked]
    return max((size for size in sizes if all(size)), default=None)
