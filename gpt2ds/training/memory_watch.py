"""Predicted beside measured: what each rank's device held at the peak of its steps, and what was said before the run.

The prediction is about a training step from the second one on, so a step's window is measured by itself: building the
engine, evaluations, samples and checkpoints count apart.
"""

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from gpt2ds.plan import Plan
from gpt2ds.runlog.memory_check import MemoryCheck


class MemoryWatch(AbstractContextManager[Any], Protocol):
    """Whoever measures the tensors on this rank's device; active from before the engine is built until the end."""

    def begin_step(self) -> int:
        """Opens a step's window; returns the peak in bytes since the last window closed."""
        ...

    def end_step(self) -> int:
        """Closes the window; returns its peak in bytes."""
        ...


class AllocatorWatch(AbstractContextManager["AllocatorWatch"]):
    """On CUDA the caching allocator keeps the account itself, at no cost."""

    def __exit__(self, *exception: object) -> None:
        """Nothing is to be undone."""

    def begin_step(self) -> int:
        """Allocated bytes at the peak since the last window."""
        return self._peak_since_reset()

    def end_step(self) -> int:
        """Allocated bytes at the peak of this window."""
        return self._peak_since_reset()

    @staticmethod
    def _peak_since_reset() -> int:
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak


class StepPeaks:
    """Every rank's largest figures over a session's steps after the first that was taken: that one makes Adam's
    moments, which need not be there yet when its backward pass peaks."""

    def __init__(self) -> None:
        self.steps = 0
        self.steady = False
        self.measured: list[int] = []
        self.reserved: list[int] = []
        self.outside: list[int] = []

    def add(self, measured: list[int], reserved: list[int] | None, outside: list[int], *, taken: bool) -> None:
        """One step's figures, a number for each rank. reserved: None where there is no caching allocator. taken: False
        when the step was left out, which makes no moments.
        """
        self.add_outside(outside)
        if self.steady:
            self.steps += 1
            self.measured = _larger(self.measured, measured)
            self.reserved = _larger(self.reserved, reserved or [])
        self.steady = self.steady or taken

    def add_outside(self, outside: list[int]) -> None:
        """Peaks between two steps, or after the last."""
        self.outside = _larger(self.outside, outside)

    def check(self, plan: Plan) -> MemoryCheck | None:
        """The comparison; None without a prediction or before a steady step."""
        if plan.estimate is None or not self.measured:
            return None
        return MemoryCheck(
            predicted_bytes=plan.estimate.peak_bytes,
            measured_bytes=self.measured,
            reserved_bytes=self.reserved or None,
            outside_bytes=self.outside,
            steps=self.steps,
        )


def _larger(so_far: list[int], new: list[int]) -> list[int]:
    return [max(pair) for pair in zip(so_far, new, strict=True)] if so_far else list(new)
