"""Pieces of work hold the tokens of the whole."""

import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2ds.corpus import units
from gpt2ds.corpus.documents import Documents, Split
from gpt2ds.corpus.tokenizer import END_OF_TEXT_ID, load_tokenizer

NO_DOCUMENTS = Documents(
    file=np.empty(0, dtype=np.int32), start=np.empty(0, dtype=np.int64), end=np.empty(0, dtype=np.int64)
)
WHITE_SPACES = " \n\t\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u2003\u200a\u2028\u2029\u202f\u205f\u3000"
ODD = "\u180e\u200b\u2060\ufeff\u0301é中。、ｂ🙂\U0001f468\u200d\U0001f469٣½"
FRAGMENTS = st.one_of(
    st.sampled_from(
        [
            *WHITE_SPACES,
            *ODD,
            "'s",
            "'ll",
            "'",
            " '",
            "''re",
            "12",
            " 7",
            "...",
            " ?!",
            "word",
            " word",
            "<|endoftext|>",
        ]
    ),
    st.text(alphabet=st.characters(codec="utf-8"), max_size=3),
)


def encode_in_units(text: bytes, unit_bytes: int) -> tuple[list[int], int]:
    """Tokens and number of units of a single document, written to a real file."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "UNIT_BYTES", unit_bytes)
        path = Path(folder, "text")
        path.write_bytes(text)
        one = Documents(file=np.zeros(1, dtype=np.int32), start=np.array([0]), end=np.array([len(text)]))
        planned = list(units.plan_units(Split(NO_DOCUMENTS, one, None), [path]))
        tokens = b"".join(units.encode_unit(unit.segments, unit.begins) for unit in planned)
        assert sum(unit.size_bytes for unit in planned) == len(text)
        return np.frombuffer(tokens, dtype="<u2").tolist(), len(planned)


@settings(max_examples=500, deadline=None)
@given(fragments=st.lists(FRAGMENTS, min_size=1, max_size=40), unit_bytes=st.integers(1, 12))
def test_a_cut_document_has_the_tokens_of_the_whole(fragments: list[str], unit_bytes: int) -> None:
    text = "".join(fragments)
    if not text:
        return
    tokens, _ = encode_in_units(text.encode(), unit_bytes)
    assert tokens == [END_OF_TEXT_ID, *load_tokenizer().encode_ordinary(text)]


@pytest.mark.parametrize("space", WHITE_SPACES)
@pytest.mark.parametrize("after", [" b", "\nb", "  b", "\n\n", " "])
def test_no_cut_within_white_space(space: str, after: str) -> None:
    assert not units.SAFE_CUT.search(f"{space}{after[:1]}".encode())
    for text in (f"a{space}{after}", f"{space}{space}{after}c", f"中{space}{after}"):
        tokens, _ = encode_in_units(text.encode(), 1)
        assert tokens == [END_OF_TEXT_ID, *load_tokenizer().encode_ordinary(text)]


@pytest.mark.parametrize("text", ["one two three four " * 20, "第一。\n第二、三。\n" * 20, "naïveté é è\n" * 20])
def test_long_documents_are_cut(text: str) -> None:
    _, count = encode_in_units(text.encode(), 40)
    assert count > len(text.encode()) / 80


def test_a_document_without_spaces_stays_whole() -> None:
    tokens, count = encode_in_units(b"x" * 5000, 10)
    assert count == 1
    assert tokens[1:] == load_tokenizer().encode_ordinary("x" * 5000)


@settings(max_examples=300, deadline=None)
@given(st.lists(FRAGMENTS, max_size=30))
def test_cuts_around_white_space_keep_the_tokens(fragments: list[str]) -> None:
    text = "".join(fragments)
    parts = units._around_gaps(text, re.compile(units._GAP.pattern.replace("1000", "2")))
    assert "".join(parts) == text
    tokens = [token for part in parts for token in load_tokenizer().encode_ordinary(part)]
    assert tokens == load_tokenizer().encode_ordinary(text)


def test_a_gap_too_long_for_the_tokenizer() -> None:
    ordinary = load_tokenizer().encode_ordinary
    gap = "\n" * 1_200_000
    with pytest.raises(ValueError, match="stack"):
        load_tokenizer().encode_to_numpy(f"{gap}x", disallowed_special=())
    expected = [*ordinary("word"), *ordinary(gap[:-1]), *ordinary("\nnext word")]
    assert units.encode(f"word{gap}next word").tolist() == expected


def test_whole_documents_are_grouped_up_to_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 100)
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(b"word " * 200)
    starts = np.arange(0, 1000, 40)
    train = Documents(
        file=np.repeat(np.array([0, 1], dtype=np.int32), 25), start=np.tile(starts, 2), end=np.tile(starts + 40, 2)
    )
    val = Documents(file=np.array([0], dtype=np.int32), start=np.array([0]), end=np.array([30]))
    planned = list(units.plan_units(Split(val, train, None), paths))
    assert [unit.split for unit in planned] == ["val"] + ["train"] * 25
    assert {unit.size_bytes for unit in planned[1:]} == {80}
    assert all(unit.begins for unit in planned)
    assert len(planned[13].segments) == 2  # the 25th document of a and the first of b
