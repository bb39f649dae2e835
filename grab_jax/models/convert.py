"""Hugging Face checkpoints <-> parameter dicts. Names map one to one, so conversion is renaming and transposing."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Key
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from grab_jax.types import InputError, Params

BUILTIN = ("bert-mini", "gpt2-mini", "bert-mini-prior")
_BASES = {"bert": "bert", "roberta": "roberta", "gpt2": "transformer"}
_CLASSES = {
    ("bert", "classification"): "BertForSequenceClassification",
    ("bert", "masked_lm"): "BertForMaskedLM",
    ("roberta", "classification"): "RobertaForSequenceClassification",
    ("gpt2", "classification"): "GPT2ForSequenceClassification",
    ("gpt2", "causal_lm"): "GPT2LMHeadModel",
}
_BUFFERS = re.compile(r"(position_ids|token_type_ids|attn\.bias|attn\.masked_bias)$")
_TIED = re.compile(r"^(lm_head\.weight|cls\.predictions\.decoder\.(weight|bias))$")
_HEADS = re.compile(r"^(cls|lm_head|classifier|score|qa_outputs|predictions|seq_relationship)\.|(^|\.)pooler\.")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_TOKENIZER = ("*.json", "vocab.txt", "merges.txt")


def resolve(name: str, revision: str | None = None) -> Path:
    """The local folder of `builtin:NAME`, a folder, or a hub id (downloaded to the hub's cache)."""
    if name.startswith("builtin:"):
        model = name.removeprefix("builtin:")
        if model not in BUILTIN:
            raise InputError(f"unknown model {name!r}; built in are: {', '.join('builtin:' + m for m in BUILTIN)}")
        return Path(str(resources.files("grab_jax") / "builtin" / model))
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise InputError(f"model folder {name!r} does not exist; give a folder, a hub id, or builtin:bert-mini")
    return _download(name, revision)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=[*_WEIGHTS, *_TOKENIZER])
        if not any(Path(folder).glob("*.safetensors")):
            folder = snapshot_download(name, revision=revision, allow_patterns=["*.bin", "*.bin.index.json"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        at = f" at revision {revision!r}" if revision else ""
        raise InputError(
            f"model {name!r}{at} is neither a folder nor could it be fetched from the hub ({reason}); "
            "check the name, or use builtin:bert-mini, which needs no network"
        ) from error
    return Path(folder)


def read_config(folder: Path) -> Any:
    """The Hugging Face config of a folder."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} has no config.json; a model folder holds config.json and model.safetensors")
    try:
        kind = json.loads(path.read_text()).get("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise InputError(f"{path} is not a JSON object ({error})") from error
    if kind not in tuple(_BASES):
        raise InputError(f"architecture {kind!r} in {path} is not supported; supported: {', '.join(_BASES)}")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a valid {kind} config: {' '.join(str(error).split())}") from error


def gpt2_config(words: int, width: int, layers: int, heads: int, positions: int, **special: int | None) -> Any:
    """The config of a GPT-2 of any size over `words` tokens; `special` are `bos_token_id` and its kin."""
    from transformers import GPT2Config

    return GPT2Config(vocab_size=words, n_embd=width, n_layer=layers, n_head=heads, n_positions=positions, **special)


def hf_names(model: Any, params: Params) -> dict[str, str]:
    """Our `"/"`-joined path -> the Hugging Face tensor name."""
    leaves = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
    names = {}
    for path in flatten_dict(params):
        parts = [re.sub(r"^(layer|h)_(\d+)$", r"\1.\2", part) for part in path[:-1]]
        names["/".join(path)] = ".".join([*parts, leaves[path[-1]]])
    return names


def _transposed(model: Any, path: str) -> bool:
    """Dense kernels are `[out, in]` on disk, except GPT-2's Conv1D."""
    conv = model.family == "gpt2" and re.search(r"(c_attn|c_proj|c_fc)/kernel$", path)
    return path.endswith("/kernel") and not conv


def read_params(folder: Path, model: Any, key: Key[Array, ""]) -> tuple[Params, list[str]]:
    """Parameters of a checkpoint and notes; missing, unused and misshapen tensors all stand in one error."""
    base = _BASES[model.family]
    raw = {_canonical(name, base): value for name, value in _read_tensors(folder).items()}
    template = jax.eval_shape(model.init, key)
    shapes = {"/".join(path): leaf.shape for path, leaf in flatten_dict(template).items()}
    names = hf_names(model, template)
    absent = [path for path, name in names.items() if name not in raw]
    new = [path for path in absent if not path.startswith(base + "/") or "/pooler/" in path]
    found, misshapen = {}, []
    for path, name in names.items():
        if name in raw:
            value = raw.pop(name)
            found[path] = value.T if _transposed(model, path) else value
            if found[path].shape != shapes[path]:
                want = shapes[path][::-1] if _transposed(model, path) else shapes[path]
                misshapen.append(f"{name} is {tuple(value.shape)}, config.json says {tuple(want)}")
    heads = sorted(name for name in raw if _HEADS.search(name) or _TIED.search(name))
    unused = sorted(name for name in raw if name not in heads and not _BUFFERS.search(name))
    missing = sorted(names[path] for path in absent if path not in new)
    refuse(folder, missing=missing, unused=unused, misshapen=misshapen)
    initial = _initial(model, tuple(new))(key)
    params = {path: jnp.asarray(found[path] if path in found else initial[path], jnp.float32) for path in names}
    return unflatten_dict({tuple(p.split("/")): v for p, v in params.items()}), _notes(names, new, heads)


@lru_cache(maxsize=8)
def _initial(model: Any, paths: tuple[str, ...]):
    """The draw of some parameters, compiled: what is not asked for is not drawn."""
    return jax.jit(lambda key: _chosen(model.init(key), paths))


def _chosen(params: Params, paths: Sequence[str]) -> dict[str, jax.Array]:
    flat = {"/".join(path): value for path, value in flatten_dict(params).items()}
    return {path: flat[path] for path in paths}


def _notes(names: Mapping[str, str], new: list[str], heads: list[str]) -> list[str]:
    untied = [name for name in heads if not _TIED.search(name)]
    notes = [f"initialised at random (not in the checkpoint): {_listing([names[p] for p in new])}"] if new else []
    return notes + ([f"left out (heads of another task): {_listing(untied)}"] if untied else [])


def _canonical(name: str, base: str) -> str:
    """Old `gamma`/`beta`, and checkpoints of the bare body, whose names lack the base prefix."""
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
    name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
    bare = re.match(r"(embeddings|encoder|pooler|wte|wpe|h|ln_f)\.", name)
    return f"{base}.{name}" if bare else name


def refuse(folder: Path, **problems: list[str]) -> None:
    """One error that lists all problems, by kind; nothing where there are none."""
    said = [f"{kind}: {_listing(names)}" for kind, names in problems.items() if names]
    if said:
        raise InputError(f"the weights in {folder} do not fit its config.json; " + "; ".join(said))


def _listing(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder, as float32: one safetensors file, shards, or `.bin` where torch is installed."""
    files = _files(folder, "model.safetensors")
    if files:
        return {name: value for file in files for name, value in read_safetensors(file).items()}
    files = _files(folder, "pytorch_model.bin")
    if files:
        return {name: value for file in files for name, value in _read_torch(file).items()}
    raise InputError(f"{folder} holds no weights; expected model.safetensors, its shards, or pytorch_model.bin")


def _files(folder: Path, name: str) -> list[Path]:
    index = folder / f"{name}.index.json"
    if index.is_file():
        try:
            files = [folder / f for f in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{index} is not a readable index of weight shards ({error})") from error
        lost = [f.name for f in files if not f.is_file()]
        if lost:
            raise InputError(f"{index} names shards that are not there: {_listing(lost)}")
        return files
    return [folder / name] if (folder / name).is_file() else []


def read_safetensors(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a file, as float32."""
    try:
        with safe_open(file, framework="flax") as tensors:
            return {name: np.asarray(tensors.get_tensor(name), np.float32) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is not a readable safetensors file ({error})") from error


def _read_torch(file: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"{file} needs PyTorch to be read: install torch, or convert the model to safetensors"
        ) from error
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or unsafe file
        raise InputError(f"{file} could not be read safely by torch ({type(error).__name__})") from error
    return {name: value.float().numpy() for name, value in tensors.items()}


def write(folder: str, model: Any, params: Params, *, half: bool = False) -> None:
    """The inverse of `read_params`, with a `config.json` beside it."""
    flat = {"/".join(path): np.asarray(value) for path, value in flatten_dict(params).items()}
    dtype = np.float16 if half else np.float32
    tensors = {}
    for path, name in hf_names(model, params).items():
        value = flat[path].T if _transposed(model, path) else flat[path]
        tensors[name] = np.ascontiguousarray(value.astype(dtype))
    os.makedirs(folder, exist_ok=True)
    config = copy.deepcopy(model.config)
    config.architectures = [_CLASSES[model.family, model.task]]
    config.save_pretrained(folder)
    save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
