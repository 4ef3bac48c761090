"""gpt2ds's command line, with markers: every rank writes what it does, and when, to a file of its own.

`marked/cli.py train --gpus 2 ...` in place of `gpt2ds train --gpus 2 ...`, and what any launcher starts on each rank.
MARKERS names the folder of the files. Checkpoints are written as on a slow disk, so that a kill can meet each part of
one; nothing else differs.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Of each tensor of a checkpoint, before and after each file is put on the disk, and before a folder gets
# its name or is removed.
TENSOR_SECONDS = 0.004
SYNC_SECONDS = 0.015


class Marker:
    """Appends lines "SECONDS WORDS" by time.monotonic(), each in one write: a kill -9 loses none."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.step = 0
        self.micro_steps = 0

    def __call__(self, words: str) -> None:
        os.write(self._file, f"{time.monotonic():.4f} {words}\n".encode())

    def around(self, owner: Any, name: str, before: str, after: str | None = None) -> None:
        """Marks each call of that function: `before`, and `after` when it has returned."""
        function: Callable[..., Any] = getattr(owner, name)

        def marked(*arguments: Any, **named: Any) -> Any:
            self(before.format(step=self.step))
            result = function(*arguments, **named)
            if after:
                self(after.format(step=self.step))
            return result

        setattr(owner, name, marked)


def mark_ranks(mark: Marker) -> None:
    """Puts the markers into this rank."""
    from gpt2ds.training import checkpoints, guard, loop, restoring
    from gpt2ds.training.engine import TrainingEngine
    from gpt2ds.training.manifest import WEIGHTS, Manifest
    from gpt2ds.training.tensor_file import TensorFile

    class MarkedFile(TensorFile):
        def __init__(self, path: Path, *arguments: Any) -> None:
            mark(f"save {mark.step}: {'weights' if path.name == WEIGHTS else 'states'}")
            super().__init__(path, *arguments)

        def add(self, tensor: Any) -> None:
            time.sleep(TENSOR_SECONDS)
            super().add(tensor)

    one_step, micro_step, fsync, leave = loop.Run.one_step, TrainingEngine.micro_step, os.fsync, os._exit
    receive, rmtree, rename = guard.StopSignals._receive, shutil.rmtree, os.rename

    def marked_step(run: loop.Run) -> Any:
        mark.micro_steps = 0
        seen = one_step(run)
        mark.step = run.step
        mark(f"step {run.step} done" if seen else f"step {run.step + 1} left")
        return seen

    def marked_micro_step(engine: TrainingEngine, ids: Any, targets: Any) -> Any:
        loss = micro_step(engine, ids, targets)
        mark.micro_steps += 1
        mark(f"micro {mark.micro_steps}")
        return loss

    def marked_receive(signals: guard.StopSignals, number: int, frame: Any) -> None:
        mark(f"signal {number}")
        receive(signals, number, frame)

    def slow_fsync(descriptor: int) -> None:
        time.sleep(SYNC_SECONDS)
        fsync(descriptor)
        time.sleep(SYNC_SECONDS)

    def slow_rename(path: Any, target: Any) -> None:
        mark(f"save {mark.step}: name")
        time.sleep(SYNC_SECONDS)
        rename(path, target)

    def slow_rmtree(path: Any, *arguments: Any, **named: Any) -> None:
        time.sleep(SYNC_SECONDS)
        rmtree(path, *arguments, **named)

    def marked_exit(code: int) -> None:
        mark(f"exit {code}")
        leave(code)

    replaced: list[tuple[Any, str, Any]] = [
        (loop.Run, "one_step", marked_step),
        (TrainingEngine, "micro_step", marked_micro_step),
        (guard.StopSignals, "_receive", marked_receive),
        (checkpoints, "TensorFile", MarkedFile),
        (os, "fsync", slow_fsync),
        (os, "_exit", marked_exit),
        (os, "rename", slow_rename),
        (shutil, "rmtree", slow_rmtree),
    ]
    for owner, name, by in replaced:
        setattr(owner, name, by)
    mark.around(restoring, "load", "load begun", "load ended")
    mark.around(checkpoints, "save", "save {step} begun", "save {step} ended")
    mark.around(Manifest, "write", "save {step}: manifest")
    mark.around(checkpoints, "prune", "save {step}: prune")


def main() -> None:
    """See the module's docstring."""
    if "RANK" in os.environ:
        mark = Marker(Path(os.environ["MARKERS"]) / f"rank-{os.environ['RANK']}.txt")
        mark(f"start {os.getpid()} {os.getppid()}")
        mark_ranks(mark)
    else:
        from gpt2ds import launcher

        launcher.__file__ = __file__  # it starts the cli.py beside it: this one
    from gpt2ds.cli import main as gpt2ds

    gpt2ds()


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    main()
