"""Settings that cannot work here: one sentence each, before torch or DeepSpeed are imported, and exit code 2."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import run_cli

from gpt2ds.devices import GPU, MIB, Machine
from gpt2ds.ds_profile import DsProfile, load_profile
from gpt2ds.ds_rules import RECOMPUTE_POLICIES
from gpt2ds.errors import UserError
from gpt2ds.estimate.rows import memory_setting
from gpt2ds.gpt2.config import MODELS
from gpt2ds.gpt2.policies import POLICIES
from gpt2ds.memory.host import predict_host
from gpt2ds.options import TrainOptions
from gpt2ds.planning import resolve
from gpt2ds.requirements import host_memory_problem, missing_requirements

pytestmark = pytest.mark.usefixtures("roomy_disk")

GIB = 2**30
CPU = Machine(cpu_name="a CPU", cores=2, host_memory_bytes=24 * GIB)
RTX_4090 = GPU(name="NVIDIA GeForce RTX 4090", total_bytes=24_564 * MIB, free_bytes=24_207 * MIB)
ONE_4090 = replace(CPU, gpus=(RTX_4090,))

BASE: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
}


def profile(folder: Path, **more: Any) -> Path:
    path = folder / "own.json"
    path.write_text(json.dumps(BASE | more), encoding="utf-8")
    return path


def offload(stage: int, device: str, **more: Any) -> dict[str, Any]:
    return {"stage": stage, "offload_optimizer": {"device": device} | more}


BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a chunk of 0": ({"gpt2ds": {"loss_chunk": 0}}, ["loss_chunk", "1 or more"]),
    "an unknown policy": ({"gpt2ds": {"recompute": "some"}}, ["gpt2ds.recompute", "'narrow'"]),
    "offload without ZeRO": ({"zero_optimization": offload(0, "cpu")}, ["offload_optimizer", "stage 1, 2 or 3"]),
    "an NVMe folder that is not there": (
        {"zero_optimization": offload(3, "nvme", nvme_path="/nowhere/at/all")},
        ["/nowhere/at/all", "create it"],
    ),
    "compile under ZeRO-3": (
        {"gpt2ds": {"compile": True}, "zero_optimization": {"stage": 3}},
        ["gpt2ds.compile", "stage 1 or 2"],
    ),
    "compile with a selective policy": (
        {"gpt2ds": {"compile": True, "recompute": "narrow"}},
        ["gpt2ds.compile", '"none" or "full"'],
    ),
    "compile with inputs in host memory": (
        {"gpt2ds": {"compile": True}, "activation_checkpointing": {"cpu_checkpointing": True}},
        ["gpt2ds.compile", "cpu_checkpointing", "remove one"],
    ),
    "host memory on a CPU": ({"gpt2ds": {"recompute": "host"}}, ["host", "on a CPU take full"]),
    "8-bit states that are offloaded": (
        {"gpt2ds": {"eight_bit_states": True}, "zero_optimization": offload(2, "cpu")},
        ["eight_bit_states", "remove one"],
    ),
    "8-bit states under ZeRO-3": (
        {"gpt2ds": {"eight_bit_states": True}, "zero_optimization": {"stage": 3}},
        ["eight_bit_states", "write stage 2"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_end_in_a_sentence(tmp_path: Path, corpus_folder: Path, name: str) -> None:
    more, expected = BAD[name]
    options = TrainOptions(ds=str(profile(tmp_path, **more)), data=corpus_folder, out=tmp_path / "logs")
    with pytest.raises(UserError) as error:
        resolve(options, ranks=1, machine=CPU)
    for word in expected:
        assert word in str(error.value)


def test_a_user_sees_the_sentence_and_exit_code_2(tmp_path: Path, corpus_folder: Path) -> None:
    path = profile(tmp_path, gpt2ds={"compile": True}, zero_optimization={"stage": 3})
    result = run_cli("train", "--ds", path, "--data", corpus_folder, cwd=tmp_path)
    assert result.returncode == 2
    assert "gpt2ds.compile" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "logs").exists()


def test_recompute_option_against_a_compiled_profile(tmp_path: Path, corpus_folder: Path) -> None:
    path = str(profile(tmp_path, gpt2ds={"compile": True}))
    options = TrainOptions(ds=path, data=corpus_folder, out=tmp_path, recompute="products")
    with pytest.raises(UserError, match="--recompute products does not go with compiled blocks: take none or full"):
        resolve(options, ranks=1, machine=CPU)


def missing(path: Path, machine: Machine = CPU) -> str:
    found: DsProfile = load_profile(path)
    return "\n".join(missing_requirements(found, found.recompute, machine, 1))


def test_missing_tools_are_named_with_their_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("gpt2ds.requirements.USUAL_NVCC", tmp_path / "nvcc")
    own_adam = {"optimizer": {"type": "AdamW", "params": {"torch_adam": False}}}
    assert missing(profile(tmp_path)) == ""
    cpu_adam = missing(profile(tmp_path, **own_adam, zero_optimization=offload(2, "cpu")))
    assert "CPU Adam" in cpu_adam and "apt install g++" in cpu_adam and "pip install ninja" in cpu_adam
    assert "nvcc" not in cpu_adam
    # Adam for the CPU is plain C++, whatever the machine.
    assert "nvcc" not in missing(profile(tmp_path, **own_adam, zero_optimization=offload(2, "cpu")), ONE_4090)
    assert "nvcc" in missing(profile(tmp_path, **own_adam), ONE_4090)
    assert "apt install g++" in missing(profile(tmp_path, gpt2ds={"compile": True}))


def test_missing_bitsandbytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_profile(profile(tmp_path, gpt2ds={"eight_bit_states": True}))
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not (Path(entry) / "bitsandbytes").is_dir()])
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    assert "pip install bitsandbytes" in "".join(missing_requirements(loaded, "none", CPU, 1))


def host_parts(name: str, model: str, ranks: int = 1, pinned: bool = True) -> dict[str, int]:
    loaded = load_profile(name)
    setting = memory_setting(
        TrainOptions(), loaded, MODELS[model], ranks=ranks, micro_batch=8, accumulation=loaded.accumulation or 1
    )
    return predict_host(setting, ranks_here=ranks, pinned=pinned)


def test_host_memory_of_an_offloaded_run() -> None:
    parameters = MODELS["gpt2_xl"].parameters
    unpinned = host_parts("zero2_offload", "gpt2_xl", pinned=False)
    # Master weights 4, gradients 4, weights on their way 2, moments 8, 16-bit sums 2: bytes a parameter.
    staging = unpinned.pop("gradients on their way")
    assert sum(unpinned.values()) == pytest.approx((20 + 2) * parameters, rel=1e-6)
    assert staging == 2 * 2 * 50257 * 1600
    pinned = host_parts("zero2_offload", "gpt2_xl")
    assert pinned["master weights"] == 2**33
    assert pinned["moments"] == unpinned["moments"]
    two = host_parts("zero2_offload", "gpt2_xl", ranks=2, pinned=False)
    assert two["moments"] == pytest.approx(unpinned["moments"], rel=1e-6)
    assert "weights" in host_parts("zero3_offload", "gpt2_xl")


def test_building_the_model_counts_for_each_rank() -> None:
    parts = host_parts("zero2", "gpt2_xl", ranks=8)
    assert parts == {"building the model": 8 * 4 * MODELS["gpt2_xl"].parameters}
    assert host_memory_problem(parts, replace(CPU, host_memory_bytes=64 * GIB)) is None
    problem = host_memory_problem(parts, CPU)
    assert problem is not None and "46.4 GiB" in problem and "fewer ranks" in problem


def test_a_named_model_is_checked_against_the_host(tmp_path: Path, wide_corpus: Path) -> None:
    options = TrainOptions(ds="zero2_offload", model="gpt2_xl", data=wide_corpus, out=tmp_path / "logs")
    with pytest.raises(UserError, match="host memory .*pin_memory"):
        resolve(options, ranks=1, machine=ONE_4090)
    resolve(options, ranks=1, machine=replace(ONE_4090, host_memory_bytes=64 * GIB))


def test_the_policies_have_the_same_names_everywhere() -> None:
    assert tuple(POLICIES) == RECOMPUTE_POLICIES
    help_text = TrainOptions.__dataclass_fields__["recompute"].metadata["help"]
    assert [name for name in POLICIES if name not in help_text] == []


def test_a_card_that_is_full_or_too_small_is_said(tmp_path: Path, wide_corpus: Path) -> None:
    options = TrainOptions(ds="zero2", model="gpt2_small", data=wide_corpus, out=tmp_path / "logs")
    full = replace(ONE_4090, gpus=(replace(RTX_4090, free_bytes=300 * MIB),))
    with pytest.raises(UserError, match="has only 0.29 GiB free: end what holds the rest.*CUDA_VISIBLE_DEVICES"):
        resolve(options, ranks=1, machine=full)
    with pytest.raises(UserError, match="--gpu-memory 0.5 GB leaves nothing"):
        resolve(replace(options, gpu_memory=0.5), ranks=1, machine=ONE_4090)
