"""The report of a fake run folder: what it shows, what it hides, and what it says about damaged folders."""

import copy
import json
import re
import stat

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grab_jax import metrics, report
from grab_jax.types import InputError

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


@pytest.fixture
def folder(tmp_path):
    def make(records, run=RUN):
        (tmp_path / "run.json").write_text(json.dumps(run))
        (tmp_path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        return tmp_path

    return make


def page(folder):
    return report.render(folder).read_text("utf-8")


def shown(html):
    """The words between tags, without style sheet."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", re.sub(r"<style>.*?</style>", "", html, flags=re.S)))


# --- the page ------------------------------------------------------------------------------------------------


def test_every_part_is_there(folder):
    html = page(folder([record(), record(1, founds=["a b"]), record(2, control=True)]))
    for mark in ("right", "moved", "wrong", "missing"):
        assert f'class="t {mark}"' in html
    text = shown(html)
    for part in (
        "Clients send one gradient.", "The server knows the weights.", "Stopped early.", "(2 batches)", "Ran once.",
        "2 h 03 min", "1,234,567", "jax 0.10.2", "layer 0", "layer 0 attention", "continuous phase", "discrete phase",
        "without the gradient", "1 control attack", "is no proof",
    ):  # fmt: skip
        assert part in text, part
    assert 'title="confidence 93 %"' in html
    assert "#101" not in text


def test_page_is_self_contained(folder):
    html = page(folder([record()]))
    assert "http" not in html.replace('http-equiv="Content-Security-Policy"', "")
    assert "default-src 'none'" in html
    for tag in ("<script", "<link", "<img", "<iframe", "@import", "url(", "javascript:", " onload"):
        assert tag not in html, tag
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


def test_text_is_escaped(folder):
    evil = '<script>alert(1)</script> & "quotes"'
    run = RUN | {"model": evil, "setting": [evil], "assumptions": [evil], "notes": [evil], "versions": {evil: evil}}
    cosine = {f"{evil}/layer_1/x": 0.5}
    masks = {"auc": {evil: 0.5}, "mean": 0.5}
    html = page(folder([record(truths=[evil], founds=[evil], notes=[evil], cosine=cosine, masks=masks)], run))
    assert "<script" not in html
    assert "&lt;script&gt;alert" in html


@pytest.mark.parametrize("founds", [["the cat sat on the mat"], ["x y z"], []])
@pytest.mark.parametrize("loss", [0.1, None])
def test_outcome_is_one_of_three_and_never_safe(folder, founds, loss):
    html = page(folder([record(founds=founds, loss=loss)]))
    (title,) = re.findall(r"<h1[^>]*>(.*?)</h1>", html)
    assert title.lower() in (metrics.LEAK, metrics.NO_LEAK, metrics.NOT_TESTABLE)
    assert not re.search(r"\bsafe", shown(html).lower())


@pytest.mark.parametrize("missing", ["cosine", "masks", "trace", "labels", "notes", "seconds"])
@pytest.mark.parametrize("how", ["absent", "none", "empty"])
def test_optional_parts_may_be_missing(folder, missing, how):
    one = record()
    value = one.pop(missing)
    if how != "absent":
        one[missing] = None if how == "none" else type(value)()
    html = page(folder([one, record(1)]))
    assert "What was recovered" in html
    assert "NaN" not in html
    assert "nan" not in re.findall(r'\bd="([^"]*)"', html)


def test_all_optional_parts_missing_at_once(folder):
    bare = {"sentences": [sentence("a b")], "predictions": []}
    html = page(folder([bare], {}))
    for title in ("How the attack converged", "How well", "Assumptions", "Notes"):
        assert title not in html
    assert "nothing" in html


def test_reconstructions_without_truth_are_shown(folder):
    text = shown(page(folder([record(truths=[], founds=["some words here"])])))
    assert "some words here" in text
    assert "Not testable" in text


def test_nan_in_the_records(folder):
    trace = [{"round": 0, "phase": "continuous", "step": s, "loss": v} for s, v in enumerate([1.0, float("nan"), 0.0])]
    cosine = {"a/kernel": float("nan"), "b/kernel": 0.5}
    html = page(folder([record(loss=float("inf"), trace=trace, cosine=cosine)]))
    assert not re.search(r"\bnan\b", shown(html).lower())


def test_long_reports_fold_and_stay_small(folder, monkeypatch):
    assert "<details" not in page(folder([record(i) for i in range(10)]))
    share = 7000 / report.MAX_TOKENS  # a small page stands for the largest one
    monkeypatch.setattr(report, "MAX_TOKENS", 7000)
    long = [" ".join(f"word{k}x{i}" for i in range(50)) for k in range(80)]
    where = folder([record(k, truths=[text], founds=[text]) for k, text in enumerate(long)])
    html = page(where)
    assert html.count("<details") == 2  # 70 sentences fit: 12 in sight, then 50 and 8
    assert "10 further sentences" in html
    assert (where / "report.html").stat().st_size < 5_000_000 * share


def test_page_is_for_the_owner_only(folder):
    path = report.render(folder([record()]))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(p.name for p in path.parent.iterdir()) == ["report.html", "results.jsonl", "run.json"]


def test_rendering_again_gives_the_same_page(folder):
    where = folder([record(), record(1)])
    assert page(where) == page(where)


# --- advice --------------------------------------------------------------------------------------------------


def commands(html):
    return [line.replace("&#39;", "'") for line in re.findall(r"<pre>(.*?)</pre>", html, flags=re.S)]


def test_advice_repeats_the_run_with_one_change(folder):
    where = folder([record()])
    start = f"python -m grab_jax.main --flagfile={where}/flags.txt --run_dir={where}"
    assert commands(page(where)) == [
        f"{start}-dropout0.3 --client_dropout=0.3",
        f"{start}-size8 --batch_size=8",
        f"{start}-frozenembeddings --client_frozen=embeddings",
        f"{start}-again",
    ]


def test_advice_leaves_out_what_is_in_force(folder):
    config = {"client": {"dropout": 0.4, "frozen": "embeddings"}, "data": {"batch_size": 16}}
    where = folder([record()], RUN | {"config": config})
    (larger, again) = commands(page(where))
    assert larger.endswith("-size32 --data_batch_size=32")
    assert again.endswith("-again")


def test_commands_survive_a_folder_with_spaces(tmp_path):
    where = tmp_path / "my run"
    where.mkdir()
    (where / "run.json").write_text(json.dumps(RUN))
    (where / "results.jsonl").write_text(json.dumps(record()))
    assert f"'--flagfile={where}/flags.txt'" in commands(page(where))[-1]


# --- damaged folders -----------------------------------------------------------------------------------------


def test_missing_folder_and_files(tmp_path):
    with pytest.raises(InputError, match=r"no-such is no folder"):
        report.render(tmp_path / "no-such")
    with pytest.raises(InputError, match=r"holds no run\.json"):
        report.render(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds no results\.jsonl"):
        report.render(tmp_path)
    (tmp_path / "results.jsonl").write_text("\n")
    with pytest.raises(InputError, match=r"results\.jsonl is empty"):
        report.render(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        '{"id": ',
        "[]",
        "{}",
        '{"sentences": [], "predictions": [{"text": "a"}]}',
        '{"sentences": [1], "predictions": []}',
    ],
)
def test_damaged_results_name_the_line(folder, line):
    where = folder([record()])
    with (where / "results.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(InputError, match=r"results\.jsonl, line 2"):
        report.render(where)


def test_damaged_run_file(folder):
    where = folder([record()])
    (where / "run.json").write_text('{"a": }')
    with pytest.raises(InputError, match=r"run\.json is damaged"):
        report.render(where)


@given(st.binary(max_size=60))
def test_any_bytes_give_an_input_error(tmp_path_factory, junk):
    where = tmp_path_factory.mktemp("junk")
    (where / "run.json").write_text("{}")
    (where / "results.jsonl").write_bytes(junk)
    with pytest.raises(InputError):
        report.render(where)


# --- redaction -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("Yesterday I met Mary and Dr. Who.", "Yesterday I met [name] and Dr. [name]."),
        ("He left. She called Bob O'Neil!", "He left. She called [name] [name]!"),
        ("Write to anna.k@example.org, please.", "Write to [mail], please."),
        ("Call +1 (415) 555-0132 now", "Call [phone] now"),
        ("It cost 45,000 euros at 14:30 in B12.", "It cost [number] euros at [number] in [number]."),
        ("I think I'm right and I’ll stay.", "I think I'm right and I’ll stay."),
        ("in Zürich lebt Ödön", "in [name] lebt [name]"),
        ("nothing private here.", "nothing private here."),
        ("", ""),
    ],
)
def test_redact_text(text, redacted):
    assert report.redact_text(text) == redacted


SECRET = record(
    truths=["Please ask Maria Lopez (born 1984) or mail to lopez@clinic.org; Maria knows."],
    founds=["lopez maria 1984 clinic ask 555 please"],
)
SECRET["sentences"][0]["tokens"] = (
    "please ask maria lop ##ez ( born 1984 ) or mail to lop ##ez @ clinic . org ; maria knows .".split()  # noqa: SIM905
)
SECRET["predictions"][0]["tokens"] = "lop ##ez maria 1984 clinic ask 555 please".split()  # noqa: SIM905


def test_private_words_are_hidden_in_truth_and_predictions(folder):
    html = page(folder([SECRET, record(1, founds=["lop maria sat"])]))
    for word in ("maria", "lop", "ez", "1984", "clinic", "555"):
        assert not re.search(rf">{word}<", html), word
    assert "lopez" not in html.lower()
    for kind in ("[name]", "[number]", "[mail]"):
        assert f">{kind}<" in html
    assert ">please<" in html


def test_redaction_can_be_switched_off(folder):
    html = page(folder([SECRET], RUN | {"config": {"report": {"redact": False}}}))
    assert ">maria<" in html
    assert ">[name]<" not in html
    assert "clear text" in html


def test_redaction_keeps_one_piece_per_token():
    truth, found = report.display(SECRET, report.private([SECRET]))
    assert [len(row) for row in (*truth, *found)] == [22, 8]
    assert [piece.text for piece in truth[0][:9]] == ["please", "ask", "[name]", "·", "·", "(", "born", "[number]", ")"]


def texts_of(row):
    return [piece.text for piece in row]


def test_a_known_name_is_hidden_at_the_start_of_a_sentence():
    one = record(truths=["We saw Mary . Mary left ."], founds=[])
    truth, _ = report.display(one, report.private([one]))
    assert texts_of(truth[0]) == ["we", "saw", "[name]", ".", "[name]", "left", "."]


def test_names_of_other_batches_are_hidden_too():
    one, other = record(truths=["We saw Mary"], founds=[]), record(founds=["mary sat"])
    assert texts_of(report.display(other, report.private([one, other]))[1][0]) == ["[name]", "sat"]


def test_marks_inside_a_hidden_item_are_hidden():
    one = record(truths=["at 14:30 sharp"], founds=["at 14 : 30 sharp"])
    one["sentences"][0]["tokens"] = ["at", "14", ":", "30", "sharp"]
    truth, found = report.display(one, report.private([one]))
    assert texts_of(truth[0]) == texts_of(found[0]) == ["at", "[number]", "·", "·", "sharp"]


def test_redaction_changes_no_record():
    before = copy.deepcopy(SECRET)
    report.display(SECRET, report.private([SECRET]))
    assert before == SECRET


def test_byte_level_names_are_hidden():
    one = record(truths=["We saw Zoë."], founds=["Zoë saw"])
    one["sentences"][0]["tokens"] = ["We", "Ġsaw", "ĠZo", "Ã«", "."]
    one["predictions"][0]["tokens"] = ["ĠZo", "Ã«", "Ġsaw"]
    assert [p.text for p in report.display(one, None)[0][0]] == ["We", "saw", "Zo", "ë", "."]
    truth, found = report.display(one, report.private([one]))
    assert [p.text for p in truth[0]] == ["We", "saw", "[name]", "·", "."]
    assert [p.text for p in found[0]][-1] == "saw"
    assert "Zo" not in "".join(p.text for p in found[0])


@given(st.text(max_size=40), st.text(max_size=40))
def test_display_never_fails(truth, found):
    one = record(truths=[truth], founds=[found])
    for hide in (None, report.private([one])):
        shown_truth, shown_found = report.display(one, hide)
        assert len(shown_truth[0]) == len(one["sentences"][0]["tokens"])
        assert len(shown_found[0]) == len(one["predictions"][0]["tokens"])
    for line in report.terminal(one, colour=False).splitlines():
        assert "\x1b" not in line


# --- pieces, terminal, curves --------------------------------------------------------------------------------


def read_aloud(tokens):
    return "".join(("" if p.glue else " ") + p.text for p in report.pieces(tokens)).strip()


def test_pieces_read_as_text():
    assert (
        read_aloud(["i", "don", "'", "t", "like", "token", "##ization", ",", "no"]) == "i don't like tokenization, no"
    )
    assert read_aloud(["I", "Ġlike", "Ġcaf", "Ã©", "s", "."]) == "I like cafés."
    assert read_aloud(["▁I", "▁to", "ken"]) == "I token"
    assert read_aloud(["##"]) == "##"
    assert report.pieces(["a\x1b[31m\u202e"])[0].text == "a\ufffd[31m\ufffd"
    assert report.pieces([]) == []


def test_terminal_by_hand():
    text = report.terminal(record(), colour=False)
    assert text.splitlines()[:3] == [
        "batch 0, sentence 0: ROUGE-L 66.7, 2 of 6 tokens in place",
        "  truth  the cat _sat_ ~on~ ~the~ ~mat~",
        "  found  the cat ~on~ !rug! ~mat~ ~the~",
    ]
    assert "legend: right   ~right token, wrong place~   !wrong!   _missing_" in text


def test_terminal_with_colour_keeps_the_marks():
    text = report.terminal(record(), colour=True)
    assert re.sub(r"\x1b\[[\d;]*m", "", text) == report.terminal(record(), colour=False)
    assert text.count("\x1b[") % 2 == 0


def test_terminal_without_prediction_and_redacted():
    assert "(nothing)" in report.terminal(record(founds=[]), colour=False)
    text = report.terminal(SECRET, colour=False, redact=True)
    assert "lop" not in text
    assert "[name]" in text


def test_save_curves(tmp_path):
    records = [record(4, cosine={"a": 0.5}), record(5, cosine={"b": 0.25}), record(6, control=True)]
    with np.load(report.save_curves(tmp_path, records)) as curves:
        assert curves["loss"].shape == curves["step"].shape == (32,)
        assert set(curves["batch"]) == {4, 5}
        assert set(curves["phase"]) == {"continuous", "discrete"}
        assert curves["loss"][0] == 1.0
        assert list(curves["cosine_name"]) == ["a", "b"]
        np.testing.assert_array_equal(curves["cosine"], [[0.5, np.nan], [np.nan, 0.25]])


def test_save_curves_of_nothing(tmp_path):
    with np.load(report.save_curves(tmp_path, [record(trace=None, cosine=None)])) as curves:
        assert curves["loss"].shape == (0,)
        assert curves["cosine"].shape == (1, 0)


def test_trajectory_mean_is_geometric_and_carries_on():
    def trace(*losses):
        return [{"round": 0, "phase": "continuous", "step": i, "loss": v} for i, v in enumerate(losses)]

    a, b = trace(1.0, 0.01), trace(1.0)
    chart = report.trajectory([record(trace=a), record(1, trace=b)])
    assert chart["log"]
    *_, y = re.findall(r"L\S+ ([\d.]+)", chart["mean"]["continuous"])
    top, bottom = (float(v) for v in re.findall(r" ([\d.]+)", chart["lines"]["continuous"][0]))
    assert float(y) == pytest.approx((top + bottom) / 2, abs=0.2)  # the mean of 0.01 and 1 is 0.1: half way


def test_trajectory_of_nothing_and_of_constants():
    assert report.trajectory([record(trace=[])]) is None
    flat = [{"round": 0, "phase": "discrete", "step": 0, "loss": 0.0}]
    chart = report.trajectory([record(trace=flat)])
    assert not chart["log"]
    assert chart["lines"]["discrete"][0].endswith("h0")
    assert chart["mean"] == chart["lines"] | {"discrete": chart["lines"]["discrete"][0]}


def test_duration():
    assert [report.duration(s) for s in (None, 4.21, 59.99, 750, 11_100)] == [
        "–", "4.2 s", "1 min 00 s", "12 min 30 s", "3 h 05 min",
    ]  # fmt: skip
