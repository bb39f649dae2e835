"""The linear algebra of span decoding: rank and basis, the box program, exact masks. Plain NumPy problems."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

from grab_jax.span import box, completion, noise, polish, subspace


def factors(rng, d, n, out=None):
    """Inputs `[n, d]` and three float32 gradients `inputs.T @ cotangents` as a client computes them."""
    inputs = rng.normal(size=(n, d)).astype(np.float32)
    return inputs, [inputs.T @ rng.normal(size=(n, out or d)).astype(np.float32) for _ in range(3)]


def orthonormal(rng, d, r):
    return np.linalg.qr(rng.normal(size=(d, r)))[0]


# --- subspace -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "n"), [(16, 1), (32, 31), (64, 20), (96, 60), (256, 100)])
def test_spectrum_finds_rank_and_span_of_float32_gradients(d, n):
    inputs, gradients = factors(np.random.default_rng(n), d, n)
    found = subspace.spectrum(gradients)
    assert found.rank == found.gap_rank == n
    assert found.values.shape == (d,)
    assert found.values[n] < found.floor < found.values[n - 1]
    assert found.gap > 100
    assert found.basis.shape == (d, n)
    np.testing.assert_allclose(found.basis.T @ found.basis, np.eye(n), atol=1e-12)
    outside = inputs - inputs @ found.basis @ found.basis.T
    assert np.linalg.norm(outside) < 1e-4 * np.linalg.norm(inputs)


def test_spectrum_is_that_of_the_columns_at_unit_size():
    _, gradients = factors(np.random.default_rng(0), 24, 7, out=4)
    stacked = np.concatenate(gradients, axis=1).astype(np.float64)
    expected = np.linalg.svd(stacked / np.linalg.norm(stacked, axis=0), compute_uv=False)
    values = subspace.spectrum(gradients).values
    np.testing.assert_allclose(values[:7], expected[:7], rtol=1e-12)
    np.testing.assert_allclose(values[7:], [*expected[7:], *[0] * 12], atol=1e-12)  # 12 columns, width 24


def test_spectrum_does_not_depend_on_the_columns_sizes():
    rng = np.random.default_rng(1)
    _, gradients = factors(rng, 32, 9)
    plain = subspace.spectrum(gradients)
    scaled = subspace.spectrum([g * 10.0 ** rng.integers(-3, 4, 32) for g in gradients])
    np.testing.assert_allclose(scaled.values[:9], plain.values[:9], rtol=1e-12)
    assert (scaled.rank, scaled.floor) == (9, pytest.approx(plain.floor, rel=1e-12))


def test_columns_of_zeros_change_nothing():
    _, gradients = factors(np.random.default_rng(1), 32, 9)
    few, many = subspace.spectrum(gradients), subspace.spectrum([np.pad(g, ((0, 0), (3, 4))) for g in gradients])
    np.testing.assert_allclose(many.values, few.values, atol=1e-12)
    assert (many.rank, many.floor) == (9, few.floor)


@pytest.mark.parametrize("n", [24, 40])
def test_as_many_tokens_as_the_width_give_full_rank(n):
    found = subspace.spectrum(factors(np.random.default_rng(2), 24, n)[1])
    assert found.rank == 24
    assert found.basis.shape == (24, 24)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_has_rank_0(bad):
    _, gradients = factors(np.random.default_rng(3), 16, 4)
    gradients[1][3, 5] = bad
    found = subspace.spectrum(gradients)
    assert found.rank == 0
    assert found.basis.shape == (16, 0)


def test_a_zero_gradient_has_rank_0():
    found = subspace.spectrum([np.zeros((16, 16))] * 3)
    assert (found.rank, found.floor, found.values.tolist()) == (0, 0, [0] * 16)
    assert found.basis.shape == (16, 0)


@pytest.mark.parametrize(("wire", "away"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_rounding_to_a_coarser_precision_is_seen_and_allowed_for(wire, away):
    inputs, gradients = factors(np.random.default_rng(4), 64, 5)
    rounded = [np.asarray(jnp.asarray(g, wire), np.float32) for g in gradients]
    found = subspace.spectrum(rounded)
    assert (found.rank, found.wire, found.sigma) == (5, wire, 0)
    outside = inputs - inputs @ found.basis @ found.basis.T
    assert np.linalg.norm(outside) < away * np.linalg.norm(inputs)


@pytest.mark.parametrize("wire", ["bfloat16", "float16"])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_rounding_errors_have_the_deviations_told(wire, scale):
    """Also where float16 has no more digits to give."""
    values = scale * np.random.default_rng(0).normal(size=(64, 400))
    rounded = np.asarray(jnp.asarray(values, wire), np.float64)
    ratio = (rounded - values) / noise.rounding(rounded, wire)
    assert 0.9 < np.sqrt((ratio**2).mean()) < 1.1


@pytest.mark.parametrize(("n", "sigma"), [(0, 1.0), (0, 1e-3), (6, 1e-3), (6, 0.3)])
def test_noise_stays_below_its_edge_and_the_signal_above(n, sigma):
    """Entries of deviation s: the largest singular value of `[d, m]` is about `s (sqrt(d) + sqrt(m))`."""
    rng = np.random.default_rng(5)
    signal = factors(rng, 64, n)[1] if n else [np.zeros((64, 64))] * 3
    found = subspace.spectrum([g + sigma * rng.normal(size=g.shape) for g in signal])
    assert found.rank == n
    assert found.sigma == pytest.approx(sigma, rel=0.03)
    assert found.values[n] < found.floor < 1.2 * found.values[n]


@pytest.mark.parametrize("sigma", [1e-3, 0.1])
def test_the_blur_is_how_far_noise_moves_the_basis(sigma):
    """Against the noise-free span: the part of each basis vector that left it."""
    rng = np.random.default_rng(6)
    _, clean = factors(rng, 128, 5)
    found = subspace.spectrum([g + sigma * rng.normal(size=g.shape) for g in clean])
    true = subspace.spectrum(clean).basis
    left = np.linalg.norm(found.basis - true @ (true.T @ found.basis), axis=0)
    np.testing.assert_allclose(left, np.linalg.norm(found.blur, axis=0), rtol=0.3)
    assert found.noise == np.linalg.norm(found.blur, axis=0).max()


def test_a_full_rank_gradient_is_not_taken_for_noise():
    """Singular values of a gradient of about as many tokens as the width fall to nearly 0; those of noise do not."""
    for n in (64, 80, 100):
        found = subspace.spectrum(factors(np.random.default_rng(n), 64, n)[1])
        assert (found.rank, found.sigma) == (64, 0)


# --- completion ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "share"), [(3, 0.5), (6, 0.5), (3, 0.7)])
def test_pruned_entries_of_a_low_rank_gradient_come_back(rank, share):
    rng = np.random.default_rng(rank)
    clean = np.concatenate(factors(rng, 64, rank)[1], axis=1).astype(np.float64)
    pruned = np.where(rng.random(clean.shape) < share, 0, clean)
    there = completion.left_in(pruned)
    np.testing.assert_array_equal(there, pruned != 0)
    ranks = []
    found = completion.complete(pruned, there, notify=ranks.append)
    assert found.rank == rank == ranks[-1]
    np.testing.assert_allclose(found.gradient, clean, atol=1e-4 * np.abs(clean).max())
    assert subspace.spectrum(np.split(found.gradient, 3, axis=1)).rank == rank


def test_too_few_entries_complete_nothing():
    rng = np.random.default_rng(0)
    clean = np.concatenate(factors(rng, 64, 20)[1], axis=1)
    pruned = np.where(rng.random(clean.shape) < 0.9, 0, clean).astype(np.float64)
    assert completion.complete(pruned, completion.left_in(pruned)) is None


def test_zeros_that_pruning_did_not_leave_are_not_missing():
    """None at all, columns of a dead unit, and what float16 rounds to 0."""
    clean = np.concatenate(factors(np.random.default_rng(1), 64, 4)[1], axis=1).astype(np.float64)
    assert completion.left_in(clean) is None
    clean[:, ::7] = 0
    assert completion.left_in(clean) is None
    small = np.asarray(jnp.asarray(1e-7 * clean, jnp.float16), np.float64)
    assert (small == 0).mean() > 0.1
    assert completion.left_in(small) is None


# --- box ----------------------------------------------------------------------------------------------------------


def box_problems(seed, count=6, d=14, r=5):
    """Random corners, basis and goals in float32."""
    rng = np.random.default_rng(seed)
    rows, goals = (rng.normal(size=(count, d)).astype(np.float32) for _ in range(2))
    return jnp.asarray(rows), jnp.asarray(orthonormal(rng, d, r), jnp.float32), jnp.asarray(goals)


def best_by_linprog(row, basis, goal):
    """The largest `goal . x` over `x = basis c` between 0 and the row."""
    row, basis, goal = (np.asarray(part, np.float64) for part in (row, basis, goal))
    limits = np.concatenate([np.maximum(row, 0), -np.minimum(row, 0)])
    done = linprog(-(goal @ basis), A_ub=np.concatenate([basis, -basis]), b_ub=limits, bounds=(None, None))
    assert done.success
    return -done.fun


@pytest.mark.parametrize("goal", ["random", "sizes"])
def test_solve_reaches_the_optimum_of_the_linear_program(goal):
    rows, basis, goals = box_problems(0, count=12)
    inner = goals @ basis @ basis.T  # a box around points of the subspace, so that there is something to gain
    rows = 1.5 * inner + 0.3 * jnp.sign(inner)
    goals = jnp.sign(rows) if goal == "sizes" else rows * goals
    x, iterate = box.solve(rows, basis, goals, box.start(rows, basis), 20000)
    best = [best_by_linprog(row, basis, goal) for row, goal in zip(rows, goals, strict=True)]
    assert np.median(best) > 1
    np.testing.assert_allclose((np.asarray(goals) * np.asarray(x)).sum(-1), best, rtol=2e-3, atol=3e-3)
    np.testing.assert_allclose(x, iterate.z, atol=2e-3)


def test_solve_and_kept_of_tokens_that_are_not_there():
    """Random boxes: for most of them 0 is the only point of the subspace inside."""
    rows, basis, _ = box_problems(1, count=40)
    x, (z, _) = box.solve(rows, basis, jnp.sign(rows), box.start(rows, basis), 20000)
    best = np.array([best_by_linprog(row, basis, np.sign(row)) for row in rows])
    assert 0 < (best > 1e-6).sum() < 10
    np.testing.assert_allclose(box.kept(x, z, rows), best / np.abs(rows).sum(-1), atol=2e-3)


def test_solve_returns_a_point_of_the_box_and_one_of_the_subspace():
    rows, basis, goals = box_problems(7)
    x, (z, _) = box.solve(rows, basis, goals, box.start(rows, basis), 20)
    assert (x >= np.minimum(rows, 0)).all()
    assert (x <= np.maximum(rows, 0)).all()
    np.testing.assert_allclose(z, z @ basis @ basis.T, atol=1e-5)


def test_start_is_the_projection():
    rows, basis, _ = box_problems(8)
    z, u = box.start(rows, basis)
    np.testing.assert_allclose(z, np.asarray(rows) @ np.asarray(basis) @ np.asarray(basis).T, atol=1e-5)
    assert not u.any()


def test_solve_continues_where_it_ended():
    rows, basis, goals = box_problems(9)
    _, half = box.solve(rows, basis, goals, box.start(rows, basis), 30)
    x, _ = box.solve(rows, basis, goals, half, 20)
    whole, _ = box.solve(rows, basis, goals, box.start(rows, basis), 50)
    np.testing.assert_allclose(x, whole, atol=1e-5)


def test_neither_the_goals_scale_nor_columns_of_zeros_matter():
    rows, basis, goals = box_problems(10)
    x, _ = box.solve(rows, basis, goals, box.start(rows, basis), 50)
    wide = jnp.pad(basis, ((0, 0), (0, 11)))
    other, _ = box.solve(rows, wide, 1000 * goals, box.start(rows, wide), 50)
    np.testing.assert_allclose(other, x, atol=1e-5)


def test_a_corner_of_0_forces_the_coordinate_to_0():
    rows, basis, goals = box_problems(11)
    x, _ = box.solve(rows.at[:, 3].set(0), basis, goals, box.start(rows, basis), 50)
    assert not x[:, 3].any()


def test_kept_by_hand():
    rows = jnp.array([[2.0, -1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    z = jnp.array([[2.0, -1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [3.0, -1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    x = z.at[3].set(jnp.array([1.0, 0.0, 0.5, 0.0]))
    # 3 of 4; a row of zeros; clipped to 0..1; the distance |x - z| = 1.5 subtracted.
    np.testing.assert_allclose(box.kept(x, z, rows), [0.75, -np.inf, 0.5, 0.125])


class Planted:
    """Copies of tokens under random masks, and the space that they span."""

    def __init__(self, seed, d=96, tokens=8, copies=2, rate=0.2):
        rng = np.random.default_rng(seed)
        self.rng = rng
        self.targets = np.repeat(rng.normal(size=(tokens, d)), copies, axis=0)
        self.kept = rng.random(self.targets.shape) > rate
        self.rows = self.targets * self.kept
        self.shares = np.abs(self.rows).sum(-1) / np.abs(self.targets).sum(-1)
        self.basis = np.linalg.qr(self.rows.T)[0]

    def commit(self, shut=None, goals=None):
        """Box programs of every row, in float32; `shut` are coordinates forced to 0."""
        rows, basis = jnp.asarray(self.targets, jnp.float32), jnp.asarray(self.basis, jnp.float32)
        corners = rows if shut is None else rows * ~shut
        z, share = box.commit(rows, basis, jnp.sign(rows) if goals is None else jnp.asarray(goals), corners)
        return np.asarray(z), np.asarray(share)


def test_commit_returns_a_planted_vertex():
    planted = Planted(0, copies=1)
    z, share = planted.commit()
    np.testing.assert_allclose(z, planted.rows, atol=2e-2)
    np.testing.assert_allclose(share, planted.shares, atol=1e-2)


def test_commit_returns_the_only_vertex_that_drops_a_forced_coordinate():
    planted = Planted(1)
    twin = np.arange(16) ^ 1
    only = planted.kept[twin] & ~planted.kept  # dropped by the row, kept by its copy
    shut = np.eye(96, dtype=bool)[(only * np.abs(planted.targets)).argmax(-1)]
    z, share = planted.commit(shut)
    np.testing.assert_allclose(z, planted.rows, atol=2e-2)
    np.testing.assert_allclose(share, planted.shares, atol=1e-2)


def test_commit_finds_nothing_under_other_tokens():
    planted = Planted(2)
    planted.targets = planted.rng.normal(size=planted.targets.shape)
    assert (planted.commit()[1] < 0.3).all()


# --- polish -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.02])
def test_perturbed_members_are_snapped_exactly(noise):
    planted = Planted(3)
    near = planted.rows + noise * planted.rng.normal(size=planted.rows.shape)
    before = near.copy()
    found = polish.polish(planted.targets, planted.basis, near)
    np.testing.assert_allclose(found.rows, planted.rows, atol=1e-8)
    np.testing.assert_allclose(found.certificate, 1)
    np.testing.assert_array_equal(found.kept, planted.kept)
    np.testing.assert_array_equal(near, before)


@pytest.mark.parametrize("seed", range(5))
def test_one_wrong_level_of_high_leverage_is_undone(seed):
    """The space holds coordinate 5 almost alone; there the start is at the wrong level, and a little off elsewhere."""
    planted = Planted(seed, tokens=10, copies=1)
    alone = np.eye(96)[5] + 0.02 * planted.rng.normal(size=96)
    planted.targets[0, 5], planted.kept[0, 5] = 1.0, seed % 2 == 0
    planted.rows[0, 5] = planted.kept[0, 5]
    basis = np.linalg.qr(np.concatenate([planted.rows, alone[None]]).T)[0]
    wrong = 1 - 2 * planted.rows[0, 5]
    start = planted.rows[:1] + wrong / alone[5] * alone[None]
    found = polish.polish(planted.targets[:1], basis, start)
    np.testing.assert_allclose(found.certificate, 1)
    np.testing.assert_array_equal(found.kept, planted.kept[:1])
    np.testing.assert_allclose(found.rows, planted.rows[:1], atol=1e-8)


@pytest.mark.parametrize("start", ["box", "projection"])
def test_no_decoy_gets_a_certificate(start):
    """Of 400 tokens that are not there only those pass that keep nothing: 0 lies in every space."""
    planted = Planted(4, d=64, tokens=10)
    planted.targets = planted.rng.normal(size=(400, 64))
    near = planted.commit()[0] if start == "box" else planted.targets @ planted.basis @ planted.basis.T
    found = polish.polish(planted.targets, planted.basis, near)
    passed = found.certificate >= 0.9
    assert np.abs(found.rows[passed]).max(initial=0) < 0.05
    assert not found.kept[passed].mean(-1).max(initial=0) > 0.1


def test_certificate_counts_redundant_coordinates_only():
    """Width 10, rank 2, by hand: the space holds 0 and the token on all coordinates but two, so (8 - 2) / (10 - 2)."""
    target = np.ones((1, 10))
    basis = np.zeros((10, 2))
    basis[0, 0] = 1
    basis[1:, 1] = np.array([1, 1, 1, 1, 1, 1, 1, 0.5, 0.5]) / np.sqrt(7.5)
    row = np.array([[1, 1, 1, 1, 1, 1, 1, 1, 0.5, 0.5]])
    found = polish.polish(target, basis, row)
    np.testing.assert_allclose(found.certificate, 0.75)
    np.testing.assert_allclose(found.rows, row, atol=1e-6)


def test_tolerance_is_the_largest_distance_of_an_explained_coordinate():
    """One coordinate of a member is off by 1% of the mean size: explained at 2%, not at 0.5%."""
    target, off = np.ones((1, 40)), np.ones(40)
    off[7] = 0.99
    basis = (off / np.linalg.norm(off))[:, None]
    for tolerance, expected in ((0.02, 1.0), (5e-3, (39 - 1) / 39)):
        found = polish.polish(target, basis, off[None], tolerance=tolerance, accept=0.0)
        np.testing.assert_allclose(found.certificate, expected)
