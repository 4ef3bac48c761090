"""One rank of the doctor's all-reduce: `python -m gpt2ds.doctor.worker BACKEND FOLDER SECONDS`.

Writes where it stands to FOLDER/rank0.json, so that whoever waits can say where a hung rank hangs.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from gpt2ds.files import write_atomically

SMALL_NUMBERS = 1000
LARGE_BYTES = 64 * 2**20
REPEATS = 3


def main() -> None:
    """Joins the group, adds numbers up, checks the sum, times a larger one."""
    backend, folder, limit = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    # Should the one who started this be gone, nobody else would end a rank that hangs.
    signal.alarm(limit)
    report = folder / f"rank{os.environ['RANK']}.json"

    def tell(stage: str, **more: Any) -> None:
        write_atomically(report, json.dumps({"stage": stage} | more).encode())

    stage = "importing torch"
    try:
        tell(stage)
        import torch
        import torch.distributed as dist

        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
        torch.set_num_threads(1)
        if backend == "nccl":
            tell(stage := "starting CUDA")
            torch.cuda.set_device(device)
            torch.zeros(1, device=device).item()
        tell(stage := "joining the group")
        dist.init_process_group(backend)
        rank, ranks = dist.get_rank(), dist.get_world_size()
        tell(stage := "adding up")
        numbers = torch.arange(SMALL_NUMBERS, device=device) * (rank + 1)
        dist.all_reduce(numbers)
        right = torch.equal(numbers.cpu(), torch.arange(SMALL_NUMBERS) * (ranks * (ranks + 1) // 2))
        tell(stage := "adding up 64 MiB")
        large = torch.full((LARGE_BYTES // 4,), 1.0, device=device)
        seconds = []
        for _ in range(REPEATS):
            large.fill_(1.0)
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(large)
            if backend == "nccl":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        right = right and bool((large == ranks).all())
        tell("done", right=right, seconds=min(seconds), bytes=LARGE_BYTES)
        dist.barrier()
    except Exception as error:
        traceback.print_exc()
        lines = str(error).splitlines() or [""]
        tell(stage, error=f"{type(error).__name__}: {lines[0]}")
        _leave(1)
    _leave(0)


def _leave(code: int) -> None:
    # What was to be found is on the disk. Backends' threads abort a usual exit now and then.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
