"""How much of the truth a reconstruction holds: scores, matchings, baseline, intervals, a run's outcome.

Every score is in percent (0 to 100) unless its docstring says otherwise. ROUGE is the F1 of the rouge-score
library on lower-cased words without stemming. Two matchings say which prediction answers for which sentence:

* `match_one_to_one`, the headline: each prediction is used once, the sum of ROUGE-1 is the greatest possible;
* `match_paper` (Grab): each sentence takes the best prediction of its batch, separately for each ROUGE, and a
  prediction may be taken twice.

A record is one line of `results.jsonl`; `summarise` turns a run's records into `summary.json`.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats
from scipy.optimize import linear_sum_assignment

SCHEMA = "grab_jax.summary/1"
KINDS = ("rouge1", "rouge2", "rougeL")
LEAK, NO_LEAK, NOT_TESTABLE = "leak shown", "no leak found under these assumptions", "not testable"

NON_TRIVIAL = 4  # tokens: a shorter sentence recovered exactly proves nothing
MARGIN = 5.0  # points of ROUGE-L above the baseline that the interval's lower bound must pass
MARGIN_FEW = 20.0  # the same for the difference itself, below three sentences
ASSUMED_BASELINE = 30.0  # points of ROUGE-L granted to chance, generously, where none was measured
BASELINE_BATCHES = 8  # other batches each batch is compared with, at most

# ASCII text splits as in rouge-score; other scripts keep their letters, ideographs and kana stand alone.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")


# --- one sentence against one prediction ------------------------------------------------------------------


class _Words:
    """The tokenizer handed to rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


_SCORER = RougeScorer(list(KINDS), use_stemmer=False, tokenizer=_Words())


@lru_cache(maxsize=1 << 16)
def _rouge(reference: str, prediction: str) -> tuple[float, ...]:
    if not _grams(reference)[0] & _grams(prediction)[0]:
        return (0.0,) * len(KINDS)
    scores = _SCORER.score(reference, prediction)
    return tuple(100.0 * float(scores[kind].fmeasure) for kind in KINDS)


def rouge(reference: str, prediction: str) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L F1 in percent; 0 where either text has no word."""
    return dict(zip(KINDS, _rouge(reference, prediction), strict=True))


def token_accuracy(truth: Sequence[str], prediction: Sequence[str]) -> float:
    """Percent of the truth's positions that hold the right token; what a prediction has beyond is ignored."""
    if not truth:
        return 0.0 if prediction else 100.0
    return 100.0 * sum(a == b for a, b in zip(truth, prediction, strict=False)) / len(truth)


def exact_match(truth: Sequence[str], prediction: Sequence[str]) -> bool:
    """Whether the two token lists are equal."""
    return list(truth) == list(prediction)


def longest_span(truth: Sequence[str], prediction: Sequence[str]) -> int:
    """Length, in tokens, of the longest run of neighbouring tokens found in both."""
    matcher = SequenceMatcher(None, list(truth), list(prediction), autojunk=False)
    return matcher.find_longest_match(0, len(truth), 0, len(prediction)).size


class Alignment(NamedTuple):
    """One mark per token: `truth` holds right, moved, missing; `prediction` holds right, moved, wrong."""

    truth: list[str]
    prediction: list[str]


def align(truth: Sequence[str], prediction: Sequence[str]) -> Alignment:
    """Mark each token "right" (same place), "moved" (elsewhere in the truth), "wrong" or "missing".

    Counts are respected: a token the truth holds twice is at most twice right or moved, and both sides
    show as many "right" and as many "moved" tokens.
    """
    same = [a == b for a, b in zip(truth, prediction, strict=False)]

    def rest(tokens: Sequence[str]) -> Counter[str]:
        return Counter(token for i, token in enumerate(tokens) if i >= len(same) or not same[i])

    def marks(tokens: Sequence[str], otherwise: str) -> list[str]:
        left, out = shared.copy(), []
        for i, token in enumerate(tokens):
            if i < len(same) and same[i]:
                out.append("right")
            elif left[token] > 0:
                left[token] -= 1
                out.append("moved")
            else:
                out.append(otherwise)
        return out

    shared = rest(truth) & rest(prediction)
    return Alignment(marks(truth, "missing"), marks(prediction, "wrong"))


# --- which prediction answers for which sentence ----------------------------------------------------------


@lru_cache(maxsize=1 << 14)
def _grams(text: str) -> tuple[Counter, Counter]:
    words = _Words().tokenize(text)
    return Counter(words), Counter(pairwise(words))


def _f1(a: Counter, b: Counter) -> float:
    total = a.total() + b.total()
    return 200.0 * (a & b).total() / total if total else 0.0


def match_one_to_one(references: Sequence[str], predictions: Sequence[str]) -> list[int | None]:
    """For each reference the index of its own prediction, or None where there are fewer predictions.

    The assignment has the greatest sum of ROUGE-1; ROUGE-2, then equality of the texts, only break ties.
    """

    def value(reference: str, prediction: str) -> float:
        (words, pairs), (found, found_pairs) = _grams(reference), _grams(prediction)
        return _f1(words, found) + 1e-7 * _f1(pairs, found_pairs) + 1e-8 * (reference == prediction)

    matched: list[int | None] = [None] * len(references)
    if references and predictions:
        values = np.array([[value(reference, prediction) for prediction in predictions] for reference in references])
        for i, j in zip(*linear_sum_assignment(values, maximize=True), strict=True):
            matched[int(i)] = int(j)
    return matched


def match_paper(references: Sequence[str], predictions: Sequence[str]) -> list[dict[str, float]]:
    """For each reference the best of each ROUGE over all predictions, each taken on its own."""
    return [_best(reference, predictions) for reference in references]


def _best(reference: str, predictions: Sequence[str]) -> dict[str, float]:
    """The best of each ROUGE; ROUGE-L, the slow one, only where ROUGE-1, which bounds it, leaves room."""
    if not predictions:
        return dict.fromkeys(KINDS, 0.0)
    words, pairs = _grams(reference)
    ranked = sorted(predictions, key=lambda text: _f1(words, _grams(text)[0]), reverse=True)
    by_pairs = max(predictions, key=lambda text: _f1(pairs, _grams(text)[1]))
    longest = 0.0
    for text in ranked:
        scores = rouge(reference, text)
        longest = max(longest, scores["rougeL"])
        if scores["rouge1"] <= longest:
            break
    single, double = rouge(reference, ranked[0])["rouge1"], rouge(reference, by_pairs)["rouge2"]
    return {"rouge1": single, "rouge2": double, "rougeL": longest}


def score_batch(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Scores of each sentence of one record, in the order of its `sentences`.

    Keys: `batch` and `sentence` (indices), `prediction` (index or None), `tokens` (count), `rouge1`, `rouge2`
    and `rougeL` (one-to-one), `paper` (dict of the three), `exact` (bool), `token_accuracy`, `longest_span`
    (tokens).
    """
    sentences, predictions = record["sentences"], record["predictions"]
    references, found = [s["text"] for s in sentences], [p["text"] for p in predictions]
    rows = []
    for i, (j, paper) in enumerate(
        zip(match_one_to_one(references, found), match_paper(references, found), strict=True)
    ):
        truth, tokens = sentences[i]["tokens"], [] if j is None else predictions[j]["tokens"]
        rows.append(
            {"batch": record.get("index"), "sentence": i, "prediction": j, "tokens": len(truth)}
            | rouge(references[i], "" if j is None else found[j])
            | {"paper": paper, "exact": j is not None and exact_match(truth, tokens)}
            | {"token_accuracy": token_accuracy(truth, tokens), "longest_span": longest_span(truth, tokens)}
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
        texts = [[p["text"] for p in other["predictions"]] for other in others if other["predictions"]]
        rows += _foreign([s["text"] for s in record["sentences"]], texts)
    return rows


def _foreign(references: list[str], texts: list[list[str]]) -> list[dict[str, float] | None]:
    """Mean one-to-one scores of the references over several foreign batches of predictions."""
    if not texts:
        return [None] * len(references)
    scores = np.zeros((len(texts), len(references), len(KINDS)))
    for k, found in enumerate(texts):
        for i, j in enumerate(match_one_to_one(references, found)):
            scores[k, i] = 0.0 if j is None else _rouge(references[i], found[j])
    return [dict(zip(KINDS, row, strict=True)) for row in scores.mean(axis=0).tolist()]


def baseline(records: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Mean of `sentence_baselines`: what an attack scores without the gradient; None where it has none."""
    rows = [row for row in sentence_baselines(records) if row is not None]
    return {kind: _mean(row[kind] for row in rows) for kind in KINDS} if rows else None


def _split(records: Iterable[Mapping[str, Any]]) -> tuple[list, list]:
    """Attacked records, control records."""
    records = list(records)
    return [r for r in records if not r.get("control")], [r for r in records if r.get("control")]


# --- uncertainty ------------------------------------------------------------------------------------------


def interval(values: Iterable[float], seed: int) -> tuple[float, float] | None:
    """95 % interval of the mean (BCa bootstrap), in the unit of `values`.

    None below two values; both ends at the value where all are equal. Never warns.
    """
    data = np.asarray(list(values), np.float64)
    if data.size < 2 or not np.isfinite(data).all():
        return None
    if np.ptp(data) <= 1e-12 * np.abs(data).max():
        return float(data[0]), float(data[0])
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        for method in ("BCa", "percentile"):
            low, high = stats.bootstrap(
                (data,), np.mean, n_resamples=2000, method=method, rng=np.random.default_rng(seed)
            ).confidence_interval
            if np.isfinite([low, high]).all():
                return float(low), float(high)
    return None


def paired_interval(a: Iterable[float], b: Iterable[float], seed: int) -> tuple[float, float] | None:
    """`interval` of the mean of the differences `a - b`, pair by pair."""
    return interval([x - y for x, y in zip(a, b, strict=True)], seed)


def share_interval(hits: int, n: int) -> tuple[float, float] | None:
    """95 % Wilson interval of a share, in percent; unlike a bootstrap it has a width at 0 and at `n` hits."""
    if n == 0:
        return None
    low, high = stats.binomtest(hits, n).proportion_ci(method="wilson")
    return 100.0 * float(low), 100.0 * float(high)


def auc(scores: Any, truth: Any) -> float | None:
    """Area under the ROC curve in [0, 1] of `scores` for the 0/1 array `truth`; ties count half.

    None where only one class is present.
    """
    scores, truth = np.ravel(np.asarray(scores, np.float64)), np.ravel(np.asarray(truth)).astype(bool)
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if not positives or not negatives:
        return None
    ranks = stats.rankdata(scores)[truth].sum()
    return float((ranks - positives * (positives + 1) / 2) / (positives * negatives))


# --- a whole run ------------------------------------------------------------------------------------------


def summarise(records: Iterable[Mapping[str, Any]], run: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `summary.json`: scores in percent, spans in tokens, costs in seconds, null if unknown.

    Control records count for the baseline only. `outcome` is one of `LEAK`, `NO_LEAK`, `NOT_TESTABLE`.
    """
    records, seed = list(records), int(run.get("seed") or 0)
    attacked, _ = _split(records)
    rows = [row for record in attacked for row in score_batch(record)]
    bases = sentence_baselines(records)
    outcome, reason = _outcome(attacked, rows, bases, seed)
    masks = [value for r in attacked if (value := _number((r.get("masks") or {}).get("mean"))) is not None]
    summary = {
        "schema": SCHEMA,
        **{key: run.get(key) for key in ("attack", "model", "data", "seed")},
        "outcome": outcome,
        "reason": reason,
        "n_sentences": len(rows),
        "n_batches": len(attacked),
        **_scores(rows, seed),
        "baseline": baseline(records),
        "masks_auc": _mean(masks),
        "seconds": {
            part: sum(_number((r.get("seconds") or {}).get(part)) or 0.0 for r in attacked)
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
            **{key: interval([r[key] for r in rows], seed) for key in (*KINDS, "token_accuracy")},
            "exact_match": share_interval(exact, len(rows)),
        },
    }


def _outcome(attacked: list, rows: list, bases: list, seed: int) -> tuple[str, str]:
    """Outcome and its reason; an exact recovery counts even where the losses are broken."""
    if not attacked:
        return NOT_TESTABLE, "No client batch was attacked."
    if not rows:
        return NOT_TESTABLE, "The records hold no true sentence to compare the reconstructions with."
    exact = [row for row in rows if row["exact"] and row["tokens"] >= NON_TRIVIAL]
    if exact:
        longest = max(row["tokens"] for row in exact)
        verb = "was" if len(exact) == 1 else "were"
        return LEAK, (
            f"{len(exact)} of {_count(len(rows), 'sentence')} {verb} recovered word for word, "
            f"the longest with {longest} tokens."
        )
    if not any(_number(record.get("loss")) is not None for record in attacked):
        return NOT_TESTABLE, f"The loss was not finite in any of {_count(len(attacked), 'attacked batch')}."
    return _difference(rows, bases, seed)


def _difference(rows: list, bases: list, seed: int) -> tuple[str, str]:
    """Outcome from ROUGE-L against the no-gradient baseline, sentence by sentence."""
    found = [row["rougeL"] for row in rows]
    chance = [ASSUMED_BASELINE if base is None else base["rougeL"] for base in bases]
    mean, bounds = np.mean(np.subtract(found, chance)), paired_interval(found, chance, seed)
    text = f"ROUGE-L is {np.mean(found):.1f} against {np.mean(chance):.1f} "
    text += "granted to chance as no baseline was measured" if None in bases else "without the gradient"
    text += f" ({_count(len(rows), 'sentence')}): a difference of {mean:.1f} points"
    if len(rows) < 3 or bounds is None:
        return (LEAK if mean > MARGIN_FEW else NO_LEAK), f"{text}, where {MARGIN_FEW:.0f} count as a leak."
    text += f" (95 % interval {bounds[0]:.1f} to {bounds[1]:.1f})"
    return (LEAK if bounds[0] > MARGIN else NO_LEAK), f"{text}, where a lower end above {MARGIN:.0f} counts as a leak."


def finite(value: Any) -> Any:
    """The same nested value as plain JSON types, with null for NaN and infinities."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [finite(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> float | None:
    """A finite float, or None."""
    ok = isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if ok else None


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return float(np.mean(values)) if values else None


def _count(n: int, noun: str) -> str:
    plural = "es" if noun.endswith("ch") else "s"
    return f"{n} {noun}{'' if n == 1 else plural}"
