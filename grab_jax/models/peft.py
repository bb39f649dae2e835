"""LoRA adapters as PEFT stores them: `adapter_config.json` and `adapter_model.safetensors` in a folder.

Factors are stored transposed (`lora_A.weight` is `[rank, in]`), under `base_model.model.` and the layer's Hugging Face
name; a trained head under its own name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from safetensors.numpy import save_file

from grab_jax import tuning
from grab_jax.models import convert
from grab_jax.models.lora import Lora, hf_layer, is_head
from grab_jax.types import InputError, Params

PREFIX = "base_model.model."
_TASKS = {"classification": "SEQ_CLS", "causal_lm": "CAUSAL_LM", "masked_lm": "FEATURE_EXTRACTION"}
_PLAIN = {"bias": "none", "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "layers_to_transform": None}
"""Settings of PEFT with the only value understood here."""


def weights(folder: str) -> Path:
    """The file of a folder that holds the factors."""
    return Path(folder) / "adapter_model.safetensors"


def digest(folder: str) -> str:
    """Of the factors: trained once more an adapter has the same name, and other weights."""
    return hashlib.sha256(weights(folder).read_bytes()).hexdigest()


def write(folder: str, model: Any, params: Params, lora: Lora, base: str = "") -> None:
    """Write the adapters and the head of `params` so that `PeftModel.from_pretrained` loads the folder.

    Args:
      lora: what the adapters were made with (`lora.add`).
      base: name or folder of the base model, for the record.
    """
    flat = {path: np.asarray(value, np.float32) for path, value in tuning.flatten(params).items()}
    tensors = {name: np.ascontiguousarray(_turned(path, flat[path])) for path, name in _names(flat).items()}
    heads = sorted({path.split("/")[0] for path in flat if is_head(path)})
    targets = {hf_layer(path.removesuffix("/lora_a")).split(".")[-1] for path in flat if path.endswith("/lora_a")}
    config = {
        "peft_type": "LORA", "task_type": _TASKS[model.task], "base_model_name_or_path": base, "inference_mode": True,
        "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "use_rslora": lora.rank_stabilised,
        "target_modules": sorted(lora.targets or targets), "fan_in_fan_out": model.family == "gpt2", "bias": "none",
        "modules_to_save": heads or None, "init_lora_weights": True,
    }  # fmt: skip
    os.makedirs(folder, exist_ok=True)
    save_file(tensors, weights(folder), metadata={"format": "pt"})
    (Path(folder) / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_config(folder: str) -> Lora:
    """The adapters' settings.

    Raises:
      InputError: no PEFT folder, or of a kind not understood; names the setting.
    """
    path = Path(folder) / "adapter_config.json"
    try:
        said = json.loads(path.read_text())
        kind = said["peft_type"]
        found = Lora(
            int(said["r"]), float(said.get("lora_alpha", 8)), tuple(_targets(said, path)),
            float(said.get("lora_dropout", 0)), bool(said.get("use_rslora", False)),
        )  # fmt: skip
    except FileNotFoundError as error:
        raise InputError(f"{folder} has no adapter_config.json; give a folder as PEFT saves it") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is not a readable LoRA config ({error})") from error
    if kind != "LORA":
        raise InputError(f"{path}: adapters of type {kind} are not supported; supported: LORA")
    for name, value, fits, needed in (
        ("r", found.rank, found.rank >= 1, "1 or more"),
        ("lora_alpha", found.alpha, 0 < found.alpha < float("inf"), "a positive number"),
        ("lora_dropout", found.dropout, 0 <= found.dropout < 1, "a rate in [0, 1)"),
    ):
        if not fits:
            raise InputError(f"{path}: {name}={value:g} should be {needed}; save the adapter again")
    for name, plain in _PLAIN.items():
        if said.get(name, plain) not in (plain, None):
            raise InputError(f"{path}: {name}={said[name]!r} is not supported; supported: {plain!r}")
    return found


def _targets(said: Mapping[str, Any], path: Path) -> list[str]:
    targets = said.get("target_modules")
    if isinstance(targets, str):
        raise InputError(f"{path}: target_modules is a regular expression; give a list of layer names")
    return sorted(targets or [])


def read(folder: str, model: Any, params: Params) -> Params:
    """Parameters with adapters (`lora.add` with the folder's `read_config`), their factors and the head as stored.

    A head that the folder does not hold stays as it is.

    Raises:
      InputError: tensors are missing, unknown or of another shape; names them.
    """
    flat = tuning.flatten(params)
    file = weights(folder)
    if not file.is_file():
        raise InputError(f"{folder} has no adapter_model.safetensors; save the adapter with safe_serialization=True")
    raw, names = convert.read_safetensors(file), _names(flat)
    missing = [name for path, name in names.items() if name not in raw and not is_head(path)]
    unused = sorted(raw.keys() - names.values())
    misshapen = [
        f"{name} is {raw[name].shape}, the model wants {_turned(path, flat[path]).shape}"
        for path, name in names.items()
        if name in raw and raw[name].shape != _turned(path, flat[path]).shape
    ]
    convert.refuse(Path(folder), missing=missing, unused=unused, misshapen=misshapen)
    stored: dict[str, Array] = {p: jnp.asarray(_turned(p, raw[n])) for p, n in names.items() if n in raw}
    return tuning.unflatten({**flat, **stored})


def _names(flat: Mapping[str, Any]) -> dict[str, str]:
    """Path -> PEFT's name, of adapters and head."""
    leaves = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "kernel": "weight", "bias": "bias"}
    names = {}
    for path in flat:
        layer, _, leaf = path.rpartition("/")
        if leaf in ("lora_a", "lora_b") or is_head(path):
            names[path] = f"{PREFIX}{hf_layer(layer)}.{leaves[leaf]}"
    return names


def _turned(path: str, value: Any) -> Any:
    """Between `[in, out]` and PyTorch's `[out, in]`; heads are linear layers in every family."""
    return value if path.endswith("/bias") else value.T
