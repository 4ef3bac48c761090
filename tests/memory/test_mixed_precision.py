"""Why mixed precision saves nothing: the closed form against traces of a plain PyTorch GPT-2."""

from dataclasses import replace

import pytest

from gpt2ds.devices import card_bytes
from gpt2ds.gpt2.config import MODELS
from gpt2ds.memory.formula import MIB
from gpt2ds.memory.mixed_precision import CAST_WEIGHTS, compare, plain_parts
from gpt2ds.memory.setting import MemorySetting

LARGE = MemorySetting(
    model=replace(MODELS["gpt2_large"], qkv_bias=True),
    context=1024,
    micro_batch=2,
    accumulation=1,
    ranks=1,
    zero_stage=2,
    dtype="bf16",
    grad_accum_dtype="fp32",
)

# MiB of gpt2_large with AdamW and windows of 1,024 tokens, traced on tensors without data; autocast was emulated.
TRACED = {
    ("fp32", True): {1: 12340, 2: 15822, 4: 22787},
    ("fp32", False): {1: 15253, 2: 21613, 4: 34332},
    ("autocast", True): {1: 12550, 2: 14770, 4: 19210},
    ("autocast", False): {1: 16903, 2: 23440, 4: 36514},
}


@pytest.mark.parametrize(("precision", "fused"), TRACED)
def test_agrees_with_the_traces(precision: str, fused: bool) -> None:
    for micro_batch, expected in TRACED[precision, fused].items():
        parts = plain_parts(replace(LARGE, micro_batch=micro_batch), precision, fused_attention=fused)
        assert sum(parts.values()) / MIB == pytest.approx(expected, rel=0.001)


def test_when_all_gradients_are_there_the_tied_weight_has_two() -> None:
    """Measured as resident pages of a plain PyTorch backward pass: autograd adds the second one in place."""
    short = replace(LARGE, micro_batch=1, context=64)
    parts = plain_parts(short, "fp32", fused_attention=True)
    P, V, d = short.model.parameters, short.model.vocab_size, short.model.emb_dim
    assert parts == {"weights": 4 * P, "moments": 8 * P, "gradients": 4 * P, "tied embedding": 4 * V * d}


def test_the_answer_for_a_24_gb_card() -> None:
    """Where this program comes from: attention by matrices allowed 2 sequences, and autocast took more than fp32."""
    found = {(one.precision, one.fused_attention): one for one in compare(LARGE, card_bytes(24))}
    assert found["fp32", False].largest_micro_batch == 2
    assert found["autocast", False].peak_bytes > found["fp32", False].peak_bytes
    assert found["fp32", True].largest_micro_batch == 4
    assert found["16 bits", True].peak_bytes < found["autocast", True].peak_bytes
    assert CAST_WEIGHTS in found["autocast", True].parts and CAST_WEIGHTS not in found["fp32", True].parts
    assert (
        found["fp32", True].parts["weights"] == found["autocast", True].parts["weights"] == 4 * LARGE.model.parameters
    )


def test_the_16_bit_states_are_the_settings_own() -> None:
    def weights_and_states(**changes: object) -> tuple[int, int]:
        parts = plain_parts(replace(LARGE, **changes), "16 bits", fused_attention=True)
        return parts["weights"], parts.get("master weights", 0) + parts.get("moments", 0)

    P = LARGE.model.parameters
    assert weights_and_states() == (2 * P, 12 * P)
    assert weights_and_states(ranks=4) == (2 * P, 3 * P)
    assert weights_and_states(ranks=4, zero_stage=3) == (P // 2, 3 * P)
    assert weights_and_states(offload_optimizer=True) == (2 * P, 0)
    accumulated = plain_parts(replace(LARGE, accumulation=4), "16 bits", fused_attention=True)
    assert accumulated["gradients"] == 4 * P
