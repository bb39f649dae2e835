"""Compare runs on the same sentences: scores, paired differences with intervals, loss per stage, learned masks.

    python experiments/compare.py --a=runs/learn-0,runs/learn-1 --b=runs/off-0,runs/off-1

`--a` and `--b` are run folders of the same data (several seeds each, in the same order); `--b` may be left out. A pair
is one sentence of one seed; intervals are 95 % BCa bootstrap intervals of the mean difference a - b in points.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from absl import app, flags

from grab_jax import metrics, report, summary

A = flags.DEFINE_list("a", None, "run folders", required=True)
B = flags.DEFINE_list("b", [], "run folders to compare with, in the same order")
KINDS = ("rouge1", "rouge2", "rougeL")
STAGES = {"continuous": "continuous, embeddings", "tokens": "continuous, tokens", "discrete": "discrete"}


def rows(folders: list[str]) -> list[dict]:
    """One dict per sentence and run: its place and its scores."""
    found = []
    for seed, folder in enumerate(folders):
        _, records = report.read(Path(folder))
        for record in sorted((r for r in records if not r["control"]), key=lambda r: r["index"]):
            for slot, score in enumerate(summary.score_batch(record)):
                found.append({"place": (seed, record["index"], slot), "record": record, **score})
    return found


def describe(name: str, found: list[dict]) -> None:
    """Mean scores, stages and masks of one side."""
    means = "/".join(f"{np.mean([r[kind] for r in found]):.1f}" for kind in KINDS)
    paper = "/".join(f"{np.mean([r['paper'][kind] for r in found]):.1f}" for kind in KINDS)
    exact = sum(r["exact"] for r in found)
    seconds = np.mean([r["record"]["seconds"]["attack"] / len(r["record"]["sentences"]) for r in found])
    print(f"{name}: {len(found)} sentences, one-to-one R-1/R-2/R-L {means}, paper's matching {paper}, ", end="")
    print(f"exact {exact}, {seconds:.0f} s per sentence")
    records = {id(r["record"]): r["record"] for r in found}.values()
    for stage in sorted({(t["round"], t["phase"]) for r in records for t in r["trace"]}, key=_stage_order):
        losses = [[t["loss"] for t in r["trace"] if (t["round"], t["phase"]) == stage] for r in records]
        # Batches that stopped early stay at their last value only in their own rounds.
        last = [values[-1] for values in losses if values]
        print(f"  round {stage[0] + 1} {STAGES[stage[1]]:24s} loss {np.mean(last):9.3f}  ({len(last)} batches)")
    auc = [r["masks"] for r in records if r.get("masks") and r["masks"]["mean"] is not None]
    if auc:
        sites = {s: np.mean([m["auc"][s] for m in auc if m["auc"][s] is not None]) for s in auc[0]["auc"]}
        best = ", ".join(f"{s} {v:.3f}" for s, v in sorted(sites.items(), key=lambda item: -item[1])[:4])
        print(f"  mask AUC, mean over sites {np.mean([m['mean'] for m in auc]):.3f}; highest: {best}")


def _stage_order(stage: tuple[int, str]) -> tuple[int, int]:
    return stage[0], list(STAGES).index(stage[1])


def main(_argv: list[str]) -> None:
    """Print the comparison."""
    a = rows(A.value)
    describe("a", a)
    if not B.value:
        return
    b = rows(B.value)
    describe("b", b)
    if [r["place"] for r in a] != [r["place"] for r in b]:
        raise SystemExit("compare: --a and --b hold different sentences; give runs of the same data and sizes")
    for kind in KINDS:
        left, right = [[r[kind] for r in side] for side in (a, b)]
        low, high = metrics.paired_interval(left, right, seed=0) or (float("nan"),) * 2
        print(f"a - b, {kind}: {np.mean(left) - np.mean(right):+.1f} points (95 % interval {low:+.1f} to {high:+.1f})")


if __name__ == "__main__":
    app.run(main)
