"""Train one of the bundled models, tokenizer and weights, on your own text.

    python experiments/train_builtin.py --kind=bert --text=a.txt,b.jsonl,c.csv --out=folder --minutes=20

`.txt` files are split into sentences; `.jsonl` and `.csv` files need a field or column `text`, one sentence a
row. An interrupted run continues where it stopped when the same command is given again; a finished folder is
trained anew. The folder loads with `grab_jax.models.load(folder)` and with Hugging Face transformers.
"""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from absl import app, flags, logging
from jaxtyping import Array, Float, Int
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as subword
from transformers import AutoTokenizer, BertConfig, GPT2Config, PreTrainedTokenizerFast

from grab_jax import models
from grab_jax.types import InputError

FLAGS = flags.FLAGS
KIND = flags.DEFINE_enum("kind", None, ["bert", "gpt2"], "masked or causal language model", required=True)
TEXT = flags.DEFINE_list("text", None, "training files (.txt, .jsonl, .csv)", required=True)
OUT = flags.DEFINE_string("out", None, "folder to write", required=True)
HELD_OUT = flags.DEFINE_list(
    "held_out",
    [],
    "files, or NAME=FILE, kept out of the weights and scored; default: 1 % of the text, at most 500",
)
VOCABULARY_TEXT = flags.DEFINE_list(
    "vocabulary_text", [], "files the tokenizer sees, three times over, and the weights never"
)
ABOUT = flags.DEFINE_string("about", "text of the user", "for the model card: what text this is")
LICENCE = flags.DEFINE_string(
    "licence",
    "The training text has its own licences; look at them before passing the weights on.",
    "for the model card",
)
VOCAB = flags.DEFINE_integer("vocab", 8000, "most tokens in the vocabulary", lower_bound=300)
LAYERS = flags.DEFINE_integer("layers", 4, "layers", lower_bound=1)
WIDTH = flags.DEFINE_integer("width", 256, "hidden size", lower_bound=1)
HEADS = flags.DEFINE_integer("heads", 8, "attention heads", lower_bound=1)
POSITIONS = flags.DEFINE_integer("positions", 128, "longest sentence in tokens", lower_bound=8)
MINUTES = flags.DEFINE_float("minutes", None, "training time, compilation not counted")
STEPS = flags.DEFINE_integer("steps", None, "training steps; with --minutes, whichever comes first")
BATCH = flags.DEFINE_integer("batch", 16, "rows of --length tokens a step", lower_bound=1)
LENGTH = flags.DEFINE_integer("length", 64, "tokens a row; every fourth step uses --positions instead")
RATE = flags.DEFINE_float("learning_rate", 1.5e-3, "highest learning rate")
SEED = flags.DEFINE_integer("seed", 0, "random seed")
SAVE_SECONDS = flags.DEFINE_float("save_seconds", 120.0, "seconds between checkpoints; 0 saves every step")

WARM_UP = 0.06
MASKED = 0.15
BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
GPT2_SPECIAL = "<|endoftext|>"


class State(NamedTuple):
    """All that a checkpoint holds; `loss` is a running mean, `epoch` and `at` are the place in the text."""

    params: Any
    moments: Any
    step: int
    seconds: float
    loss: float
    epoch: int
    at: int


# --- text ---------------------------------------------------------------------------------------------------


def read_sentences(file: str) -> list[str]:
    """The sentences of a file; fields other than `text` are ignored."""
    path = Path(file)
    if not path.is_file():
        raise InputError(f"text file {file!r} does not exist; give .txt, .jsonl or .csv files")
    if path.suffix == ".txt":
        return list(_split_paragraphs(path.read_text(encoding="utf-8").splitlines()))
    with path.open(encoding="utf-8", newline="") as stream:
        rows = csv.DictReader(stream) if path.suffix == ".csv" else map(json.loads, stream)
        try:
            texts = [" ".join(row["text"].split()) for row in rows]
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise InputError(f"{file} has a row without a readable 'text' ({error!r})") from error
    return [text for text in texts if text]


def _split_paragraphs(lines: Sequence[str]) -> Iterator[str]:
    """Sentences of plain text, without headings, in ordinary spacing where the text is WikiText."""
    for line in lines:
        line = re.sub(r" @(.)@ ", r"\1", " ".join(line.split()))
        line = re.sub(r" (?=[.,;:!?)%]|'s\b|n't\b)", "", line).replace("( ", "(")
        if not line.startswith("="):
            yield from (s for s in re.split(r'(?<=[.!?]) (?=[A-Z"])', line) if s and "<unk>" not in s)


def split_name(entry: str) -> tuple[str, str]:
    """`NAME=FILE`, or `FILE` named after itself."""
    name, found, file = entry.partition("=")
    return (name, file) if found else (Path(entry).name, entry)


def leave_out(sentences: list[str], held_out: list[str], shortest: int = 20) -> list[str]:
    """The sentences that neither repeat, nor contain, nor are part of a held-out one.

    Only letters and digits are compared; parts of fewer than `shortest` stay in, unless they are a whole
    held-out sentence.
    """

    def bare(text: str) -> str:
        return re.sub(r"[\W_]+", "", text.lower())

    held = {bare(text) for text in held_out}
    long = [text for text in held if len(text) >= shortest]
    joined = "\n".join(held)

    def known(text: str) -> bool:
        return text in held or (len(text) >= shortest and (text in joined or any(h in text for h in long)))

    return [text for text in sentences if not known(bare(text))]


def gather() -> tuple[list[str], dict[str, list[str]]]:
    """Training sentences, and held-out sentences by name."""
    sentences = list(dict.fromkeys(s for file in TEXT.value for s in read_sentences(file)))
    if HELD_OUT.value:
        held_out = {name: read_sentences(file) for name, file in map(split_name, HELD_OUT.value)}
    else:
        order = np.random.default_rng(SEED.value).permutation(len(sentences))
        chosen = order[: min(500, max(8, len(sentences) // 100))]
        held_out = {"text": [sentences[i] for i in chosen]}
    kept = leave_out(sentences, [s for part in held_out.values() for s in part])
    if not kept:
        raise InputError(f"none of {len(sentences)} sentences is left to train on; give more --text")
    return kept, held_out


# --- tokenizer ----------------------------------------------------------------------------------------------


def train_tokenizer(kind: str, sentences: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """Lower-cased WordPiece for BERT, byte-level BPE for GPT-2."""
    return (_train_wordpiece if kind == "bert" else _train_bytes)(sentences, vocab)


def _train_wordpiece(sentences: list[str], vocab: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(subword.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab, special_tokens=BERT_SPECIAL, limit_alphabet=200, show_progress=False
    )
    tokenizer.train_from_iterator(sentences, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    names = {f"{token[1:-1].lower()}_token": token for token in BERT_SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=POSITIONS.value, **names)


def _train_bytes(sentences: list[str], vocab: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(subword.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[GPT2_SPECIAL], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sentences, trainer)
    names = {f"{role}_token": GPT2_SPECIAL for role in ("bos", "eos", "pad", "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=POSITIONS.value, **names)


def open_tokenizer(out: Path, sentences: list[str]) -> Any:
    """The tokenizer of an interrupted run, or a new one."""
    if not ((out / "state").is_dir() and (out / "tokenizer.json").is_file()):
        extra = [s for file in VOCABULARY_TEXT.value for s in read_sentences(file)]
        train_tokenizer(KIND.value, sentences + 3 * extra, VOCAB.value).save_pretrained(out)
    return AutoTokenizer.from_pretrained(out, local_files_only=True)


# --- batches ------------------------------------------------------------------------------------------------


class Packer:
    """Rows full of whole sentences, the last one cut; the sentences are shuffled anew each epoch."""

    def __init__(self, tokenizer: Any, sentences: list[str], seed: int):
        self.tokenizer, self.seed = tokenizer, seed
        self.start = [] if tokenizer.cls_token_id is None else [tokenizer.cls_token_id]
        self.end = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id
        encoded = tokenizer(sentences, add_special_tokens=False, verbose=False)["input_ids"]
        self.units = [[*ids, self.end] for ids in encoded]
        self.tokens = sum(map(len, self.units))
        self.seek(0, 0)

    def seek(self, epoch: int, at: int) -> None:
        """Stand before sentence `at` of an epoch."""
        self.epoch, self.at = epoch, at
        self.order = np.random.default_rng([self.seed, epoch]).permutation(len(self.units))

    def count(self) -> Int[np.ndarray, " v"]:
        """How often each token stands in the text, plus one."""
        return 1 + np.bincount([i for unit in self.units for i in unit], minlength=len(self.tokenizer))

    def row(self, length: int) -> list[int]:
        """The next `length` tokens, from the start of a sentence."""
        row = list(self.start)
        while len(row) < length:
            row += self.units[self.order[self.at]]
            self.at += 1
            if self.at == len(self.units):
                self.seek(self.epoch + 1, 0)
        return row[:length] if not self.start else [*row[: length - 1], self.end]

    def rows(self, count: int, length: int) -> Int[np.ndarray, "b t"]:
        """`count` rows."""
        return np.asarray([self.row(length) for _ in range(count)], np.int32)


class Examples(NamedTuple):
    """Token rows, the positions to predict, and what stands there."""

    ids: Int[Array, "b t"]
    where: Int[Array, "b n"]
    targets: Int[Array, "b n"]


def make_examples(ids: Int[np.ndarray, "b t"], tokenizer: Any, rng: np.random.Generator) -> Examples:
    """Next tokens, or 15 % of the positions: 80 % become [MASK], 10 % a random token, 10 % stay."""
    rows, length = ids.shape
    if tokenizer.mask_token_id is None:
        where = np.tile(np.arange(length - 1, dtype=np.int32), (rows, 1))
        return Examples(ids, where, ids[:, 1:])
    order = rng.random(ids.shape) + np.isin(ids, tokenizer.all_special_ids)
    where = np.argsort(order, axis=1)[:, : max(1, round(MASKED * length))].astype(np.int32)
    targets = np.take_along_axis(ids, where, axis=1)
    die = rng.random(targets.shape)
    guesses = rng.integers(len(BERT_SPECIAL), len(tokenizer), targets.shape, dtype=np.int32)
    shown = np.where(die < 0.8, tokenizer.mask_token_id, np.where(die < 0.9, guesses, targets))
    ids = ids.copy()
    np.put_along_axis(ids, where, shown.astype(np.int32), axis=1)
    return Examples(ids, where, targets)


# --- training -----------------------------------------------------------------------------------------------


def make_model(kind: str, tokenizer: Any) -> models.Model:
    """The model of the flags, for this tokenizer."""
    if kind == "bert":
        config = BertConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH.value, num_hidden_layers=LAYERS.value,
            num_attention_heads=HEADS.value, intermediate_size=4 * WIDTH.value,
            max_position_embeddings=POSITIONS.value, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        return models.build(config, "masked_lm")
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=WIDTH.value, n_layer=LAYERS.value, n_head=HEADS.value,
        n_positions=POSITIONS.value, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return models.build(config, "causal_lm")


def _masked_logits(module: Any, ids: Int[Array, "b t"], where: Int[Array, "b n"]) -> Float[Array, "b n v"]:
    """BERT's head at the masked positions only: seven times cheaper than at all of them."""
    hidden = module.bert(ids, jnp.ones(ids.shape, bool), None)
    picked = jnp.take_along_axis(hidden, where[:, :, None], axis=1)
    return module.cls(picked, module.bert.embeddings.word_embeddings)


def mean_loss(model: models.Model, params: Any, examples: Examples) -> Float[Array, ""]:
    """Mean cross-entropy in nats."""
    ids, where, targets = examples
    if model.task == "masked_lm":
        logits = model.module.apply({"params": params}, ids, where, method=_masked_logits)
    else:
        logits = model.apply(params, ids, jnp.ones(ids.shape, bool))[:, :-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def make_optimizer() -> optax.GradientTransformation:
    """AdamW without its rate, which follows the clock; biases, norms and embeddings do not decay."""

    def decays(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b2=0.98),
        optax.add_decayed_weights(0.05, decays),
    )


def make_step(model: models.Model, optimizer: Any) -> Callable[..., tuple[Any, Any, Float[Array, ""]]]:
    """One AdamW step: parameters, moments, examples, rate -> parameters, moments and the loss before it."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, moments: Any, examples: Examples, rate: float) -> tuple[Any, Any, Float[Array, ""]]:
        loss, gradient = jax.value_and_grad(partial(mean_loss, model))(params, examples)
        change, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, jax.tree.map(lambda c: -rate * c, change)), moments, loss

    return step


def progress(step: int, seconds: float) -> float:
    """How much of the budget is used, in [0, 1]: of the steps or of the minutes, whichever is ahead."""
    used = [step / STEPS.value] if STEPS.value else []
    used += [seconds / (60 * MINUTES.value)] if MINUTES.value else []
    return min(1.0, max(used))


def learning_rate(done: float) -> float:
    """Linear warm-up, then cosine to zero."""
    if done < WARM_UP:
        return RATE.value * max(done, 1e-3) / WARM_UP
    return RATE.value * 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))


def row_length(step: int) -> int:
    """Tokens a row of this step: every fourth step reaches the last position."""
    return POSITIONS.value if step % 4 == 3 else min(LENGTH.value, POSITIONS.value)


def open_state(keeper: ocp.CheckpointManager, model: models.Model, optimizer: Any) -> State:
    """The latest checkpoint, or a new start."""
    params = model.init(jax.random.key(SEED.value))
    state = State(params, optimizer.init(params), 0, 0.0, 0.0, 0, 0)
    if keeper.latest_step() is None:
        return state
    template = ocp.args.StandardRestore(state._asdict())
    try:
        found = State(**keeper.restore(keeper.latest_step(), args=template))
    except ValueError as error:
        raise InputError(
            f"the checkpoint in {keeper.directory} is of another model; "
            "give the same flags as before, or delete that folder"
        ) from error
    print(f"resuming at step {found.step}", flush=True)
    return found


def train(model: models.Model, tokenizer: Any, packer: Packer, folder: Path) -> State:
    """Train until the budget is used, with checkpoints in `folder`."""
    optimizer = make_optimizer()
    step = make_step(model, optimizer)
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder, options=options) as keeper:
        state, compiled = open_state(keeper, model, optimizer), set()
        packer.seek(state.epoch, state.at)
        said = saved = time.monotonic()
        while (done := progress(state.step, state.seconds)) < 1:
            length = row_length(state.step)
            began = time.monotonic()
            ids = packer.rows(max(1, BATCH.value * LENGTH.value // length), length)
            examples = make_examples(ids, tokenizer, np.random.default_rng([SEED.value, 1, state.step]))
            params, moments, loss = step(state.params, state.moments, examples, learning_rate(done))
            mean = state.loss + (float(loss) - state.loss) * max(0.01, 1 / (state.step + 1))
            now = time.monotonic()
            seconds = state.seconds + (now - began if length in compiled else 0.0)
            compiled.add(length)
            state = State(params, moments, state.step + 1, seconds, mean, packer.epoch, packer.at)
            if now - saved >= SAVE_SECONDS.value:
                keeper.save(state.step, args=ocp.args.StandardSave(state._asdict()))
                saved = now
            if now - said >= 10 or state.step == 1:
                say(state)
                said = now
    say(state)
    return state


def say(state: State) -> None:
    """Print where training stands."""
    done = progress(state.step, state.seconds)
    print(
        f"step {state.step} ({100 * done:.1f} %, {state.seconds:.0f} s, epoch {state.epoch}): "
        f"loss {state.loss:.4f}, rate {learning_rate(done):.2e}",
        flush=True,
    )


class Score(NamedTuple):
    """Held-out losses in nats per predicted token; `baseline` knows the token frequencies only."""

    sentences: int
    loss: float
    baseline: float


def score(model: models.Model, params: Any, training: Packer, sentences: list[str]) -> Score:
    """Losses on packed rows of held-out sentences."""
    packer = Packer(training.tokenizer, sentences, SEED.value)
    rng = np.random.default_rng([SEED.value, 2])
    rows = [packer.rows(1, row_length(0)) for _ in range(math.ceil(packer.tokens / row_length(0)))]
    examples = [make_examples(row, packer.tokenizer, rng) for row in rows]
    log_frequency = np.log(training.count() / training.count().sum())
    baseline = -np.mean([log_frequency[e.targets].mean() for e in examples])
    loss = jax.jit(partial(mean_loss, model))
    return Score(len(sentences), float(np.mean([loss(params, e) for e in examples])), float(baseline))


# --- the folder ---------------------------------------------------------------------------------------------


CARD = """\
# {name}

A small {what} for first runs and tests of grab_jax; not a useful language model.

- size: {layers} layers, width {width}, {heads} heads, {positions} positions, vocabulary {vocab}; float16
- tokenizer: {tokenizer}, from the training text{extra}
- training text: {about} ({sentences} sentences, {corpus} tokens)
- training: {steps} steps, {seen} tokens ({epochs:.1f} epochs), {minutes:.1f} minutes on {device};
  {objective}; AdamW, no dropout
- training loss at the end (running mean): {loss:.3f} nats per predicted token

| held out | sentences | loss (nats per predicted token) | perplexity | loss of token frequencies alone |
|---|---|---|---|---|
{table}

Held-out sentences, and training sentences that contain one or are part of one, were kept out of the weights.
Losses are on packed rows of {length} tokens; a causal model also predicts the separators between sentences.

Licence: the folder holds a vocabulary and weights, none of the training text. {licence}

Made by `experiments/train_builtin.py --kind={kind}`.
"""
NOTES = {
    "bert": ("BERT (masked language model)", "lower-cased WordPiece", "15 % of positions masked, 80/10/10"),
    "gpt2": ("GPT-2 (causal language model)", "byte-level BPE", "next-token prediction"),
}


def count_tokens(steps: int) -> int:
    """Tokens seen in that many steps."""
    lengths = map(row_length, range(steps))
    return sum(length * max(1, BATCH.value * LENGTH.value // length) for length in lengths)


def write_card(out: Path, packer: Packer, state: State, held: dict[str, Score]) -> None:
    """`README.md`: what the model is, what it was trained on, how well it does."""
    what, tokenizer, objective = NOTES[KIND.value]
    table = "\n".join(
        f"| {name} | {s.sentences} | {s.loss:.3f} | {math.exp(s.loss):.1f} | {s.baseline:.3f} |"
        for name, s in held.items()
    )
    extra = "".join(f" and {Path(file).name} three times over" for file in VOCABULARY_TEXT.value)
    seen = count_tokens(state.step)
    card = CARD.format(
        name=out.name, kind=KIND.value, what=what, tokenizer=tokenizer, extra=extra, objective=objective, table=table,
        layers=LAYERS.value, width=WIDTH.value, heads=HEADS.value, positions=POSITIONS.value,
        length=LENGTH.value, vocab=len(packer.tokenizer), about=ABOUT.value, licence=LICENCE.value,
        sentences=len(packer.units), corpus=packer.tokens, steps=state.step, seen=seen, loss=state.loss,
        epochs=seen / packer.tokens, minutes=state.seconds / 60, device=jax.devices()[0].device_kind,
    )  # fmt: skip
    (out / "README.md").write_text(card, encoding="utf-8")


def run(out: Path) -> None:
    """Tokenizer, training, scores, and the files of the folder."""
    out.mkdir(parents=True, exist_ok=True)
    sentences, held_out = gather()
    tokenizer = open_tokenizer(out, sentences)
    packer = Packer(tokenizer, sentences, SEED.value)
    model = make_model(KIND.value, tokenizer)
    print(f"{len(sentences)} sentences, {packer.tokens} tokens, vocabulary {len(tokenizer)}", flush=True)
    state = train(model, tokenizer, packer, out / "state")
    held = {name: score(model, state.params, packer, part) for name, part in held_out.items() if part}
    for name, part in held.items():
        print(f"held out {name}: loss {part.loss:.4f}, perplexity {math.exp(part.loss):.1f}", flush=True)
    models.save(str(out), model, state.params, half=True)
    write_card(out, packer, state, held)
    shutil.rmtree(out / "state")
    print(f"wrote {out}: {count_tokens(state.step)} tokens seen", flush=True)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    if not (MINUTES.value or STEPS.value):
        raise app.UsageError("give --minutes, --steps, or both")
    if WIDTH.value % HEADS.value:
        raise app.UsageError(f"--width={WIDTH.value} is not a multiple of --heads={HEADS.value}")
    logging.set_verbosity(logging.WARNING)
    try:
        run(Path(OUT.value).expanduser().resolve())
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
