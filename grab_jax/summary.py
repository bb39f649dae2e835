"""The records of a run summed up: scores, the baseline without the gradient, intervals and the outcome.

A record is one line of `results.jsonl`; `summarise` turns a run's records into `summary.json`. Scores are in
percent; `metrics` defines them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from grab_jax import evidence, metrics
from grab_jax.metrics import KINDS

SCHEMA = "grab_jax.summary/1"
LEAK, NO_LEAK, NOT_TESTABLE = "leak shown", "no leak found under these assumptions", "not testable"

NON_TRIVIAL = 4  # tokens: a shorter sentence recovered exactly proves nothing
MARGIN = 5.0  # points of ROUGE-L above the baseline that the interval's lower bound must pass
MARGIN_FEW = 20.0  # the same for the difference itself, below three sentences
ASSUMED_BASELINE = 30.0  # points of ROUGE-L granted to chance, generously, where none was measured
BASELINE_BATCHES = 8  # other batches each batch is compared with, at most


def summarise(records: Iterable[Mapping[str, Any]], run: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `summary.json`: scores in percent, spans in tokens, costs in seconds, null if unknown.

    Control records count for the baseline only. `outcome` is one of `LEAK`, `NO_LEAK`, `NOT_TESTABLE`. `certified` of
    `certified_of` reconstructions are proven by a certificate, and `certified_wrong` of them are not true all the same
    (`evidence.counts`).
    """
    records, seed = list(records), int(run.get("seed") or 0)
    attacked, _ = _split(records)
    rows = [row for record in attacked for row in score_batch(record)]
    outcome, reason = _outcome(records, rows, seed)
    masks = [value for r in attacked if (value := metrics.known((r.get("masks") or {}).get("mean"))) is not None]
    summary = {
        "schema": SCHEMA,
        **{key: run.get(key) for key in ("attack", "model", "data", "seed")},
        "outcome": outcome,
        "reason": reason,
        "n_sentences": len(rows),
        "n_batches": len(attacked),
        **evidence.counts(attacked),
        **_scores(rows, seed),
        "baseline": baseline(records),
        "masks_auc": _mean(masks),
        "seconds": {
            part: sum(metrics.known((r.get("seconds") or {}).get(part)) or 0.0 for r in attacked)
            for part in ("compile", "attack")
        },
    }
    return finite(summary)


def _scores(rows: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """The part of the summary that is averaged over sentences."""
    exact = sum(row["exact"] for row in rows)
    worst = max(rows, key=lambda r: (r["rougeL"], r["exact"], r["longest_span"]), default=None)
    return {
        "rouge": {
            "one_to_one": {kind: _mean(row[kind] for row in rows) for kind in KINDS},
            "paper": {kind: _mean(row["paper"][kind] for row in rows) for kind in KINDS},
        },
        "exact_match": 100.0 * exact / len(rows) if rows else None,
        "token_accuracy": _mean(row["token_accuracy"] for row in rows),
        "longest_span": max((row["longest_span"] for row in rows), default=None),
        "longest_span_mean": _mean(row["longest_span"] for row in rows),
        "worst": worst and {key: worst[key] for key in ("rougeL", "batch", "sentence", "exact", "longest_span")},
        "intervals": {
            **{key: metrics.interval([r[key] for r in rows], seed) for key in (*KINDS, "token_accuracy")},
            "exact_match": metrics.share_interval(exact, len(rows)),
        },
    }


def _outcome(records: Sequence[Mapping[str, Any]], rows: list, seed: int) -> tuple[str, str]:
    """Outcome and its reason, for the batches that the attack could test."""
    attacked, controls = _split(records)
    tested = [record for record in attacked if evidence.tested(record)]
    if not attacked:
        return NOT_TESTABLE, "No client batch was attacked."
    if not tested:
        return NOT_TESTABLE, evidence.why_untested(attacked)
    outcome, reason = _tested(tested, controls, rows, seed)
    return outcome, " ".join([reason, *evidence.remarks(attacked)])


def _tested(tested: list, controls: list, rows: list, seed: int) -> tuple[str, str]:
    """Proofs first, then words against chance; an exact recovery counts even where the losses are broken."""
    counts = evidence.counts(tested)
    certified = counts["certified"] if not counts["certified_wrong"] else None
    if not rows and certified:
        verb = "is proven by its certificate" if certified == 1 else "are proven by their certificates"
        found = _count(counts["certified_of"], "reconstruction")
        return LEAK, f"{certified} of {found} {verb}; there is no true sentence to compare with."
    if not rows:
        return NOT_TESTABLE, "The records hold no true sentence to compare the reconstructions with."
    exact = [row for row in rows if row["exact"] and (row["tokens"] >= NON_TRIVIAL or (certified and row["proven"]))]
    if exact:
        return LEAK, _verbatim(exact, len(rows), certified) + evidence.unused(tested)
    if not any(evidence.of(record) or metrics.known(record.get("loss")) is not None for record in tested):
        return NOT_TESTABLE, f"The loss was not finite in any of {_count(len(tested), 'attacked batch')}."
    scored = [row for record in tested for row in score_batch(record)]
    outcome, reason = _difference(scored, sentence_baselines([*tested, *controls]), seed)
    sure, telling, total = evidence.loose_rows(tested)
    if outcome == NO_LEAK and telling >= NON_TRIVIAL and not counts["certified_wrong"]:
        return LEAK, (
            f"No sentence was recovered word for word, but {sure} of the {total} input rows were found and certified, "
            "each of them a token with its position."
        )
    right, found, there = evidence.placed(tested)
    if outcome == NO_LEAK and right >= max(NON_TRIVIAL, found / 2):
        return LEAK, (
            f"No sentence was put together, but {right} of the {there} tokens were found at their positions, without a "
            f"certificate ({found - right} other tokens were named)."
        )
    return outcome, reason


def _verbatim(exact: list, n: int, certified: int | None) -> str:
    """The sentence on exact recoveries; `certified` is None where no certificate is worth telling."""
    longest = max(row["tokens"] for row in exact)
    text = f"{len(exact)} of {_count(n, 'sentence')} {'was' if len(exact) == 1 else 'were'} recovered word for word"
    if certified is None:
        return f"{text}, the longest with {longest} tokens."
    proofs = _proven(sum(row["proven"] for row in exact), len(exact))
    return f"{text}, {proofs}; the longest has {longest} tokens."


def _proven(certified: int, n: int) -> str:
    """How many of n sentences carry a certificate."""
    if n == 1:
        return "proven by its certificate" if certified else "though without a certificate"
    if not certified:
        return "none of them proven by a certificate"
    whose = "its certificate" if certified == 1 else "their certificates"
    return f"{'all' if certified == n else certified} of them proven by {whose}"


def _difference(rows: list, bases: list, seed: int) -> tuple[str, str]:
    """Outcome from ROUGE-L against the no-gradient baseline, sentence by sentence."""
    found = [row["rougeL"] for row in rows]
    chance = [ASSUMED_BASELINE if base is None else base["rougeL"] for base in bases]
    mean, bounds = np.mean(np.subtract(found, chance)), metrics.paired_interval(found, chance, seed)
    text = f"ROUGE-L is {np.mean(found):.1f} against {np.mean(chance):.1f} "
    text += "granted to chance as no baseline was measured" if None in bases else "without the gradient"
    text += f" ({_count(len(rows), 'sentence')}): a difference of {mean:.1f} points"
    if len(rows) < 3 or bounds is None:
        return (LEAK if mean > MARGIN_FEW else NO_LEAK), f"{text}, where {MARGIN_FEW:.0f} count as a leak."
    text += f" (95 % interval {bounds[0]:.1f} to {bounds[1]:.1f})"
    return (LEAK if bounds[0] > MARGIN else NO_LEAK), f"{text}, where a lower end above {MARGIN:.0f} counts as a leak."


def score_batch(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Scores of each sentence of one record, in the order of its `sentences`.

    Keys: `batch` and `sentence` (indices), `prediction` (index or None), `tokens` (count), `rouge1`, `rouge2`
    and `rougeL` (one-to-one), `paper` (dict of the three), `exact` (bool), `token_accuracy`, `longest_span`
    (tokens), `proof` (what its prediction's certificate comes to, see `evidence.words`), `proven` (bool: all of it).
    """
    sentences, predictions = record["sentences"], record["predictions"]
    references, found = [s["text"] for s in sentences], [p["text"] for p in predictions]
    matched = zip(metrics.match_one_to_one(references, found), metrics.match_paper(references, found), strict=True)
    rows, proofs = [], evidence.words(record)
    for i, (j, paper) in enumerate(matched):
        truth, tokens = sentences[i]["tokens"], [] if j is None else predictions[j]["tokens"]
        rows.append(
            {"batch": record.get("index"), "sentence": i, "prediction": j, "tokens": len(truth)}
            | metrics.rouge(references[i], "" if j is None else found[j])
            | {"paper": paper, "exact": j is not None and metrics.exact_match(truth, tokens)}
            | {"token_accuracy": metrics.token_accuracy(truth, tokens)}
            | {"longest_span": metrics.longest_span(truth, tokens)}
            | {"proof": "" if j is None else proofs[j], "proven": j is not None and proofs[j] == "proven"}
        )
    return rows


# --- the no-gradient baseline -----------------------------------------------------------------------------


def sentence_baselines(records: Sequence[Mapping[str, Any]]) -> list[dict[str, float] | None]:
    """What each attacked sentence scores against predictions that never saw its update; None without any.

    Those are the predictions of the other attacked batches (of the next `BASELINE_BATCHES`, in a circle) and
    of the control records, matched one-to-one and averaged over the batches.
    """
    attacked, controls = _split(records)
    rows: list[dict[str, float] | None] = []
    for i, record in enumerate(attacked):
        others = (attacked[i + 1 :] + attacked[:i])[:BASELINE_BATCHES] + controls
        texts = [
            [p["text"] for p in other["predictions"]]
            for other in others
            if other["predictions"] and evidence.tested(other)
        ]
        rows += _foreign([s["text"] for s in record["sentences"]], texts)
    return rows


def _foreign(references: list[str], texts: list[list[str]]) -> list[dict[str, float] | None]:
    """Mean one-to-one scores of the references over several foreign batches of predictions."""
    if not texts:
        return [None] * len(references)
    scores = np.zeros((len(texts), len(references), len(KINDS)))
    for k, found in enumerate(texts):
        for i, j in enumerate(metrics.match_one_to_one(references, found)):
            scores[k, i] = 0.0 if j is None else [*metrics.rouge(references[i], found[j]).values()]
    return [dict(zip(KINDS, row, strict=True)) for row in scores.mean(axis=0).tolist()]


def baseline(records: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Mean of `sentence_baselines`: what an attack scores without the gradient; None where it has none."""
    rows = [row for row in sentence_baselines(records) if row is not None]
    return {kind: _mean(row[kind] for row in rows) for kind in KINDS} if rows else None


def _split(records: Iterable[Mapping[str, Any]]) -> tuple[list, list]:
    """Attacked records, control records."""
    records = list(records)
    return [r for r in records if not r.get("control")], [r for r in records if r.get("control")]


# --- values -----------------------------------------------------------------------------------------------


def finite(value: Any) -> Any:
    """The same nested value as plain JSON types, with null for NaN and infinities."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [finite(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return float(np.mean(values)) if values else None


def _count(n: int, noun: str) -> str:
    plural = "es" if noun.endswith("ch") else "s"
    return f"{n} {noun}{'' if n == 1 else plural}"
