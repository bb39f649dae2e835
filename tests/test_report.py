"""The report of a fake run folder: what it shows, what it hides, and what it says about damaged folders."""

import json
import re
import stat

import pytest
from fake_run import RUN, SECRET, barred, proofs, record, sentence, span
from hypothesis import given
from hypothesis import strategies as st

from grab_jax import bars, report, summary
from grab_jax.types import InputError


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
        "Clients send one gradient.", "The server knows the weights.", "Stopped early.", "(2 of 2 batches)",
        "Ran once.", "2 h 03 min", "1,234,567", "jax 0.10.2", "layer 0", "layer 0 attention", "continuous phase",
        "discrete phase", "without the gradient", "1 control attack", "is no proof",
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
    assert title.lower() in (summary.LEAK, summary.NO_LEAK, summary.NOT_TESTABLE)
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
    blocks = re.findall(r"<pre>(.*?)</pre>", html, flags=re.S)
    return [" ".join(block.replace("&#39;", "'").replace("\\\n", "").split()) for block in blocks]


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
    config = {"client": {"dropout": 0.4, "frozen": "embeddings"}, "batch_size": 16}
    where = folder([record()], RUN | {"config": config})
    (larger, again) = commands(page(where))
    assert larger.endswith("-size32 --batch_size=32")
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


# --- hiding -------------------------------------------------------------------------------------------------


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


# --- bars, notes, numbers -------------------------------------------------------------------------------------


def test_layers_from_input_to_output_without_key_biases():
    cosine = {
        "bert/classifier/kernel": 0.5, "bert/encoder/layer_10/output/dense/kernel": 0.7,
        "bert/encoder/layer_2/attention/self/key/bias": -0.9, "bert/encoder/layer_2/output/dense/kernel": 0.6,
        "bert/encoder/layer_2/output/dense/bias": 0.8, "bert/embeddings/LayerNorm/bias": 0.4, "bert/pooler/x": 0.3,
    }  # fmt: skip
    rows = bars.layers([record(cosine=cosine), record(cosine=cosine)])
    assert [row["name"] for row in rows] == ["embeddings", "layer 2", "layer 10", "pooler", "classifier"]
    assert (rows[1]["mean"], rows[1]["low"]) == (pytest.approx(0.7), 0.6)
    assert rows[1]["lowest"] == "bert/encoder/layer_2/output/dense/kernel"


def test_layers_of_gpt2():
    names = ("score/kernel", "transformer/h_0/attn/c_attn/bias", "transformer/ln_f/bias", "transformer/wte/embedding")
    rows = bars.layers([record(cosine=dict.fromkeys(names, 0.9))])
    assert [row["name"] for row in rows] == ["word embeddings", "layer 0", "last layer norm", "classifier"]


def test_a_note_is_shown_once(folder):
    records = [record(k, notes=["stopped early"] * (k < 2)) for k in range(3)]
    text = shown(page(folder(records, RUN | {"notes": ["left out x", "left out x"]})))
    assert text.count("Left out x") == 1
    assert text.count("Stopped early (2 of 3 batches)") == 1


def test_number():
    assert [report.number(v) for v in (None, 0.04, -0.04, -1.25, 5)] == ["–", "0.0", "0.0", "−1.2", "5.0"]


def test_duration():
    assert [report.duration(s) for s in (None, 0.0, 0.004, 4.21, 59.99, 750, 11_100)] == [
        "–", "0.0 s", "less than 0.1 s", "4.2 s", "1 min 00 s", "12 min 30 s", "3 h 05 min",
    ]  # fmt: skip


def test_share_and_small():
    assert [report.share(v) for v in (None, 1.0, 0.99999, 0.98)] == ["–", "100 %", "99.9 %", "98.0 %"]
    assert [report.small(v) for v in (None, 0.0, 3.72e-7, 0.04, 1.0)] == ["–", "0", "3.7·10⁻⁷", "4.0·10⁻²", "1.0·10⁰"]


# --- evidence -------------------------------------------------------------------------------------------------


def cards(html):
    return re.findall(r'<article class="card">(.*?)</article>', html, flags=re.S)


def tags(card):
    return re.findall(r'<strong class="tag">(.*?)</strong>', card)


def test_certified_cards_are_tagged(folder):
    texts = ("the cat sat on the mat", "a dog ran off", "birds sing at dawn")
    html = page(folder([span(0, texts, certified=[True, False, True])]))
    assert [tags(card) for card in cards(html)] == [["verbatim", "proven"], ["verbatim"], ["verbatim", "proven"]]
    assert "2 proven" in shown(html)


def test_a_wrong_certificate_leaves_nothing_proven(folder):
    texts = ("the cat sat on the mat", "birds sing at dawn")
    html = page(folder([span(0, texts, (texts[0], "birds sing at dusk"))]))
    assert [tags(card) for card in cards(html)] == [["verbatim", "certified"], ["certificate wrong"]]
    assert "proven" not in shown(html)
    assert "no certificate of this run can be relied on" in shown(html)


def test_certified_reconstructions_without_truth_are_tagged(folder):
    html = page(folder([span(0, (), ("some words here", "more words"), certified=[True, False])]))
    assert [">proven<" in card for card in cards(html)] == [True, False]


def test_evidence_is_explained_and_tabled(folder):
    found = proofs([True, False], rows=11, gap_rank=10)
    html = page(folder([span(3, ("a b c d", "e f g h"), evidence=found), barred(4)]))
    text = shown(html)
    assert "What proves it" in text
    assert "either exactly kept or exactly zero" in text
    assert "3 11 of 12 (largest drop at 10) 384 100 % 1 of 2 2.0·10⁻⁷" in text
    assert "4 of at least 384 384 not testable" in text
    assert "Singular values" in text
    assert "12 to at least 384 here" in text
    for part in ("How the attack converged", "How well the update was matched"):
        assert part not in text


def test_an_untested_run_shows_no_scores(folder):
    text = shown(page(folder([barred(), barred(1)])))
    assert "Not testable by span decoding: 400 tokens or more &gt;= width 384." in text
    assert "What would prove it" in text
    for part in ("Recovered verbatim", "What was recovered", "ROUGE-L 0"):
        assert part not in text, part
    assert "Singular values" in text


def test_untested_batches_beside_tested_ones_are_marked(folder):
    html = page(folder([span(), barred(1)]))
    assert ["not tested" in card for card in cards(html)] == [False, True]
    assert "nothing" not in shown(html).split("What would")[0]


def test_a_search_that_span_decoding_began(folder):
    """Both parts are explained; a batch that only the search could test was tested."""
    search = {key: record()[key] for key in ("trace", "masks", "cosine")}
    begun = span(0, ("a b c d", "e f g h"), certified=[True, False]) | search
    html = page(folder([begun, barred(1) | search | {"predictions": span(1)["predictions"]}]))
    text = shown(html)
    for part in (
        "What proves it",
        "0 12 of 12 384 100 % 1 of 2",
        "1 of at least 384 384 not testable by certificates",
        "How the attack converged",
        "How well the update was matched",
        "How well dropout masks were decoded or learned",
        "over a found word for the attack",
        "recovered word for word, 1 of them proven",
    ):
        assert part in text, part
    assert "not tested" not in text
    assert sorted(tags(card) for card in cards(html)) == [[], ["verbatim"], ["verbatim", "proven"]]
    assert "batch_size" in "".join(commands(html))


def test_evidence_without_dropout_reads_otherwise(folder):
    found = proofs()
    found["rows"][0]["certificate"] = 1 - 3e-7
    run = RUN | {"config": {"client": {"dropout": 0.0}}}
    text = shown(page(folder([span(evidence=found)], run)))
    assert "exactly zero" not in text
    assert "farthest row from the space" in text
    assert "3.0·10⁻⁷" in text


def test_no_evidence_no_section(folder):
    text = shown(page(folder([record(evidence=None)])))
    assert "What proves it" not in text
    assert "Singular values" not in text
    assert "proven" not in text


@pytest.mark.parametrize("missing", ["spectrum", "rows", "sentences", "rank", "gap_rank", "width", "floor"])
def test_parts_of_the_evidence_may_be_missing(folder, missing):
    found = proofs()
    del found[missing]
    with_it = span()
    with_it["evidence"] = found
    html = page(folder([with_it]))
    assert re.search("What (proves|would prove) it", html)
    assert not re.search(r"\bnan\b", shown(html).lower())


def test_many_batches_fold(folder):
    html = page(folder([span(k) for k in range(30)]))
    assert "6 more batches" in shown(html)
    assert html.count('<path class="values many"') == 30


def test_private_words_stay_hidden_beside_evidence(folder):
    secret = SECRET | {"evidence": proofs([True])}
    html = page(folder([secret]))
    for word in ("lopez", "maria", "1984", "clinic"):
        assert word not in html.lower()
    assert "2999" not in html  # token ids of the rows
    assert "3000" not in html


def test_advice_for_span_decoding_fills_the_batch(folder):
    where = folder([span(evidence=proofs(rank=40)), span(1, evidence=proofs(rank=32))])
    dropout, larger, _ = commands(page(where))
    assert dropout.endswith("--client_dropout=0.3")
    assert larger.endswith("--batch_size=24")  # 2 sentences, 40 rows: 1.2 times 384 rows
    assert "384, against at most 40 here" in shown(page(where))
    assert len(commands(page(folder([barred()])))) == 2  # a batch that is full needs no filling


# --- two runs side by side ------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path):
    """Folders of span decoding and of Grab on the same sentences, the latter with one more."""

    def make(own, others):
        for name, records, attack in (("own", own, "span"), ("other", others, "grab")):
            (tmp_path / name).mkdir()
            (tmp_path / name / "run.json").write_text(json.dumps(RUN | {"attack": attack}))
            (tmp_path / name / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        return tmp_path / "own", tmp_path / "other"

    return make


def test_another_run_is_shown_under_each_sentence_and_in_a_table(two):
    own = [span(), span(1, truths=["a dog ran"])]
    own_folder, other = two(own, [record(founds=["cat mat rug"]), record(1, truths=["it rained"], founds=["it"])])
    text = shown(report.render(own_folder, [other]).read_text().replace("<", " <"))
    assert "Side by side" in text
    assert "Attack word for word proven" in text
    assert "span 2 of 2 2 100.0 100.0 100.0" in text
    assert "grab 0 of 2 –" in text
    assert "grab cat mat rug ROUGE-L" in text
    assert "grab it" not in text  # no sentence of this run
    assert "Side by side" not in shown(page(own_folder))


def test_private_words_of_another_run_are_hidden_too(two):
    own, other = two([span(truths=[SECRET["sentences"][0]["text"]])], [SECRET])
    own_record = json.loads((own / "results.jsonl").read_text())
    own_record["sentences"][0]["tokens"] = SECRET["sentences"][0]["tokens"]
    (own / "results.jsonl").write_text(json.dumps(own_record))
    text = shown(report.render(own, [other]).read_text())
    assert "Side by side" in text
    for word in ("lopez", "maria", "1984", "clinic"):
        assert word not in text.lower(), word


def test_a_run_on_other_sentences_is_refused(two):
    own, other = two([span()], [record(truths=["it rained"], founds=["it"])])
    with pytest.raises(InputError, match="other sentences"):
        report.render(own, [other])


def test_a_missing_folder_is_named_with_its_flag(two, tmp_path):
    own, _ = two([span()], [record()])
    with pytest.raises(InputError, match="--report_beside"):
        report.render(own, [tmp_path / "nowhere"])
