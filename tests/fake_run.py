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


SECRET = record(
    truths=["Please ask Maria Lopez (born 1984) or mail to lopez@clinic.org; Maria knows."],
    founds=["lopez maria 1984 clinic ask 555 please"],
)
SECRET["sentences"][0]["tokens"] = (
    "please ask maria lop ##ez ( born 1984 ) or mail to lop ##ez @ clinic . org ; maria knows .".split()  # noqa: SIM905
)
SECRET["predictions"][0]["tokens"] = "lop ##ez maria 1984 clinic ask 555 please".split()  # noqa: SIM905
