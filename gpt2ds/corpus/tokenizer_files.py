"""GPT-2's tokenizer as the files that Hugging Face's libraries read, all derived from the ranks file beside this."""

import functools
import itertools
import json
from pathlib import Path
from typing import Any

from gpt2ds.corpus.tokenizer import END_OF_TEXT, END_OF_TEXT_ID, read_ranks


def write_tokenizer_files(folder: Path, context: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json, vocab.json and merges.txt; with them nothing is downloaded.

    context: the longest text, in tokens, that the tokenizer's users are warned beyond.
    """
    ranks = read_ranks()
    visible = _visible_bytes()
    shown = {token: "".join(visible[byte] for byte in token) for token in ranks}
    vocabulary = {shown[token]: rank for token, rank in sorted(ranks.items(), key=lambda pair: pair[1])}
    pairs = [[shown[left], shown[right]] for left, right in _merges()]
    _write_json(folder / "vocab.json", vocabulary | {END_OF_TEXT: END_OF_TEXT_ID})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    _write_json(folder / "tokenizer.json", _tokenizer(vocabulary | {END_OF_TEXT: END_OF_TEXT_ID}, pairs))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "GPT2Tokenizer",
            "add_prefix_space": False,
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "unk_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
            "model_max_length": context,
        },
    )


def _tokenizer(vocabulary: dict[str, int], pairs: list[list[str]]) -> dict[str, Any]:
    """The tokenizers library's own description of byte-level byte-pair encoding, GPT-2's way of cutting text."""
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": END_OF_TEXT_ID, "content": END_OF_TEXT} | special],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": pairs,
        },
    }


@functools.cache
def _merges() -> tuple[tuple[bytes, bytes], ...]:
    """The pair that each token of several bytes was merged from, in the order of the ranks; takes 0.5 s.

    A token was made by the last merge of its own encoding: with only lower ranks, two parts are left of it.
    """
    ranks, merges = read_ranks(), []
    for token, rank in sorted(ranks.items(), key=lambda pair: pair[1]):
        if len(token) == 1:
            continue
        parts = [token[at : at + 1] for at in range(len(token))]
        while len(parts) > 2:
            candidates = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
            at = min(range(len(candidates)), key=candidates.__getitem__)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        left, right = parts
        merges.append((left, right))
    return tuple(merges)


def _visible_bytes() -> dict[int, str]:
    """GPT-2's names for the 256 bytes (OpenAI's gpt-2 source, src/encoder.py, bytes_to_unicode): themselves where
    printable, else the next characters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
