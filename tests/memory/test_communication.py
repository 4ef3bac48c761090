"""What ranks send, by formula, against what DeepSpeed's own communication log counted on two ranks."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpt2ds.gpt2.config import MODELS
from gpt2ds.memory.communication import PERSISTENT_ELEMENTS, persistent_parameters, traffic
from gpt2ds.memory.setting import MemorySetting

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "communication.json"
COUNTED = json.loads(RESULTS.read_text(encoding="utf-8"))
LARGE = MemorySetting(
    model=MODELS["gpt2_large"],
    context=1024,
    micro_batch=8,
    accumulation=32,
    ranks=2,
    zero_stage=1,
    dtype="bf16",
    grad_accum_dtype="fp32",
)


@pytest.mark.parametrize("row", COUNTED["rows"], ids=str)
def test_agrees_with_what_was_counted(row: dict[str, Any]) -> None:
    model = MODELS[COUNTED["model"]]
    setting = replace(
        LARGE,
        model=model,
        zero_stage=row["ZeRO stage"],
        accumulation=row["accumulation"],
        dtype=row["dtype"],
        live_parameter_elements=row.get("live parameters", 0),
    )
    sent = traffic(setting, persistent_elements=row.get("persistent below", PERSISTENT_ELEMENTS))
    # Two ranks: a ring sends half of a reduced tensor twice, half of a scattered one, and a gather's input once.
    gradients = row.get("all_reduce", 0) * 2 / 2 + row.get("reduce_scatter_tensor", 0) / 2
    weights = row.get("all_gather_into_tensor", 0)
    assert sent.gradients / model.parameters == pytest.approx(gradients, rel=1e-4)
    assert sent.weights / model.parameters == pytest.approx(weights, rel=1e-3)


def test_every_stage_was_counted() -> None:
    assert {row["ZeRO stage"] for row in COUNTED["rows"]} == {0, 1, 2, 3}
    assert {row["accumulation"] for row in COUNTED["rows"]} == {1, 4, 8}


def test_one_rank_sends_nothing_and_many_ranks_a_whole_ring() -> None:
    for stage in range(4):
        assert traffic(replace(LARGE, zero_stage=stage, ranks=1)).total == 0
    two, many = traffic(LARGE), traffic(replace(LARGE, ranks=1024))
    assert many.gradients == pytest.approx(two.gradients * (1023 / 1024) / (1 / 2), rel=1e-6)
    fp32 = traffic(LARGE, gradient_bytes=4)
    assert (fp32.gradients, fp32.weights) == (2 * two.gradients, two.weights)


def test_only_zero_1_sends_gradients_once_a_step() -> None:
    per_step = {
        stage: traffic(replace(LARGE, zero_stage=stage)).gradients
        / traffic(replace(LARGE, zero_stage=stage, accumulation=1)).gradients
        for stage in range(4)
    }
    assert per_step == pytest.approx({0: 1, 1: 1, 2: 32, 3: 32})


def test_what_zero_3_does_not_divide_are_the_small_tensors() -> None:
    model = MODELS["gpt2_tiny"]
    assert persistent_parameters(model, 0) == 0
    # Everything but the token embedding is below 100,000 elements in this model.
    assert persistent_parameters(model, 100_000) == model.parameters - model.vocab_size * model.emb_dim
    large = MODELS["gpt2_large"]
    assert 0 < persistent_parameters(large, 100_000) < 0.001 * large.parameters
