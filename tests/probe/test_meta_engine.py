"""The traced engine: beside the closed form, and what it says of itself. test_oracles.py has it beside real runs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpt2ds.ds_profile import load_profile
from gpt2ds.estimate.rows import memory_setting
from gpt2ds.gpt2.config import MODELS
from gpt2ds.memory.formula import predict
from gpt2ds.memory.setting import CUBLAS_WORKSPACE_BYTES
from gpt2ds.options import TrainOptions
from gpt2ds.probe.meta_engine import Trace, TraceRequest, trace, trace_all


def profile_path(folder: Path, dtype: str, zero: dict[str, Any], accumulate: str = "fp32") -> Path:
    path = folder / f"{len(list(folder.iterdir()))}.json"
    settings = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": zero,
        "data_types": {"grad_accum_dtype": accumulate},
    }
    if dtype != "fp32":
        settings[dtype] = {"enabled": True}
    path.write_text(json.dumps(settings), encoding="utf-8")
    return path


LARGE = replace(MODELS["gpt2_large"], n_layers=3)


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Trace, int]]:
    """The trace of a few settings of a shallow gpt2_large on one card, and the peak by the formula."""
    folder = tmp_path_factory.mktemp("profiles")
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
    settings = {
        # name: (profile, recompute, micro-batch)
        "ZeRO-0": (profile_path(folder, "bf16", {"stage": 0}, "bf16"), "none", 4),
        "ZeRO-1": (profile_path(folder, "bf16", {"stage": 1}), "none", 4),
        "ZeRO-2": (profile_path(folder, "bf16", {"stage": 2}), "none", 4),
        "ZeRO-2 recomputing": (profile_path(folder, "bf16", {"stage": 2}), "full", 16),
        "ZeRO-2 recomputing some": (profile_path(folder, "bf16", {"stage": 2}), "narrow", 16),
        "step": (profile_path(folder, "bf16", {"stage": 2}, "bf16"), "full", 1),
        "ZeRO-1 in 16 bits": (profile_path(folder, "fp16", {"stage": 1}, "fp16"), "none", 4),
        "ZeRO-2 in fp16": (profile_path(folder, "fp16", {"stage": 2}), "none", 4),
        "offload": (profile_path(folder, "bf16", {"stage": 2} | offload, "bf16"), "none", 4),
    }
    requests, predictions = [], []
    for path, recompute, micro_batch in settings.values():
        profile = load_profile(path)
        batch = {"micro_batch": micro_batch, "accumulation": 2, "ranks": 1}
        requests.append(TraceRequest(model=LARGE, ds_config=profile.ds_config(**batch), recompute=recompute))
        setting = replace(memory_setting(TrainOptions(), profile, LARGE, **batch), recompute=recompute)
        predictions.append(predict(setting).peak_bytes - CUBLAS_WORKSPACE_BYTES)
    return dict(zip(settings, zip(trace_all(requests), predictions, strict=True), strict=True))


@pytest.mark.parametrize(
    "name",
    [
        *("ZeRO-0", "ZeRO-1", "ZeRO-1 in 16 bits", "ZeRO-2", "ZeRO-2 in fp16", "ZeRO-2 recomputing"),
        *("ZeRO-2 recomputing some", "step", "offload"),
    ],
)
def test_the_closed_form_agrees(traces: dict[str, tuple[Trace, int]], name: str) -> None:
    seen, predicted = traces[name]
    assert predicted == pytest.approx(seen.peak_bytes, rel=0.002)
    assert seen.phase.endswith({"step": "optimizer", "ZeRO-0": "forward"}.get(name, seen.phase))


def test_what_lives_at_the_peak_has_names(traces: dict[str, tuple[Trace, int]]) -> None:
    seen, _ = traces["ZeRO-2"]
    all_of_them = pytest.approx(LARGE.parameters, rel=1e-4)
    assert seen.parts["weights"] / 2 == all_of_them
    assert seen.parts["master weights"] / 4 == all_of_them
    assert seen.parts["moments"] / 8 == all_of_them
    assert seen.parts["made in backward"] / 4 == all_of_them  # fp32 sums of the first micro-batch
    assert seen.peak_bytes == max(phase.peak_bytes for phase in seen.phases)
    assert [phase.name for phase in seen.phases] == [
        *(f"step 2 micro-batch {number} {what}" for number in (1, 2) for what in ("forward", "backward")),
        "step 2 optimizer",
    ]


def test_offloaded_states_are_not_on_the_device(traces: dict[str, tuple[Trace, int]]) -> None:
    seen, _ = traces["offload"]
    for phase in seen.phases:
        assert not {"moments", "master weights"} & set(phase.parts)
        assert phase.parts["weights"] / 2 == pytest.approx(LARGE.parameters, rel=1e-4)
    assert seen.phases[-1].peak_bytes < 5 * LARGE.parameters  # weights, and buffers for one gradient at a time


def test_a_trace_that_fails_says_why(tmp_path: Path) -> None:
    config = load_profile(profile_path(tmp_path, "bf16", {"stage": 2})).ds_config(
        micro_batch=1, accumulation=1, ranks=2
    )
    with pytest.raises(RuntimeError, match="zero_optimization"):
        trace(TraceRequest(model=LARGE, ds_config=config | {"zero_optimisation": {}}, ranks=2))
