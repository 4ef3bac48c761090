"""Token shards, corpora and corpus.json that are damaged, of another kind, or lead outside."""

from typing import Any

import numpy as np
from faults.bad_input import REMOVED

from gpt2ds.corpus.shards import header

TOKENS = np.arange(60_000) % 1000


def shard(tokens: Any = TOKENS) -> bytes:
    return header(len(tokens)) + np.asarray(tokens, dtype="<u2").tobytes()


def fields(*numbers: int) -> bytes:
    """A header with these numbers in front, and some tokens after it."""
    return np.array([*numbers, *[0] * (256 - len(numbers))], dtype="<i4").tobytes() + bytes(2000)


BAD_SHARDS: dict[str, bytes] = {
    "empty": b"",
    "one byte": b"\0",
    "odd": shard() + b"\0",
    "truncated": shard()[:-2],
    "a token too many": shard() + b"\0\0",
    "half a header": shard()[:500],
    "only a header": header(60_000),
    "no tokens": header(0),
    "fewer than none": fields(20240520, 1, -1),
    "most there can be": fields(20240520, 1, 2**31 - 1),
    "another version": fields(20240520, 2, 1000),
    "llama": fields(20240801, 7, 1000),
    "evaluation": fields(20240522, 1, 1000),
    "big endian": np.frombuffer(shard()[:1024], dtype="<i4").astype(">i4").tobytes() + bytes(2000),
    "ids beyond": shard([*range(1000), 50257]),
    "all ids beyond": shard([65535] * 60_000),
    "text": b"It was a dark and stormy night. " * 64,
    "a pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
}


FORMS: dict[str, dict[str, bytes]] = {
    "nothing": {},
    "only train": {"a_train_000000.bin": shard()},
    "only val": {"a_val_000000.bin": shard()},
    "two corpora": {f"{name}_{split}_000000.bin": shard() for name in "ab" for split in ("train", "val")},
    "nanogpt odd": {"train.bin": bytes(2001), "val.bin": bytes(2000)},
    "nanogpt empty": {"train.bin": b"", "val.bin": bytes(2000)},
    "nanogpt without val": {"train.bin": bytes(2000)},
    "nanogpt characters": {"train.bin": bytes(2000), "val.bin": bytes(2000), "meta.pkl": b"\x80\x04."},
    "nanogpt ids": {"train.bin": b"\xff" * 2000, "val.bin": bytes(2000)},
    "too short": {"a_train_000000.bin": shard([1, 2]), "a_val_000000.bin": shard([1, 2])},
    "interrupted": {".progress.json": b"{}"},
    "text": {"text.txt": b"words"},
}


ODD = [REMOVED, None, [], {}, True, "x", -1, 1.5, 10**30, "\x1b[31mred", "x" * 100_000]
OUTSIDE = ["../../secret.bin", "/etc/passwd", "a/../../secret.bin", "..\\secret.bin", "link.bin", "", "."]
# Each is read by those who open a corpus; the rest of corpus.json is for people.
OF_CORPUS = ["format_version", "tokenizer", "tokenizer.vocab_size", "tokenizer.sha256", "splits", "digest"]
OF_CORPUS += ["splits.train", "splits.val", "splits.train.shards", "splits.val.shards"]
OF_CORPUS += [f"splits.{split}.shards.0{field}" for split in ("train", "val") for field in ("", ".file", ".tokens")]
OF_CORPUS += ["splits.train.shards.0.sha256"]
