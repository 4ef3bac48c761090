"""The searches over the formula: against trying everything, and the order in which settings are preferred."""

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2ds.gpt2.config import MODELS
from gpt2ds.gpt2.policies import POLICIES, recomputed_flops_per_token
from gpt2ds.memory.communication import traffic
from gpt2ds.memory.fit import (
    divisors,
    fastest_that_fits,
    fits,
    has_enough_tokens,
    largest_micro_batch,
    slowness,
)
from gpt2ds.memory.formula import predict
from gpt2ds.memory.setting import MemorySetting

GIB = 2**30
SMALL = MemorySetting(
    model=MODELS["gpt2_small"],
    context=1024,
    micro_batch=1,
    accumulation=24,
    ranks=1,
    zero_stage=2,
    dtype="bf16",
    grad_accum_dtype="fp32",
)


@pytest.mark.parametrize("number", [1, 2, 12, 97, 512, 5040])
def test_divisors(number: int) -> None:
    assert divisors(number) == [size for size in range(1, number + 1) if number % size == 0]


@given(
    room=st.integers(1 * GIB, 12 * GIB),
    recompute=st.sampled_from(list(POLICIES)),
    stage=st.sampled_from([0, 1, 2, 3]),
    ranks=st.sampled_from([1, 2, 5]),
    most=st.sampled_from([1, 2, 7, 64, 4096]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_largest_micro_batch_fits_and_the_next_does_not(
    room: int, recompute: str, stage: int, ranks: int, most: int
) -> None:
    accumulate = "fp32" if stage else "bf16"
    setting = replace(SMALL, recompute=recompute, zero_stage=stage, ranks=ranks, grad_accum_dtype=accumulate)
    found = largest_micro_batch(setting, room, most=most)
    assert 0 <= found <= most
    if found:
        assert fits(predict(replace(setting, micro_batch=found)), room)
    if found < most:
        assert not fits(predict(replace(setting, micro_batch=found + 1)), room)


@given(room=st.integers(2 * GIB, 16 * GIB), per_rank=st.integers(1, 60), ranks=st.sampled_from([1, 2]))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_no_setting_with_less_recompute_fits(room: int, per_rank: int, ranks: int) -> None:
    start = replace(SMALL, accumulation=per_rank, ranks=ranks)

    def at(size: int, policy: str) -> MemorySetting:
        return replace(start, micro_batch=size, accumulation=per_rank // size, recompute=policy)

    policies = [policy for policy in POLICIES if policy != "host"]
    fitting = [
        setting
        for size, policy in product(divisors(per_rank), policies)
        if fits(predict(setting := at(size, policy)), room)
    ]
    found = fastest_that_fits(start, room)
    if found is None:
        assert not fitting
        return
    assert found in fitting
    assert found.micro_batch * found.accumulation == per_rank

    def cost(setting: MemorySetting) -> float:
        return recomputed_flops_per_token(setting.model, setting.recompute)

    if has_enough_tokens(found):
        assert not any(has_enough_tokens(other) and cost(other) < cost(found) for other in fitting)
        same = [other for other in fitting if other.recompute == found.recompute]
        assert found.micro_batch == max(other.micro_batch for other in same)
    else:
        assert found.micro_batch == max(other.micro_batch for other in fitting)


def test_a_bound_on_the_peak_counts_beside_the_room() -> None:
    free = fastest_that_fits(SMALL, 24 * GIB)
    assert free is not None
    limit = predict(free).peak_bytes - 1
    bounded = fastest_that_fits(SMALL, 24 * GIB, most_peak_bytes=limit)
    assert bounded is not None and predict(bounded).peak_bytes <= limit
    assert fastest_that_fits(SMALL, 24 * GIB, most_peak_bytes=GIB) is None
    assert fastest_that_fits(SMALL, 24 * GIB, policies=["host"]) is not None


def test_the_order_of_preference() -> None:
    setting = replace(SMALL, micro_batch=8, accumulation=8, ranks=2)
    in_order = [
        replace(setting, zero_stage=1),
        replace(setting, zero_stage=2),
        replace(setting, zero_stage=3),
        replace(setting, zero_stage=1, recompute="products"),
        replace(setting, zero_stage=1, recompute="attention"),
        replace(setting, zero_stage=1, recompute="full"),
        replace(setting, zero_stage=1, micro_batch=4, accumulation=16),
        replace(setting, zero_stage=1, micro_batch=1, accumulation=64),
        replace(setting, zero_stage=2, offload_optimizer=True),
        replace(setting, zero_stage=3, offload_optimizer=True, offload_param=True),
    ]
    turned = in_order[::-1]
    assert sorted(turned, key=slowness) == in_order
    # Alone a rank sends nothing, and the stage that takes least memory comes first; with one micro-batch a step ZeRO-1
    # and 2 send the same.
    alone = [replace(setting, ranks=1, zero_stage=stage) for stage in (1, 2)]
    once = [replace(setting, accumulation=1, zero_stage=stage) for stage in (1, 2)]
    for pair in (alone, once):
        assert sorted(pair, key=slowness) == sorted(pair, key=lambda one: predict(one).peak_bytes)
    # ZeRO-3 that keeps what it has gathered sends less than ZeRO-2 then, but waits for it.
    kept = replace(setting, accumulation=1, zero_stage=3, live_parameter_elements=10**9)
    assert traffic(kept).total < traffic(once[1]).total
    assert slowness(kept) > slowness(once[1])
