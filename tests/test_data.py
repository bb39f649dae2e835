"""Sentences, tokens and batches: every reader, every complaint, and the order in which rows are taken."""

import json
import time

import datasets
import numpy as np
import pytest

from grab_jax import data
from grab_jax.config import DataConfig
from grab_jax.data import Sentence
from grab_jax.models import convert
from grab_jax.types import InputError

ODD = "Ærøskøbing – 東京 🙂"


@pytest.fixture
def read(tmp_path):
    """Write a file of this name and read its sentences."""

    def make(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return data.sentences(DataConfig(name=str(path)))

    return make


@pytest.fixture(scope="session")
def bert():
    return data.load_tokenizer(str(convert.resolve("builtin:bert-mini")))


@pytest.fixture(scope="session")
def gpt2():
    return data.load_tokenizer(str(convert.resolve("builtin:gpt2-mini")))


def refusal(action, *args, **more):
    with pytest.raises(InputError) as caught:
        action(*args, **more)
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 500
    return said


# --- readers -------------------------------------------------------------------------------------------------


def test_jsonl(read):
    lines = [f'{{"text": " {ODD} ", "label": 1}}', "", "   ", '{"sentence": "no label"}', '{"text": "b", "label": "2"}']
    expected = [Sentence(ODD, 1, 0), Sentence("no label", None, 3), Sentence("b", 2, 4)]
    assert read("a.jsonl", "\n".join(lines)) == expected
    assert read("a.jsonl", "\r\n".join(lines) + "\r\n") == expected


def test_csv(read):
    text = f'label,text\n1,"a, ""b""\nc"\n,{ODD}\n0,"  "\n'
    assert read("a.csv", text) == [Sentence('a, "b"\nc', 1, 0), Sentence(ODD, None, 1)]


def test_txt(read):
    assert read("a.txt", f"one\n\n  {ODD}  \n") == [Sentence("one", None, 0), Sentence(ODD, None, 2)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_only_line_breaks_end_a_line(read, name):
    odd = "a\u2028b\u0085c\x0cd"
    text = json.dumps({"text": odd}, ensure_ascii=False) if name == "a.jsonl" else odd
    assert [s.text for s in read(name, text + "\n")] == [odd]


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", '{"text": "a"}'), ("a.csv", "text\na\n"), ("a.txt", "a")])
def test_byte_order_mark(read, name, text):
    assert read(name, b"\xef\xbb\xbf" + text.encode()) == [Sentence("a", None, 0)]


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": "b"', ("a.jsonl, line 3", "not JSON")),
        ("a.jsonl", '{"text": "a", "label": "spam"}', ("a.jsonl, line 1", "'spam' is not an integer")),
        ("a.jsonl", '{"text": "a", "label": 0.5}', ("a.jsonl, line 1", "0.5 is not an integer")),
        ("a.jsonl", '{"text": "a", "label": [1]}', ("a.jsonl, line 1", "[1] is not an integer")),
        ("a.jsonl", '{"text": "a", "label": Infinity}', ("a.jsonl, line 1", "not an integer")),
        ("a.jsonl", '\n{"text": 3}', ("a.jsonl, line 2", 'expected a record with "text"')),
        ("a.jsonl", '["text"]', ("a.jsonl, line 1", 'expected a record with "text"')),
        ("a.csv", 'text,label\n"a\nb",1\nc,x\n', ("a.csv, line 4", "'x' is not an integer")),
        ("a.csv", "words,label\na,1\n", ("a.csv, line 2", 'expected a record with "text"')),
        ("a.csv", "text,label\n" + "a" * 200_000 + ",1\n", ("a.csv, line", "not CSV")),
        ("a.jsonl", "", ("holds no non-empty sentence",)),
        ("a.csv", "text,label\n", ("holds no non-empty sentence",)),
        ("a.txt", " \n\n", ("holds no non-empty sentence",)),
        ("a.txt", "Æ".encode("latin-1"), ("a.txt", "not UTF-8")),
        ("a.csv", "text\nÆ\n".encode("latin-1"), ("a.csv", "not UTF-8")),
        ("a.tsv", "a\tb\n", ("a.tsv", ".jsonl, .csv or .txt")),
    ],
)  # fmt: skip
def test_refused_files(read, name, content, parts):
    said = refusal(read, name, content)
    for part in parts:
        assert part in said


def test_no_file(tmp_path):
    missing, folder = tmp_path / "no.jsonl", tmp_path / "folder"
    folder.mkdir()
    assert "no.jsonl does not exist" in refusal(data.sentences, DataConfig(name=str(missing)))
    assert ".jsonl, .csv or .txt" in refusal(data.sentences, DataConfig(name=str(folder)))


def test_start(read, tmp_path):
    read("a.txt", "a\n\nb\nc\n")
    path = str(tmp_path / "a.txt")
    assert [s.text for s in data.sentences(DataConfig(name=path, start=2))] == ["c"]
    assert "--data_start=3" in refusal(data.sentences, DataConfig(name=path, start=3))


def test_builtin_sentences():
    found = data.sentences(DataConfig())
    assert len(found) >= 200
    assert {s.label for s in found} == {0, 1}
    assert all(s.text.isascii() and s.text == s.text.strip() for s in found)
    assert len({s.text for s in found}) == len(found)


# --- the hub -------------------------------------------------------------------------------------------------


def test_lamp_order():
    order = data.lamp_order(8551)
    assert order[0] == 2310
    assert sorted(order) == list(range(8551))


def test_named_set(monkeypatch):
    """CoLA as the hub gives it, in LAMP's order; empty sentences are skipped and keep the others' rows."""
    asked = []

    def load_dataset(name, subset, *, split):
        asked.append((name, subset, split))
        rows = [{"sentence": f"s{i}", "label": i % 2, "idx": i} for i in range(8551)]
        rows[2310]["sentence"] = " "
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = data.sentences(DataConfig(name="cola", split="validation"))
    assert asked == [("nyu-mll/glue", "cola", "validation")]
    order = np.arange(8551)
    np.random.RandomState(101).shuffle(order)
    assert found[:3] == [Sentence(f"s{i}", i % 2, i) for i in order[1:4].tolist()]


def test_hub_id_with_subset(monkeypatch):
    """Another hub set keeps its own order."""
    asked = []
    rows = [{"text": "b", "label": 1}, {"text": "a", "label": 0}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **more: asked.append((args, more)) or rows)
    assert data.sentences(DataConfig(name="owner/name:part")) == [Sentence("b", 1, 0), Sentence("a", 0, 1)]
    assert asked == [(("owner/name", "part"), {"split": "train"})]


@pytest.mark.parametrize("name", ["cola", "owner/no-such-set-of-grab-jax"])
def test_hub_offline(name, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    begin = time.monotonic()
    said = refusal(data.sentences, DataConfig(name=name))
    assert f"--data={name}" in said
    assert "could not be loaded" in said
    assert time.monotonic() - begin < 20


# --- tokens and batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "expected"), [(1, 8), (8, 8), (9, 12), (16, 16), (17, 24), (1024, 1024), (1025, 1025)]
)
def test_bucket(length, expected):
    assert data.bucket(length) == expected


def test_encode_pads(bert):
    """[CLS] the dog . [SEP] is 5 tokens, so 8 after padding; a missing label is 0."""
    group = [Sentence("the dog.", 1, 0), Sentence("the", None, 1)]
    found = data.encode(group, bert, 7, 128, 2)
    ids, attention, labels = map(np.asarray, found.batch)
    words = bert.convert_tokens_to_ids(["[CLS]", "the", "dog", ".", "[SEP]"])
    np.testing.assert_array_equal(ids, [words + [0] * 3, [words[0], words[1], words[4]] + [0] * 5])
    np.testing.assert_array_equal(attention, [[True] * 5 + [False] * 3, [True] * 3 + [False] * 5])
    np.testing.assert_array_equal(labels, [1, 0])
    assert ids.dtype == np.int32
    assert found.index == 7
    assert found.tokens == (("the", "dog", "."), ("the",))
    assert found.truncated == (False, False)


def test_encode_cuts(bert):
    """Six tokens with [CLS] and [SEP]: four words stay; a sentence of exactly six tokens is not marked."""
    group = [Sentence("the " * 40, 0, 0), Sentence("the the the the", 0, 1)]
    found = data.encode(group, bert, 0, 6, 2)
    assert found.truncated == (True, False)
    assert found.tokens == (("the",) * 4,) * 2
    assert found.batch.ids.shape == (2, 6)
    assert np.asarray(found.batch.ids)[:, -1].tolist() == [bert.sep_token_id] * 2
    assert found.batch.attention.all()


@pytest.mark.parametrize("label", [2, -1])
def test_label_out_of_range(bert, label):
    said = refusal(data.encode, [Sentence("a", label, 5)], bert, 0, 128, 2)
    assert f"label {label} in row 5" in said
    assert "--model_num_labels" in said


def test_batches(bert):
    found = [Sentence(f"the {word}", 0, i) for i, word in enumerate(("dog", "cat", "house", "man", "woman"))]
    made = data.batches(found, bert, batch_size=2, count=2, longest=128, num_labels=2)
    assert [[s.row for s in batch.sentences] for batch in made] == [[0, 1], [2, 3]]
    assert [batch.index for batch in made] == [0, 1]
    said = refusal(data.batches, found, bert, batch_size=3, count=2, longest=128, num_labels=2)
    assert "need 6 sentences, the data has 5" in said
    assert "--num_batches" in said
    assert "--batch_size" in said


def test_decoding_warns_of_nothing(gpt2, monkeypatch):
    """Spaces before punctuation are BPE's own: it is not asked to clean them up, which it would refuse aloud."""
    asked, decode = [], type(gpt2).decode
    monkeypatch.setattr(type(gpt2), "decode", lambda self, *a, **k: asked.append(k) or decode(self, *a, **k))
    assert data.decode(gpt2, gpt2("the dog , a cat")["input_ids"])[0] == "the dog , a cat"
    assert asked == [{"clean_up_tokenization_spaces": False}]


def test_decode(bert, gpt2):
    """Padding and special tokens are dropped, an id beyond the tokenizer shows as `<id>`."""
    ids = bert("The dog, a cat.")["input_ids"]
    dropped = bert.convert_tokens_to_ids(["dog"])
    expected = ["the", "dog", ",", "a", "cat", "."]
    assert data.decode(bert, [*ids, bert.pad_token_id]) == ("the dog, a cat.", expected)
    assert data.decode(bert, [*dropped, bert.pad_token_id, *dropped])[1] == ["dog", "dog"]  # "[PAD]" in a text
    assert data.decode(bert, np.array(ids, np.int32))[1] == expected
    assert data.decode(bert, []) == ("", [])
    assert data.decode(bert, [*dropped, 10**6])[1] == ["dog", "<1000000>"]
    assert data.decode(gpt2, [*gpt2("the dog")["input_ids"], gpt2.eos_token_id])[0] == "the dog"


def test_vocabulary(bert, gpt2):
    """BERT wraps a sentence in [CLS] and [SEP], GPT-2 does not; its padding token is its end token."""
    facts = data.vocabulary(bert)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pad, _, cls, sep, _ = ids = bert.convert_tokens_to_ids(special)
    assert facts == (pad, cls, sep, frozenset(ids))
    facts = data.vocabulary(gpt2)
    assert facts == (gpt2.eos_token_id, None, None, frozenset({gpt2.eos_token_id}))


def test_no_tokenizer(tmp_path):
    """transformers would make up a tokenizer that turns every word into [UNK]."""
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "has no tokenizer" in refusal(data.load_tokenizer, str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    assert "no usable tokenizer" in refusal(data.load_tokenizer, str(tmp_path))


def test_shuffle_reorders_all_sentences_by_its_seed(tmp_path):
    path = tmp_path / "many.txt"
    path.write_text("\n".join(f"sentence {i}" for i in range(50)))
    read = lambda **kw: [s.row for s in data.sentences(DataConfig(name=str(path), **kw))]  # noqa: E731
    assert read() == list(range(50))
    assert sorted(read(shuffle=3)) == list(range(50)) != read(shuffle=3)
    assert read(shuffle=3) == read(shuffle=3) != read(shuffle=4)
    assert read(shuffle=3, start=10) == read(shuffle=3)[10:]
