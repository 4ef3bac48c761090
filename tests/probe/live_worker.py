"""One of several real ranks on CPUs: trains and prints what was live in each phase of the last step, a line a request.

Arguments: a JSON file with a list of trace requests, and who watches: "tracker" (LiveBytes) or "pages" (the kernel).
"""

import contextlib
import gc
import io
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pages import Pages, start_over_with_own_pages

from gpt2ds.gpt2.config import GPT2Config
from gpt2ds.probe.live import LiveBytes, PhasePeak
from gpt2ds.probe.meta_engine import TraceRequest, plan_of, train
from gpt2ds.training.engine import Ranks, TrainingEngine, start_ranks, stop_ranks

wait = dist.Work.wait


def wait_and_let_go(work: Any, *arguments: Any) -> Any:
    """gloo's threads hold a tensor for a moment after its exchange is done; NCCL's stream order has no such moment."""
    done = wait(work, *arguments)
    time.sleep(0.003)
    return done


def watched(request: TraceRequest, ranks: Ranks, oracle: str) -> list[PhasePeak]:
    """Builds the engine and trains it; the phases of the last step."""
    live: Any = LiveBytes(device="cpu") if oracle == "tracker" else Pages()
    with live if oracle == "tracker" else contextlib.nullcontext():
        engine = TrainingEngine(plan_of(request), ranks, io.StringIO())
        return train(engine, request, live)


def main() -> None:
    """Every request in turn, in one process."""
    path, oracle = sys.argv[1:]
    if oracle == "pages":
        start_over_with_own_pages()
        # Pages that nobody has written to are not there yet: torch writes to fresh tensors only in this mode.
        torch.use_deterministic_algorithms(True, warn_only=True)
    dist.Work.wait = wait_and_let_go  # type: ignore[method-assign, assignment]
    ranks = start_ranks("cpu")
    for given in json.loads(Path(path).read_text(encoding="utf-8")):
        request = TraceRequest(**given | {"model": GPT2Config(**given["model"])})
        if oracle == "pages":
            # What libraries load and keep at first use is no tensor.
            watched(replace(request, steps=1), ranks, oracle)
        phases = watched(request, ranks, oracle)
        gc.collect()
        print("PHASES " + json.dumps([asdict(phase) for phase in phases]), flush=True)
    stop_ranks()


if __name__ == "__main__":
    main()
