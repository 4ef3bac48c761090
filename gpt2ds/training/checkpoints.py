"""Checkpoints that exist only when they are complete.

A checkpoint is a folder `step-00001234` with DeepSpeed's files of every rank, `model.safetensors` for everything that
is not training, and `manifest.json`, written last: names, sizes and digests of the other files, and where the run
stood. A folder without a manifest that holds is no checkpoint, whatever else is in it.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from gpt2ds import __version__
from gpt2ds.errors import UserError
from gpt2ds.files import file_sha256, write_atomically
from gpt2ds.gpt2.weights import save_weights
from gpt2ds.training.engine import TrainingEngine, share

FORMAT = 1
MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """Where a run stands after a step: with the plan and the weights, all that is needed to go on exactly."""

    step: int
    sequences_seen: int
    elapsed_seconds: float
    skipped_steps: int
    learning_rate: dict[str, Any]
    """The schedule as decided so far; under --hours its length is known only since some step."""
    evaluate_every: int | None
    speed_measured: bool
    """Under --hours: whether warm-up and evaluation interval were fitted to the speed already."""
    schedule: dict[str, Any]
    """The schedule as the plan asked for it; when a resume asks for another, that one counts."""
    evaluated_at: int
    """Step of the last evaluation."""


def save(engine: TrainingEngine, folder: Path, position: Position, keep: int) -> tuple[str, int, float]:
    """Writes a checkpoint of all ranks, then removes all but the `keep` newest; returns (name, bytes, seconds).

    Called by all ranks together. Raises OSError when the disk is full; what was there before is untouched then.
    """
    start = time.monotonic()
    name = f"step-{position.step:08d}"
    target = folder / name
    if engine.ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        # Left over from a run that died while saving, or saved before a resume from an earlier step.
        shutil.rmtree(target, ignore_errors=True)
    dist.barrier()
    # save_latest=False: DeepSpeed writes its `latest` before all ranks have finished (engine.py:4956).
    engine.engine.save_checkpoint(str(folder), tag=name, save_latest=False)
    weights = engine.gathered_weights()
    dist.barrier()
    size = 0
    if weights is not None:
        save_weights(target / WEIGHTS, engine.plan.model, weights)
        # Also below: states that are offloaded to NVMe are copied into a folder of their own.
        paths = sorted(path for path in target.rglob("*") if path.is_file())
        files = {path.relative_to(target).as_posix(): _described(path) for path in paths}
        size = sum(file["bytes"] for file in files.values())
        manifest = {
            "format": FORMAT,
            "position": asdict(position),
            "ranks": engine.ranks.world_size,
            "zero_stage": engine.plan.profile.zero_stage,
            "identity": engine.plan.identity(),
            "version": __version__,
            "files": files,
        }
        write_atomically(target / MANIFEST, json.dumps(manifest, indent=1).encode())
        _prune(folder, name, keep)
    dist.barrier()
    return name, int(share(size)), time.monotonic() - start


def load(engine: TrainingEngine, folder: Path, passed_over: Callable[[str], None]) -> tuple[str, Position]:
    """Puts every rank where the newest checkpoint that holds left off; returns (name, position).

    passed_over: told of each newer checkpoint that is damaged, and why. Raises UserError when none holds.
    """
    found: tuple[str, dict[str, Any]] | None = None
    damages: list[str] = []
    if engine.ranks.rank == 0:
        found = newest(folder, damages.append)
    found, damages = share((found, damages))
    for damage in damages:
        passed_over(damage)
    if found is None:
        raise UserError(
            f"--resume found no complete checkpoint in {folder}: leave --resume out and choose another --name."
            + "".join(f" {damage}" for damage in damages)
        )
    name, manifest = found
    loaded, _ = engine.engine.load_checkpoint(str(folder), tag=name, load_lr_scheduler_states=False)
    assert loaded is not None, "a checkpoint whose manifest holds is one that DeepSpeed finds"
    position = Position(**manifest["position"])
    engine.skipped_steps = position.skipped_steps
    return name, position


def newest(
    folder: Path, passed_over: Callable[[str], None], only: str | None = None
) -> tuple[str, dict[str, Any]] | None:
    """(name, manifest) of the newest checkpoint of a run whose files are all as its manifest says.

    only: look at this one file, when the others are not needed; the rest may be gigabytes.
    """
    for path in sorted(folder.glob("step-*"), reverse=True):
        damage = verify(path, only)
        if damage is None:
            return path.name, json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        passed_over(f"Checkpoint {path.name} is passed over: {damage}.")
    return None


def newest_name(folder: Path) -> str | None:
    """Name of the newest checkpoint that has a manifest, unverified; None when there is none."""
    names = [path.parent.name for path in folder.glob(f"step-*/{MANIFEST}")]
    return max(names, default=None)


def verify(path: Path, only: str | None = None) -> str | None:
    """What is wrong with a checkpoint (or with `only` that file of it), or None when all is there and unchanged."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "it was never completed (no manifest)"
    except (OSError, ValueError) as error:
        return f"its manifest cannot be read ({error})"
    try:
        if manifest["format"] != FORMAT:
            return f"its format {manifest['format']} is not the {FORMAT} of this version"
        Position(**manifest["position"])
        for name, expected in manifest["files"].items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                return f"its manifest names a file outside the folder: {name}"
            if only not in (None, name):
                continue
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size:,} bytes instead of {expected['bytes']:,}"
            if file_sha256(file) != expected["sha256"]:
                return f"{name} was changed since it was saved (its sha256 differs)"
    except (KeyError, TypeError, AttributeError) as error:
        return f"its manifest is not one of ours ({error})"
    except OSError as error:
        return f"a file cannot be read ({error})"
    return None


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
    return run / "checkpoints" / name / WEIGHTS, Position(**manifest["position"])


def _prune(folder: Path, newest_name: str, keep: int) -> None:
    """Keeps the `keep` newest complete checkpoints up to the one just written.

    Later ones were damaged and passed over by a resume, those without a manifest never completed.
    """
    complete = sorted(
        (path for path in folder.glob("step-*") if path.name <= newest_name and (path / MANIFEST).is_file()),
        reverse=True,
    )
    for path in set(folder.glob("step-*")) - set(complete[:keep]):
        # The manifest goes first: half a folder must not look like a checkpoint.
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)


def _described(path: Path) -> dict[str, Any]:
    # On the disk and not only in the page cache before the manifest says so.
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
