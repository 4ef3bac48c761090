"""What to change when a profile does not fit: every answer, asked for, fits; and nothing that comes earlier does."""

import re
from dataclasses import replace

import pytest

from gpt2ds.devices import CARD_OVERHEAD_BYTES, Machine
from gpt2ds.errors import UserError
from gpt2ds.estimate.change import changes_needed, stop_if_hopeless
from gpt2ds.estimate.rows import EstimateOptions, estimate
from gpt2ds.memory.fit import ALLOCATOR_SLACK

CPU = Machine(cpu_name="a CPU", cores=2, host_memory_bytes=64 * 2**30)


def asked_again(options: EstimateOptions, words: str) -> EstimateOptions:
    """The options with what a sentence says to change."""
    for name in ("recompute", "ds", "model", "gpus", "gpu_memory", "micro_batch", "accumulation"):
        if found := re.search(rf"--{name.replace('_', '-')} ([\w.]+)", words):
            value = found[1].rstrip(".")
            typed = {"recompute": value, "ds": (value,), "model": value}.get(name, int(value) if value.isdigit() else 0)
            options = replace(options, **{name: typed})
    if found := re.search(r'"loss_chunk": (\d+)', words):
        options = replace(options, loss_chunk=int(found[1]))
    return options


@pytest.mark.parametrize(
    ("model", "gpu_memory", "gpus"),
    [
        ("gpt2_medium", 2, 2),
        ("gpt2_medium", 6, 1),
        ("gpt2_large", 11, 1),
        ("gpt2_large", 16, 1),
        ("gpt2_large", 16, 2),
        ("gpt2_xl", 24, 1),
        ("gpt2_xl", 40, 2),
    ],
)
def test_every_answer_fits(model: str, gpu_memory: int, gpus: int) -> None:
    options = EstimateOptions(model=model, gpu_memory=float(gpu_memory), gpus=gpus)
    found = estimate(options, CPU)
    for row, change in zip(found.rows, changes_needed(found, options, CPU), strict=True):
        assert (change is None) == row.fits
        if change is None:
            continue
        own = replace(options, ds=(row.profile,))
        if row.largest_micro_batch:
            batch, _, policy = change.partition(", or ")
            smaller = asked_again(own, batch)
            (again,) = estimate(smaller, CPU).rows
            assert again.fits
            assert again.global_batch == row.global_batch or "a smaller global batch" in change
            if policy:
                assert estimate(asked_again(own, policy), CPU).rows[0].fits
            continue
        assert "not even micro-batch 1 fits" in change
        if '"reduce_bucket_size"' in change or '"overlap_comm"' in change or "--models-file" in change:
            continue  # not an option of the command
        (again,) = estimate(asked_again(own, change), CPU).rows
        assert again.fits and again.micro_batch == 1, change
        assert again.global_batch == row.global_batch


def test_the_order_in_which_changes_hurt() -> None:
    def change(**asked: object) -> str:
        options = EstimateOptions(**asked)  # type: ignore[arg-type]
        found = estimate(options, CPU)
        (sentence,) = changes_needed(found, options, CPU)
        assert sentence is not None
        return sentence

    assert "--recompute products" in change(ds=("zero2",), gpu_memory=16)
    assert "--ds zero2_offload" in change(ds=("zero2",), gpu_memory=24, model="gpt2_xl")
    assert "--ds zero3" in change(ds=("zero1",), gpu_memory=10, gpus=4, model="gpt2_xl")
    assert "--gpus" in change(ds=("zero2_fp16",), gpu_memory=24, model="gpt2_xl")
    assert "a card of " in change(ds=("zero3_offload",), gpu_memory=1.3, model="gpt2_xl")
    assert "--micro-batch 6 --accumulation 8" in change(ds=("zero2",), gpu_memory=24, micro_batch=12, accumulation=4)


def test_a_chunk_of_the_loss_can_be_what_is_missing() -> None:
    # All recompute is there already; between the rooms of a large chunk and of a small one nothing else helps.
    asked = EstimateOptions(model="gpt2_medium", ds=("zero2",), micro_batch=1, recompute="full", gpu_memory=24)

    def peak(chunk: int) -> int:
        return estimate(replace(asked, loss_chunk=chunk), CPU).rows[0].peak_bytes

    between = (peak(1024) + peak(512)) / 2
    room = between / (1 - ALLOCATOR_SLACK)
    options = replace(asked, loss_chunk=1024, gpu_memory=(room + CARD_OVERHEAD_BYTES) / 2**30)
    found = estimate(options, CPU)
    assert not found.rows[0].fits
    assert '"loss_chunk": 512' in (changes_needed(found, options, CPU)[0] or "")


def test_only_a_profile_without_any_hope_is_a_mistake() -> None:
    options = EstimateOptions(ds=("zero2", "zero1"), model="gpt2_xl", gpu_memory=24)
    found = estimate(options, CPU)
    with pytest.raises(UserError) as error:
        stop_if_hopeless(found, changes_needed(found, options, CPU))
    assert str(error.value).count("zero2_offload") == 2
    smaller = replace(options, ds=("zero2", "zero2_offload"))
    found = estimate(smaller, CPU)
    stop_if_hopeless(found, changes_needed(found, smaller, CPU))
