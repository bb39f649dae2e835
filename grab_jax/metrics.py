"""How much of a truth a reconstruction holds: scores, matchings and their uncertainty.

Every score is in percent (0 to 100) unless its docstring says otherwise. ROUGE is the F1 of the rouge-score
library on lower-cased words without stemming. Two matchings say which prediction answers for which sentence:

* `match_one_to_one`, the headline: each prediction is used once, the sum of ROUGE-1 is the greatest possible;
* `match_paper` (Grab): each sentence takes the best prediction of its batch, separately for each ROUGE, and a
  prediction may be taken twice.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats
from scipy.optimize import linear_sum_assignment

KINDS = ("rouge1", "rouge2", "rougeL")

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


def known(value: Any) -> float | None:
    """A finite float, or None for anything else."""
    ok = isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if ok else None
