"""What a real run on CPUs holds in tensors, step by step: LiveBytes as the training loop's observer of memory."""

import time
from typing import Any

import torch.distributed as dist

from gpt2ds.probe.live import LiveBytes

# gloo's threads let a tensor go a moment after its exchange is done; on a GPU, where exchanges are ordered by streams,
# there is no such moment, and the prediction knows none. It matters where the backward pass peaks, not where the loss
# does: there the wait changed nothing in ZeRO-2 and 3.
LET_GO_SECONDS = 0.003


class TensorWatch:
    """Counts the bytes of all tensors of this rank, a `training.memory_watch.MemoryWatch`.

    Every operation passes through Python meanwhile, and every exchange between ranks waits a moment.
    """

    def __init__(self) -> None:
        self.live = LiveBytes(device="cpu")
        self._wait = dist.Work.wait

    def __enter__(self) -> "TensorWatch":
        wait = self._wait

        def wait_and_let_go(work: Any, *arguments: Any) -> Any:
            done = wait(work, *arguments)
            time.sleep(LET_GO_SECONDS)
            return done

        work_type: Any = dist.Work
        work_type.wait = wait_and_let_go
        self.live.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        self.live.__exit__(*exception)  # type: ignore[no-untyped-call]
        work_type: Any = dist.Work
        work_type.wait = self._wait

    def begin_step(self) -> int:
        """Bytes of live tensors at the peak since the last window."""
        return self._next_window("step")

    def end_step(self) -> int:
        """Bytes of live tensors at the peak of this window."""
        return self._next_window("outside of the steps")

    def _next_window(self, name: str) -> int:
        peak = self.live.phases[-1].peak_bytes
        self.live.begin(name)
        del self.live.phases[:-1]  # a long run has many
        return peak
