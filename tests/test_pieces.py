"""Word pieces spelled for a reader."""

from grab_jax.pieces import pieces


def read_aloud(tokens):
    return "".join(("" if p.glue else " ") + p.text for p in pieces(tokens)).strip()


def test_pieces_read_as_text():
    assert (
        read_aloud(["i", "don", "'", "t", "like", "token", "##ization", ",", "no"]) == "i don't like tokenization, no"
    )
    assert read_aloud(["I", "Ġlike", "Ġcaf", "Ã©", "s", "."]) == "I like cafés."
    assert read_aloud(["▁I", "▁to", "ken"]) == "I token"
    assert read_aloud(["##"]) == "##"
    assert pieces(["a\x1b[31m\u202e"])[0].text == "a\ufffd[31m\ufffd"
    assert pieces([]) == []


def texts(tokens):
    return [piece.text for piece in pieces(tokens)]


def test_a_character_of_several_tokens_shows_once():
    # GPT-2 spells ’ (e2 80 99) as two tokens, and ê (c3 aa) may be split too
    assert texts(["I", "Ġdon", "âĢ", "Ļ", "t"]) == ["I", "don", "", "’", "t"]
    assert read_aloud(["A", "ĠâĢ", "ľ", "cr", "Ã", "ª", "pe"]) == "A “crêpe"


def test_a_broken_character_is_a_sign_and_spares_its_neighbours():
    assert texts(["Ġa", "âĢ", "Ġb"]) == ["a", "", "\ufffd b"]
    assert texts(["Ġa", "âĢ"]) == ["a", "\ufffd"]
    assert texts(["Ġa", "Ļ", "b"]) == ["a", "\ufffd", "b"]


def test_white_space_and_special_tokens_can_be_seen():
    assert texts(["Hi", "Ġ", "Ċ", "Ġthere", "ĉ"]) == ["Hi", "␣", "↵", "there", "⇥"]
    assert texts(["Ġa", "<|endoftext|>", "<50260>"]) == ["a", "<|endoftext|>", "<50260>"]
    assert texts(["[UNK]", "[CLS]"]) == ["[UNK]", "[CLS]"]
