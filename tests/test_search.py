"""The search engines on problems small enough for brute force: beam, scoring, moves, vocabulary, descent."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grab_jax.search import beam, descent, moves, scoring, starts, vocabulary
from grab_jax.types import Candidate

FREE = np.array([[False, True, True, False], [False, True, False, True]])
POOLS = (np.array([5, 6, 7], np.int32), np.array([5, 8], np.int32))
START = np.array([[1, 0, 0, 2], [1, 0, 3, 0]], np.int32)
COST = np.random.default_rng(0).uniform(size=(2, 4, 10))


def separable(ids):
    """Every position pays for its own token."""
    rows, columns = np.indices(ids.shape[1:])
    return COST[rows[None], columns[None], ids].sum((1, 2))


def interacting(ids):
    """Good only if the free tokens of row 0 fit together: a first move that looks worse pays off later."""
    a, b = ids[:, 0, 1], ids[:, 0, 2]
    return 1.0 * (a != 5) - 1.0 * ((a == 5) & (b == 6)) - 5.0 * ((a == 6) & (b == 7))


def reachable():
    """Every batch with pool tokens at the free positions, all other positions as in START."""
    places = list(zip(*np.nonzero(FREE), strict=True))
    for tokens in itertools.product(*(POOLS[row] for row, _ in places)):
        batch = START.copy()
        for place, token in zip(places, tokens, strict=True):
            batch[place] = token
        yield batch


def test_a_greedy_beam_finds_the_best_of_all_batches_where_positions_do_not_interact():
    everything = np.stack(list(reachable()))
    best = everything[separable(everything).argmin()]
    found, score = beam.search(separable, START[None], FREE, POOLS, width=1, sweeps=1)
    expected = best if separable(best[None]) < separable(START[None]) else START
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(score, separable(expected[None])[0])


def test_width_matters_where_positions_interact():
    everything = np.stack(list(reachable()))
    best = interacting(everything).min()
    assert best == -4
    values = [beam.search(interacting, START[None], FREE, POOLS, width=w, sweeps=1)[1] for w in (1, 3)]
    assert values == [-1, -4]


def test_a_sweep_substitutes_pool_tokens_at_free_positions_only_and_may_repeat_them():
    seen = []

    def spy(ids):
        seen.append(ids.copy())
        return (ids[:, 0] != 6).sum(1) + (ids[:, 1] != 8).sum(1) + 0.0

    starts_ = np.stack([START, START + np.int32(FREE) * 9])
    found, scores = beam.sweep(spy, starts_, spy(starts_), FREE, POOLS, width=2)
    tried = np.concatenate(seen[1:])
    assert (tried[:, ~FREE] == START[~FREE]).all()
    for row, column in zip(*np.nonzero(FREE), strict=True):
        assert set(tried[:, row, column]) <= {0, 9, *POOLS[row]}
    wanted = np.array([[1, 6, 6, 2], [1, 8, 3, 8]])  # the same token twice: a substitution, not a swap
    np.testing.assert_array_equal(found, [wanted, wanted])
    np.testing.assert_array_equal(scores, [4, 4])


def test_beams_carry_on_across_rows():
    """Only a beam kept from row 0, second best there, leads to the best batch."""

    def score(ids):
        a, b = ids[:, 0, 1], ids[:, 1, 1]
        return 1.0 * (a != 5) + 2.0 * (a == 7) - 9.0 * ((a == 6) & (b == 8))

    free = np.array([[False, True, False, False], [False, True, False, False]])
    assert beam.search(score, START[None], free, POOLS, width=1, sweeps=1)[1] == 0
    assert beam.search(score, START[None], free, POOLS, width=2, sweeps=1)[1] == -8


def test_a_start_is_replaced_only_by_something_better():
    worse = lambda ids: np.where((ids == START).all((1, 2)), 0.0, 1.0)  # noqa: E731
    equal = lambda ids: np.zeros(len(ids))  # noqa: E731
    for score in (worse, equal):
        found, scores = beam.sweep(score, START[None], np.zeros(1), FREE, POOLS)
        np.testing.assert_array_equal(found, START[None])
        assert scores == [0]


def test_a_row_without_tokens_stays_as_it_is():
    empty = np.array([], np.int32)
    found, _ = beam.search(separable, START[None], FREE, (empty, POOLS[1]), width=2, sweeps=2)
    np.testing.assert_array_equal(found[0], START[0])


def test_search_keeps_the_best_starts_and_stops_when_nothing_changes():
    calls = []

    def score(ids):
        calls.append(len(ids))
        return separable(ids)

    many = np.stack(list(reachable()))
    found, value = beam.search(score, many, FREE, POOLS, width=1, sweeps=50)
    np.testing.assert_array_equal(found, many[separable(many).argmin()])
    assert value == separable(many).min()
    assert len(calls) == 1 + FREE.sum()  # the starts, then one sweep that changes nothing
    calls.clear()
    beam.search(score, many, FREE, POOLS, width=2, sweeps=1)
    assert calls == [36, 2 * 3, 2 * 2 * 3, 2 * 2 * 2, 2 * 2 * 2]  # starts x beams x pool
    still, value = beam.search(separable, many, FREE, POOLS, width=2, sweeps=0)
    np.testing.assert_array_equal(still, found)


def test_best_distinct_drops_duplicates_and_keeps_the_earlier_of_a_tie():
    rows = np.array([[[4]], [[1]], [[2]], [[1]], [[3]]], np.int32)
    found, scores = beam.best_distinct(rows, np.array([9.0, 1.0, 1.0, 1.0, 0.5]), 3)
    np.testing.assert_array_equal(found.ravel(), [3, 1, 2])
    np.testing.assert_array_equal(scores, [0.5, 1, 1])
    assert len(beam.best_distinct(rows, np.zeros(5), 10)[0]) == 4


def propose(key):
    x_key, y_key = jax.random.split(key)
    return {"x": jax.random.normal(x_key, (2,)), "y": jax.random.uniform(y_key)}


def first_coordinate(tree):
    return tree["x"][0]


BEGIN = {"x": jnp.array([10.0, 0.0]), "y": jnp.float32(0.5)}


def best_of(count, chunk, score=first_coordinate, start=BEGIN):
    return jax.jit(lambda key: scoring.best_of(key, propose, score, count, chunk, start=start))(jax.random.key(0))


@pytest.mark.parametrize("chunk", [1, 4, 7, 20])
def test_best_of_finds_the_lowest_proposal_whatever_the_chunk(chunk):
    proposals = [propose(jax.random.fold_in(jax.random.key(0), i)) for i in range(20)]
    lowest = int(np.argmin([p["x"][0] for p in proposals]))
    for count in (lowest, lowest + 1):  # a proposal past the count does not win, though a full chunk would hold it
        assert count > 1
        winner = min(proposals[:count], key=lambda p: float(p["x"][0]))
        found, value = best_of(count, chunk)
        np.testing.assert_allclose(found["x"], winner["x"], rtol=1e-6)
        np.testing.assert_allclose(found["y"], winner["y"], rtol=1e-6)
        np.testing.assert_allclose(value, winner["x"][0], rtol=1e-6)


def test_best_of_keeps_a_better_start_and_returns_it_where_nothing_is_proposed():
    low = BEGIN | {"x": jnp.array([-10.0, 3.0])}
    found, value = best_of(7, 4, start=low)
    np.testing.assert_array_equal(found["x"], low["x"])
    assert value == -10
    for count, lowest in ((0, 10), (scoring.NOTHING, np.inf)):
        found, value = best_of(count, 4)
        np.testing.assert_array_equal(found["x"], BEGIN["x"])
        assert value == lowest


def test_a_score_that_is_not_a_number_loses():
    broken = lambda tree: jnp.where(tree["x"][0] < 0, jnp.nan, tree["x"][0])  # noqa: E731
    kept = [x for i in range(7) if (x := float(propose(jax.random.fold_in(jax.random.key(0), i))["x"][0])) >= 0]
    assert 0 < len(kept) < 7
    np.testing.assert_allclose(best_of(7, 4, score=broken)[1], min(kept), rtol=1e-6)
    never = lambda tree: tree["x"][0] * jnp.nan  # noqa: E731
    found, value = best_of(7, 4, score=never)
    np.testing.assert_array_equal(found["x"], BEGIN["x"])
    assert value == np.inf


def test_chunked_gives_exact_values_in_two_shapes_and_remembers_them():
    shapes, rated, ticks = [], [], []

    def score(ids):
        shapes.append(ids.shape[0])
        rated.extend(map(tuple, np.asarray(ids).reshape(len(ids), -1).tolist()))
        return (ids * jnp.arange(1, 5)[None, None]).sum((1, 2)) * 0.5

    run = scoring.chunked(score, 8, ticks.append)
    rows = np.random.default_rng(0).integers(0, 50, size=(21, 1, 4)).astype(np.int32)
    rows[20] = rows[0]
    expected = 0.5 * (rows * np.arange(1, 5)).sum((1, 2))
    np.testing.assert_allclose(run(rows), expected)
    assert set(shapes) == {8}  # 20 different ones: 8 + 8 + 4
    assert ticks[-1] == 20
    seen, calls = len(set(rated)), len(shapes)
    np.testing.assert_allclose(run(rows[::-1]), expected[::-1])
    assert len(shapes) == calls
    fresh = np.concatenate([rows[:2], rows[:1] + 100])
    np.testing.assert_allclose(run(fresh), 0.5 * (fresh * np.arange(1, 5)).sum((1, 2)))
    assert shapes[calls:] == [2]  # one new candidate runs in a quarter chunk
    assert len(set(rated)) == seen + 1
    assert ticks[-1] == 21


@pytest.mark.parametrize(
    ("count", "sparing", "expected"),
    [
        (17, False, [64]), (17, True, [16, 16]), (48, True, [16, 16, 16]), (49, True, [64]), (80, True, [64, 16]),
        (5, True, [16]),
    ],
)  # fmt: skip
def test_sparing_leaves_less_than_a_quarter_chunk_empty(count, sparing, expected):
    shapes = []

    def score(ids):
        shapes.append(len(ids))
        return ids.sum((1, 2)) * 1.0

    rows = np.arange(2 * count, dtype=np.int32).reshape(count, 1, 2)
    np.testing.assert_array_equal(scoring.chunked(score, 64, sparing=sparing)(rows), rows.sum((1, 2)))
    assert shapes == expected


@pytest.mark.parametrize(("chunk", "multiple"), [(1, 1), (2, 1), (3, 1), (8, 4), (4, 4)])
def test_chunked_with_small_chunks_and_multiples(chunk, multiple):
    shapes = []

    def score(ids):
        shapes.append(len(ids))
        return ids.sum((1, 2)) * 1.0

    rows = np.arange(10, dtype=np.int32).reshape(5, 1, 2)
    np.testing.assert_array_equal(scoring.chunked(score, chunk, multiple=multiple)(rows), rows.sum((1, 2)))
    assert len(set(shapes)) <= 2
    assert all(size % multiple == 0 and size <= chunk for size in shapes)


def orders(free, shared, count=50):
    draw = jax.vmap(lambda key: moves.permutation(key, jnp.asarray(free), shared=shared))
    return np.asarray(draw(jax.random.split(jax.random.key(0), count)))


@pytest.mark.parametrize("shared", [True, False])
def test_a_permutation_reorders_free_positions_and_leaves_the_rest(shared):
    free = np.array([[0, 1, 1, 0, 1, 1, 0], [0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]], bool)
    found = orders(free, shared)
    for source in found:
        for row in range(3):
            assert sorted(source[row, free[row]]) == np.nonzero(free[row])[0].tolist()
            np.testing.assert_array_equal(source[row, ~free[row]], np.nonzero(~free[row])[0])
    counts = [(found[:, 0, 1] == j).sum() for j in (1, 2, 4, 5)]
    assert min(counts) >= 3  # 12.5 expected of 50: every place is drawn


def test_rows_share_an_order_or_draw_their_own():
    free = np.array([[0, 1, 1, 1, 1, 1, 0]] * 2, bool)
    together, apart = orders(free, True), orders(free, False)
    assert (together[:, 0] == together[:, 1]).all()
    assert (apart[:, 0] == apart[:, 1]).all(1).mean() < 0.2  # 1 in 120 by chance
    assert len(np.unique(together[:, 0], axis=0)) > 25


def test_rearrange_gathers_tokens_and_embeddings():
    source = jnp.array([[0, 2, 1], [2, 1, 0]])
    rows = np.array([[7, 8, 9], [4, 5, 6]])
    np.testing.assert_array_equal(moves.rearrange(jnp.asarray(rows), source), [[7, 9, 8], [6, 5, 4]])
    embeds = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    expected = np.stack([embeds[0][[0, 2, 1]], embeds[1][[2, 1, 0]]])
    np.testing.assert_array_equal(moves.rearrange(jnp.asarray(embeds), source), expected)


def start_of(score, embeds, *, anchored=None, free=None, fresh, candidates=0, permutations=0, chunk=4, seed=1):
    flat = jnp.ones(embeds.shape[:2], bool)
    known = starts.Known(
        jnp.asarray(embeds), flat & False if anchored is None else anchored, flat if free is None else free,
        jnp.float32(2.5),
    )  # fmt: skip
    sizes = {"candidates": candidates, "permutations": permutations, "chunk": chunk}
    run = jax.jit(lambda key, fresh: starts.choose(key, score, known, jnp.asarray(embeds), fresh=fresh, **sizes))
    return np.asarray(run(jax.random.key(seed), fresh))


def test_drawn_starts_hold_the_anchors_at_the_norm_of_the_vocabulary_and_take_the_best_draw():
    anchors = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    anchored = np.array([[1, 0, 0, 0, 1], [1, 0, 0, 1, 1]], bool)
    score = lambda embeds: embeds[0, 1, 0]  # noqa: E731
    run = lambda count: start_of(score, anchors, anchored=anchored, fresh=True, candidates=count)  # noqa: E731
    found = run(40)
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 2.5, rtol=1e-5)
    unit = anchors / np.linalg.norm(anchors, axis=-1, keepdims=True)
    np.testing.assert_allclose(found[anchored], 2.5 * unit[anchored], rtol=1e-5)
    assert found[0, 1, 0] < -2  # the lowest of 41 draws on a sphere of radius 2.5
    assert run(0)[0, 1, 0] > found[0, 1, 0]


def test_permuted_starts_take_the_best_order_and_keep_a_better_original():
    embeds = np.arange(15, dtype=np.float32).reshape(1, 5, 3)
    free = jnp.array([[False, True, True, True, False]])
    score = lambda e: (e[0, :, 0] * jnp.array([0.0, 3.0, 2.0, 1.0, 0.0])).sum()  # noqa: E731  # ascending is best
    run = lambda rows: start_of(score, rows, free=free, fresh=False, permutations=64, chunk=16)  # noqa: E731
    np.testing.assert_array_equal(run(embeds[:, [0, 3, 1, 2, 4]]), embeds)
    np.testing.assert_array_equal(run(embeds), embeds)


def test_drawn_starts_move_all_rows_together_and_later_ones_each_for_itself():
    """The order that suits the first row best is not the one that suits the second."""
    angles = np.array([[0.1, 0.5, 0.9, 1.3], [1.2, 0.3, 0.7, 0.2]])
    rows = 2.5 * np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
    score = lambda e: (e[:, :, 1] @ jnp.arange(4.0)).sum()  # noqa: E731  # least where the angles fall
    anchored = jnp.ones((2, 4), bool)
    orders = lambda found: [  # noqa: E731
        [int(np.abs(row - vector).sum(1).argmin()) for vector in moved] for row, moved in zip(rows, found, strict=True)
    ]
    first, second = orders(start_of(score, rows, anchored=anchored, fresh=True, permutations=200, chunk=50))
    assert first == second
    assert orders(start_of(score, rows, fresh=False, permutations=6000, chunk=500)) == [[3, 2, 1, 0], [0, 2, 1, 3]]


def by_hand(tokens):
    """Every order that one of LAMP's moves makes of a few tokens: two swapped, or two neighbouring blocks exchanged."""
    n, orders = len(tokens), set()
    for i, j in itertools.combinations(range(n), 2):
        swapped = list(tokens)
        swapped[i], swapped[j] = swapped[j], swapped[i]
        orders.add(tuple(swapped))
    for i, j, k in itertools.combinations(range(n + 1), 3):
        orders.add((*tokens[:i], *tokens[j:k], *tokens[i:j], *tokens[k:]))
    return orders


@pytest.mark.parametrize("free", [[0, 1, 1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0, 0, 0]])
def test_a_reordering_is_one_of_lamps_moves_and_every_one_of_them_comes_up(free):
    free = np.array(free, bool)
    sources = np.asarray(
        jax.vmap(moves.reorder, (0, None))(jax.random.split(jax.random.key(0), 3000), jnp.asarray(free))
    )
    np.testing.assert_array_equal(sources[:, ~free], np.broadcast_to(np.nonzero(~free)[0], (3000, (~free).sum())))
    found = {tuple(source[free]) for source in sources}
    assert found == by_hand(tuple(np.nonzero(free)[0]))


@pytest.mark.parametrize("free", [[0, 0, 0, 0], [0, 1, 0, 0]])
def test_fewer_than_two_free_positions_stay(free):
    sources = jax.vmap(moves.reorder, (0, None))(jax.random.split(jax.random.key(0), 50), jnp.array(free, bool))
    np.testing.assert_array_equal(sources, np.broadcast_to(np.arange(4), (50, 4)))


@pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 3, 6)])
def test_nearest_is_the_largest_cosine_among_the_allowed(shape):
    rng = np.random.default_rng(0)
    table, embeds = rng.normal(size=(9, 6)), rng.normal(size=shape)
    table[3] = 40 * table[3]  # a long row wins nothing by its length
    cosines = embeds @ table.T / np.linalg.norm(embeds, axis=-1)[..., None] / np.linalg.norm(table, axis=1)
    allowed = np.ones(9, bool)
    allowed[np.unique(cosines.argmax(-1))] = False
    for mask in (None, allowed):
        scored = cosines if mask is None else np.where(mask, cosines, -np.inf)
        given = None if mask is None else jnp.asarray(mask)
        ids, values = vocabulary.nearest(jnp.asarray(embeds, jnp.float32), jnp.asarray(table, jnp.float32), given)
        np.testing.assert_array_equal(ids, scored.argmax(-1))
        np.testing.assert_allclose(values, scored.max(-1), rtol=1e-5)
        assert ids.dtype == jnp.int32
    zero = vocabulary.nearest(jnp.zeros(6), jnp.asarray(table, jnp.float32))[1]
    assert zero == 0


GRAB = {"lr": 0.01, "schedule": "step", "decay": 0.89, "decay_every": 50, "weight_decay": 0.01, "clip": None}
TARGET = np.random.default_rng(3).normal(size=(1, 4, 3))
BEGINNING = np.random.default_rng(4).normal(size=(1, 4, 3))


def quadratic(candidate):
    return ((candidate.embeds - TARGET) ** 2 * jnp.asarray(np.arange(1, 4.0))[None, None]).sum()


def slope(x):
    return 2 * (x - TARGET) * np.arange(1, 4.0)


def descend(steps, optimizer, start=BEGINNING):
    with jax.enable_x64(True):
        search = descent.descent(quadratic, optimizer, lambda candidate: candidate)
        state = search.init(Candidate(jnp.asarray(start), None, None))
        return jax.jit(lambda s: jax.lax.scan(lambda s, _: search.step(s), s, length=steps))(state)


def numpy_adamw(steps, rate, x=BEGINNING):
    """AdamW as published, torch's defaults: betas 0.9 and 0.999, epsilon 1e-8, decay 0.01."""
    mean, square = np.zeros_like(x), np.zeros_like(x)
    for i in range(steps):
        gradient = slope(x)
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        direction = mean / (1 - 0.9 ** (i + 1)) / (np.sqrt(square / (1 - 0.999 ** (i + 1))) + 1e-8)
        x = x - rate(i) * 0.01 * x - rate(i) * direction
    return x


RATES = {"step": lambda i: 0.01 * 0.89 ** (i // 50), "linear": lambda i: 0.01 * (1 - i / 200)}


@pytest.mark.parametrize("schedule", RATES)
def test_adamw_follows_its_published_equations_and_schedule(schedule):
    state, losses = descend(200, descent.adamw(200, **GRAB | {"schedule": schedule}))
    np.testing.assert_allclose(state.candidate.embeds, numpy_adamw(200, RATES[schedule]), rtol=1e-6)
    np.testing.assert_allclose(losses[0], ((BEGINNING - TARGET) ** 2 * np.arange(1, 4.0)).sum(), rtol=1e-8)


@pytest.mark.parity
def test_adamw_with_step_decay_is_torchs():
    torch = pytest.importorskip("torch")
    x = torch.tensor(BEGINNING, requires_grad=True)
    optimizer = torch.optim.AdamW([x], lr=0.01, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 50, 0.89)
    for _ in range(200):
        optimizer.zero_grad()
        ((x - torch.tensor(TARGET)) ** 2 * torch.arange(1, 4)).sum().backward()
        optimizer.step()
        schedule.step()
    state, _ = descend(200, descent.adamw(200, **GRAB))
    np.testing.assert_allclose(state.candidate.embeds, x.detach().numpy(), rtol=1e-6)


def test_the_linear_schedule_ends_at_zero():
    rule = descent.adamw(10, **GRAB | {"schedule": "linear"})
    candidate = Candidate(jnp.ones((1, 1, 1)), None, None)
    state, sizes = rule.init(candidate), []
    for _ in range(11):
        update, state = rule.update(candidate, state, candidate)
        sizes.append(float(jnp.abs(update.embeds).max()))
    np.testing.assert_allclose(sizes, 0.01 * 1.01 * (1 - np.arange(11) / 10), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("size", [0.1, 30.0])
def test_clipping_rescales_the_gradient_of_the_embeddings_only(size):
    """Seen through the first moments: (1 - 0.9) times the gradient."""
    rng = np.random.default_rng(0)
    embeds = rng.normal(size=(2, 3, 4))
    embeds *= size / np.linalg.norm(embeds)
    gradient = Candidate(jnp.asarray(embeds), {"site": jnp.full((2, 3), 7.0)}, jnp.full((2, 2), 9.0))
    rule = descent.adamw(10, **GRAB | {"clip": 0.5})
    _, state = rule.update(gradient, rule.init(gradient), gradient)
    moments = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose(moments.embeds, 0.1 * embeds * min(1, 0.5 / size), rtol=1e-4)
    np.testing.assert_allclose(moments.masks["site"], 0.7, rtol=1e-6)
    np.testing.assert_allclose(moments.labels, 0.9, rtol=1e-6)


def test_a_step_projects_after_the_update_and_reports_the_loss_before_it():
    search = descent.descent(
        lambda x, target: (x - target) ** 2, optax.sgd(0.5), lambda x, target: jnp.minimum(x, target - 1)
    )
    state, loss = search.step(search.init(jnp.float32(0.0)), jnp.float32(4.0))
    assert loss == 16
    assert state.candidate == 3  # the update reaches 4, the constraint allows 3


@pytest.mark.parametrize("rate", [0.3, 1.1])
def test_the_best_iterate_is_the_one_of_lowest_loss(rate):
    """By hand: x moves by `-2 rate x`, away from 0 at the higher rate; the last iterate is not scored."""
    search = descent.descent(lambda x: x**2, optax.sgd(rate), lambda x: x, "best")
    state = search.init(jnp.float32(1.0))
    for _ in range(4):
        state, _ = search.step(state)
    iterates = (1 - 2 * rate) ** np.arange(5)
    np.testing.assert_allclose(state.candidate, iterates[4], rtol=1e-4)
    best = iterates[:4][np.argmin(iterates[:4] ** 2)]
    np.testing.assert_allclose([state.chosen, state.best.loss], [best, best**2], rtol=1e-4)
    assert descent.descent(lambda x: x**2, optax.sgd(rate), lambda x: x).init(jnp.float32(1.0)).chosen == 1


def test_a_diverged_descent_carries_nan_without_an_error():
    search = descent.descent(lambda x: jnp.log(x), optax.sgd(0.1), lambda x: x)
    state, loss = search.step(search.init(jnp.float32(-1.0)))
    assert np.isnan(loss)
    assert state.candidate.shape == ()
