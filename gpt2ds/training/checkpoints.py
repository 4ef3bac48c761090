"""Checkpoints that exist only when they are complete, and that any ZeRO stage, number of ranks or recipe can read.

A checkpoint is a folder `step-00001234`: `states-00000.safetensors` and so on with the master weights and moments that
each rank held, `model.safetensors` for everything that is not training, and `manifest.json`, written last. Nothing in
it is pickled, so reading one executes nothing. DeepSpeed's own files are not written: they can be read only by the same
number of ranks at the same stage, and unpickle what they hold.
"""

import hashlib
import shutil
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpt2ds.files import sync_folder
from gpt2ds.gpt2.weights import weights_metadata
from gpt2ds.training.engine import TrainingEngine, gather_objects, share
from gpt2ds.training.manifest import MANIFEST, WEIGHTS, Manifest, Position, best_name, checkpoint_name, read_manifest
from gpt2ds.training.states import KINDS, OptimizerStates, Tile
from gpt2ds.training.tensor_file import TensorFile, TensorSpec

# A folder in which a checkpoint is being written; without this it is complete.
WRITING = ".writing"


class SaveError(OSError):
    """A checkpoint could not be written; the ones before it are as they were. Raised on all ranks alike."""


def save(
    engine: TrainingEngine, folder: Path, position: Position, keep: int | None, versions: dict[str, str]
) -> tuple[str, int, float]:
    """Writes a checkpoint of all ranks, then removes all but the best and the `keep` newest; returns (name, bytes,
    seconds).

    Called by all ranks together. keep: None removes nothing. Raises SaveError on all ranks when one of them could not
    write.
    """
    start = time.monotonic()
    name = checkpoint_name(position.step)
    target = folder / f".{name}{WRITING}"
    failure = None
    if engine.ranks.rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            sync_folder(folder.parent)
            for left_over in folder.glob(f".step-*{WRITING}"):
                _remove(left_over)
            target.mkdir()
        except OSError as error:
            failure = _said(error)
    _stop_at(failure, target, engine)

    states = OptimizerStates(engine)
    files: dict[str, dict[str, Any]] = {}
    try:
        own = f"states-{engine.ranks.rank:05d}.safetensors"
        if described := _write_states(states, target / own):
            files[own] = described
    except OSError as error:
        failure = _said(error)
    try:
        if described := _write_weights(engine, target / WEIGHTS):
            files[WEIGHTS] = described
    except OSError as error:
        failure = _said(error)
    _stop_at(failure, target, engine)
    for others in gather_objects(files):
        files |= others

    manifest = Manifest(
        position=position,
        adam_steps=states.adam_steps,
        loss_scale=states.loss_scale,
        ranks=engine.ranks.world_size,
        zero_stage=engine.plan.profile.zero_stage,
        identity=engine.plan.identity(),
        versions=versions,
        files=files,
    )
    if engine.ranks.rank == 0:
        try:
            manifest.write(target)
            _replace(folder / name, target)
        except OSError as error:
            failure = _said(error)
    _stop_at(failure, target, engine)
    if engine.ranks.rank == 0 and keep is not None:
        prune(folder, name, keep)
    return name, manifest.size_bytes, time.monotonic() - start


def _stop_at(failure: str | None, target: Path, engine: TrainingEngine) -> None:
    """Raises SaveError on every rank when one of them failed; also a barrier."""
    failures = [failed for failed in gather_objects(failure) if failed]
    if failures:
        if engine.ranks.rank == 0:
            with suppress(OSError):
                _remove(target)
        raise SaveError(failures[0])


def _said(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        # Rank 0 has just made the folder.
        return "a rank does not see the run folder: give an --out that all machines share"
    return error.strerror or str(error)


def _write_states(states: OptimizerStates, path: Path) -> dict[str, Any] | None:
    """This rank's share; None when it holds nothing, as it may of a very small model on many ranks."""
    rank, ranks = states.engine.ranks.rank, states.engine.ranks.world_size
    # What all ranks hold alike is written by them in turn.
    own = [tile for tile in states.tiles if tile.fragments and (not tile.shared or tile.number % ranks == rank)]
    if not own:
        return None
    specs = [
        TensorSpec(f"{state_key(kind, fragment.parameter)}/{fragment.start}", states.dtypes[kind], (fragment.length,))
        for tile in own
        for kind in KINDS
        for fragment in tile.fragments
    ]
    for tile in own:
        codes = states.eight_bits(tile)
        specs += [TensorSpec(code_key(name, rank, tile), code.dtype, tuple(code.shape)) for name, code in codes.items()]
    with TensorFile(path, specs) as file:
        for tile in own:
            with states.open(tile):
                for kind in KINDS:
                    for fragment in tile.fragments:
                        file.add(states.piece(tile, kind, fragment).to(states.dtypes[kind]))
                        states.engine.on_progress()
        for tile in own:
            for code in states.eight_bits(tile).values():
                file.add(code)
        return file.close()


def _write_weights(engine: TrainingEngine, path: Path) -> dict[str, Any] | None:
    """The weights in the compute type, by rank 0, gathered one by one under ZeRO-3."""
    with ExitStack() as stack:
        file: TensorFile | None = None
        failure: OSError | None = None
        for _, weight in engine.gathered_weights():
            engine.on_progress()
            if weight is None:
                continue
            # The other ranks take part in every gathering: a full disk must not stop rank 0 in the middle of one.
            try:
                if file is None and failure is None:
                    metadata = weights_metadata(engine.plan.model)
                    file = stack.enter_context(TensorFile(path, engine.weight_specs(), metadata))
                if file is not None and failure is None:
                    file.add(weight)
            except OSError as error:
                failure = error
        if failure:
            raise failure
        return file.close() if file else None


def state_key(kind: str, parameter: str) -> str:
    """Of a parameter's states in the files; the number of a piece's first element follows."""
    return f"{kind}/{parameter}"


def code_key(name: str, rank: int, tile: Tile) -> str:
    """Of a tile's 8-bit moments as they are; the parameters' places are part of it, for the codes do not name them."""
    layout = hashlib.sha256(repr(tile.fragments).encode()).hexdigest()[:16]
    return f"8bit.{name}/{layout}/{tile.number}/{rank}"


def amend(engine: TrainingEngine, folder: Path, position: Position) -> None:
    """Gives the newest checkpoint another position, at once and without touching its states.

    Called by all ranks together. Raises SaveError on all of them when that could not be written; it is as it was then.
    """
    failure = None
    if engine.ranks.rank == 0:
        path = folder / checkpoint_name(position.step)
        try:
            replace(read_manifest(path), position=position).write(path)
        except (OSError, ValueError) as error:
            failure = _said(error) if isinstance(error, OSError) else str(error)
    if failure := share(failure):
        raise SaveError(failure)


def prune(folder: Path, newest_name: str, keep: int) -> None:
    """Keeps the `keep` newest complete checkpoints up to the one just written, and the best by validation loss.

    Later ones were damaged and passed over by a resume.
    """
    paths = sorted((path for path in folder.glob("step-*") if path.name <= newest_name), reverse=True)
    complete = [path.name for path in paths if (path / MANIFEST).is_file()]
    kept = {*complete[:keep], best_name(paths)}
    for path in folder.glob("step-*"):
        if path.name not in kept:
            with suppress(OSError):
                _remove(path)


def _replace(path: Path, written: Path) -> None:
    """Gives a complete checkpoint its name. One of the same step, from before a resume, is whole until then."""
    if path.exists():
        earlier = path.with_name(f".{path.name}-earlier{WRITING}")
        path.rename(earlier)
        written.rename(path)
        with suppress(OSError):
            _remove(earlier)
    else:
        written.rename(path)
    sync_folder(path.parent)


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
        return
    # The manifest goes first: half a folder must not look like a checkpoint.
    (path / MANIFEST).unlink(missing_ok=True)
    if path.exists():
        shutil.rmtree(path)


def forget_from(folder: Path, step: int) -> None:
    """Removes the checkpoints of this step and later ones."""
    for path in folder.glob("step-*"):
        if path.name >= checkpoint_name(step):
            with suppress(OSError):
                _remove(path)
