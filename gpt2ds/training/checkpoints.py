"""Checkpoints that exist only when they are complete, and that any ZeRO stage, number of ranks or recipe can read.

A checkpoint is a folder `step-00001234`: `states-00000.safetensors` and so on with the master weights and moments that
each rank held, `model.safetensors` for everything that is not training, and `manifest.json`, written last. Nothing in
it is pickled, so reading one executes nothing. DeepSpeed's own files are not written: they can be read only by the same
number of ranks at the same stage, and unpickle what they hold.
"""

import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2ds.errors import UserError
from gpt2ds.gpt2.weights import weights_metadata
from gpt2ds.training.engine import TrainingEngine, gather_objects, share
from gpt2ds.training.manifest import MANIFEST, WEIGHTS, Manifest, Position, best_name, checkpoint_name, newest
from gpt2ds.training.states import KINDS, Fragment, OptimizerStates, Tile
from gpt2ds.training.tensor_file import TensorFile, TensorSpec


class SaveError(OSError):
    """A checkpoint could not be written; the ones before it are as they were. Raised on all ranks alike."""


def save(
    engine: TrainingEngine, folder: Path, position: Position, keep: int, versions: dict[str, str]
) -> tuple[str, int, float]:
    """Writes a checkpoint of all ranks, then removes all but the best and the `keep` newest; returns (name, bytes,
    seconds).

    Called by all ranks together. Raises SaveError on all ranks when one of them could not write.
    """
    start = time.monotonic()
    name = checkpoint_name(position.step)
    target = folder / name
    failure = None
    if engine.ranks.rank == 0:
        try:
            # Left over from a run that died while saving, or saved before a resume from an earlier step.
            _remove(target)
            target.mkdir(parents=True)
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
        except OSError as error:
            failure = _said(error)
    _stop_at(failure, target, engine)
    if engine.ranks.rank == 0:
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
        TensorSpec(_key(kind, fragment), states.dtypes[kind], (fragment.length,))
        for tile in own
        for kind in KINDS
        for fragment in tile.fragments
    ]
    for tile in own:
        codes = states.eight_bits(tile)
        specs += [
            TensorSpec(_code_key(name, rank, tile), code.dtype, tuple(code.shape)) for name, code in codes.items()
        ]
    with TensorFile(path, specs) as file:
        for tile in own:
            with states.open(tile) as flat:
                for kind in KINDS:
                    for fragment in tile.fragments:
                        file.add(_piece(flat[kind], fragment).to(states.dtypes[kind]))
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
            engine.on_progress()
        if failure:
            raise failure
        return file.close() if file else None


def _key(kind: str, fragment: Fragment) -> str:
    return f"{kind}/{fragment.parameter}/{fragment.start}"


def _code_key(name: str, rank: int, tile: Tile) -> str:
    return f"8bit.{name}/{tile.number}/{rank}"


def _piece(flat: Tensor, fragment: Fragment) -> Tensor:
    return flat.narrow(0, fragment.offset, fragment.length)


def load(engine: TrainingEngine, folder: Path, passed_over: Callable[[str], None]) -> tuple[str, Position]:
    """Puts every rank where the newest checkpoint that holds left off; returns (name, position).

    passed_over: told of each newer checkpoint that is damaged, and why. Raises UserError when none holds.
    """
    damages: list[str] = []
    found = _found(engine, folder, damages.append, before=None)
    if found is None:
        raise UserError(
            f"--resume found no complete checkpoint in {folder}: leave --resume out and choose another --name."
            + "".join(f" {damage}" for damage in damages)
        )
    for damage in damages:
        passed_over(damage)
    return _taken(engine, folder, *found)


def load_before(
    engine: TrainingEngine, folder: Path, passed_over: Callable[[str], None], step: int
) -> tuple[str, Position] | None:
    """The same for the newest checkpoint of an earlier step, and removes the later ones; None when there is none."""
    found = _found(engine, folder, passed_over, before=step)
    if found is None:
        return None
    taken = _taken(engine, folder, *found)
    if engine.ranks.rank == 0:
        for path in folder.glob("step-*"):
            if path.name >= checkpoint_name(step):
                with suppress(OSError):
                    _remove(path)
    return taken


def _found(
    engine: TrainingEngine, folder: Path, passed_over: Callable[[str], None], before: int | None
) -> tuple[str, Manifest] | None:
    """What rank 0 finds, on every rank."""
    found: tuple[str, Manifest] | None = None
    damages: list[str] = []
    if engine.ranks.rank == 0:
        found = newest(folder, damages.append, before=before)
    found, damages = share((found, damages))
    for damage in damages:
        passed_over(damage)
    return found


def _taken(engine: TrainingEngine, folder: Path, name: str, manifest: Manifest) -> tuple[str, Position]:
    states = OptimizerStates(engine)
    states.prepare()
    problem = None
    try:
        with _Pieces(folder / name, manifest) as pieces, torch.no_grad():
            for tile in states.tiles:
                with states.open(tile) as flat:
                    _fill(tile, flat, pieces)
                    if not _same_codes(states, tile, pieces, manifest):
                        states.quantize(tile, flat)
    except (OSError, ValueError) as error:
        problem = str(error)
    if problems := [said for said in gather_objects(problem) if said]:
        raise UserError(
            f"Checkpoint {name} in {folder} cannot be read ({problems[0]}): "
            "move it away, and the one before it is taken."
        )
    states.finish(manifest.adam_steps, manifest.loss_scale)
    engine.skipped_steps = manifest.position.skipped_steps
    return name, manifest.position


def _fill(tile: Tile, flat: dict[str, Tensor], pieces: "_Pieces") -> None:
    for kind in KINDS:
        for fragment in tile.fragments:
            wanted = _piece(flat[kind], fragment)
            done = 0
            for piece in pieces.of(kind, fragment):
                wanted.narrow(0, done, len(piece)).copy_(piece)
                done += len(piece)
            if done != fragment.length:
                raise ValueError(f"it lacks part of the {kind} of {fragment.parameter}")


def _same_codes(states: OptimizerStates, tile: Tile, pieces: "_Pieces", manifest: Manifest) -> bool:
    """Takes 8-bit moments over as they are where the same stage and ranks wrote them; False where that is not so."""
    ranks = states.engine.ranks
    if (manifest.ranks, manifest.zero_stage) != (ranks.world_size, states.engine.plan.profile.zero_stage):
        return False
    writer = tile.number % ranks.world_size if tile.shared else ranks.rank
    codes = states.eight_bits(tile)
    for name, code in codes.items():
        found = pieces.whole(_code_key(name, writer, tile))
        if found is None or found.shape != code.shape:
            return False
        code.copy_(found)
    return True


class _Pieces:
    """All state files of a checkpoint, opened: pieces of a parameter from whichever ranks wrote them."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._paths = [folder / name for name in sorted(manifest.files) if name != WEIGHTS]
        self._stack = ExitStack()
        self._pieces: dict[str, list[tuple[int, Any]]] = {}

    def __enter__(self) -> "_Pieces":
        from safetensors import SafetensorError, safe_open

        for path in self._paths:
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as error:
                raise ValueError(f"{path.name}: {error}") from error
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                whole, _, start = key.rpartition("/")
                self._pieces.setdefault(whole, []).append((int(start), file.get_slice(key)))
        for found in self._pieces.values():
            found.sort(key=lambda piece: piece[0])
        return self

    def __exit__(self, *_: object) -> None:
        self._pieces.clear()
        self._stack.close()

    def whole(self, key: str) -> Tensor | None:
        """One tensor by its key."""
        before, _, last = key.rpartition("/")
        for start, piece in self._pieces.get(before, []):
            if start == int(last):
                tensor: Tensor = piece[:]
                return tensor
        return None

    def of(self, kind: str, fragment: Fragment) -> list[Tensor]:
        """The tensors that together are this fragment, in order; fewer where the files lack some."""
        wanted_start, wanted_end = fragment.start, fragment.start + fragment.length
        found: list[Tensor] = []
        at = wanted_start
        for start, piece in self._pieces.get(f"{kind}/{fragment.parameter}", []):
            end = start + piece.get_shape()[0]
            if start <= at < min(end, wanted_end):
                found.append(piece[at - start : min(end, wanted_end) - start])
                at = min(end, wanted_end)
        return found


def prune(folder: Path, newest_name: str, keep: int) -> None:
    """Keeps the `keep` newest complete checkpoints up to the one just written, and the best by validation loss.

    Later ones were damaged and passed over by a resume, those without a manifest never completed.
    """
    complete = sorted(
        (path for path in folder.glob("step-*") if path.name <= newest_name and (path / MANIFEST).is_file()),
        reverse=True,
    )
    kept = {path.name for path in complete[:keep]} | {best_name(folder)}
    for path in folder.glob("step-*"):
        if path.name not in kept or path.name > newest_name:
            with suppress(OSError):
                _remove(path)


def _remove(path: Path) -> None:
    # The manifest goes first: half a folder must not look like a checkpoint.
    (path / MANIFEST).unlink(missing_ok=True)
    if path.exists():
        shutil.rmtree(path)
