"""GPT-2's encoding from the shipped ranks file."""

import importlib.util
import itertools
import json
import shutil
from pathlib import Path

import pytest
from tiktoken_ext import openai_public  # type: ignore[import-untyped]

from gpt2ds.corpus import tokenizer
from gpt2ds.corpus.tokenizer import END_OF_TEXT, END_OF_TEXT_ID, RANKS_PATH, VOCAB_SIZE, load_tokenizer, read_ranks
from gpt2ds.errors import UserError

MIXED = "Fruits are good for you because\n\n  they're 100% Über-gesund 中文。\t\r\n 🙂 naïve\u00a0\u3000x  "


def test_known_ids() -> None:
    assert load_tokenizer().encode_ordinary("Fruits are good for you because") == [37, 50187, 389, 922, 329, 345, 780]


def test_vocabulary_and_end_of_text() -> None:
    encoding = load_tokenizer()
    assert (encoding.name, encoding.n_vocab, encoding.eot_token) == ("gpt2", VOCAB_SIZE, END_OF_TEXT_ID)
    assert encoding.encode(END_OF_TEXT, allowed_special="all") == [END_OF_TEXT_ID]
    assert END_OF_TEXT_ID not in encoding.encode_ordinary(f"a{END_OF_TEXT}b")
    assert encoding.decode(encoding.encode_ordinary(MIXED)) == MIXED


def test_pieces_are_tiktokens_own() -> None:
    assert load_tokenizer()._pat_str == openai_public.r50k_pat_str


def test_is_made_once() -> None:
    assert load_tokenizer() is load_tokenizer()


def test_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    tokenizer.load_tokenizer.__wrapped__()
    assert list(tmp_path.iterdir()) == []


def test_damaged_ranks_are_refused(tmp_path: Path) -> None:
    damaged = tmp_path / "gpt2.tiktoken"
    content = bytearray(RANKS_PATH.read_bytes())
    content[1000] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged.*reinstall gpt2ds"):
        read_ranks(damaged)
    with pytest.raises(UserError, match=r"cannot be read.*reinstall gpt2ds"):
        read_ranks(tmp_path / "absent.tiktoken")


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs the test extra transformers")
def test_equals_hugging_face(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ranks = read_ranks()
    visible = _visible_bytes()
    names = {rank: "".join(visible[byte] for byte in token) for token, rank in ranks.items()}
    vocabulary = {name: rank for rank, name in sorted(names.items())} | {END_OF_TEXT: END_OF_TEXT_ID}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = [
        _merged_from(token, ranks) for token, rank in sorted(ranks.items(), key=lambda pair: pair[1]) if len(token) > 1
    ]
    lines = [" ".join("".join(visible[byte] for byte in part) for part in pair) for pair in merges]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
    theirs = transformers.GPT2Tokenizer.from_pretrained(str(tmp_path))
    assert len(theirs) == VOCAB_SIZE
    text = MIXED + Path(shutil.__file__).read_text(encoding="utf-8")[:20_000]
    assert theirs.encode(text) == load_tokenizer().encode_ordinary(text)


def _visible_bytes() -> dict[int, str]:
    """GPT-2's names for the 256 bytes: themselves where printable, else the next characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _merged_from(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens that byte-pair encoding with only lower ranks leaves of `token`."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(parts)]
        at = min(range(len(pairs)), key=pairs.__getitem__)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts
