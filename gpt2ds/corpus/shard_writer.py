"""Writes shards so that nothing on disk is ever half a file under its final name, and a stopped writer goes on at
the very token."""

import os
from pathlib import Path
from typing import Any, BinaryIO

from gpt2ds.corpus.shards import HEADER_BYTES, MAX_SHARD_TOKENS, header
from gpt2ds.files import file_sha256, sync_folder


class ShardWriter:
    """Writes a stream of tokens, the validation split first, as `<name>_val_000000.bin`, `<name>_train_000001.bin`,
    ... of `shard_tokens` each.

    A shard has a hidden name until it is whole. `state()` (after an fsync) is enough to go on from that very token:
    pass it to a new writer, which
    raises LookupError if the shards are not as the state says.
    """

    def __init__(self, folder: Path, name: str, shard_tokens: int, state: dict[str, Any] | None = None) -> None:
        assert 0 < shard_tokens <= MAX_SHARD_TOKENS
        self._folder, self._name, self._shard_tokens = folder, name, shard_tokens
        self.finished: list[dict[str, Any]] = list(state["finished"]) if state else []
        self._file: BinaryIO | None = None
        self._split = "val"
        self._tokens = 0  # in the open shard
        if state:
            self._check_finished()
            self._split, self._tokens = state["split"], state["tokens"]
            if self._tokens:
                self._reopen()

    @property
    def tokens(self) -> int:
        """Tokens written so far, of both splits."""
        return self._tokens + sum(int(entry["tokens"]) for entry in self.finished)

    def write(self, split: str, tokens: bytes) -> None:
        """Appends little-endian uint16 tokens to a split; after the first "train" no "val" may follow."""
        if split != self._split:
            assert (self._split, split) == ("val", "train")
            self._complete()
            self._split = split
        left = memoryview(tokens)
        while len(left):
            if self._file is None:
                self._file = self._hidden().open("wb")
                self._file.write(bytes(HEADER_BYTES))
            part = left[: 2 * (self._shard_tokens - self._tokens)]
            self._file.write(part)
            self._tokens += len(part) // 2
            left = left[len(part) :]
            if self._tokens == self._shard_tokens:
                self._complete()

    def state(self) -> dict[str, Any]:
        """What is safely on disk, as JSON data."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        return {"finished": self.finished, "split": self._split, "tokens": self._tokens}

    def finish(self) -> dict[str, list[dict[str, Any]]]:
        """Completes the last shard; {"val": [{file, tokens, sha256}], "train": [...]}."""
        self._complete()
        return {
            split: [entry for entry in self.finished if f"_{split}_" in entry["file"][len(self._name) :]]
            for split in ("val", "train")
        }

    def close(self) -> None:
        """Lets go of the open file, for a run that ends early."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _check_finished(self) -> None:
        for entry in self.finished:
            path = self._folder / entry["file"]
            if not path.is_file() or path.stat().st_size != HEADER_BYTES + 2 * entry["tokens"]:
                raise LookupError(f"{entry['file']} is gone or of another size")

    def _final(self) -> Path:
        return self._folder / f"{self._name}_{self._split}_{len(self.finished):06d}.bin"

    def _hidden(self) -> Path:
        return self._folder / f".{self._final().name}.partial"

    def _reopen(self) -> None:
        if not self._hidden().exists() and self._final().exists():
            self._final().replace(self._hidden())  # it was completed after the state was taken
        size = HEADER_BYTES + 2 * self._tokens
        try:
            file = self._hidden().open("r+b")
        except OSError as problem:
            raise LookupError("the partial shard is gone") from problem
        if file.seek(0, os.SEEK_END) < size:
            file.close()
            raise LookupError("the partial shard is shorter than the journal says")
        file.truncate(size)
        file.seek(size)
        self._file = file

    def _complete(self) -> None:
        if self._file is None:
            return
        self._file.seek(0)
        self._file.write(header(self._tokens))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()
        digest = file_sha256(self._hidden())
        self._hidden().replace(self._final())
        sync_folder(self._folder)
        self.finished.append({"file": self._final().name, "tokens": self._tokens, "sha256": digest})
        self._tokens = 0
