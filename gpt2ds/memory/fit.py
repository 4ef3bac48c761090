"""Searches over the formula: what fits, the largest micro-batch, and the fastest of several settings."""

from collections.abc import Callable, Iterable
from dataclasses import replace

from gpt2ds.gpt2.config import GPT2Config
from gpt2ds.gpt2.policies import POLICIES, recomputed_flops_per_token
from gpt2ds.memory.communication import traffic
from gpt2ds.memory.formula import Estimate, predict
from gpt2ds.memory.setting import MemorySetting

# Between what tensors hold and what the caching allocator reserves for them lie 3 to 5% even with expandable segments.
ALLOCATOR_SLACK = 1 - 22_900 / 23_700

# Tokens of one micro-batch beyond which more buy no speed: 8 windows of 1,024 fill every product of a 24 GB card. A
# judgement, not a measurement.
ENOUGH_TOKENS = 8192

MICRO_BATCH_MOST = 4096


def tensor_bytes(device_bytes: int) -> int:
    """What tensors may take of so many bytes that can be reserved."""
    return int(device_bytes * (1 - ALLOCATOR_SLACK))


def fits(estimate: Estimate, device_bytes: int) -> bool:
    """Whether the predicted peak, and what the allocator adds to it, stay below what the device can reserve."""
    return estimate.peak_bytes <= tensor_bytes(device_bytes)


def largest_micro_batch(setting: MemorySetting, device_bytes: int, *, most: int = MICRO_BATCH_MOST) -> int:
    """The largest micro-batch whose predicted peak fits, everything else equal; 0 when not even one sequence does.

    The peak never falls when the micro-batch grows, and is nearly a straight line: the next size that is tried lies on
    the line between the last that fits and the first that does not, every other time in the middle between them.
    """
    room = tensor_bytes(device_bytes)
    peaks: dict[int, int] = {}

    def peak(size: int) -> int:
        if size not in peaks:
            peaks[size] = predict(replace(setting, micro_batch=size)).peak_bytes
        return peaks[size]

    if peak(1) > room:
        return 0
    if peak(most) <= room:
        return most
    low, high, on_line = 1, most, True
    while high - low > 1:
        part = (room - peak(low)) / (peak(high) - peak(low)) if on_line else 0.5
        size = min(max(low + 1, low + int(part * (high - low))), high - 1)
        low, high = (size, high) if peak(size) <= room else (low, size)
        # A line that ends in a single step has found the size or leads nowhere.
        on_line = not on_line or high - low <= 2
    return low


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
    sizes = divisors(per_rank)
    policies = list(policies)
    best: MemorySetting | None = None
    for policy in sorted(policies, key=lambda name: recomputed_flops_per_token(setting.model, name, setting.context)):
        if policy == "host" and len(policies) > 1:
            continue  # full recompute with a transfer on top: only for those who ask for it

        def with_size(size: int, policy: str = policy) -> MemorySetting:
            return replace(setting, micro_batch=size, accumulation=per_rank // size, recompute=policy)

        def holds(index: int, with_size: Callable[[int], MemorySetting] = with_size) -> bool:
            estimate = predict(with_size(sizes[index - 1]))
            return fits(estimate, device_bytes) and (most_peak_bytes is None or estimate.peak_bytes <= most_peak_bytes)

        # Without accumulation no sums are kept, so the whole batch at once may fit where its half does not.
        index = len(sizes) if holds(len(sizes)) else last_true(holds, len(sizes) - 1)
        if not index:
            continue
        found = with_size(sizes[index - 1])
        if has_enough_tokens(found):
            return found
        if best is None or found.micro_batch > best.micro_batch:
            best = found
    return best


def has_enough_tokens(setting: MemorySetting) -> bool:
    """Whether a larger micro-batch is expected to buy no speed, or the global batch holds no larger one."""
    per_rank = setting.micro_batch * setting.accumulation
    return setting.micro_batch >= min(per_rank, -(-ENOUGH_TOKENS // setting.context))


def slowness(setting: MemorySetting) -> tuple[float, ...]:
    """The order in which settings of one global batch are preferred, the fastest first.

    What is offloaded last of all; 16 bits before fp32; a micro-batch that fills the card; the least recompute; ZeRO-3,
    which waits for weights, after the others; then the least that crosses the link between the GPUs; then the least
    memory. The order is a judgement: nothing of it was measured on a GPU.
    """
    return (
        setting.offload_optimizer + setting.offload_param,
        setting.dtype == "fp32",
        0 if has_enough_tokens(setting) else 1 / setting.micro_batch,
        recomputed_flops_per_token(setting.model, setting.recompute, setting.context),
        list(POLICIES).index(setting.recompute),
        setting.zero_stage == 3,
        traffic(setting).total,
        predict(setting).peak_bytes,
    )


def divisors(number: int) -> list[int]:
    """All divisors, the smallest first."""
    small = [size for size in range(1, int(number**0.5) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def last_true(holds: Callable[[int], bool], most: int) -> int:
    """The largest of 1 to `most` for which `holds`, which once false stays false; 0 for none."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
