"""Where each document starts and ends, and which documents validate.

Nothing is held but byte positions; the text itself is read where it is encoded.
"""

import codecs
import mmap
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from gpt2ds.corpus.batches import permuted
from gpt2ds.corpus.tokenizer import END_OF_TEXT
from gpt2ds.errors import UserError

Positions = npt.NDArray[np.int64]
EndOfText = Literal["boundary", "text", "refuse"]

_MARKER = END_OF_TEXT.encode()
_BOM = codecs.BOM_UTF8
_CHUNK_BYTES = 1 << 20
_SPACES = np.isin(np.arange(256), list(b" \t\n\r\v\f"))


class FileDocuments(NamedTuple):
    """What one file holds: non-empty documents as [start, end) byte positions in the UTF-8 text, and what was found
    on the way."""

    starts: Positions
    ends: Positions
    markers: int
    first_marker: int | None
    first_marker_line: int
    undecodable: str | None


def find_documents(path: Path, separator: str | None, end_of_text: EndOfText) -> FileDocuments:
    """Cuts a UTF-8 file at `separator` and, under "boundary", at each <|endoftext|>; checks the encoding (about 0.5
    GB/s for both).

    A byte order mark at the start belongs to no document; documents of ASCII white space only are dropped.
    """
    nothing = np.empty(0, dtype=np.int64)
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return FileDocuments(nothing, nothing, 0, None, 0, None)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            undecodable = _first_undecodable(text)
            markers = _occurrences(text, _MARKER)
            first = int(markers[0]) if len(markers) else None
            line = 0 if first is None else 1 + text[:first].count(b"\n")
            edges = [(markers, len(_MARKER))] if end_of_text == "boundary" else []
            if separator:
                edges.append((_occurrences(text, separator.encode()), len(separator.encode())))
            starts, ends = _between(edges, len(_BOM) if text[:3] == _BOM else 0, len(text))
            kept = _with_content(text, starts, ends)
            return FileDocuments(starts[kept], ends[kept], len(markers), first, line, undecodable)


def _occurrences(text: mmap.mmap, wanted: bytes) -> Positions:
    return np.fromiter((match.start() for match in re.finditer(re.escape(wanted), text)), dtype=np.int64)


def _between(edges: list[tuple[Positions, int]], start: int, end: int) -> tuple[Positions, Positions]:
    """The stretches of [start, end) that no edge covers; empty ones included. Edges that overlap count as one."""
    cut_starts = np.concatenate([positions for positions, _ in edges] or [np.empty(0, dtype=np.int64)])
    cut_ends = np.concatenate([positions + length for positions, length in edges] or [np.empty(0, dtype=np.int64)])
    order = np.argsort(cut_starts, kind="stable")
    cut_starts, cut_ends = cut_starts[order], np.maximum.accumulate(cut_ends[order]) if len(order) else cut_ends
    starts = np.concatenate([[start], np.maximum(cut_ends, start)]).astype(np.int64)
    ends = np.concatenate([cut_starts, [end]]).astype(np.int64)
    return starts, ends


def _with_content(text: mmap.mmap, starts: Positions, ends: Positions) -> Positions:
    kept = ends > starts
    first_bytes = np.frombuffer(text, dtype=np.uint8)[
        np.where(kept, starts, 0)
    ]  # a copy: it must not keep the map open
    for index in np.flatnonzero(kept & _SPACES[first_bytes]).tolist():
        start, end = int(starts[index]), int(ends[index])
        if text[start : min(start + 64, end)].isspace() and text[start:end].isspace():
            kept[index] = False
    return np.flatnonzero(kept)


def _first_undecodable(text: mmap.mmap) -> str | None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(text), _CHUNK_BYTES):
        chunk = text[start : start + _CHUNK_BYTES]
        pending = len(decoder.getstate()[0])
        if not pending and chunk.isascii():
            continue
        try:
            decoder.decode(chunk, final=start + len(chunk) == len(text))
        except UnicodeDecodeError as problem:
            return _undecodable(problem, start - pending)
    return None


def _undecodable(problem: UnicodeDecodeError, base: int) -> str:
    return f"byte 0x{problem.object[problem.start]:02x} at offset {base + problem.start:,} ({problem.reason})"


def transcode(path: Path, encoding: str, target: Path) -> str | None:
    """Writes the text of `path` as UTF-8 to `target`, in bounded memory; what is wrong and where, if it is not in
    `encoding`."""
    decoder = codecs.getincrementaldecoder(encoding)()
    base = 0
    with path.open("rb") as source, target.open("wb") as out:
        while True:
            chunk = source.read(_CHUNK_BYTES)
            pending = len(decoder.getstate()[0])
            try:
                decoded = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as problem:
                return _undecodable(problem, base - pending)
            except UnicodeError as problem:  # utf-16 and utf-32 without a byte order mark raise the plain kind
                return f"the bytes near offset {base:,} ({problem})"
            out.write(decoded.encode("utf-8", "replace"))
            base += len(chunk)
            if not chunk:
                return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Documents:
    """Documents in reading order, as columns: number of the file, first byte, byte after the last. 20 bytes a
    document."""

    file: npt.NDArray[np.int32]
    start: Positions
    end: Positions

    def __len__(self) -> int:
        return len(self.file)

    @property
    def size_bytes(self) -> Positions:
        return self.end - self.start

    def at(self, rows: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> "Documents":
        """The documents at those rows."""
        return Documents(file=self.file[rows], start=self.start[rows], end=self.end[rows])


def collect(files: Sequence[FileDocuments]) -> Documents:
    """The documents of all files, in order."""
    return Documents(
        file=np.repeat(np.arange(len(files), dtype=np.int32), [len(each.starts) for each in files]),
        start=np.concatenate([each.starts for each in files]),
        end=np.concatenate([each.ends for each in files]),
    )


class Split(NamedTuple):
    """Validation and training documents, each in reading order, and a sentence if a document had to be cut in two
    for it."""

    validation: Documents
    training: Documents
    note: str | None


def split_documents(documents: Documents, fraction: float, seed: int, paths: Sequence[Path]) -> Split:
    """Takes documents for validation in a seeded random order until they hold `fraction` of the bytes; never all of
    them.

    A document that would carry the validation split past twice its share is passed over. When that leaves none, the
    smallest document is taken if it is at most a tenth of the text, else the largest document is cut in two near its
    end, after a line or a word. UserError if there is nothing to cut.
    """
    sizes = documents.size_bytes
    total = int(sizes.sum())
    share = max(total * fraction, 1.0)
    chosen = np.zeros(len(documents), dtype=np.bool_)
    held = 0
    for first in range(0, len(documents), 1 << 16):
        block = np.arange(first, min(first + (1 << 16), len(documents)), dtype=np.int64)
        for row in permuted(block, len(documents), seed, 0).tolist():
            if held < share and held + int(sizes[row]) <= 2 * share and held + int(sizes[row]) < total:
                chosen[row] = True
                held += int(sizes[row])
        if held >= share:
            break
    if not held and len(documents) > 1 and int(sizes.min()) <= total / 10:
        chosen[int(np.argmin(sizes))] = True
        held = int(sizes.min())
    if held:
        return Split(documents.at(chosen), documents.at(~chosen), None)
    return _cut_largest(documents, max(int(share), 1), paths)


def _cut_largest(documents: Documents, share: int, paths: Sequence[Path]) -> Split:
    row = int(np.argmax(documents.size_bytes))
    start, end = int(documents.start[row]), int(documents.end[row])
    with paths[documents.file[row]].open("rb") as file:
        cut = _cut_near(file.fileno(), start, end, min(share, (end - start) // 2))
    if cut is None:
        raise UserError("the text is one document too short to set a validation split aside: give more text")
    one = documents.at(np.array([row], dtype=np.int64))
    validation = Documents(file=one.file, start=np.array([cut], dtype=np.int64), end=one.end)
    ends = documents.end.copy()
    ends[row] = cut
    training = Documents(file=documents.file, start=documents.start, end=ends)
    what = "the text is a single document" if len(documents) == 1 else "no document is small enough to validate on"
    return Split(
        validation,
        training,
        f"{what}: its last {end - cut:,} bytes became the validation split"
        if len(documents) == 1
        else f"{what}: the last {end - cut:,} bytes of the largest one became the validation split",
    )


def _cut_near(descriptor: int, start: int, end: int, share: int) -> int | None:
    """A position in (start, end), near end - share: after the last line end, else after the last space, of the 64
    KiB before it."""
    target = end - share
    low = max(start, target - 65536)
    before = os.pread(descriptor, target - low, low)
    for mark in (b"\n", b" "):
        at = before.rfind(mark)
        if at >= 0 and before[: at + 1].strip():
            return low + at + 1
    while low < target < end and os.pread(descriptor, 1, target)[0] & 0xC0 == 0x80:  # inside a UTF-8 character
        target -= 1
    return target if low < target < end else None
