"""One of several ranks of `gpt2ds train ARGUMENTS`, with a prediction that is half of the right one, and whose engine
fails in the session's third step.
"""

import sys
from dataclasses import replace
from typing import Any

from gpt2ds import cli
from gpt2ds.planning import _Planner
from gpt2ds.training.engine import TrainingEngine

predict, step = _Planner.estimate, TrainingEngine.optimizer_step
steps = 0


def half(*arguments: Any) -> Any:
    estimate = predict(*arguments)
    assert estimate is not None
    return replace(estimate, peak_bytes=estimate.peak_bytes // 2)


def failing(engine: TrainingEngine, lr: float) -> Any:
    global steps
    steps += 1
    if steps == 3:
        raise ArithmeticError("on purpose")
    return step(engine, lr)


_Planner.estimate = half  # type: ignore[method-assign]
TrainingEngine.optimizer_step = failing  # type: ignore[method-assign]
sys.argv[0] = "gpt2ds"
try:
    cli.main()
except ArithmeticError:
    print("failed on purpose", flush=True)
    # Not in the usual way: gloo's threads can abort a process that leaves so.
    sys.stdout.flush()
    cli.os._exit(0)
