"""Searches over the formula: the largest micro-batch that fits, and whether a setting fits at all."""

from collections.abc import Callable, Iterable
from dataclasses import replace

from gpt2ds.gpt2.config import GPT2Config
from gpt2ds.memory.formula import Estimate, MemorySetting, predict

# Between what tensors hold and what the caching allocator reserves for them lie 3 to 5% even with expandable segments.
ALLOCATOR_SLACK = 1 - 22_900 / 23_700


def fits(estimate: Estimate, device_bytes: int) -> bool:
    """Whether the predicted peak, and what the allocator adds to it, stay below what the device can reserve."""
    return estimate.peak_bytes <= device_bytes * (1 - ALLOCATOR_SLACK)


def largest_micro_batch(setting: MemorySetting, device_bytes: int, *, most: int = 4096) -> int:
    """The largest micro-batch whose predicted peak fits, everything else equal; 0 when not even one sequence does.

    A bisection: the peak never falls when the micro-batch grows.
    """

    def holds(micro_batch: int) -> bool:
        return fits(predict(replace(setting, micro_batch=micro_batch)), device_bytes)

    return _last_true(holds, most)


def largest_model(
    models: Iterable[GPT2Config], setting_for: Callable[[GPT2Config], MemorySetting], device_bytes: int
) -> GPT2Config | None:
    """The model with the most parameters whose setting fits; None when none does."""
    fitting = [model for model in models if fits(predict(setting_for(model)), device_bytes)]
    return max(fitting, key=lambda model: model.parameters, default=None)


def _last_true(holds: Callable[[int], bool], most: int) -> int:
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
