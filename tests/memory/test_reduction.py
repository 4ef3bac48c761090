"""Where gradients wait: shares, buckets and exchanges of a model small enough to count by hand."""

from dataclasses import replace

import pytest

from gpt2ds.gpt2.config import GPT2Config
from gpt2ds.memory.reduction import Divided, Kept, Reduction, layout
from gpt2ds.memory.setting import MemorySetting

D = 8
MODEL = GPT2Config(name="by hand", emb_dim=D, n_heads=2, n_layers=2, context_length=16, vocab_size=100)
SETTING = MemorySetting(
    model=MODEL,
    context=16,
    micro_batch=1,
    accumulation=1,
    ranks=2,
    zero_stage=2,
    dtype="bf16",
    grad_accum_dtype="bf16",
    reduce_bucket_elements=300,
)
ALL = MODEL.parameters


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_the_shares_hold_every_parameter_once(ranks: int) -> None:
    places = layout(MODEL, ranks)
    assert sum(one.elements for one in (*places.matrices, *places.vectors)) == ALL
    matrices = sum(one.elements for one in places.matrices)
    own = sum(one.own_elements for one in places.matrices)
    assert own == matrices - (ranks - 1) * -(-matrices // ranks)
    assert places.tokens.first_rank == 0
    assert places.blocks[-1].out[-1].last_rank == ranks - 1


def test_a_full_bucket_is_exchanged_and_the_own_share_stays() -> None:
    places = layout(MODEL, 2)
    out, fc = places.blocks[-1].out[-1], places.blocks[-1].fc[-1]  # 256 elements each, both in the last rank's share
    reduction = Reduction(SETTING, places)
    assert reduction.bucket_bytes == 2 * 300
    assert reduction.hand_over(out) == 0
    assert reduction.held_bytes == 0
    share = 2 * sum(one.elements for one in (*places.matrices, *places.vectors) if one.is_own)
    assert reduction.hand_over(fc) == share
    assert reduction.held_bytes == share
    # Of the token embedding only a part, if any, is the last rank's; too large for the bucket, it stays where it is.
    assert reduction.hand_over(places.tokens) == share
    assert reduction.held_bytes == share + 2 * places.tokens.elements
    reduction.exchange()
    assert reduction.held_bytes == share


def test_fp32_sums_take_a_copy_of_each_tensor_and_no_second_share() -> None:
    setting = replace(SETTING, grad_accum_dtype="fp32", accumulation=2)
    places = layout(MODEL, 2)
    reduction = Reduction(setting, places)
    share = 4 * sum(one.own_elements for one in (*places.matrices, *places.vectors))
    assert reduction.held_bytes == share
    reduction.hand_over(places.blocks[-1].out[-1])
    assert reduction.exchange() == share + 4 * 256
    assert reduction.held_bytes == share


def test_without_zero_gradients_stay_and_later_ones_are_added() -> None:
    places = layout(MODEL, 1)
    first = Kept(replace(SETTING, zero_stage=0, ranks=1))
    for one in (*places.matrices, *places.vectors):
        first.hand_over(one)
    assert first.held_bytes == 2 * ALL
    later = Kept(replace(SETTING, zero_stage=0, ranks=1, accumulation=2))
    later.hand_over(places.tokens)
    assert later.held_bytes == 2 * ALL


def test_zero_3_sorts_a_bucket_into_a_copy() -> None:
    places = layout(MODEL, 2)
    divided = Divided(replace(SETTING, zero_stage=3))
    sums = -(-2 * ALL // 2)
    assert divided.held_bytes == sums
    divided.hand_over(places.blocks[-1].out[0])
    divided.hand_over(places.blocks[-1].out[1])
    assert divided.exchange() == sums + 2 * (D + 256)
    assert divided.held_bytes == sums
