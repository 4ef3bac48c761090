"""gpt2ds's command line with numbers that go wrong on one rank, wherever its data is of certain sequences.

FAULT: a JSON object with "kind" (of `rank_steps.poison`), "rank", and "from" and "to", positions in the data.
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


def noting_micro_batches(self: Batches, sequences_seen: int) -> Iterator[Indices]:
    global position
    position = sequences_seen
    yield from micro_batches(self, sequences_seen)


def faulty_micro_step(self: TrainingEngine, ids: Tensor, targets: Tensor) -> Any:
    faulty = self.ranks.rank == FAULT["rank"] and FAULT["from"] <= position < FAULT["to"]
    hook = poison(self.module, FAULT["kind"]) if faulty else None
    try:
        return micro_step(self, ids, targets)
    finally:
        if hook:
            hook.remove()


Batches.micro_batches = noting_micro_batches  # type: ignore[method-assign]
TrainingEngine.micro_step = faulty_micro_step  # type: ignore[method-assign]
main()
