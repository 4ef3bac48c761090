"""One of several real ranks on CPUs: trains under LiveBytes and prints the phases of the last step, a line a request.

Argument: a JSON file with a list of trace requests.
"""

import io
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from gpt2ds.gpt2.config import GPT2Config
from gpt2ds.probe.live import LiveBytes
from gpt2ds.probe.meta_engine import TraceRequest, plan_of, train
from gpt2ds.training.engine import TrainingEngine, start_ranks, stop_ranks

wait = dist.Work.wait


def wait_and_let_go(work: Any, *arguments: Any) -> Any:
    """gloo's threads hold a tensor for a moment after its exchange is done; NCCL's stream order has no such moment."""
    done = wait(work, *arguments)
    time.sleep(0.003)
    return done


dist.Work.wait = wait_and_let_go
ranks = start_ranks("cpu")
for given in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
    request = TraceRequest(**given | {"model": GPT2Config(**given["model"])})
    live = LiveBytes(device="cpu")
    with live:
        engine = TrainingEngine(plan_of(request), ranks, io.StringIO())
        phases = train(engine, request, live)
    del engine
    print("PHASES " + json.dumps([asdict(phase) for phase in phases]), flush=True)
stop_ranks()
