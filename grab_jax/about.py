"""What `run.json` says about a run: setting and assumptions in words, versions, device."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from grab_jax.attacks import NEEDS
from grab_jax.config import Config, identity

RESULT_CODE = (
    "models/*.py", "search/*.py", "span/*.py", "attacks/*.py", "kernels/*.py", "masks.py", "losses.py", "tuning.py",
    "client.py", "simulate.py", "defenses.py", "leaves.py", "views.py", "distances.py", "matching.py", "data.py",
    "record.py",
)  # fmt: skip
"""What can change a reconstruction; reports and progress cannot."""


def about(config: Config, model: Any, parameters: int, notes: list[str], ids: list[str]) -> dict[str, Any]:
    """The content of `run.json`; `ids` are those of the results that belong to it."""
    packages = ("jax", "jaxlib", "flax", "optax", "transformers", "numpy", "grab-jax")
    return {
        "schema": "grab_jax.run/1",
        "config": dataclasses.asdict(config),
        "identity": identity(config),
        "attack": config.attack.name,
        "model": config.model.name,
        "data": config.data.name,
        "seed": config.seed,
        "parameters": parameters,
        "versions": {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}},
        "device": device(),
        "git": _git(),
        "code": code_version(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "setting": _setting(config, model),
        "assumptions": _assumptions(config, model),
        "needs": NEEDS[config.attack.name]._asdict(),
        "notes": notes,
        "ids": ids,
        "flags_file": "flags.txt",
    }


def _setting(config: Config, model: Any) -> list[str]:
    dropout = f"dropout {config.client.dropout:g} on" if config.client.dropout else "dropout off (evaluation mode)"
    task = "next-token prediction" if config.model.task == "causal_lm" else "sequence classification"
    frozen = "word and position embeddings frozen" if config.client.frozen == "embeddings" else "everything trained"
    return [
        f"One FedSGD step of {task} with {config.model.name} ({model.family}, width {model.width}, "
        f"{model.config.num_hidden_layers} layers), {_count(config.batch_size, 'sentence')} per client batch.",
        f"Client in {'training' if config.client.dropout else 'evaluation'} mode: {dropout}; {frozen}.",
        *_defended(config),
    ]


def _defended(config: Config) -> list[str]:
    """One sentence on what is done to the update, if anything is."""
    said, parts = config.defense, []
    if said.noise:
        on = "each tensor is divided by its norm, then " if said.noise_on == "normalised" else ""
        parts.append(f"{on}Gaussian noise of standard deviation {said.noise:g} is added to every entry")
    if said.prune:
        which = "random" if said.prune_by == "random" else "the smallest"
        parts.append(f"{which} {100 * said.prune:g} % of each tensor's entries are set to zero")
    if config.client.wire != "float32":
        parts.append(f"it is sent in {config.client.wire}")
    return [f"Before the update leaves the client: {'; '.join(parts)}."] if parts else []


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _assumptions(config: Config, model: Any) -> list[str]:
    exact = "" if _defended(config) else "exact float32 "
    server = f"Honest-but-curious server: it sees one client's {exact}gradient as it is sent, and the weights it sent."
    if config.attack.name == "span":
        return [server, *_told_span(config, model)]
    if config.attack.name == "dager":
        return [server, *_told_dager(config, model)]
    return [server, *_told_search(config), *([_begun(model)] if config.attack.init == "span" else [])]


def _begun(model: Any) -> str:
    return (
        "It first decodes the first attention layer's gradient (span decoding), holds the tokens and masks that this "
        f"proves, and searches the rest; a batch of as many tokens as the model is wide ({model.width}) it searches "
        "knowing nothing."
    )


def _told_span(config: Config, model: Any) -> list[str]:
    """Span decoding takes of `--known_*` the dropout rate only, and no setting of another attack."""
    rate = config.client.dropout
    if rate:
        used = "the first attention layer's query, key and value gradients only, with the weights of that layer"
        told = f"It knows the dropout rate ({rate:g})" if config.known.rate else "It is not told the dropout rate"
        told += ", and decodes the masks."
    else:
        used = "at most the first two attention layers' query, key and value gradients, with these layers' weights"
        told = "It knows that the client trains without dropout."
    return [
        f"It uses {used} and the word and position embeddings.",
        "It is not told the labels, the sentences' lengths or the batch size, whatever --known_labels and "
        "--known_lengths say.",
        told,
        f"The batch holds fewer tokens than the model is wide ({model.width}); any other batch is not testable.",
    ]


def _told_dager(config: Config, model: Any) -> list[str]:
    """DAGER takes nothing of `--known_*`."""
    ends = "It takes the client for one that trains without dropout" + (
        ", which it does not." if config.client.dropout else "."
    )
    return [
        "It uses the first two attention layers' gradients, the ranks of the first ten's, the weights and the word and "
        "position embeddings.",
        "It is not told the labels or the sentences' lengths, whatever --known_labels and --known_lengths say. It "
        "knows the batch size, and returns as many sentences where not all are found.",
        ends,
        f"The batch holds fewer tokens than the model is wide ({model.width}); any other batch is not testable.",
    ]


def _told_search(config: Config) -> list[str]:
    mode = {
        "learn": "It knows the dropout rate and sites and learns the masks.",
        "off": "It ignores dropout (evaluation mode).",
        "true": "Control: it is given the client's true dropout masks.",
    }
    said = [
        "The attacker knows the batch size, the architecture and which parameters are frozen.",
        "It is told every label." if config.known.labels else "It is not told the labels.",
        "It is told every sentence's length."
        if config.known.lengths
        else "It is told only the longest length of the batch.",
    ]
    if config.client.dropout:
        said.append(mode[config.attack.masks])
    if config.attack.tokens == "true":
        said.append("Control: it is given the true tokens.")
    if config.attack.prior != "none":
        said.append(f"It has a language model for the model's tokenizer, {config.attack.prior}, to judge word order.")
    return said


def device() -> str:
    """The devices of this process, in words."""
    device = jax.local_devices()[0]
    return f"{jax.local_device_count()} x {device.device_kind} ({device.platform}), {os.cpu_count()} host cores"


def _git() -> str | None:
    root = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def code_version() -> str:
    """Hash of the sources that decide a result: part of every result's identity."""
    root = Path(__file__).parent
    files = [file for name in RESULT_CODE for file in sorted(root.glob(name))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
