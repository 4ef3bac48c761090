"""What makes a folder a checkpoint: its manifest, and the search for the newest one that holds.

Needs neither torch nor DeepSpeed. A folder `step-00001234` without a manifest that holds is no checkpoint, whatever
else is in it.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from gpt2ds.errors import UserError
from gpt2ds.files import file_sha256, sync_folder, write_atomically

FORMAT = 3
MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """Where a run stands after a step: with the plan and the weights, all that is needed to go on exactly."""

    step: int
    sequences_seen: int
    """The data position. More than steps times the global batch when data was passed over."""
    passed_over: list[list[int]]
    """Ranges [from, to) of sequences that will not be seen, because training on them went wrong."""
    elapsed_seconds: float
    skipped_steps: int
    returns: int
    """How often the run went back to an earlier checkpoint."""
    learning_rate: dict[str, Any]
    """The schedule as decided so far; under --hours its length is known only since some step."""
    evaluate_every: int | None
    speed_measured: bool
    """Under --hours: whether warm-up and evaluation interval were fitted to the speed already."""
    schedule: dict[str, Any]
    """The schedule as the plan asked for it; when a resume asks for another, that one counts."""
    evaluated_at: int
    """Step of the last evaluation."""
    val_loss: float | None
    """Validation loss of these very weights, where they were evaluated."""
    losses: list[float]
    """Of the last good steps: by them the next session sees a jump."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """manifest.json: where the run stood, what wrote it, and every other file with its size and digest."""

    position: Position
    adam_steps: int
    loss_scale: dict[str, float]
    ranks: int
    zero_stage: int
    identity: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, dict[str, Any]]

    def write(self, folder: Path) -> None:
        """The last file of a checkpoint; raises OSError, and there is no checkpoint then."""
        content = sealed({"format": FORMAT} | asdict(self))
        write_atomically(folder / MANIFEST, json.dumps(content, indent=1).encode())
        sync_folder(folder.parent)  # else a power cut may leave a checkpoint without a name, and the older one pruned

    @property
    def size_bytes(self) -> int:
        """Of all files together."""
        return sum(file["bytes"] for file in self.files.values())


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """What a manifest says, with its own digest: the one file that no other file vouches for."""
    text = json.dumps({name: value for name, value in content.items() if name != "sha256"}, sort_keys=True)
    return content | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


def read_manifest(folder: Path) -> Manifest:
    """A checkpoint's manifest. Raises ValueError with what is wrong with it, in words that follow "because"."""
    path = folder / MANIFEST
    if not os.path.lexists(path):
        raise ValueError(f"it was never completed (no {MANIFEST})")
    if problem := _no_file(path):
        raise ValueError(problem)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"its {MANIFEST} cannot be read ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"its {MANIFEST} is not of format {FORMAT}, which this version reads")
    fields = {name: value for name, value in content.items() if name not in ("format", "sha256")}
    try:
        position = Position(**fields.pop("position"))
        manifest = Manifest(position=position, **fields)
    except (KeyError, TypeError) as error:
        raise ValueError(f"its {MANIFEST} is not one of ours ({error})") from error
    for part in (position, manifest):
        for name, hint in get_type_hints(type(part)).items():
            if not _fits(getattr(part, name), hint):
                raise ValueError(f"its {MANIFEST} holds a {name} that is none")
    if min(position.step, position.sequences_seen) < 0 or not abs(position.elapsed_seconds) < math.inf:
        raise ValueError(f"its {MANIFEST} holds a step or a time that is none")
    if any(len(ends) != 2 or not 0 <= ends[0] < ends[1] for ends in position.passed_over):
        raise ValueError(f"its {MANIFEST} holds a range of sequences that is none")
    for name, described in manifest.files.items():
        if name in ("", "..") or Path(name).name != name:
            raise ValueError(f"its {MANIFEST} names a file outside the folder: {name!r}")
        if not _fits(described.get("bytes"), int) or not isinstance(described.get("sha256"), str):
            raise ValueError(f"its {MANIFEST} does not say the size and digest of {name!r}")
    if WEIGHTS not in manifest.files:
        raise ValueError(f"its {MANIFEST} does not name {WEIGHTS}")
    # Last, so that what a hand or a stranger has changed is named where that is possible.
    if sealed(content)["sha256"] != content.get("sha256"):
        raise ValueError(f"its {MANIFEST} was changed since it was saved (its sha256 differs)")
    return manifest


def _fits(value: Any, hint: Any) -> bool:
    """Whether what JSON gave is of a field's type; an int is a float, a bool is neither."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind is Any:
        return True
    if kind is UnionType:
        return any(_fits(value, part) for part in parts)
    if kind is list:
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    if kind is dict:
        # What a dict holds is looked at as well, its keys are texts already.
        return isinstance(value, dict) and all(_fits(item, parts[1]) for item in value.values())
    if kind in (int, float):
        return isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    return isinstance(value, kind)


def verify(folder: Path, only: str | None = None, progress: Callable[[], None] = lambda: None) -> Manifest:
    """The manifest, after comparing every file (or `only` that one) with what it says of it.

    progress: called now and then, for gigabytes take minutes. Raises ValueError with what is damaged, by the file's
    name.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest.files.items():
        if only not in (None, name):
            continue
        file = folder / name
        try:
            if problem := _no_file(file):
                raise ValueError(problem)
            size = file.stat().st_size
            if size != expected["bytes"]:
                raise ValueError(f"{name} has {size:,} bytes instead of {expected['bytes']:,}")
            if file_sha256(file, progress) != expected["sha256"]:
                raise ValueError(f"{name} was changed since it was saved (its sha256 differs)")
        except OSError as error:
            raise ValueError(f"{name} cannot be read ({error.strerror})") from error
    return manifest


def _no_file(path: Path) -> str | None:
    if path.is_symlink():
        return f"{path.name} is a symbolic link, which may lead anywhere"
    return None if path.is_file() else f"{path.name} is missing"


def newest(
    folder: Path,
    passed_over: Callable[[str], None],
    only: str | None = None,
    before: int | None = None,
    progress: Callable[[], None] = lambda: None,
) -> tuple[str, Manifest] | None:
    """(name, manifest) of the newest checkpoint of a run whose files are all as its manifest says.

    only: look at this one file, when the others are not needed; the rest may be gigabytes. before: pass silently over
    this step and later ones.
    """
    for path in sorted(folder.glob("step-*"), reverse=True):
        if before is not None and path.name >= checkpoint_name(before):
            continue
        try:
            return path.name, verify(path, only, progress)
        except ValueError as damage:
            passed_over(f"Checkpoint {path.name} is passed over: {damage}.")
    return None


def checkpoint_name(step: int) -> str:
    """Its folder below `checkpoints`; in the order of the steps when sorted."""
    return f"step-{step:08d}"


def best_name(checkpoints: Iterable[Path]) -> str | None:
    """Name of the one with the lowest validation loss of those that were evaluated; None when there is none."""
    losses: dict[str, float] = {}
    for path in sorted(checkpoints):
        try:
            loss = read_manifest(path).position.val_loss
        except ValueError:
            continue
        if loss is not None and math.isfinite(loss):
            losses[path.name] = loss
    return min(losses, key=lambda name: losses[name], default=None)


def newest_weights(run: Path, passed_over: Callable[[str], None]) -> tuple[Path, Position]:
    """The weights of a run's newest checkpoint that holds, and where it stood; needs neither DeepSpeed nor a GPU.

    Raises UserError when the run has none.
    """
    found = newest(run / "checkpoints", passed_over, only=WEIGHTS)
    if found is None:
        raise UserError(
            f"{run} has no complete checkpoint: train it first (gpt2ds train --name {run.name}), or give another run."
        )
    name, manifest = found
    return run / "checkpoints" / name / WEIGHTS, manifest.position
