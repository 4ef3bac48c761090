"""An ordered pool of processes over the standard library's, with a bounded number of tasks in flight.

What it adds: results in the order of the tasks, a worker that was killed is reported, and workers neither take the
terminal's Ctrl-C nor outlive their parent.
"""

import ctypes
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from types import TracebackType
from typing import Any, TypeVar

from gpt2ds.errors import UserError

T = TypeVar("T")

# Results that may wait for an earlier one, per worker; with the size of a result this bounds the memory.
_AHEAD_PER_WORKER = 4
_PR_SET_PDEATHSIG = 1  # prctl(2)


class Workers:
    """`processes` processes (1: none, everything runs in the caller's). A context manager; leaving it ends them."""

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        if self._processes > 1:
            # Fresh interpreters: a fork would copy the progress bar's thread in whatever state it is.
            self._pool = ProcessPoolExecutor(
                self._processes, mp_context=get_context("spawn"), initializer=_begin, initargs=(os.getpid(),)
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def ordered(self, function: Callable[..., T], arguments: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        """function(*a) for each a, in the order of `arguments` (read lazily, a bounded number ahead). `function` is
        a module-level function.

        Raises what the function raised; UserError if a worker was killed.
        """
        if not self._pool:
            for argument in arguments:
                yield function(*argument)
            return
        waiting: deque[Future[T]] = deque()
        try:
            for argument in arguments:
                waiting.append(self._pool.submit(function, *argument))
                if len(waiting) >= _AHEAD_PER_WORKER * self._processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "A worker process was killed (often: out of memory); the same command with fewer --processes goes on "
                "from here."
            ) from error


def _begin(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; only the parent acts on it
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that
        os._exit(1)
