"""The work of `prepare` in pieces of a few MB whose tokens, put together, are those of the whole text."""

import itertools
import mmap
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gpt2ds.corpus.documents import Documents, Positions, Split
from gpt2ds.corpus.tokenizer import END_OF_TEXT_ID, load_tokenizer
from gpt2ds.errors import UserError

UNIT_BYTES = 4 << 20
# No GPT-2 piece runs from a visible character into a space or a line end, and none looks back, so text cut between
# the two has the tokens of the whole. Visible: ASCII from ! to ~, and every longer UTF-8 character that is not one
# of Unicode's white spaces.
SAFE_CUT = re.compile(
    rb"[!-~\x80-\xbf](?=[ \n])"
    rb"(?<!\xc2[\x85\xa0])(?<!\xe1\x9a\x80)(?<!\xe2\x80[\x80-\x8a\xa8\xa9\xaf])(?<!\xe2\x81\x9f)(?<!\xe3\x80\x80)"
)
# Unicode's white space, as the tokenizer's \s has it (Python's own \s also takes the separators 0x1c to 0x1f).
_GAP = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{1000,}")
_END_OF_TEXT = np.array([END_OF_TEXT_ID], dtype="<u2").tobytes()


class Unit(NamedTuple):
    """One piece of work: whole documents (`begins`), or a further part of one document; all of one split."""

    split: str
    segments: list[tuple[Path, Positions, Positions]]
    begins: bool
    size_bytes: int


def plan_units(split: Split, paths: Sequence[Path]) -> Iterator[Unit]:
    """The corpus in writing order, in units of about UNIT_BYTES; a document is cut only where its tokens stay the
    same."""
    for name, documents in (("val", split.validation), ("train", split.training)):
        ends = np.cumsum(documents.size_bytes)
        first = 0
        while first < len(documents):
            before = int(ends[first - 1]) if first else 0
            last = int(np.searchsorted(ends, before + UNIT_BYTES, side="right"))
            if last == first:
                yield from _cut(name, documents, first, paths)
                first += 1
                continue
            files = documents.file[first:last]
            edges = [first, *(first + 1 + np.flatnonzero(np.diff(files))).tolist(), last]
            segments = [
                (paths[documents.file[a]], documents.start[a:b], documents.end[a:b])
                for a, b in itertools.pairwise(edges)
            ]
            yield Unit(name, segments, True, int(ends[last - 1]) - before)
            first = last


def _cut(name: str, documents: Documents, row: int, paths: Sequence[Path]) -> Iterator[Unit]:
    path, start, end = paths[documents.file[row]], int(documents.start[row]), int(documents.end[row])
    begins = True
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        while start < end:
            found = SAFE_CUT.search(text, start + UNIT_BYTES, end) if end - start > UNIT_BYTES else None
            stop = found.end() if found else end
            yield Unit(name, [(path, np.array([start]), np.array([stop]))], begins, stop - start)
            start, begins = stop, False


def encode_unit(segments: list[tuple[Path, Positions, Positions]], begins: bool) -> bytes:
    """The tokens of a unit as little-endian uint16, <|endoftext|> before each document (not before a further part of
    one)."""
    parts: list[bytes] = []
    for path, starts, ends in segments:
        with path.open("rb") as file:
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
                file.seek(start)
                text = file.read(end - start)
                if len(text) != end - start:
                    raise UserError(
                        f"{path} became shorter while it was read: leave the text alone and give the same command again"
                    )
                tokens = encode(text.decode("utf-8"))
                if begins:
                    parts.append(_END_OF_TEXT)
                parts.append(tokens.astype("<u2").tobytes())
    return b"".join(parts)


def encode(text: str) -> npt.NDArray[np.uint32]:
    """The tokens of a text, <|endoftext|> in it as ordinary text; as `encode_ordinary` has them, a tenth faster
    without its list."""
    tokenizer = load_tokenizer()
    try:
        return tokenizer.encode_to_numpy(text, disallowed_special=())
    except ValueError:  # its regex runs out of stack in about a million white spaces before a visible character
        return np.concatenate([tokenizer.encode_to_numpy(part, disallowed_special=()) for part in _around_gaps(text)])


def _around_gaps(text: str, gap: re.Pattern[str] = _GAP) -> list[str]:
    """The text cut at long white space where GPT-2's own pieces end: before it, and before its last character."""
    cuts = [0, len(text)]
    for found in gap.finditer(text):
        cuts += [found.start(), found.end() - 1 if found.end() < len(text) else found.end()]
    return [text[start:end] for start, end in itertools.pairwise(sorted(cuts)) if start < end]
