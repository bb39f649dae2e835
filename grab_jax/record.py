"""One line of `results.jsonl`: an attacked batch, its reconstruction, and how well each part of it fits."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from grab_jax import data, distances, local_training, metrics, simulate
from grab_jax import masks as dropout_masks
from grab_jax.models import Site
from grab_jax.types import Result


def record(
    identifier: str,
    truth: simulate.Simulated,
    result: Result,
    tokenizer: Any,
    *,
    control: bool,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The record of one client batch; `seconds` are its share of compiling and attacking."""
    batch = truth.batch
    predictions = _predictions(result, tokenizer)
    sentences = [
        {"text": s.text, "tokens": list(tokens), "label": s.label or 0, "row": s.row, "truncated": cut}
        for s, tokens, cut in zip(batch.sentences, batch.tokens, batch.truncated, strict=True)
    ]
    return {
        "id": identifier,
        "index": batch.index,
        "control": control,
        "sentences": sentences,
        "predictions": predictions,
        "loss": result.loss if math.isfinite(result.loss) else None,
        "trace": result.trace,
        "masks": mask_scores(truth, result, sentences, predictions),
        "cosine": _cosines(truth, result),
        "labels": None if result.labels is None else [int(label) for label in result.labels],
        "notes": result.notes,
        "evidence": result.evidence,
        "placed": _placed(truth, result, tokenizer),
        "seconds": seconds,
    }


def _predictions(result: Result, tokenizer: Any) -> list[dict[str, Any]]:
    special = set(tokenizer.all_special_ids)
    predictions = []
    for ids, confidence in zip(np.asarray(result.ids), np.asarray(result.confidence), strict=True):
        text, tokens = data.decode(tokenizer, ids)
        shown = [float(c) for i, c in zip(ids, confidence, strict=True) if int(i) not in special]
        predictions.append({"text": text, "tokens": tokens, "confidence": shown[: len(tokens)]})
    return predictions


def _placed(truth: simulate.Simulated, result: Result, tokenizer: Any) -> dict[str, int] | None:
    """Tokens with their positions that evidence names, without special ones: `found`, `right`, and how many are there.

    None without such evidence. It is what rows tell that no sentence was put together from.
    """
    rows = (result.evidence or {}).get("rows")
    if not rows:
        return None
    special = set(tokenizer.all_special_ids)
    told = lambda pairs: {(int(p), int(t)) for p, t in pairs if int(t) not in special}  # noqa: E731
    ids, real = (np.asarray(part) for part in truth.batch.batch[:2])
    there = told((place, ids[sentence, place]) for sentence, place in np.argwhere(real))
    found = told((row["position"], row["token"]) for row in rows)
    return {"found": len(found), "right": len(found & there), "of": len(there)}


def mask_scores(truth: simulate.Simulated, result: Result, sentences, predictions) -> dict[str, Any] | None:
    """Area under ROC of the learned masks against the client's, per site, padding left out.

    Rows are matched as the texts are, since the order of sentences in a batch cannot be known. None where nothing was
    learned.
    """
    if result.masks is None or truth.masks is None:
        return None
    if any(np.ndim(mask) != np.ndim(truth.masks[name]) for name, mask in result.masks.items()):
        return None  # one mask for all epochs of a client that drew new ones in each
    rows = metrics.match_one_to_one([s["text"] for s in sentences], [p["text"] for p in predictions])
    pairs = [(row, match) for row, match in enumerate(rows) if match is not None]
    found = {
        name: _site_auc(_cut(result.masks[name], site, truth), np.asarray(truth.masks[name]), site, pairs, truth)
        for name, site in truth.problem.model.sites.items()
        if name in result.masks
    }
    known = [value for value in found.values() if value is not None]
    return {"auc": found, "mean": float(np.mean(known)) if known else None}


def _cut(learned: Any, site: Site, truth: simulate.Simulated) -> np.ndarray:
    """The masks at the batch's own positions: an attack that was not told lengths may return longer ones."""
    length = truth.batch.batch.ids.shape[1]
    return np.asarray(learned)[(..., *(slice(length) if axis == "t" else slice(None) for axis in site.axes))]


def _site_auc(learned: np.ndarray, true: np.ndarray, site: Site, pairs, truth: simulate.Simulated) -> float | None:
    real = np.asarray(truth.batch.batch.attention)
    keep = {row: _real_entries(site, real[row]) for row, _ in pairs}
    if not pairs:
        return None
    kept = lambda masks, i, row: masks[i][..., keep[row]].ravel()  # noqa: E731  # of every epoch
    scores = np.concatenate([kept(learned, match, row) for row, match in pairs])
    return metrics.auc(scores, np.concatenate([kept(true, row, row) for row, _ in pairs]))


def _real_entries(site: Site, real: np.ndarray) -> np.ndarray:
    """True where a mask entry belongs to real tokens only."""
    keep = np.ones(site.shape(len(real)), bool)
    for axis, letter in enumerate(site.axes):
        if letter == "t":
            keep &= real.reshape([-1 if i == axis else 1 for i in range(keep.ndim)])
    return keep


def _cosines(truth: simulate.Simulated, result: Result) -> dict[str, float]:
    """How well the reconstruction's own update points along the observed one, per tensor.

    Empty for a reconstruction that was not found by matching.
    """
    if not result.trace:
        return {}
    problem, known = truth.problem, truth.problem.known
    ids = jax.numpy.asarray(result.ids)
    attention = (known.attention & (ids != problem.vocabulary.pad)).at[:, 0].set(True)
    labels = known.labels if result.labels is None else jax.nn.one_hot(result.labels, problem.model.num_labels)
    found = known.masks if result.masks is None else result.masks
    local, observed = local_training.repeated(problem), local_training.matched(problem)
    masks = dropout_masks.complete(found, problem.model.sites, *ids.shape, () if local is None else (local.epochs,))
    update = simulate.compiled(problem.model, local)(problem.trainable, problem.frozen, ids, attention, labels, masks)
    sign = 1 if local is None else -1  # `matched` turns a change of the weights into a gradient
    return {path: sign * float(distances.similarity(update[path], observed[path])) for path in update}
