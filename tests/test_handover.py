"""Hand-over: what span decoding proves is held, Grab searches the rest and no more, and what is certified stays so."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from span_client import FAMILIES, WIDTH, client, sentence
from test_run import TEXTS, do, records
from test_span_attack import folder, settings  # noqa: F401  # fixtures

from grab_jax import masks
from grab_jax.attack_config import AttackConfig
from grab_jax.attacks import discrete, grab, handover, programs, span
from grab_jax.span.rows import Row

pytestmark = pytest.mark.usefixtures("quick_compilation")
PAD = 0
FAST = AttackConfig(
    init="span", rounds=2, steps=60, candidates=2, permutations=0, beam=2, sweeps=1, chunk=1, weight_decay=0.1
)
ONE = replace(FAST, rounds=1)


@pytest.fixture(scope="module", autouse=True)
def share_programs():
    """One set of compiled programs for settings that differ only in what the host reads."""
    compiled = programs.compiled
    programs.compiled = lambda model, config, *rest: compiled(model, replace(config, rounds=1, init="none"), *rest)
    yield
    programs.compiled = compiled


def drawn(*lengths, seed=0, family="bert"):
    rng = np.random.default_rng(seed)
    return tuple(sentence(family, rng, n) for n in lengths)


THREE = drawn(3, 6, 4)
SAME = drawn(4, 4, 4, 4, seed=3)


@pytest.fixture(scope="module")
def truth():
    return client("bert", THREE)


def keys(*seeds):
    return jax.vmap(jax.random.key)(jnp.array(seeds))


def tokens_of(found, one):
    return tuple(found.rows[i].token for i in one.rows)


@pytest.fixture
def lose(monkeypatch):
    """Make span decoding forget some sentences, whose rows stay as loose ones, and those loose rows at a position."""
    decoded = span.decoded

    def forget(sentences, position=None):
        def fewer(*args):
            spectrum, found = decoded(*args)
            left = [one for one in found.sentences if tokens_of(found, one) not in sentences]
            used = {i for one in left for i in one.rows}
            stay = [i for i, row in enumerate(found.rows) if i in used or row.position != position]
            moved = [one._replace(rows=tuple(stay.index(i) for i in one.rows)) for one in left]
            return spectrum, found._replace(rows=[found.rows[i] for i in stay], sentences=moved)

        monkeypatch.setattr(span, "decoded", fewer)

    return forget


def hand(problem, config=FAST):
    return handover.hand(problem, 5, config)


def ids_of(truth):
    return np.asarray(truth.batch.batch.ids)


def real(truth):
    return np.asarray(truth.batch.batch.attention)


def told_masks(handed):
    return np.asarray(handed.problem.known.masks["embeddings"])


def attack(*problems, config=FAST, **kwargs):
    return grab.attack(keys(*range(7, 7 + len(problems))), problems, config, **kwargs)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, (a.ids, a.loss, a.masks, a.labels), (b.ids, b.loss, b.masks, b.labels))
    np.testing.assert_array_equal(a.confidence, b.confidence)
    assert (a.trace, a.notes, a.evidence) == (b.trace, b.notes, b.evidence)


# --- what is known after span decoding ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_proven_is_held_in_the_batch_s_order(family):
    truth = client(family, drawn(3, 6, 4, family=family))
    handed = hand(truth.problem)
    known = handed.problem.known
    np.testing.assert_array_equal(known.ids, ids_of(truth))
    np.testing.assert_array_equal(known.attention, real(truth))
    assert np.asarray(known.pinned).all()
    assert handed.settled
    expected = np.where(real(truth)[..., None], truth.masks["embeddings"], np.nan)
    np.testing.assert_array_equal(told_masks(handed), expected)
    assert handed.note == "span decoding proved 3 of 3 sentences; nothing was left to search"
    assert not handed.pool.any()


@pytest.mark.parametrize("seed", range(2))
def test_labels_tell_sentences_of_one_length_apart(seed):
    """Rows 0 and 3 have one label: which sentence is in which of them does not matter."""
    truth = client("bert", SAME, seed=seed)
    found = np.asarray(hand(truth.problem).problem.known.ids)
    np.testing.assert_array_equal(found[1:3], ids_of(truth)[1:3])
    assert sorted(found.tolist()) == sorted(ids_of(truth).tolist())


def test_lengths_that_are_not_told_are_found():
    truth = client("bert", THREE, lengths=False, labels=False)
    known = hand(truth.problem).problem.known
    assert known.labels is None
    order = [ids_of(truth).tolist().index(row) for row in np.asarray(known.ids).tolist()]
    assert sorted(order) == [0, 1, 2]
    np.testing.assert_array_equal(known.attention, real(truth)[order])


def test_one_sentence_open_gets_the_rows_that_are_left(truth, lose):
    """Its rows need no sentence around them; one was not found and stays open."""
    lose(THREE[1:2], position=4)
    handed = hand(truth.problem)
    known = handed.problem.known
    np.testing.assert_array_equal(np.argwhere(known.free), [[1, 4]])
    np.testing.assert_array_equal(np.where(known.free, ids_of(truth), known.ids), ids_of(truth))
    assert np.isnan(told_masks(handed)[1, 4]).all()
    np.testing.assert_array_equal(told_masks(handed)[1, :4], truth.masks["embeddings"][1, :4])
    assert handed.note == (
        "span decoding proved 2 of 3 sentences and 7 rows of the other one; Grab searched the other 1 position"
    )


def test_rows_of_several_open_sentences_go_to_the_pools(truth, lose):
    lose(THREE[:2])
    handed = hand(truth.problem)
    known = handed.problem.known
    np.testing.assert_array_equal(np.asarray(known.free).sum(1), [3, 6, 0])
    assert set(np.flatnonzero(handed.pool)) == {token for words in THREE[:2] for token in words}
    assert np.isnan(told_masks(handed)[:2]).all()
    assert handed.note == "span decoding proved 1 of 3 sentences; Grab searched the other 9 positions"


def test_a_sentence_without_a_certificate_is_where_its_row_begins(truth, monkeypatch):
    """Of its length, among the rows no proven one has; nothing of it is held."""
    certified = span.certified
    weak = lambda one, rows, problem: len(one.rows) == 6 and certified(one, rows, problem)  # noqa: E731
    monkeypatch.setattr(span, "certified", weak)
    handed = hand(truth.problem)
    known = handed.problem.known
    np.testing.assert_array_equal(known.ids, ids_of(truth))
    np.testing.assert_array_equal(np.asarray(known.free).sum(1), [3, 6, 0])
    assert np.isnan(told_masks(handed)[:2]).all()


def row(position, token, certificate=1.0):
    return Row(position, token, np.ones(4), np.ones(WIDTH, bool), certificate)


@pytest.mark.parametrize(
    ("rows", "held"),
    [
        ([row(2, 50)], [50]),
        ([row(2, 50), row(2, 60)], []),  # one of them is not true
        ([row(2, 50, 0.97)], []),
        ([row(7, 50)], []),  # the sentence has 5 tokens
        ([row(9, 50)], []),
        ([row(0, 50)], []),  # [CLS] is told
        ([row(4, 3), row(1, 2)], [2]),
    ],
)
def test_rows_that_contradict_are_not_held(rows, held, monkeypatch):
    truth = client("bert", THREE[:1])
    spectrum, _ = span.decoded(truth.problem, 0)
    monkeypatch.setattr(span, "decoded", lambda *_: (spectrum, span.Found(rows, [])))
    handed = hand(truth.problem)
    told = np.asarray(handed.problem.known.ids)[0, 1:4]
    assert told[told >= 0].tolist() == held
    sure = {r.token for r in rows if r.certificate > span.ACCEPT}
    assert set(np.flatnonzero(handed.pool)) == sure - set(held) - ({3} if held == [2] else set())


def test_with_few_dimensions_to_spare_rows_are_tried_not_held(truth, lose, monkeypatch):
    lose(THREE[1:2])
    monkeypatch.setattr(handover, "SPARE", WIDTH)
    handed = hand(truth.problem)
    assert np.asarray(handed.problem.known.free).sum() == 6
    assert handed.pool[list(THREE[1])].all()


def test_a_client_without_dropout():
    truth = client("bert", THREE, dropout=False)
    handed = hand(truth.problem)
    assert handed.problem.known.masks is None
    np.testing.assert_array_equal(handed.problem.known.ids, ids_of(truth))


# --- the search -----------------------------------------------------------------------------------------------------


def test_nothing_open_is_finished_at_once(truth, monkeypatch):
    monkeypatch.setattr(discrete.beam, "search", lambda *_, **__: pytest.fail("searched"))
    seen = []
    (result,) = attack(truth.problem, on_segment=lambda state, info: seen.append((state, info.phase)))
    (alone,) = span.attack(keys(7), [truth.problem], AttackConfig(name="span"))
    np.testing.assert_array_equal(result.ids, ids_of(truth))
    assert (result.confidence == 1).all()
    assert set(seen) == {(None, "rows")}
    assert result.trace == []
    assert result.loss == alone.loss
    assert result.labels is None
    np.testing.assert_array_equal(
        result.masks["embeddings"][real(truth)], np.asarray(truth.masks["embeddings"])[real(truth)]
    )
    assert all(one["certified"] for one in result.evidence["sentences"])
    assert {k: v for k, v in result.evidence.items() if k != "sentences"} == {
        k: v for k, v in alone.evidence.items() if k != "sentences"
    }
    assert result.notes == ["span decoding proved 3 of 3 sentences; nothing was left to search"]


@pytest.fixture(scope="module")
def partial(truth):
    """An attack that knows one sentence of three and all rows but one of the others' words, and what was seen of it."""
    states, searched = [], []
    with pytest.MonkeyPatch.context() as patch:
        decoded, search = span.decoded, discrete.beam.search

        def fewer(*args):
            spectrum, found = decoded(*args)
            left = [s for s in found.sentences if len(s.rows) == 6]
            return spectrum, found._replace(sentences=left)

        patch.setattr(span, "decoded", fewer)
        spy = lambda *args, **more: (searched.append(args), search(*args, **more))[1]  # noqa: E731
        patch.setattr(discrete.beam, "search", spy)
        keep = lambda state, _: state is None or states.append(jax.tree.map(np.array, state))  # noqa: E731
        (result,) = attack(truth.problem, on_segment=keep)
        resumed = [attack(truth.problem, state=state)[0] for state in (states[0], states[len(states) // 2])]
    return result, states, searched, resumed


def test_what_is_held_never_changes(truth, partial):
    result, states, _, _ = partial
    table = np.asarray(truth.problem.frozen[truth.problem.model.word_table])
    kept = np.asarray(truth.masks["embeddings"])[2, :6]
    for state in states:
        now = state.descent.candidate
        np.testing.assert_array_equal(now.masks["embeddings"][0, 0, 2, :6], kept)
        np.testing.assert_array_equal(now.embeds[0, 0, 2], table[ids_of(truth)[2]])
    np.testing.assert_array_equal(result.ids[2], ids_of(truth)[2])
    np.testing.assert_array_equal(result.masks["embeddings"][2, :6], kept)
    assert (result.confidence[2] == 1).all()
    free = result.masks["embeddings"][:2, :5]
    assert ((free > 0) & (free < 1)).any()  # those are learnt
    assert set(result.masks) == set(truth.problem.model.sites)


def test_only_open_positions_are_searched(truth, partial):
    for _, starts, free, pools in partial[2]:
        np.testing.assert_array_equal(np.asarray(free).sum(1), [3, 6, 0])
        assert (starts[:, 2] == ids_of(truth)[2]).all()
        words = {token for s in THREE[:2] for token in s[1:-1]}
        assert all(words <= set(pools[row].tolist()) for row in (0, 1))


def test_evidence_stays_with_its_sentence(partial):
    result = partial[0]
    assert [one["certified"] for one in result.evidence["sentences"]] == [False, False, True]
    assert result.notes[0] == "span decoding proved 1 of 3 sentences; Grab searched the other 9 positions"
    assert json.loads(json.dumps(result.evidence, allow_nan=False)) == result.evidence
    assert {point["phase"] for point in result.trace} == {"continuous", "tokens", "discrete"}


def test_a_resumed_attack_gives_the_same(partial):
    assert len(partial[3]) == 2
    for resumed in partial[3]:
        same(resumed, partial[0])


def test_states_have_the_structure_of_the_first(truth, partial):
    shapes = lambda state: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)  # noqa: E731
    template = shapes(grab.start(keys(7), [truth.problem], FAST))
    assert all(shapes(state) == template for state in partial[1])


def test_the_first_start_holds_what_is_known_and_begins_at_what_is_not_sure(truth, monkeypatch):
    """Before any step: words at the embeddings of the sentence put together, masks told at held positions only."""
    certified = span.certified
    monkeypatch.setattr(span, "certified", lambda one, *rest: len(one.rows) == 6 and certified(one, *rest))
    states = []
    descend = grab._descend
    monkeypatch.setattr(grab, "_descend", lambda job, state: (states.append(state), descend(job, state))[1])
    (result,) = attack(truth.problem, config=ONE)
    first = states[0].descent.candidate
    table = np.asarray(truth.problem.frozen[truth.problem.model.word_table])
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    words = ids_of(truth)[:2]
    np.testing.assert_allclose(unit(np.asarray(first.embeds)[0, 0, :2]), unit(table[words]), atol=1e-5)
    assert [one["certified"] for one in result.evidence["sentences"]] == [False, False, True]


@pytest.mark.long
def test_not_testable_is_plain_grab_and_says_why(truth):
    rng = np.random.default_rng(0)
    full = {
        path: jnp.asarray(rng.normal(size=value.shape), jnp.float32) if value.ndim == 2 else value
        for path, value in truth.problem.observed.items()
    }
    problem = truth.problem._replace(observed=full)
    (result,) = attack(problem, config=ONE)
    (plain,) = attack(problem, config=replace(ONE, init="none"))
    np.testing.assert_array_equal(result.ids, plain.ids)
    assert result.loss == pytest.approx(plain.loss, rel=1e-3)
    assert result.evidence["not_testable"].startswith("not testable by span decoding: ")
    assert result.notes[0] == result.evidence["not_testable"] + "; Grab searched everything"
    assert [note for note in result.notes[1:] if "noise" not in note] == plain.notes
    assert result.evidence["sentences"] == []


@pytest.mark.long
def test_without_mask_learning_masks_that_are_known_still_count(truth, lose):
    lose(THREE[:2])
    (result,) = attack(truth.problem, config=replace(ONE, masks="off"))
    kept = np.asarray(truth.masks["embeddings"])
    assert set(result.masks) == {"embeddings"}
    np.testing.assert_array_equal(result.masks["embeddings"][2, :6], kept[2, :6])
    np.testing.assert_allclose(result.masks["embeddings"][:2], 0.9)
    problem, known = truth.problem, hand(truth.problem).problem.known
    used = masks.complete({"embeddings": jnp.asarray(result.masks["embeddings"])}, problem.model.sites, 3, 8)
    score = handover._objective(problem.model, "l2+l1", 0.01, PAD)
    rest = (problem.trainable, problem.frozen, problem.observed, known)
    assert result.loss == pytest.approx(float(score(result.ids, used, None, *rest)), rel=1e-3)


def test_noise_on_the_update_leaves_no_wrong_certificate(truth):
    """Whatever span decoding makes of it, certified sentences are true and held."""
    rng = np.random.default_rng(1)
    noisy = {
        path: value + 0.05 * jnp.abs(value).mean() * jnp.asarray(rng.normal(size=value.shape), jnp.float32)
        for path, value in truth.problem.observed.items()
    }
    (result,) = attack(truth.problem._replace(observed=noisy), config=ONE)
    sure = [one["certified"] for one in result.evidence["sentences"]]
    for ids, ok in zip(result.ids, [*sure, False, False, False], strict=False):
        assert not ok or tuple(ids[ids != PAD].tolist()) in THREE
    assert "Grab searched" in result.notes[0]


# --- a whole run ----------------------------------------------------------------------------------------------------

SMALL = """--attack=grab --attack_init=span --attack_rounds=1 --attack_steps=20 --attack_candidates=4
    --attack_permutations=4 --attack_sweeps=1 --attack_beam=2 --attack_chunk=8 --num_batches=2 --batch_size=2"""


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "four.jsonl"
    path.write_text("".join(json.dumps({"text": text, "label": i % 2}) + "\n" for i, text in enumerate(TEXTS)))
    return path


@pytest.mark.long
@pytest.mark.usefixtures("settings")
def test_a_whole_run(folder, data, tmp_path):  # noqa: F811
    """Two batches in one program: the first loses a sentence, the second is solved by span decoding alone."""
    where = tmp_path / "run"
    jax.config.update("jax_debug_key_reuse", False)  # as `tests/test_run.py` says
    decoded, calls = span.decoded, []

    def fewer(*args):
        calls.append(args)
        spectrum, found = decoded(*args)
        return (spectrum, found._replace(sentences=found.sentences[:1])) if len(calls) == 1 else (spectrum, found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(span, "decoded", fewer)
        said = do(*SMALL.split(), f"--model={folder}", f"--data={data}", f"--run_dir={where}")
    jax.config.update("jax_debug_key_reuse", True)
    first, second = records(where)
    assert "input rows found" in said
    assert sum(one["certified"] for one in first["evidence"]["sentences"]) == 1
    assert all(one["certified"] for one in second["evidence"]["sentences"])
    assert sorted(p["tokens"] for p in second["predictions"]) == sorted(s["tokens"] for s in second["sentences"])
    assert second["cosine"] == {}
    summary = json.loads((where / "summary.json").read_text())
    assert (summary["attack"], summary["certified_wrong"]) == ("grab", 0)
    assert summary["outcome"] == "leak shown"
    assert "proven by their certificates" in summary["reason"]
    page = (where / "report.html").read_text()
    assert "What proves it" in page
    assert "not testable" not in page
