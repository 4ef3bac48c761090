"""Searches over the formula: the largest micro-batch that fits, and whether a setting fits at all."""

from collections.abc import Callable, Iterable
from dataclasses import replace

from gpt2ds.gpt2.config import GPT2Config
from gpt2ds.gpt2.policies import POLICIES, recomputed_flops_per_token
from gpt2ds.memory.formula import Estimate, MemorySetting, predict

# Between what tensors hold and what the caching allocator reserves for them lie 3 to 5% even with expandable segments.
ALLOCATOR_SLACK = 1 - 22_900 / 23_700

# Tokens of one micro-batch beyond which more buy no speed: 8 windows of 1,024 fill every product of a 24 GB card. A
# judgement, not a measurement.
ENOUGH_TOKENS = 8192


def tensor_bytes(device_bytes: int) -> int:
    """What tensors may take of so many bytes that can be reserved."""
    return int(device_bytes * (1 - ALLOCATOR_SLACK))


def fits(estimate: Estimate, device_bytes: int) -> bool:
    """Whether the predicted peak, and what the allocator adds to it, stay below what the device can reserve."""
    return estimate.peak_bytes <= tensor_bytes(device_bytes)


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


def fastest_that_fits(
    setting: MemorySetting, device_bytes: int, *, policies: Iterable[str] = POLICIES, most_peak_bytes: int | None = None
) -> MemorySetting | None:
    """The setting with the micro-batch, accumulation and recompute policy that should be fastest among those predicted
    to fit, at the same global batch; None when not even one sequence fits.

    The policy with the least extra arithmetic that leaves room for ENOUGH_TOKENS at a time; where none does, the one
    with the largest micro-batch. most_peak_bytes: a bound on the predicted peak beside the device's, for when a setting
    that was predicted to fit has not.
    """
    per_rank = setting.micro_batch * setting.accumulation
    divisors = [size for size in range(1, per_rank + 1) if per_rank % size == 0]
    enough = min(per_rank, -(-ENOUGH_TOKENS // setting.context))
    best: MemorySetting | None = None
    for policy in sorted(policies, key=lambda name: recomputed_flops_per_token(setting.model, name, setting.context)):
        if policy == "host":
            continue  # full recompute with a transfer on top: only for those who ask for it
        for size in reversed(divisors):
            candidate = replace(setting, micro_batch=size, accumulation=per_rank // size, recompute=policy)
            estimate = predict(candidate)
            if fits(estimate, device_bytes) and (most_peak_bytes is None or estimate.peak_bytes <= most_peak_bytes):
                if size >= enough:
                    return candidate
                if best is None or size > best.micro_batch:
                    best = candidate
                break
    return best


def _last_true(holds: Callable[[int], bool], most: int) -> int:
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
