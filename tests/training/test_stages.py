"""Every ZeRO stage and shipped profile on two real ranks: the same training as plain torch, no NaN in the weights."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from support import PROFILES, run_ranks

STAGES = [f"zero{stage}_{dtype}" for stage in range(4) for dtype in ("bf16", "fp32")]
# The shipped profiles as they are; zero1 to zero3 are those of the stages in bf16.
SHIPPED = ["fp32_baseline", "zero2_offload", "zero3_offload"]
NAMES = STAGES + SHIPPED


def write_profiles(folder: Path) -> None:
    """The shipped bf16 profile of each stage, and the same in fp32."""
    for name in SHIPPED:
        shutil.copy(PROFILES / f"{name}.json", folder)
    for name in STAGES:
        stage = int(name[4])
        profile = json.loads((PROFILES / f"zero{max(stage, 1)}.json").read_text(encoding="utf-8"))
        profile["zero_optimization"]["stage"] = stage
        if stage == 0:
            del profile["zero_optimization"]
        if name.endswith("fp32"):
            del profile["bf16"]
            profile.pop("data_types", None)
        elif stage == 0:
            profile["data_types"] = {"grad_accum_dtype": "bf16"}
        (folder / f"{name}.json").write_text(json.dumps(profile), encoding="utf-8")


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, models_file: Path, corpus_folder: Path
) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("profiles")
    write_profiles(folder)
    worker = Path(__file__).with_name("stages_worker.py")
    out = run_ranks(worker, folder, models_file, corpus_folder)[0].stdout
    (line,) = [line for line in out.splitlines() if line.startswith("RESULTS ")]
    return json.loads(line.removeprefix("RESULTS "))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_training_as_plain_torch(results: dict[str, dict[str, Any]], name: str) -> None:
    result = results[name]
    assert result["taken"] == [True, True, True]
    exact = "fp32" in name
    # In 16 bits a bias, which begins at 0, can take Adam's first steps the other way: the model as a whole must agree.
    assert result["worst_tensor" if exact else "whole_model"] < (1e-5 if exact else 0.03)
    for norm, reference in zip(result["norms"], result["reference_norms"], strict=True):
        assert norm == pytest.approx(reference, rel=1e-4 if exact else 0.05)


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_on_one_rank_never_reaches_a_weight(results: dict[str, dict[str, Any]], name: str) -> None:
    result = results[name]
    assert result["poisoned_taken"] == {"loss": False, "gradient": False, "data": False}
    assert result["unchanged"]
    assert result["after_taken"]
    assert result["moved"]
    assert result["finite"]
    assert result["skipped"] == 3


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_engine_takes_the_very_same_step(results: dict[str, dict[str, Any]], name: str) -> None:
    assert results[name]["resumed_step"] == 5
    assert results[name]["resumed_equal"]


@pytest.mark.parametrize("name", NAMES)
def test_another_stage_goes_on_from_the_checkpoint(results: dict[str, dict[str, Any]], name: str) -> None:
    crossed = results[name]["crossed"]
    source = results[crossed["source"]]
    assert crossed["states"] == 3 * 26  # master weights and two moments of every parameter
    assert crossed["states_equal"], "loaded and saved again, not a bit has changed"
    loss, norm = source["going_on"]
    exact = "fp32" in name
    assert crossed["loss"] == pytest.approx(loss, rel=1e-6 if exact else 1e-3)
    assert crossed["norm"] == pytest.approx(norm, rel=3e-4 if exact else 0.05)  # ZeRO-3 sums its norm otherwise


@pytest.mark.parametrize("name", NAMES)
def test_validation_and_samples_work(results: dict[str, dict[str, Any]], name: str) -> None:
    assert results[name]["validation"] == pytest.approx(math.log(50257), abs=0.5)
    assert results[name]["sample"]
    if name.endswith("fp32"):
        assert results[name]["validation"] == pytest.approx(results["zero0_fp32"]["validation"], rel=1e-5)
        assert results[name]["sample"] == results["zero0_fp32"]["sample"]
