"""The compiled pieces of a gradient-matching attack: starts, descent, tokens, scores; one compilation per shape.

Client batches of one shape are stacked on a leading axis k, attacked together and split over the local devices, and
where there are devices to spare, so are the restarts n of each; the weights are shared. Devices exchange the best loss
of the restarts at the end of a run of steps, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from grab_jax import distances, local_training, masks, matching, models, views
from grab_jax.attack_config import AttackConfig
from grab_jax.attacks import lamp, prior
from grab_jax.leaves import Seen, has_direction
from grab_jax.local_training import Local
from grab_jax.search import descent, starts, vocabulary
from grab_jax.types import Candidate, InputError, Known, Params, Problem, Vocabulary

CHUNK = 64
"""Candidates scored at once where the settings do not say."""


class Shared(NamedTuple):
    """The arrays every program reads: the weights, and what differs between client batches, stacked `[k ...]`.

    `observed` is what is matched of the updates, factored where that is exact; `prior` the parameters of the language
    model that judges, or None, and `allowed` the tokens that embeddings may become.
    """

    trainable: dict[str, Array]
    frozen: dict[str, Array]
    observed: dict[str, Seen]
    known: Known
    prior: Params | None
    allowed: Bool[Array, " v"]


class Programs(NamedTuple):
    """Jitted functions, split over the local devices of `mesh`.

    `choose(keys, candidates, ids, fresh, i, shared)` is a start for the i-th batch of every device, all restarts: drawn
    if `fresh`, else from the tokens `ids`; `init(candidates)` begins a descent and `run(state, losses, step, stop,
    shared)` advances it, and `move(keys, state, shared)` moves its words; `tokens(embeds, table, allowed)` are the
    nearest tokens and their cosines; `score(ids, candidate,
    context)` rates token batches `[n b t]` against the batch of `context`.
    """

    mesh: Mesh
    choose: Callable[..., Candidate]
    init: Callable[..., descent.State]
    run: Callable[..., tuple[descent.State, Array]]
    move: Callable[..., descent.State]
    tokens: Callable[..., tuple[Array, Array]]
    score: Callable[..., Array]


Context = tuple[dict[str, Array], dict[str, Array], dict[str, Seen], Known]
"""`(trainable, frozen, observed, known)` of one client batch."""

EACH = PartitionSpec("k", "n")
"""Placement of arrays `[k n ...]`: client batches over the rows of the mesh, restarts over its columns."""

_SPLIT, _WHOLE, _ALL = PartitionSpec("k"), PartitionSpec(), PartitionSpec(("k", "n"))
_SHARED = Shared(_WHOLE, _WHOLE, _SPLIT, _SPLIT, _WHOLE, _WHOLE)


def mesh_for(batches: int, restarts: int = 1) -> Mesh:
    """Local devices as a grid: rows for client batches, and columns for restarts, as many as divide them evenly."""
    devices = jax.local_devices()
    k = min(len(devices), max(1, batches))
    n = max(n for n in range(1, len(devices) // k + 1) if restarts % n == 0)
    return Mesh(np.array(devices[: k * n]).reshape(k, n), ("k", "n"))


def stack(problems: Sequence[Problem], config: AttackConfig, mesh: Mesh, judge: prior.Prior | None = None) -> Shared:
    """Put problems of one shape side by side on the mesh, the last one repeated to fill it; weights are replicated."""
    seen = observed(problems, config, _rows(problems[0]))
    missing = -len(problems) % mesh.shape["k"]
    together = lambda *leaves: jnp.stack([*leaves, *leaves[-1:] * missing])  # noqa: E731
    matched = jax.tree.map(together, *seen)
    known = jax.tree.map(together, *[p.known for p in problems])
    whole, split = NamedSharding(mesh, _WHOLE), NamedSharding(mesh, _SPLIT)
    words = judge and judge.params, allowed(problems[0], config)
    weights, words = jax.device_put(((dict(problems[0].trainable), dict(problems[0].frozen)), words), whole)
    return Shared(*weights, *jax.device_put((matched, known), split), *words)


def observed(problems: Sequence[Problem], config: AttackConfig, rows: int) -> list[dict[str, Seen]]:
    """What an attack by gradient matching compares with, of client batches of one model.

    Args:
      problems: the client batches.
      config: names the view, the tensors and the distance.
      rows: as in `views.factored`.

    Raises:
      InputError: the tensors chosen leave nothing to match.
    """
    updates, defended = [local_training.matched(problem) for problem in problems], local_training.left(problems[0])
    found = views.seen(updates, rows, config.view, config.layers, defended)
    directed = config.distance in ("cosine", "normalised")
    table = problems[0].model.word_table
    if all(path == table or (directed and not has_direction(path)) for path in found[0]):
        raise InputError(
            f"--attack_layers={config.layers} leaves nothing to match through --attack_view={config.view} and "
            f"--attack_distance={config.distance}: key biases have no direction, and embeddings do not touch the word "
            "table; match other tensors as well"
        )
    return found


def _rows(problem: Problem) -> int:
    """Token rows behind an update: its rank at most."""
    local, (sentences, _) = local_training.repeated(problem), problem.known.ids.shape
    return problem.known.ids.size * (1 if local is None else local.steps(sentences))


def allowed(problem: Problem, config: AttackConfig) -> Bool[np.ndarray, " v"]:
    """Tokens that embeddings may become; without special ones, but for those that end a sentence of unknown length."""
    special = [i for i in problem.vocabulary.special if i < problem.model.config.vocab_size]
    found = np.ones(problem.model.config.vocab_size, bool)
    if config.vocabulary == "words":
        found[special] = False
    return found if problem.lengths else ending(problem, found)


def ending(problem: Problem, tokens: Bool[np.ndarray, " v"]) -> Bool[np.ndarray, " v"]:
    """The tokens with those that end a sentence: padding and the separator."""
    tokens = np.array(tokens)
    tokens[[i for i in (problem.vocabulary.pad, problem.vocabulary.sep) if i is not None]] = True
    return tokens


def fill(tree: Any, mesh: Mesh, spec: PartitionSpec = _SPLIT) -> Any:
    """Split the leading axis over the mesh (and the next by `spec`), the last entry repeated until the mesh divides it.

    Always on the mesh: a program sees one placement, and is traced once. Filled on the host: operations on leaves that
    are split would be collectives, and several of those in flight can wait for each other for ever (CPU devices abort).
    """

    def filled(leaf):
        missing = -leaf.shape[0] % mesh.shape["k"]
        if not missing:
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # never split before
            return jnp.concatenate([leaf, jnp.repeat(leaf[-1:], missing, axis=0)])
        return np.concatenate([np.asarray(leaf), np.repeat(np.asarray(leaf)[-1:], missing, axis=0)])

    return jax.device_put(jax.tree.map(filled, tree), NamedSharding(mesh, spec))


def first(tree: Any, count: int) -> Any:
    """The leading entries of every leaf, without those that `fill` added; on the host where there are any."""
    return jax.tree.map(lambda leaf: leaf if leaf.shape[0] == count else np.asarray(leaf)[:count], tree)


def entry(tree: Any, j: int) -> Any:
    """Entry j of every leaf's leading axis, from the device that holds it: no collective, see `fill`."""

    def held(leaf):
        for shard in getattr(leaf, "addressable_shards", ()):
            begin = shard.index[0].start or 0
            if begin <= j < begin + shard.data.shape[0]:
                return shard.data[j - begin]
        return leaf[j]

    return jax.tree.map(held, tree)


def at(tree: Any, j: int | slice | Array) -> Any:
    """Entry (or slice) j of every leaf's leading axis."""
    return jax.tree.map(lambda leaf: leaf[j], tree)


def context(j: int, mesh: Mesh, shared: Shared) -> Context:
    """Problem j on every device."""
    alone = jax.device_put(entry((shared.observed, shared.known), j), NamedSharding(mesh, _WHOLE))
    return shared.trainable, shared.frozen, *alone


def word_table(model: Any, trainable: dict[str, Array], frozen: dict[str, Array]) -> Float[Array, "v d"]:
    """The word embeddings, trained or frozen."""
    return {**frozen, **trainable}[model.word_table]


_USED = (
    "steps", "candidates", "permutations", "start_norm", "lr", "schedule", "decay", "decay_every", "weight_decay",
    "clip", "distance", "l1", "norm_weight", "precision", "keep", "moves", "prior_weight", "chunk", "together",
)  # fmt: skip
"""The settings that are compiled into a program; whatever else differs, it is the same one."""


def compiled(
    model: Any,
    config: AttackConfig,
    words: Vocabulary,
    mesh: Mesh,
    judge: models.Model | None,
    local: Local | None = None,
    clip: float | None = None,
) -> Programs:
    """The programs of one model and setting; the same arguments give the same (already compiled) functions.

    `local` is the client's training where several steps are to be repeated, `clip` the norm to which candidates'
    examples are rescaled, as the client's were.
    """
    used = replace(AttackConfig(), **{name: getattr(config, name) for name in _USED})
    return _compiled(model, used, words, mesh, judge, local, clip)


@lru_cache(maxsize=8)
def _compiled(
    model: Any,
    config: AttackConfig,
    words: Vocabulary,
    mesh: Mesh,
    judge: models.Model | None,
    local: Local | None,
    clip: float | None,
) -> Programs:
    distance = distances.by_name(config.distance, config.l1)
    objective = matching.embedding_objective(model, distance, config.precision, local, clip)
    objective = matching.with_norm_penalty(model, objective, config.norm_weight)
    optimizer = descent.adamw(
        config.steps, lr=config.lr, schedule=config.schedule, decay=config.decay,
        decay_every=config.decay_every, weight_decay=config.weight_decay, clip=config.clip,
    )  # fmt: skip
    search = descent.descent(objective, optimizer, lambda *args: project(model, *args), config.keep)
    token_score = matching.token_objective(model, distance, words.pad, config.precision, local, clip)

    def score(ids, candidate, context):
        return jax.vmap(lambda one: token_score(one, candidate.masks, candidate.labels, *context))(ids)

    def split(function, *specs, out=_SPLIT):
        mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
        return jax.jit(mapped)

    return Programs(
        mesh,
        choose=split(_start(model, config, objective), EACH, EACH, _SPLIT, _WHOLE, _WHOLE, _SHARED, out=EACH),
        init=jax.jit(jax.vmap(jax.vmap(search.init))),
        run=split(_descent(search, config.together), EACH, _SPLIT, _WHOLE, _WHOLE, _SHARED, out=(EACH, _SPLIT)),
        move=split(_move(model, config, lamp.rating(objective, config, judge, words)), EACH, EACH, _SHARED, out=EACH),
        tokens=jax.jit(vocabulary.nearest),
        score=split(score, _ALL, _WHOLE, _WHOLE, out=_ALL),
    )


def _start(model: Any, config: AttackConfig, objective: matching.Objective):
    """Per device: a start for each restart of its i-th client batch."""
    largest = max(config.candidates, config.permutations)
    sizes = {
        "candidates": config.candidates, "permutations": config.permutations,
        "chunk": min(config.chunk or CHUNK, largest + 1),
    }  # fmt: skip

    def choose(keys, candidates, ids, fresh, i, shared):
        context = shared.trainable, shared.frozen, at(shared.observed, i), at(shared.known, i)
        table, known = word_table(model, *context[:2]), context[3]
        norm = jnp.linalg.norm(table, axis=1).mean() if config.start_norm == "vocabulary" else None
        held = starts.Known(table[known.ids], known.ids >= 0, known.free, norm)

        def one(pair):
            key, candidate = pair
            score = lambda embeds: objective(candidate._replace(embeds=embeds), *context)  # noqa: E731
            return candidate._replace(embeds=starts.choose(key, score, held, table[ids[i]], fresh=fresh, **sizes))

        chosen = jax.lax.map(one, (keys[i], at(candidates, i)))
        return jax.tree.map(lambda leaf: leaf[None], chosen)

    return choose


def _descent(search: descent.Descent, together: int | None):
    """The continuous phase: one loop over steps, vmapped over a device's client batches and their restarts.

    `together` restarts are in memory at once, by default all.
    """

    def over_restarts(state, *context):
        count = len(state.candidate.embeds)
        step = lambda one: search.step(one, *context)  # noqa: E731
        if together is None or together >= count:
            return jax.vmap(step)(state)
        return jax.lax.map(step, state, batch_size=together)

    def run(state, losses, step, stop, shared):
        over_batches = jax.vmap(over_restarts, in_axes=(0, None, None, 0, 0))

        def body(carry):
            state, losses, i = carry
            state, loss = over_batches(state, *shared[:4])
            return state, losses.at[:, i].set(jnp.nanmin(loss, axis=1)), i + 1

        state, losses, _ = jax.lax.while_loop(lambda carry: carry[2] < stop, body, (state, losses, step))
        best = jax.lax.pmin(jnp.where(jnp.isnan(losses), jnp.inf, losses), "n")
        return state, jnp.where(jnp.isinf(best), jnp.nan, best)

    return run


def _move(model: Any, config: AttackConfig, rate: lamp.Rate):
    """LAMP's discrete step, for one client batch and restart after another."""
    move = lamp.mover(rate, config, min(config.chunk or CHUNK, config.moves + 1))

    def over_batches(keys, state, shared):
        table = word_table(model, shared.trainable, shared.frozen)

        def one_batch(args):
            keys, state, *own = args
            context = shared.trainable, shared.frozen, *own
            one = lambda pair: move(*pair, table, shared.allowed, shared.prior, context)  # noqa: E731
            return jax.lax.map(one, (keys, state))

        return jax.lax.map(one_batch, (keys, state, shared.observed, shared.known))

    return over_batches


def project(model: Any, candidate: Candidate, trainable, frozen, _observed, known: Known) -> Candidate:
    """Masks and soft labels into [0, 1]; pinned positions and told masks hold what is known of them again."""
    pinned = word_table(model, trainable, frozen)[known.ids]
    return Candidate(
        jnp.where(known.pinned[..., None], pinned, candidate.embeds),
        masks.hold(masks.project(candidate.masks), known.masks),
        None if candidate.labels is None else jnp.clip(candidate.labels, 0.0, 1.0),
    )
