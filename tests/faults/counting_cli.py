"""gpt2ds's command line that notes which sequences this rank trains on: a line "position window" each in COUNT_FILE."""

import os
from pathlib import Path

from gpt2ds.cli import main
from gpt2ds.corpus.batches import Batches, Indices

file = Path(f"{os.environ['COUNT_FILE']}-{os.environ['RANK']}").open("a", encoding="ascii")  # noqa: SIM115
window_numbers = Batches.window_numbers


def noted(self: Batches, positions: Indices) -> Indices:
    numbers = window_numbers(self, positions)
    for position, number in zip(positions.tolist(), numbers.tolist(), strict=True):
        file.write(f"{position} {number}\n")
    file.flush()
    return numbers


Batches.window_numbers = noted  # type: ignore[method-assign]
main()
