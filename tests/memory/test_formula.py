"""The closed form against figures of the traced DeepSpeed engine, and the searches over it.

The expected MiB are traces of DeepSpeed 0.19.8 on meta tensors (gpt2 with a query, key and value bias, chunk 1,024, no
cuBLAS workspace); nothing here was measured on a GPU.
"""

from dataclasses import replace

import pytest
from support import PROFILES

from gpt2ds.devices import NCCL_BYTES, card_bytes
from gpt2ds.ds_profile import load_profile
from gpt2ds.estimate.rows import memory_setting
from gpt2ds.gpt2.config import MODELS
from gpt2ds.gpt2.policies import POLICIES, recomputed_flops_per_token, saved_bytes_per_token
from gpt2ds.memory.fit import fastest_that_fits, fits, largest_micro_batch, largest_model
from gpt2ds.memory.formula import MIB, _step, predict
from gpt2ds.memory.setting import CUBLAS_WORKSPACE_BYTES, MemorySetting
from gpt2ds.options import TrainOptions

CARD_24GB_BYTES = card_bytes(24)

LARGE = MemorySetting(
    model=replace(MODELS["gpt2_large"], qkv_bias=True),
    context=1024,
    micro_batch=8,
    accumulation=1,
    ranks=1,
    zero_stage=2,
    dtype="bf16",
    grad_accum_dtype="bf16",
    recompute="full",
    reduce_bucket_elements=500_000_000,
)


def mib(setting: MemorySetting) -> float:
    return (predict(setting).peak_bytes - CUBLAS_WORKSPACE_BYTES) / MIB


def test_zero_2_step_peak_is_22_bytes_a_parameter() -> None:
    estimate = predict(LARGE)
    assert estimate.phase == "step"
    assert mib(LARGE) == pytest.approx(16_240, rel=0.002)
    assert mib(replace(LARGE, ranks=2, micro_batch=2)) == pytest.approx(8_858, rel=0.002)


def test_fp32_accumulation_is_smaller_at_the_peak_than_16_bits() -> None:
    setting = replace(LARGE, grad_accum_dtype="fp32", accumulation=2, reduce_bucket_elements=20_000_000)
    assert predict(setting).phase != "step"
    assert mib(setting) == pytest.approx(14_776, rel=0.015)


def test_largest_micro_batches_on_a_24_gb_card() -> None:
    """Traced: 6 without and 67 with full recompute on one card, 110 on two, before NCCL's share."""
    setting = replace(LARGE, grad_accum_dtype="fp32", accumulation=2, reduce_bucket_elements=20_000_000)
    assert largest_micro_batch(replace(setting, recompute="none"), CARD_24GB_BYTES) == 6
    assert largest_micro_batch(setting, CARD_24GB_BYTES) == pytest.approx(67, abs=1)
    assert largest_micro_batch(replace(setting, ranks=2), CARD_24GB_BYTES) == pytest.approx(110, abs=2)


@pytest.mark.parametrize(
    ("recompute", "numbers", "extra_percent"),
    [
        # Traced for gpt2_large: numbers kept per token and unit of width, and products computed again.
        ("none", 16, 0.0),
        ("products", 10, 0.0),
        ("alternate", 9, 2.3),
        ("narrow", 6, 9.1),
        ("attention", 2, 18.1),
        ("full", 1, 21.8),
        ("host", 0, 21.8),
    ],
)
def test_what_each_policy_keeps_and_costs(recompute: str, numbers: int, extra_percent: float) -> None:
    model = MODELS["gpt2_large"]
    fp32 = {"none": 4 * 20 + 16, "full": 0, "host": 0}.get(recompute, 4 * 20)
    assert saved_bytes_per_token(model, 2, recompute) == numbers * 2 * 1280 + fp32
    extra = recomputed_flops_per_token(model, recompute) / model.flops_per_token()
    assert 100 * extra == pytest.approx(extra_percent, abs=0.06)


def test_dropout_makes_the_last_product_worth_keeping() -> None:
    model = replace(MODELS["gpt2_large"], drop_rate=0.1)
    # One more for the last product, one less for attention, whose kernel has to draw its mask again.
    kept = [saved_bytes_per_token(model, 2, name) for name in ("products", "alternate", "narrow", "attention")]
    assert kept == [numbers * 2 * 1280 for numbers in (10, 9, 6, 1)]
    without = recomputed_flops_per_token(MODELS["gpt2_large"], "full")
    assert recomputed_flops_per_token(model, "full") == without + 36 * 8 * 1280**2


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("recompute", POLICIES)
@pytest.mark.parametrize("accumulate", ["bf16", "fp32"])
def test_parts_sum_to_the_peak_and_the_peak_grows_with_the_batch(stage: int, recompute: str, accumulate: str) -> None:
    setting = replace(LARGE, zero_stage=stage, recompute=recompute, grad_accum_dtype=accumulate, accumulation=4)
    peaks = []
    for micro_batch in range(1, 40):
        estimate = predict(replace(setting, micro_batch=micro_batch))
        assert sum(estimate.parts.values()) == estimate.peak_bytes
        assert all(size > 0 for size in estimate.parts.values())
        peaks.append(estimate.peak_bytes)
    assert peaks == sorted(peaks)


def test_the_bucket_counts_once_or_twice() -> None:
    setting = replace(LARGE, micro_batch=60)
    with_bucket = predict(setting).peak_bytes
    smaller = replace(setting, reduce_bucket_elements=400_000_000)
    assert with_bucket - predict(smaller).peak_bytes == 2 * 100_000_000
    assert predict(replace(setting, overlap_comm=True)).peak_bytes - with_bucket == 2 * 500_000_000


def test_the_bisection_finds_the_last_size_that_fits() -> None:
    setting = replace(LARGE, reduce_bucket_elements=20_000_000)
    for gib in (16, 20, 24, 40):
        most = largest_micro_batch(setting, gib * 2**30)
        if most:
            assert fits(predict(replace(setting, micro_batch=most)), gib * 2**30)
        assert not fits(predict(replace(setting, micro_batch=most + 1)), gib * 2**30)


def test_largest_model() -> None:
    def setting(model: object) -> MemorySetting:
        return replace(LARGE, model=model, grad_accum_dtype="fp32", reduce_bucket_elements=20_000_000)

    assert largest_model(MODELS.values(), setting, CARD_24GB_BYTES) == MODELS["gpt2_large"]
    assert largest_model(MODELS.values(), setting, 8 * 2**30) == MODELS["gpt2_medium"]
    assert largest_model(MODELS.values(), setting, 2**20) is None


@pytest.mark.parametrize(
    ("name", "model", "ranks"),
    [
        ("zero1", "gpt2_large", 1),
        ("zero2", "gpt2_large", 1),
        ("zero2_fp16", "gpt2_large", 1),
        ("zero3", "gpt2_xl", 2),
        ("zero3_fp16", "gpt2_xl", 2),
        ("zero2_offload", "gpt2_xl", 1),
        ("zero3_offload", "gpt2_xl", 1),
        ("fp32_baseline", "gpt2_medium", 1),
    ],
)
def test_every_shipped_profile_is_predicted_to_fit_what_it_is_for(name: str, model: str, ranks: int) -> None:
    profile = load_profile(PROFILES / f"{name}.json")
    setting = memory_setting(
        TrainOptions(), profile, MODELS[model], ranks=ranks, micro_batch=profile.micro_batch or 0, accumulation=8
    )
    assert fits(predict(setting), CARD_24GB_BYTES)
    if name in ("zero1", "zero2", "zero2_fp16"):
        assert largest_micro_batch(setting, CARD_24GB_BYTES) == profile.micro_batch


@pytest.mark.parametrize(
    ("name", "card_gb", "ranks"),
    [
        ("gpt2_medium_24gb", 24, 1),
        ("gpt2_large_24gb", 24, 1),
        ("gpt2_large_24gb_bf16_states", 24, 1),
        ("gpt2_large_24gb_8bit", 24, 1),
        ("gpt2_large_2x24gb", 24, 2),
        ("gpt2_large_16gb", 16, 1),
        ("gpt2_xl_24gb_offload", 24, 1),
        ("gpt2_xl_24gb_bf16_states", 24, 1),
        ("gpt2_xl_2x24gb", 24, 2),
    ],
)
def test_a_profile_named_for_its_use_is_the_fastest_that_fits(name: str, card_gb: int, ranks: int) -> None:
    profile = load_profile(PROFILES / f"{name}.json")
    model = MODELS["_".join(name.split("_")[:2])]
    assert profile.micro_batch and profile.accumulation
    assert profile.micro_batch * profile.accumulation * ranks * model.context_length == 2**19
    setting = memory_setting(
        TrainOptions(), profile, model, ranks=ranks, micro_batch=profile.micro_batch, accumulation=profile.accumulation
    )
    room = card_bytes(card_gb) - (NCCL_BYTES if ranks > 1 else 0)
    assert fastest_that_fits(setting, room) == setting


def test_16_and_8_bit_states_are_smaller_by_what_they_leave_out() -> None:
    """Traced: gpt2_large with 16-bit states steps at 12 bytes a parameter (fp32 states: 22); 8-bit moments: 16."""
    parameters = LARGE.model.parameters
    sixteen = replace(LARGE, master_bytes=2, moment_bytes=4, micro_batch=1, reduce_bucket_elements=20_000_000)
    eight = replace(LARGE, moment_bytes=2, micro_batch=1, reduce_bucket_elements=20_000_000)
    assert _step(sixteen)["step"]["moments"] == 4 * parameters
    assert sum(_step(sixteen)["step"].values()) == pytest.approx(12 * parameters, rel=0.01)
    assert sum(_step(eight)["step"].values()) == pytest.approx(16 * parameters, rel=0.01)
