"""From TEXT arguments to documents: which files, where each document starts and ends in them, and which documents
validate.

Nothing is held but byte positions; the text itself is read where it is encoded.
"""

import codecs
import glob
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt2ds.errors import UserError

_HEAD_BYTES = 8192
_TEXT_SUFFIXES = frozenset({"", ".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One text file. `label` names it in messages and corpus.json: the path as given, without what lies above an
    absolute one."""

    path: Path
    label: str
    size_bytes: int
    modified_ns: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Gathered:
    """The files to read, sorted by label, and how many files of the folders were passed over, by reason."""

    sources: tuple[Source, ...]
    skipped: dict[str, int]


def gather(arguments: Sequence[str], *, encoding: str = "utf-8", exclude: Path | None = None) -> Gathered:
    """Files, folders (every text file in them, recursively) and globs -> sorted files, each once.

    In folders hidden files, binary files (a NUL byte in the first 8 KiB; for unusual suffixes also: not decodable)
    and everything under `exclude` are passed over and counted. UserError, a line per argument, for what is missing
    or holds no text.
    """
    check_encoding(encoding)
    problems: list[str] = []
    skipped: Counter[str] = Counter()
    found: dict[Path, Source] = {}
    for argument in arguments:
        path = Path(argument)
        if _exists(path):
            matches = [path]
        elif glob.has_magic(argument):
            matches = sorted(Path(match) for match in glob.glob(argument, recursive=True))
            if not matches:
                problems.append(f"no file matches {argument}: check the pattern")
        else:
            problems.append(f"there is no file or folder {argument}: check the path")
            continue
        for match in matches:
            try:
                files = list(_text_files(match, encoding, exclude, skipped)) if match.is_dir() else [match]
                if not files and match == path:
                    problems.append(f"the folder {argument} holds no text file: give one with .txt or .md files in it")
                shown = Path(match.resolve().name) if match.is_absolute() else match
                for file in files:
                    _add(found, file, shown / file.relative_to(match))
            except OSError as problem:
                problems.append(f"{problem.filename or match} cannot be read: {problem.strerror}")
    if not arguments:
        problems.append("no text was given: name files, folders or patterns")
    if problems:
        raise UserError.from_list(problems)
    sources = tuple(sorted(found.values(), key=lambda source: (source.label, str(source.path))))
    if not any(source.size_bytes for source in sources):
        labels = ", ".join(source.label for source in sources[:5]) + (", ..." if len(sources) > 5 else "")
        raise UserError(f"the text is empty, no byte in {labels}: give files with text in them")
    return Gathered(sources=sources, skipped=dict(skipped))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long
        return False


def check_encoding(encoding: str) -> bool:
    """True if `encoding` is UTF-8. UserError if Python knows no such text encoding."""
    try:
        name = codecs.lookup(encoding).name
        "".encode(encoding)  # LookupError for codecs that do not encode text, like base64
    except LookupError as problem:
        raise UserError(
            f"unknown encoding {encoding!r}: give one that Python knows, such as utf-8, latin-1, cp1252, "
            "utf-16, gb18030"
        ) from problem
    return name in {"utf-8", "utf-8-sig"}


def _add(found: dict[Path, Source], path: Path, label: Path) -> None:
    status = path.stat()
    if not path.is_file():
        raise OSError(22, "not a regular file", str(path))
    with path.open("rb"):
        pass
    real = path.resolve()
    found.setdefault(
        real, Source(path=real, label=label.as_posix(), size_bytes=status.st_size, modified_ns=status.st_mtime_ns)
    )


def _text_files(folder: Path, encoding: str, exclude: Path | None, skipped: Counter[str]) -> Iterable[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and (Path(parent) / name).resolve() != exclude
        )
        for name in sorted(names):
            path = Path(parent, name)
            if name.startswith("."):
                skipped["hidden"] += 1
            elif not path.is_file():
                skipped["not a regular file"] += 1
            elif not _is_text(path, encoding):
                skipped["binary"] += 1
            else:
                yield path


def _is_text(path: Path, encoding: str) -> bool:
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if b"\0" in head and b"\0" not in "a".encode(encoding):
        return False
    if path.suffix.lower() in _TEXT_SUFFIXES:
        return True  # a .txt with wrong bytes is an error to be named, not a file to be passed over
    try:
        codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeError:
        return False
    return True
