"""The pool of processes: order, errors, deaths."""

import os
import signal
import time
from collections.abc import Iterator

import pytest

from gpt2ds.corpus.workers import Workers
from gpt2ds.errors import UserError


def test_results_come_in_order_whatever_each_takes() -> None:
    with Workers(3) as workers:
        assert list(workers.ordered(divmod, ((n, 7) for n in range(200)))) == [divmod(n, 7) for n in range(200)]
        slow_first = [(0.2,), (0.0,), (0.0,), (0.1,), (0.0,)]
        assert list(workers.ordered(time.sleep, slow_first)) == [None] * 5
        assert list(workers.ordered(len, [])) == []


def test_large_tasks_and_results_do_not_block_each_other() -> None:
    block = bytes(3_000_000)
    with Workers(2) as workers:
        assert all(len(result) == len(block) for result in workers.ordered(bytes, ((block,) for _ in range(20))))


def test_only_a_bounded_number_of_tasks_is_read_ahead() -> None:
    taken = 0

    def tasks() -> Iterator[tuple[float]]:
        nonlocal taken
        for _ in range(1000):
            taken += 1
            yield (0.0,)

    with Workers(2) as workers:
        results = workers.ordered(time.sleep, tasks())
        next(results)
        assert taken < 20


def test_an_error_comes_back_with_its_kind() -> None:
    with Workers(2) as workers, pytest.raises(ZeroDivisionError):
        list(workers.ordered(divmod, [(1, 0)]))


def test_a_killed_worker_is_reported() -> None:
    with Workers(2) as workers, pytest.raises(UserError, match="A worker process was killed"):
        list(workers.ordered(signal.raise_signal, [(signal.SIGKILL,)] * 2))


def test_no_process_is_left() -> None:
    with Workers(2) as workers:
        pids = list(workers.ordered(os.getpid, [()] * 8))
        assert os.getpid() not in pids
    for pid in set(pids):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_one_process_is_this_one() -> None:
    with Workers(1) as workers:
        assert list(workers.ordered(os.getpid, [()])) == [os.getpid()]
