"""One rank of one bench setting, in a process of its own: a few real optimizer steps, and one JSON of what they took.

    python -m gpt2ds.probe.bench_worker SETTING.json RESULTS_FOLDER

Writes RESULTS_FOLDER/rank<N>.json in every case that leaves Python alive, also when the memory ran out.
"""

import json
import os
import resource
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt2ds.corpus.batches import Windows
from gpt2ds.devices import card_bytes
from gpt2ds.errors import UserError
from gpt2ds.files import write_atomically
from gpt2ds.options import TrainOptions
from gpt2ds.plan import Plan
from gpt2ds.planning import resolve
from gpt2ds.runlog.metrics import gib
from gpt2ds.training.engine import TrainingEngine, gather_numbers, start_ranks, stop_ranks
from gpt2ds.training.evaluation import to_device
from gpt2ds.training.out_of_memory import asked_bytes, is_out_of_memory

# fp16 begins with a loss scale that is too high on purpose: so many steps may be left out before it has come down.
SKIPPED_STEPS_MOST = 30


def main() -> None:
    """Measures, writes what came out, and leaves without taking the interpreter down (see cli.main)."""
    setting = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    bench = _Bench(setting)
    code = 0
    try:
        report = bench.measured()
    except UserError as error:
        report, code = {"result": "refused", "why": str(error)}, 2
    except Exception as error:
        traceback.print_exc()
        out = is_out_of_memory(error)
        what = wanted(error) if out else f"{type(error).__name__}: {first_line(error)}"
        report = {"result": "out of memory" if out else "crashed", "why": f"{what} {bench.doing}"}
        report |= bench.memory_now()
        code = 3
    report |= {"rank": int(os.environ["RANK"]), "at": time.time()}
    write_atomically(Path(sys.argv[2]) / f"rank{report['rank']}.json", json.dumps(report).encode())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class _Bench:
    """The steps of one rank, and what it was doing last."""

    def __init__(self, setting: dict[str, Any]) -> None:
        self.setting = setting
        self.doing = "while starting"
        self.device_kind = ""

    def measured(self) -> dict[str, Any]:
        """Builds the engine, takes the steps; the report is complete on rank 0."""
        setting = self.setting
        if setting["host_bytes"]:
            # An allocation beyond it fails by itself; without, the system would kill whatever process it likes.
            soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
            limits = [limit for limit in (soft, setting["host_bytes"]) if limit != resource.RLIM_INFINITY]
            resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
        options = TrainOptions().over(setting["options"])
        plan = resolve(options, ranks=setting["ranks"], only_measured=True)
        self.device_kind = plan.device_kind
        cap = card_bytes(options.gpu_memory) if options.gpu_memory else None
        ranks = start_ranks(plan.device_kind, memory_cap_bytes=cap)
        self.doing = "while building the engine"
        start = time.monotonic()
        engine = TrainingEngine(plan, ranks, sys.stderr)
        build_seconds = time.monotonic() - start
        built_bytes, _ = self.memory(engine)
        if plan.device_kind == "cuda":
            # What building takes for a moment is reported beside the steps' own peak, which the prediction is about.
            torch.cuda.reset_peak_memory_stats()

        windows = Windows(plan.corpus.train, plan.context)
        warm_up: list[float] = []
        timed: list[float] = []
        losses: list[float] = []
        while len(timed) < setting["steps"]:
            seconds, loss, taken = self.step(engine, windows, number=len(losses))
            losses.append(loss)
            if taken:
                (warm_up if len(warm_up) < setting["warm_up_steps"] else timed).append(seconds)
            elif engine.skipped_steps > SKIPPED_STEPS_MOST:
                raise ArithmeticError(f"the gradient was not finite in {engine.skipped_steps} steps")
        peak, reserved = self.memory(engine)
        rows = gather_numbers([peak, -1 if reserved is None else reserved, built_bytes], ranks.device)
        stop_ranks()
        speed = plan.tokens_per_step / statistics.median(timed)
        flops = plan.model.flops_per_token(plan.context) * speed
        return {
            "result": "measured",
            "why": None,
            "tokens_per_second": round(speed, 1),
            "mfu": round(flops / plan.peak_flops, 4) if plan.peak_flops else None,
            "step_seconds": [round(seconds, 4) for seconds in timed],
            "warm_up_seconds": [round(seconds, 4) for seconds in warm_up],
            "build_seconds": round(build_seconds, 2),
            "losses": [round(loss, 4) for loss in losses],
            "skipped_steps": engine.skipped_steps,
            "peak_bytes": [int(row[0]) for row in rows],
            "reserved_bytes": [int(row[1]) for row in rows] if reserved is not None else None,
            "building_peak_bytes": [int(row[2]) for row in rows],
        }

    def step(self, engine: TrainingEngine, windows: Windows, *, number: int) -> tuple[float, float, bool]:
        """One optimizer step over real windows; returns (seconds, mean loss of all ranks, whether it was taken)."""
        plan, device = engine.plan, engine.ranks.device
        _finish(device)
        start = time.monotonic()
        total = torch.zeros((), device=device)
        for round_ in range(plan.accumulation):
            self.doing = f"in step {number + 1}, micro-batch {round_ + 1} of {plan.accumulation}"
            if round_:
                engine.end_micro_step()
            ids, targets = to_device(self.micro_batch(plan, windows, number, round_, engine.ranks.rank), device)
            total += engine.micro_step(ids, targets)
        self.doing = f"in the optimizer step of step {number + 1}"
        _, taken = engine.optimizer_step(plan.schedule.peak_lr)
        rows = gather_numbers([float(total) / plan.accumulation], device)
        _finish(device)
        return time.monotonic() - start, statistics.fmean(row[0] for row in rows), taken

    @staticmethod
    def micro_batch(plan: Plan, windows: Windows, number: int, round_: int, rank: int) -> np.ndarray:
        """(B, T + 1) tokens; a text shorter than the steps begins again, which costs as much as a longer one."""
        first = ((number * plan.accumulation + round_) * plan.ranks + rank) * plan.micro_batch
        return windows[np.arange(first, first + plan.micro_batch, dtype=np.int64) % len(windows)]

    def memory(self, engine: TrainingEngine) -> tuple[int, int | None]:
        """(peak bytes so far, bytes reserved): CUDA's allocator, or the most that was ever resident on a CPU."""
        return engine.memory() if self.device_kind == "cuda" else (peak_resident_bytes(), None)

    def memory_now(self) -> dict[str, Any]:
        """What this rank alone had taken when it failed."""
        if self.device_kind == "cuda":
            return {
                "peak_bytes": [torch.cuda.max_memory_allocated()],
                "reserved_bytes": [torch.cuda.max_memory_reserved()],
            }
        return {"peak_bytes": [peak_resident_bytes()]} if self.device_kind == "cpu" else {}


def wanted(error: BaseException) -> str:
    """What the failed allocation asked for, as far as the message says so."""
    asked = asked_bytes(error)
    return f"tried to allocate {gib(asked)}" if asked else first_line(error) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error's message, of a length that a report can show."""
    return (str(error).splitlines() or [""])[0][:300]


def peak_resident_bytes() -> int:
    """The most memory that this process has ever had resident. Not ru_maxrss, which begins with the parent's peak."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
