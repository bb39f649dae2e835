"""A fake run for the tests of what a person reads: `run.json` and records as `results.jsonl` holds them."""

RUN = {
    "schema": "grab_jax.run/1",
    "config": {"client": {"dropout": 0.1, "frozen": ""}, "batch_size": 2, "report": {"redact": True}},
    "attack": "grab", "model": "bert-base-uncased", "data": "cola", "seed": 101, "versions": {"jax": "0.10.2"},
    "device": "cpu", "git": None, "code": "abc", "started": "2026-01-01T00:00:00Z", "parameters": 1234567,
    "assumptions": ["The server knows the weights."], "setting": ["Clients send one gradient."], "notes": ["Ran once."],
    "flags_file": "flags.txt",
}  # fmt: skip


def sentence(text, tokens=None):
    return {"text": text, "tokens": tokens or text.lower().split(), "label": 1, "row": 0, "truncated": False}


def prediction(text):
    tokens = text.lower().split()
    return {"text": text, "tokens": tokens, "confidence": [0.93] * len(tokens)}


def record(index=0, truths=("the cat sat on the mat",), founds=("the cat on rug mat the",), **more):
    trace = [
        {"round": r, "phase": phase, "step": step, "loss": 1.0 / (1 + 90 * r + step)}
        for r in range(2)
        for phase in ("continuous", "discrete")
        for step in range(0, 40, 10)
    ]
    base = {
        "id": f"{index:04x}", "index": index, "control": False, "loss": 0.01, "trace": trace,
        "notes": ["Stopped early."],
        "masks": {"auc": {"embeddings": 0.9, "layer_0.attention": 0.4}, "mean": 0.65}, "labels": [1],
        "cosine": {"bert/encoder/layer_0/attention/self/query/kernel": 0.91, "classifier/kernel": -0.2},
        "seconds": {"compile": 1.0, "attack": 3700.0},
        "sentences": [sentence(t) for t in truths], "predictions": [prediction(t) for t in founds],
    }  # fmt: skip
    return base | more


def proofs(certified=(True,), rows=12, rank=12, width=384, not_testable=None, **more):
    """Evidence as span decoding writes it: a spectrum with a cliff at the rank, certified rows and sentences."""
    base = {
        "width": width, "rank": rank, "gap_rank": rank, "floor": 1e-6,
        "spectrum": [2.0] * rank + [1e-7] * (width - rank),
        "sentences": [{"certified": sure, "residual": 2e-7 if sure else 0.04} for sure in certified],
        "rows": [{"position": i, "token": 29990 + i, "certificate": 1.0, "used": True} for i in range(rows)],
    }  # fmt: skip
    return base | ({} if not_testable is None else {"not_testable": not_testable}) | more


def span(index=0, truths=("the cat sat on the mat",), founds=None, certified=None, *, evidence=None, **more):
    """A record of span decoding; everything is found and certified unless told otherwise."""
    founds = truths if founds is None else founds
    found = evidence or proofs([True] * len(founds) if certified is None else certified)
    empty = {"trace": [], "cosine": {}, "labels": None, "notes": [], "masks": {"auc": {"embeddings": 1.0}, "mean": 1.0}}
    loss = max((s["residual"] for s in found["sentences"]), default=None)
    return record(index, truths, founds, evidence=found, loss=loss, **(empty | more))


WIDE = "not testable by span decoding: 400 tokens or more >= width 384"


def barred(index=0, truths=("a b c d",), reason=WIDE):
    """A record of span decoding of a batch with more tokens than the model is wide."""
    found = proofs((), rows=0, rank=384, not_testable=reason)
    return span(index, truths, [""], evidence=found, masks=None, notes=[reason])


SECRET = record(
    truths=["Please ask Maria Lopez (born 1984) or mail to lopez@clinic.org; Maria knows."],
    founds=["lopez maria 1984 clinic ask 555 please"],
)
SECRET["sentences"][0]["tokens"] = (
    "please ask maria lop ##ez ( born 1984 ) or mail to lop ##ez @ clinic . org ; maria knows .".split()  # noqa: SIM905
)
SECRET["predictions"][0]["tokens"] = "lop ##ez maria 1984 clinic ask 555 please".split()  # noqa: SIM905
