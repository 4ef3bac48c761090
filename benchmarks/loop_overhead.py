"""What the training loop costs beside DeepSpeed: time of a gpt2_small step outside engine(...), backward and step.

    python benchmarks/loop_overhead.py [--steps 6] [--model gpt2_small]

One rank on this machine's CPUs, bf16 (zero2.json), micro-batch 1. Data, the exchange between ranks, metrics and console
are in the loop's share.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt2ds.devices import this_machine
from gpt2ds.options import TrainOptions
from gpt2ds.plan import Plan
from gpt2ds.planning import resolve
from gpt2ds.runlog.console import console_view
from gpt2ds.runlog.metrics import RunLog

RESULTS = Path(__file__).parent / "results"


class Stopwatch:
    """Adds up the time spent inside the functions that it wraps; as a view of the run it sees each step's end."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.last_end: float | None = None
        self.shares: list[float] = []

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - start

        return timed

    def show(self, record: dict[str, Any]) -> None:
        """Takes the share of the time since the last step's end that was not spent in DeepSpeed."""
        now = time.perf_counter()
        if record["kind"] == "step":
            if self.last_end is not None:
                whole = now - self.last_end
                self.shares.append((whole - self.seconds) / whole)
                print(f"step {record['step']}: {whole:.3f} s, of it {whole - self.seconds:.4f} s the loop's own")
            self.last_end, self.seconds = now, 0.0

    def close(self) -> None:
        """Nothing to close."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--model", default="gpt2_small")
    arguments = parser.parse_args()
    os.environ["DS_ACCELERATOR"] = "cpu"
    inside = Stopwatch()
    from deepspeed.runtime.engine import DeepSpeedEngine

    from gpt2ds.training.guard import StopSignals
    from gpt2ds.training.session import train

    for name in ("forward", "backward", "step"):
        setattr(DeepSpeedEngine, name, inside.around(getattr(DeepSpeedEngine, name)))

    def recorder(plan: Plan) -> RunLog:
        # The console comes first, so that what it costs has been spent when this step's end is seen.
        return RunLog(plan.folder, [console_view(plan.to_dict()), inside])

    with tempfile.TemporaryDirectory() as folder:
        options = TrainOptions(
            ds="zero2",
            model=arguments.model,
            out=Path(folder),
            name="overhead",
            micro_batch=1,
            accumulation=1,
            steps=arguments.steps,
            evaluation_windows=1,
            evaluate_every=10**6,
            sample_tokens=1,
        )
        train(resolve(options, ranks=1), recorder, StopSignals())
    shares = inside.shares
    machine = this_machine()
    result = {
        "what": "share of a training step outside DeepSpeed's forward, backward and step",
        "model": arguments.model,
        "machine": {"cpu": machine.cpu_name, "cores": machine.cores, "gpu": None},
        "python": platform.python_version(),
        "shares": [round(share, 5) for share in shares],
        "median_share": round(statistics.median(shares), 5),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "loop_overhead.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"median: {result['median_share']:.2%} of a step")


if __name__ == "__main__":
    main()
