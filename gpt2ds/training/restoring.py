"""Going on from a checkpoint: every rank takes the pieces of every state that it holds now, whoever wrote them."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2ds.errors import UserError
from gpt2ds.training.checkpoints import code_key, forget_from, state_key
from gpt2ds.training.engine import TrainingEngine, gather_objects, share
from gpt2ds.training.manifest import WEIGHTS, Manifest, newest
from gpt2ds.training.states import KINDS, MASTER, Fragment, OptimizerStates, Tile


def load(engine: TrainingEngine, folder: Path, passed_over: Callable[[str], None]) -> tuple[str, Manifest]:
    """Puts every rank where the newest checkpoint that holds left off; returns (name, manifest).

    passed_over: told of each newer checkpoint that is damaged, and why. Raises UserError when none holds.
    """
    damages: list[str] = []
    taken = _taken(engine, folder, damages.append, before=None)
    if taken is None:
        raise UserError(
            f"--resume found no complete checkpoint in {folder}: leave --resume out and choose another --name."
            + "".join(f" {damage}" for damage in damages)
        )
    for damage in damages:
        passed_over(damage)
    return taken


def load_before(
    engine: TrainingEngine, folder: Path, passed_over: Callable[[str], None], step: int
) -> tuple[str, Manifest] | None:
    """The same for the newest checkpoint of an earlier step, and removes the later ones; None when there is none."""
    taken = _taken(engine, folder, passed_over, before=step)
    if taken and engine.ranks.rank == 0:
        forget_from(folder, step)
    return taken


def _taken(
    engine: TrainingEngine, folder: Path, passed_over: Callable[[str], None], before: int | None
) -> tuple[str, Manifest] | None:
    """The newest checkpoint that all ranks could read; None, and states that may be of several, when there is none."""
    identity = engine.plan.identity()
    while found := _found(engine, folder, passed_over, before):
        name, manifest = found
        problem = None
        if manifest.identity != identity:
            problem = "it belongs to another plan"
        else:
            problem = _read(engine, folder / name, manifest)
        if problem is None:
            engine.skipped_steps = manifest.position.skipped_steps
            return name, manifest
        passed_over(f"Checkpoint {name} is passed over: {problem}.")
        before = manifest.position.step
    return None


def _found(
    engine: TrainingEngine, folder: Path, passed_over: Callable[[str], None], before: int | None
) -> tuple[str, Manifest] | None:
    """What rank 0 finds, on every rank."""
    found: tuple[str, Manifest] | None = None
    damages: list[str] = []
    if engine.ranks.rank == 0:
        found = newest(folder, damages.append, before=before, progress=engine.on_progress)
    found, damages = share((found, damages))
    for damage in damages:
        passed_over(damage)
    return found


def _read(engine: TrainingEngine, folder: Path, manifest: Manifest) -> str | None:
    """Replaces the engine's states; what is wrong with the files on any rank, or None."""
    from safetensors import SafetensorError

    states = OptimizerStates(engine)
    states.prepare()
    problem = None
    try:
        with _Pieces(folder, manifest) as pieces, torch.no_grad():
            for tile in states.tiles:
                with states.open(tile):
                    _fill(states, tile, pieces, manifest)
    except (OSError, ValueError, SafetensorError) as error:
        problem = str(error)
    if problems := [said for said in gather_objects(problem) if said]:
        return problems[0]
    states.finish(manifest.adam_steps, manifest.loss_scale)
    return None


def _fill(states: OptimizerStates, tile: Tile, pieces: "_Pieces", manifest: Manifest) -> None:
    in_eight_bits = bool(states.eight_bits(tile))
    same_codes = in_eight_bits and _take_codes(states, tile, pieces, manifest)
    for kind in KINDS:
        if not in_eight_bits or kind == MASTER:
            for fragment in tile.fragments:
                pieces.copy(kind, fragment, states.piece(tile, kind, fragment))
                states.engine.on_progress()
        elif not same_codes:
            whole = states.empty(tile)
            for fragment in tile.fragments:
                pieces.copy(kind, fragment, whole.narrow(0, fragment.offset, fragment.length))
            states.quantize(tile, kind, whole)


def _take_codes(states: OptimizerStates, tile: Tile, pieces: "_Pieces", manifest: Manifest) -> bool:
    """Takes 8-bit moments over as they are where the same stage and ranks wrote them; False where that is not so."""
    ranks = states.engine.ranks
    if (manifest.ranks, manifest.zero_stage) != (ranks.world_size, states.engine.plan.profile.zero_stage):
        return False
    writer = tile.number % ranks.world_size if tile.shared else ranks.rank
    for name, code in states.eight_bits(tile).items():
        found = pieces.whole(code_key(name, writer, tile))
        if found is None or found.shape != code.shape:
            return False
        code.copy_(found)
    return True


class _Pieces:
    """All state files of a checkpoint, opened: pieces of a parameter from whichever ranks wrote them.

    Raises ValueError where the files are not what the manifest's writer would have written.
    """

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
                piece = file.get_slice(key)
                if not start.isdigit() or not piece.get_shape():
                    raise ValueError(f"{path.name} holds a tensor {key!r} that is none of ours")
                self._pieces.setdefault(whole, []).append((int(start), piece))
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

    def copy(self, kind: str, fragment: Fragment, target: Tensor) -> None:
        """Fills the target, flat, with a fragment of a parameter's states."""
        at, end = fragment.start, fragment.start + fragment.length
        for start, piece in self._pieces.get(state_key(kind, fragment.parameter), []):
            if len(piece.get_shape()) != 1:
                raise ValueError(f"its {kind} of {fragment.parameter} is not flat")
            stop = min(start + piece.get_shape()[0], end)
            if start <= at < stop:
                target.narrow(0, at - fragment.start, stop - at).copy_(piece[at - start : stop - start])
                at = stop
        if at != end:
            raise ValueError(f"it lacks part of the {kind} of {fragment.parameter}")
