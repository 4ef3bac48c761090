"""Token shards on disk (llm.c's `.bin`, nanoGPT's headerless `.bin` for reading) and the `Corpus`: what `train` opens.

llm.c: 256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros), then the tokens as uint16.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt2ds.corpus.tokenizer import RANKS_SHA256, VOCAB_SIZE
from gpt2ds.errors import UserError
from gpt2ds.files import file_sha256

Tokens = npt.NDArray[np.uint16]

MAGIC = 20240520
FORMAT_VERSION = 1
HEADER_BYTES = 1024
MAX_SHARD_TOKENS = 2**31 - 1  # the header's int32
MANIFEST = "corpus.json"
JOURNAL = ".progress.json"
MANIFEST_VERSION = 1

_OTHER_MAGICS = {20240801: "a Llama-3 shard (uint32 tokens)", 20240522: "an llm.c evaluation file"}
_SHARD_NAME = re.compile(r"^(?P<name>.+)_(?P<split>train|val)_(?P<number>\d+)\.bin$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One file of tokens. `sha256` is that of the whole file, where corpus.json records it."""

    path: Path
    tokens: int
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """An opened and checked corpus. `digest` names its content: equal digests mean equal tokens in the same splits."""

    folder: Path
    name: str
    vocab_size: int
    train: tuple[Shard, ...]
    val: tuple[Shard, ...]
    digest: str

    @property
    def train_tokens(self) -> int:
        return sum(shard.tokens for shard in self.train)

    @property
    def val_tokens(self) -> int:
        return sum(shard.tokens for shard in self.val)


def header(tokens: int) -> bytes:
    """The 1,024 bytes before the tokens of an llm.c shard."""
    fields = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    fields[:3] = MAGIC, FORMAT_VERSION, tokens
    return fields.tobytes()


def read_shard(path: Path, *, with_header: bool | None = None) -> Tokens:
    """The tokens of one shard as a read-only uint16 memory map; the format is told by the magic unless `with_header`
    demands one.

    UserError if the file is missing, empty, truncated, of odd size, or of another format.
    """
    offset = HEADER_BYTES if _has_header(path, with_header) else 0
    return np.memmap(path, dtype="<u2", mode="r", offset=offset)


def _has_header(path: Path, with_header: bool | None) -> bool:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEADER_BYTES)
    except OSError as problem:
        raise UserError(f"shard {path} cannot be read: {problem.strerror}") from problem
    magic, version, tokens = (int.from_bytes(head[at : at + 4], "little", signed=True) for at in (0, 4, 8))
    if magic in _OTHER_MAGICS:
        raise UserError(
            f"shard {path} is {_OTHER_MAGICS[magic]}, not GPT-2 tokens in llm.c's format: prepare the text "
            "with gpt2ds prepare"
        )
    if magic == MAGIC and with_header is not False:
        if version != FORMAT_VERSION:
            raise UserError(
                f"shard {path} is of format version {version}; only version {FORMAT_VERSION} (GPT-2, uint16) can "
                "be read"
            )
        expected = HEADER_BYTES + 2 * tokens
        if size != expected or tokens <= 0:
            what = "truncated" if size < expected else "damaged"
            raise UserError(
                f"shard {path} is {what}: its header says {tokens:,} tokens = {expected:,} bytes, the file has "
                f"{size:,}: fetch or prepare it again"
            )
        return True
    if with_header:
        raise UserError(
            f"shard {path} is not in llm.c's format: it starts with {magic}, not with {MAGIC}: fetch or "
            "prepare it again"
        )
    if size == 0 or size % 2:
        raise UserError(
            f"shard {path} holds {size} bytes, which is no whole number of uint16 tokens: fetch or prepare it again"
        )
    return False


def open_corpus(folder: Path, *, verify_digests: bool = False) -> Corpus:
    """The corpus in `folder`: by its corpus.json, else llm.c's `*_train_*.bin` and `*_val_*.bin`, else nanoGPT's
    train.bin and val.bin.

    Sizes and headers are always checked; with `verify_digests` every shard's sha256 too (about 1 s a GB). UserError
    with one line per problem.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no corpus folder {folder}: make one with gpt2ds prepare TEXT... --out {folder}")
    if (folder / MANIFEST).exists():
        return _open_prepared(folder, verify_digests)
    if (folder / JOURNAL).exists():
        raise UserError(f"{folder} holds no {MANIFEST}: its prepare was interrupted; give the same command again")
    names = sorted(path.name for path in folder.glob("*.bin") if path.is_file())
    if any(_SHARD_NAME.match(name) for name in names):
        return _open_llmc(folder, names)
    if {"train.bin", "val.bin"} & set(names):
        return _open_nanogpt(folder, names)
    raise UserError(
        f"{folder} holds no corpus (no {MANIFEST}, *_train_*.bin or train.bin): "
        f"make one with gpt2ds prepare TEXT... --out {folder}"
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """corpus.json as it stands. UserError if it is not JSON (line and column) or not ours."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as problem:
        raise UserError(
            f"{path} is not JSON, line {problem.lineno} column {problem.colno}: {problem.msg}: prepare the corpus again"
        ) from problem
    except OSError as problem:
        raise UserError(f"{path} cannot be read ({problem.strerror}): prepare the corpus again") from problem
    except (ValueError, RecursionError) as problem:  # bytes that are no text, numbers or depths that nobody writes
        raise UserError(f"{path} is not one that gpt2ds wrote ({problem}): prepare the corpus again") from problem
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != MANIFEST_VERSION:
        raise UserError(
            f"{path} has format_version {version!r}; this gpt2ds reads {MANIFEST_VERSION}: prepare the corpus again"
        )
    return dict(manifest)


def corpus_digest(splits: dict[str, list[dict[str, Any]]]) -> str:
    """One sha256 over the tokenizer and every shard's split, order, length and sha256; file names and sources do not
    enter."""
    lines = [f"ranks {RANKS_SHA256}"]
    for split in ("val", "train"):
        lines += [f"{split} {entry['tokens']} {entry['sha256']}" for entry in splits[split]]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _open_prepared(folder: Path, verify_digests: bool) -> Corpus:
    manifest = read_manifest(folder)
    problems: list[str] = []
    found: dict[str, tuple[Shard, ...]] = {"train": (), "val": ()}
    try:
        tokenizer = manifest["tokenizer"]
        if tokenizer["vocab_size"] != VOCAB_SIZE or tokenizer["sha256"] != RANKS_SHA256:
            problems.append(
                f"the corpus was made with the tokenizer {tokenizer['name']} (vocabulary {tokenizer['vocab_size']}), "
                f"not GPT-2's ({VOCAB_SIZE}): prepare the text again"
            )
        entries = {split: list(manifest["splits"][split]["shards"]) for split in found}
        for split in found:
            found[split] = tuple(_checked_entries(folder, split, entries[split], verify_digests, problems))
        digest, name = str(manifest["digest"]), str(manifest["name"])
        if not problems and digest != corpus_digest(entries):
            problems.append(
                f"the digest in {MANIFEST} does not fit its shards: it was edited; prepare the corpus again"
            )
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as problem:
        what = f"lacks the field {problem}" if isinstance(problem, KeyError) else "has a field of a wrong kind"
        raise UserError(f"{folder / MANIFEST} {what}: prepare the corpus again") from problem
    _refuse(folder, problems)
    return Corpus(
        folder=folder, name=name, vocab_size=VOCAB_SIZE, train=found["train"], val=found["val"], digest=digest
    )


def _checked_entries(
    folder: Path, split: str, entries: list[dict[str, Any]], verify: bool, problems: list[str]
) -> Iterator[Shard]:
    if not entries:
        problems.append(f"{MANIFEST} names no {split} shard: prepare the corpus again")
    for entry in entries:
        name, tokens = str(entry["file"]), int(entry["tokens"])
        relative = PurePosixPath(name)
        if (
            relative.is_absolute()
            or ".." in relative.parts
            or "\\" in name
            or not (folder / name).resolve().is_relative_to(folder.resolve())
        ):
            problems.append(
                f"{MANIFEST} names a shard outside its folder, {name!r}: it is not read; prepare the corpus again"
            )
            continue
        path = folder / name
        try:
            if _has_header(path, True) and (size := (path.stat().st_size - HEADER_BYTES) // 2) != tokens:
                problems.append(
                    f"shard {path} holds {size:,} tokens, {MANIFEST} says {tokens:,}: prepare the corpus again"
                )
            elif verify and file_sha256(path) != entry["sha256"]:
                problems.append(
                    f"shard {path} has another sha256 than {MANIFEST} says: its content is damaged; prepare the "
                    "corpus again"
                )
        except UserError as problem:
            problems.append(str(problem))
        yield Shard(path=path, tokens=tokens, sha256=str(entry["sha256"]))


def _open_llmc(folder: Path, names: list[str]) -> Corpus:
    matches = [match for name in names if (match := _SHARD_NAME.match(name))]
    corpora = sorted({match["name"] for match in matches})
    problems = (
        []
        if len(corpora) == 1
        else [f"{folder} holds shards of several corpora ({', '.join(corpora)}): keep one a folder"]
    )
    splits: dict[str, list[Path]] = {"train": [], "val": []}
    for match in sorted(matches, key=lambda each: int(each["number"])):
        splits[match["split"]].append(folder / match.string)
    return _foreign(folder, corpora[0], splits, True, problems)


def _open_nanogpt(folder: Path, names: list[str]) -> Corpus:
    problems = []
    if (folder / "meta.pkl").exists():
        problems.append(
            f"{folder} has a meta.pkl: these are nanoGPT's characters, not GPT-2 tokens: prepare the text "
            "with gpt2ds prepare"
        )
    splits = {split: [folder / f"{split}.bin"] if f"{split}.bin" in names else [] for split in ("train", "val")}
    return _foreign(folder, folder.resolve().name, splits, None, problems)


def _foreign(
    folder: Path, name: str, splits: dict[str, list[Path]], with_header: bool | None, problems: list[str]
) -> Corpus:
    """A corpus without corpus.json. Its digest covers names, lengths and both ends of every file: whole FineWeb
    would take minutes to hash."""
    quick = hashlib.sha256()
    shards: dict[str, list[Shard]] = {"train": [], "val": []}
    for split, paths in splits.items():
        if not paths:
            other = "*_train_*.bin" if split == "train" else "*_val_*.bin"
            problems.append(
                f"{folder} has no {split} split ({other} or {split}.bin): fetch it, or prepare the text with "
                "gpt2ds prepare"
            )
        for path in paths:
            try:
                tokens = read_shard(path, with_header=with_header)
            except UserError as problem:
                problems.append(str(problem))
                continue
            quick.update(
                f"{split} {path.name} {len(tokens)}\n".encode() + tokens[:32768].tobytes() + tokens[-32768:].tobytes()
            )
            shards[split].append(Shard(path=path, tokens=len(tokens)))
    _refuse(folder, problems)
    return Corpus(
        folder=folder,
        name=name,
        vocab_size=VOCAB_SIZE,
        train=tuple(shards["train"]),
        val=tuple(shards["val"]),
        digest=f"quick-{quick.hexdigest()}",
    )


def _refuse(folder: Path, problems: list[str]) -> None:
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise UserError.from_list(shown)


def check_ids(corpus: Corpus, vocab_size: int) -> None:
    """UserError naming every shard that holds a token id of `vocab_size` or above; reads all shards (about 1 s per
    10^9 tokens once cached)."""
    problems = []
    for shard in (*corpus.val, *corpus.train):
        tokens = read_shard(shard.path)
        for start in range(0, len(tokens), 1 << 24):
            piece = tokens[start : start + (1 << 24)]
            if int(piece.max()) >= vocab_size:
                at = int(np.argmax(piece >= vocab_size))
                problems.append(
                    f"shard {shard.path} holds token id {int(piece[at])} at position {start + at:,}, beyond the "
                    f"vocabulary of {vocab_size}: "
                    "it was made with another tokenizer; prepare the text again"
                )
                break
    _refuse(corpus.folder, problems)
