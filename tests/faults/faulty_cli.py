"""gpt2ds's command line with numbers that go wrong on one rank, wherever its data is of certain sequences.

FAULT: a JSON object with "kind" (of `rank_steps.poison`, or "update", a learning rate that ruins the weights), "rank",
and "from" and "to", positions in the data.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "training"))

from rank_steps import poison
from torch import Tensor

from gpt2ds.cli import main
from gpt2ds.corpus.batches import Batches, Indices
from gpt2ds.training.engine import TrainingEngine

FAULT = json.loads(os.environ["FAULT"])
position = -1
micro_batches, micro_step = Batches.micro_batches, TrainingEngine.micro_step
optimizer_step = TrainingEngine.optimizer_step


def is_bad() -> bool:
    return bool(FAULT["from"] <= position < FAULT["to"])


def noting_micro_batches(self: Batches, sequences_seen: int) -> Iterator[Indices]:
    global position
    position = sequences_seen
    yield from micro_batches(self, sequences_seen)


def faulty_micro_step(self: TrainingEngine, ids: Tensor, targets: Tensor) -> Any:
    faulty = self.ranks.rank == FAULT["rank"] and is_bad() and FAULT["kind"] != "update"
    hook = poison(self.module, FAULT["kind"]) if faulty else None
    try:
        return micro_step(self, ids, targets)
    finally:
        if hook:
            hook.remove()


def faulty_optimizer_step(self: TrainingEngine, lr: float) -> Any:
    return optimizer_step(self, 1.0 if FAULT["kind"] == "update" and is_bad() else lr)


Batches.micro_batches = noting_micro_batches  # type: ignore[method-assign]
TrainingEngine.micro_step = faulty_micro_step  # type: ignore[method-assign]
TrainingEngine.optimizer_step = faulty_optimizer_step  # type: ignore[method-assign]
main()
