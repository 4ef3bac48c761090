"""Text to shards with all cores: byte-identical whatever the number of processes, and an interrupted run goes on
where it was.

Every document is preceded by <|endoftext|> (llm.c's convention); first come all validation documents, then all
training documents.
"""

import errno
import fcntl
import itertools
import json
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, get_args

from gpt2ds.corpus import units
from gpt2ds.corpus.documents import EndOfText, FileDocuments, collect, find_documents, split_documents, transcode
from gpt2ds.corpus.record import (
    Job,
    PrepareOptions,
    Progress,
    begin,
    complete_manifest,
    fingerprint,
    finished,
    write_journal,
)
from gpt2ds.corpus.shard_writer import ShardWriter
from gpt2ds.corpus.shards import JOURNAL, MANIFEST, MAX_SHARD_TOKENS, Corpus, open_corpus
from gpt2ds.corpus.sources import Source, check_encoding, gather
from gpt2ds.corpus.tokenizer import END_OF_TEXT
from gpt2ds.corpus.workers import Workers
from gpt2ds.errors import UserError
from gpt2ds.files import file_sha256, write_atomically

__all__ = ["PrepareOptions", "Progress", "prepare"]

JOURNAL_SECONDS = 5.0
BYTES_PER_TOKEN = 3.5  # a cautious guess for the disk room; English prose has 4.0

_SCRATCH = ".utf8"


def prepare(
    sources: Sequence[str],
    out: Path,
    *,
    options: PrepareOptions | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> Corpus:
    """Encodes files, folders and globs into shards and corpus.json in `out`, and opens the result.

    `progress(bytes_done, bytes_total, tokens_done)` is called after each unit of work, `note(sentence)` for what the
    user should know. Called again with the same text and options it goes on where it was, or is done at once.
    Memory: about 10 times UNIT_BYTES per process and 20 bytes per document. UserError for all that the user can mend.
    """
    options = options or PrepareOptions()
    tell = note or (lambda sentence: None)
    out = Path(out)
    name = _checked(options, out)
    gathered = gather(sources, encoding=options.encoding, exclude=out)
    files = gathered.sources
    if gathered.skipped:
        tell(
            "passed over in the folders: "
            + ", ".join(f"{count} {why}" for why, count in sorted(gathered.skipped.items()))
        )
    processes = min(
        options.processes or len(os.sched_getaffinity(0)),
        1 + sum(file.size_bytes for file in files) // units.UNIT_BYTES,
    )
    with _locked(out), _friendly_disk(out):
        job = Job(files, out, name, options, fingerprint(files, name, options), progress, tell)
        if finished(job):
            return open_corpus(out)
        writer, units_done, bytes_done = begin(job)
        try:
            _check_room(job, writer.tokens)
            with Workers(processes) as workers:
                _run(job, workers, writer, units_done, bytes_done)
        except UserError:
            if writer.tokens == 0:  # a text that is refused leaves nothing behind
                (out / JOURNAL).unlink(missing_ok=True)
            raise
        finally:
            writer.close()
            shutil.rmtree(out / _SCRATCH, ignore_errors=True)
        return open_corpus(out)


def _run(job: Job, workers: Workers, writer: ShardWriter, units_done: int, bytes_done: int) -> None:
    paths, found = _read(job, workers)
    documents = collect(found)
    if not len(documents):
        raise UserError(
            "the text is empty: its files hold nothing but white space and separators; give files with text in them"
        )
    split = split_documents(documents, job.options.validation_fraction, job.options.seed, paths)
    if split.note:
        job.tell(split.note)
    markers = sum(each.markers for each in found)
    if markers:
        meaning = (
            "each taken as the end of a document"
            if job.options.end_of_text == "boundary"
            else "encoded as ordinary text"
        )
        job.tell(f"{END_OF_TEXT} stands {markers:,} times in the text: {meaning}")

    total = int(split.validation.size_bytes.sum() + split.training.size_bytes.sum())
    report = job.progress or (lambda done, of, tokens: None)
    report(bytes_done, total, writer.tokens)
    planned: deque[units.Unit] = deque()

    def arguments() -> Iterator[tuple[Any, ...]]:
        for unit in itertools.islice(units.plan_units(split, paths), units_done, None):
            planned.append(unit)
            yield unit.segments, unit.begins

    journal_time = time.monotonic()
    for tokens in workers.ordered(units.encode_unit, arguments()):
        unit = planned.popleft()
        writer.write(unit.split, tokens)
        units_done += 1
        bytes_done += unit.size_bytes
        if time.monotonic() - journal_time > JOURNAL_SECONDS:
            write_journal(job, units=units_done, bytes_done=bytes_done, writer=writer.state())
            journal_time = time.monotonic()
        report(bytes_done, total, writer.tokens)

    hashes = list(workers.ordered(file_sha256, ((file.path,) for file in job.files)))
    _check_unchanged(job.files)
    manifest = complete_manifest(job, hashes, split, writer.finish(), markers)
    write_atomically(job.out / MANIFEST, (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode())
    write_journal(job, complete=True)


def _read(job: Job, workers: Workers) -> tuple[list[Path], list[FileDocuments]]:
    """The UTF-8 file behind each source and the documents in it. UserError with a line per file that is wrong."""
    options, problems = job.options, []
    paths = [file.path for file in job.files]
    if not check_encoding(options.encoding):
        scratch = job.out / _SCRATCH
        scratch.mkdir(exist_ok=True)
        utf8 = [scratch / f"{number:06d}.txt" for number in range(len(paths))]
        tasks = ((path, options.encoding, target) for path, target in zip(paths, utf8, strict=True))
        for file, wrong in zip(job.files, workers.ordered(transcode, tasks), strict=True):
            if wrong:
                problems.append(f"{file.label} is not {options.encoding}: {wrong}; name its encoding with --encoding")
        if problems:
            raise UserError.from_list(problems[:20])
        paths = utf8
    found = list(workers.ordered(find_documents, ((path, options.separator, options.end_of_text) for path in paths)))
    for file, documents in zip(job.files, found, strict=True):
        if documents.undecodable:
            problems.append(
                f"{file.label} is not UTF-8: {documents.undecodable}; name its encoding with --encoding, such as "
                "latin-1 or cp1252"
            )
        if documents.markers and options.end_of_text == "refuse":
            problems.append(
                f"{file.label} holds {END_OF_TEXT} ({documents.markers:,} times, first in line "
                f"{documents.first_marker_line:,}): "
                "take it out, or choose --end-of-text boundary or text"
            )
    if problems:
        raise UserError.from_list(problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else []))
    return paths, found


def _check_unchanged(files: Sequence[Source]) -> None:
    for file in files:
        status = file.path.stat()
        if (status.st_size, status.st_mtime_ns) != (file.size_bytes, file.modified_ns):
            raise UserError(
                f"{file.label} changed while it was read: leave the text alone and give the same command again"
            )


def _check_room(job: Job, tokens_done: int) -> None:
    text_bytes = sum(file.size_bytes for file in job.files)
    scratch_bytes = 0 if check_encoding(job.options.encoding) else 2 * text_bytes
    needed = int(text_bytes / BYTES_PER_TOKEN - tokens_done) * 2 + scratch_bytes
    free = shutil.disk_usage(job.out).free
    if free < needed:
        raise UserError(
            f"the disk of {job.out} has {free / 2**30:.2f} GiB free, the shards need about {needed / 2**30:.2f} GiB: "
            "free some room or choose another --out"
        )


def _checked(options: PrepareOptions, out: Path) -> str:
    """The name of the corpus. UserError with a line per option that cannot be."""
    problems = []
    name = options.name or re.sub(r"[^A-Za-z0-9._-]+", "-", out.resolve().name).strip("-.") or "corpus"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        problems.append(f"the name {name!r} must be made of letters, digits, '.', '_' and '-'")
    if not 0 < options.validation_fraction < 1:
        problems.append(f"the validation fraction must lie between 0 and 1, not be {options.validation_fraction}")
    if not 0 < options.shard_tokens <= MAX_SHARD_TOKENS:
        problems.append(f"a shard must hold 1 to {MAX_SHARD_TOKENS:,} tokens, not {options.shard_tokens:,}")
    if options.processes is not None and options.processes < 1:
        problems.append(f"there must be at least 1 process, not {options.processes}")
    if options.separator == "":
        problems.append("the separator is empty: leave it out to take each file as one document")
    if options.end_of_text not in get_args(EndOfText):
        problems.append(
            f"the end-of-text policy must be one of {', '.join(get_args(EndOfText))}, not {options.end_of_text!r}"
        )
    if problems:
        raise UserError.from_list(problems)
    return name


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """At most one prepare per folder; the lock goes with the process, however it ends."""
    try:
        made = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
        folder = os.open(out, os.O_RDONLY)
    except OSError as problem:
        raise UserError(
            f"the folder {out} cannot be made or read ({problem.strerror}): choose another --out"
        ) from problem
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as problem:
        os.close(folder)
        raise UserError(
            f"another gpt2ds prepare is writing to {out}: wait for it, or choose another --out"
        ) from problem
    except OSError:
        pass  # a file system without locks; the user is on their own there
    try:
        yield
    finally:
        os.close(folder)
        if made:
            with suppress(OSError):
                out.rmdir()  # if nothing came of it


@contextmanager
def _friendly_disk(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk of {out} is full: free some room and give the same command again, it goes on from here"
            ) from problem
        if problem.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UserError(
                f"{problem.filename or out} cannot be written ({problem.strerror}): choose another --out"
            ) from problem
        raise
