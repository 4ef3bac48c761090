"""What is written down about a `prepare`: the journal from which an interrupted one goes on, and corpus.json when it
is complete."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gpt2ds.corpus import units
from gpt2ds.corpus.documents import EndOfText, Split
from gpt2ds.corpus.shard_writer import ShardWriter
from gpt2ds.corpus.shards import (
    JOURNAL,
    MANIFEST,
    MANIFEST_VERSION,
    corpus_digest,
    open_corpus,
    read_manifest,
)
from gpt2ds.corpus.sources import Source
from gpt2ds.corpus.tokenizer import RANKS_SHA256, VOCAB_SIZE
from gpt2ds.errors import UserError
from gpt2ds.files import file_sha256, write_atomically

Progress = Callable[[int, int, int], None]

_SHARDS = re.compile(r"^\.?(?P<name>.+)_(?:train|val)_\d{6}\.bin(?:\.partial)?$")


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareOptions:
    """How text becomes a corpus. All but `processes` and `overwrite` decide what the shards hold."""

    name: str | None = None
    """First part of the shards' names; by default the name of the output folder."""
    separator: str | None = None
    """Cuts each file into documents; by default a file is a document."""
    end_of_text: EndOfText = "boundary"
    """What <|endoftext|> in the text is: the end of a document, ordinary text, or a mistake."""
    encoding: str = "utf-8"
    """Of the text files."""
    validation_fraction: float = 0.01
    """Share of the text's bytes, in whole documents, that is never trained on."""
    seed: int = 1337
    """Chooses the validation documents."""
    shard_tokens: int = 100_000_000
    """Tokens per shard; each takes 2 bytes."""
    processes: int | None = None
    """By default one for each core that this process may use."""
    overwrite: bool = False
    """Replace a finished corpus of other text or options instead of refusing."""
    origin: Mapping[str, str] = field(default_factory=dict)
    """Where the text comes from, recorded in corpus.json (versions of the packages behind the embedded text)."""


class Job(NamedTuple):
    """What one call of `prepare` was asked for."""

    files: tuple[Source, ...]
    out: Path
    name: str
    options: PrepareOptions
    fingerprint: str
    progress: Progress | None
    tell: Callable[[str], None]


def begin(job: Job) -> tuple[ShardWriter, int, int]:
    """A writer with the units and bytes that it already holds: from the journal if that fits, else from nothing."""
    journal = _read_journal(job.out)
    if journal is None and any(
        _SHARDS.match(path.name) and path.name.startswith(f"{job.name}_") for path in job.out.glob("*.bin")
    ):
        raise UserError(
            f"{job.out} already holds shards named {job.name}_... that are not from an unfinished prepare: "
            "choose another --out"
        )
    if journal is not None and not journal.get("complete"):
        if journal.get("fingerprint") != job.fingerprint:
            job.tell("an interrupted prepare of other text or options lies here: starting anew")
        else:
            try:
                units_done, bytes_done = int(journal["units"]), int(journal["bytes_done"])
                state = dict(journal["writer"])
                return ShardWriter(job.out, job.name, job.options.shard_tokens, state), units_done, bytes_done
            except (LookupError, TypeError, ValueError):
                job.tell("the shards of the interrupted prepare are not all there: starting anew")
    _clear(job, journal)
    write_journal(job, units=0, bytes_done=0, writer={"finished": [], "split": "val", "tokens": 0})
    return ShardWriter(job.out, job.name, job.options.shard_tokens), 0, 0


def _clear(job: Job, journal: dict[str, Any] | None) -> None:
    # The manifest first: it must never stand beside shards that are not its own.
    (job.out / MANIFEST).unlink(missing_ok=True)
    names = {job.name, str((journal or {}).get("name", job.name))}
    for path in job.out.iterdir():
        match = _SHARDS.match(path.name)
        if match and match["name"] in names:
            path.unlink()


def finished(job: Job) -> bool:
    """True if the corpus of the very text and options is there and whole."""
    if not (job.out / MANIFEST).exists():
        return False
    other = "of other text or options: choose another --out, or remove that folder first"
    journal = _read_journal(job.out) or {}
    known = journal.get("complete") and journal.get("fingerprint") == job.fingerprint
    try:
        open_corpus(job.out)
        manifest = read_manifest(job.out)
    except UserError as problem:
        if not (known or job.options.overwrite):
            raise UserError(f"{job.out} holds a damaged corpus {other}\n{problem}") from problem
        job.tell(f"the corpus in {job.out} is damaged and is made anew: {problem}")
        return False
    if known:
        return True
    same = {**manifest, **_described(job)} == manifest and _same_content(job.files, manifest["sources"])
    if same:
        write_journal(job, complete=True)
    elif not job.options.overwrite:
        raise UserError(f"{job.out} holds a finished corpus {other}")
    return same


def _same_content(files: Sequence[Source], recorded: list[dict[str, Any]]) -> bool:
    if [(file.label, file.size_bytes) for file in files] != [(each["path"], each["bytes"]) for each in recorded]:
        return False
    return all(file_sha256(file.path) == each["sha256"] for file, each in zip(files, recorded, strict=True))


def _described(job: Job) -> dict[str, Any]:
    """The part of corpus.json that is known before the text is read."""
    options = job.options
    return {
        "format_version": MANIFEST_VERSION,
        "name": job.name,
        "tokenizer": {"name": "gpt2", "sha256": RANKS_SHA256, "vocab_size": VOCAB_SIZE},
        "end_of_text": options.end_of_text,
        "encoding": options.encoding,
        "separator": options.separator,
        "seed": options.seed,
        "validation_fraction": options.validation_fraction,
        "shard_tokens": options.shard_tokens,
        "origin": dict(options.origin),
    }


def complete_manifest(
    job: Job, hashes: list[str], split: Split, shards: dict[str, list[dict[str, Any]]], markers: int
) -> dict[str, Any]:
    documents = {"val": split.validation, "train": split.training}
    return {
        **_described(job),
        "end_of_text_markers": markers,
        "sources": [
            {"path": file.label, "bytes": file.size_bytes, "sha256": digest}
            for file, digest in zip(job.files, hashes, strict=True)
        ],
        "splits": {
            name: {
                "documents": len(documents[name]),
                "bytes": int(documents[name].size_bytes.sum()),
                "tokens": sum(int(entry["tokens"]) for entry in shards[name]),
                "shards": shards[name],
            }
            for name in ("val", "train")
        },
        "digest": corpus_digest(shards),
    }


def fingerprint(files: Sequence[Source], name: str, options: PrepareOptions) -> str:
    """Equal when nothing that decides the shards has changed, judged without reading the text."""
    chosen = {key: value for key, value in asdict(options).items() if key not in ("processes", "overwrite")}
    texts = [(str(file.path), file.label, file.size_bytes, file.modified_ns) for file in files]
    return hashlib.sha256(json.dumps([MANIFEST_VERSION, units.UNIT_BYTES, name, chosen, texts]).encode()).hexdigest()


def _read_journal(out: Path) -> dict[str, Any] | None:
    try:
        journal = json.loads((out / JOURNAL).read_text())
    except (OSError, ValueError):
        return None
    return journal if isinstance(journal, dict) else None


def write_journal(job: Job, **progress: Any) -> None:
    write_atomically(
        job.out / JOURNAL, json.dumps({"fingerprint": job.fingerprint, "name": job.name, **progress}).encode()
    )
