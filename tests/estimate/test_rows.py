"""`gpt2ds memory-estimate`: the same figures as the plan's, instantly, and answers in sentences and exit codes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import run_cli

from gpt2ds.devices import CONTEXT_BYTES, GPU, MIB, NCCL_BYTES, Machine, card_bytes
from gpt2ds.ds_profile import shipped_profiles
from gpt2ds.errors import UserError
from gpt2ds.estimate.fit import find_fit
from gpt2ds.estimate.plot import write_plot
from gpt2ds.estimate.rows import EstimateOptions, estimate
from gpt2ds.options import TrainOptions
from gpt2ds.planning import resolve

pytestmark = pytest.mark.usefixtures("roomy_disk")

CPU = Machine(cpu_name="a CPU", cores=2, host_memory_bytes=64 * 2**30)
RTX_4090 = GPU(name="NVIDIA GeForce RTX 4090", total_bytes=24_564 * MIB, free_bytes=23_000 * MIB)


def test_without_options_every_profile_for_gpt2_large_on_a_24_gb_card() -> None:
    found = estimate(EstimateOptions(), CPU)
    assert found.room_bytes == card_bytes(24)
    assert [row.profile for row in found.rows] == [path.stem for path in shipped_profiles()]
    rows = {row.profile: row for row in found.rows}
    assert rows["zero2"].largest_micro_batch == 6
    assert rows["gpt2_large_24gb"].fits and not rows["gpt2_medium_24gb"].fits
    assert rows["zero3"].recompute_percent == 21.8
    assert all(row.ranks == 1 and sum(row.parts.values()) == row.peak_bytes for row in found.rows)
    assert all(
        row.fits == (row.margin_bytes >= 0) == (row.micro_batch <= row.largest_micro_batch) for row in found.rows
    )


def test_the_machines_own_cards_count_less_what_others_hold() -> None:
    machine = replace(CPU, gpus=(replace(RTX_4090, free_bytes=24_000 * MIB), RTX_4090))
    found = estimate(EstimateOptions(ds=("zero2",)), machine)
    assert found.rows[0].ranks == 2
    assert found.room_bytes == 23_000 * MIB - CONTEXT_BYTES - NCCL_BYTES
    assert estimate(EstimateOptions(ds=("zero2",), gpu_memory=16, gpus=1), machine).room_bytes == card_bytes(16)


def test_what_is_estimated_is_what_is_planned(tmp_path: Path, wide_corpus: Path) -> None:
    machine = replace(CPU, gpus=(RTX_4090,))
    options = TrainOptions(ds="zero2", model="gpt2_large", data=wide_corpus, out=tmp_path, micro_batch=3, context=512)
    plan = resolve(replace(options, recompute="narrow"), ranks=1, machine=machine)
    asked = EstimateOptions(ds=("zero2",), micro_batch=3, context=512, recompute="narrow")
    (row,) = estimate(asked, machine).rows
    assert plan.estimate is not None
    assert (row.peak_bytes, row.parts) == (plan.estimate.peak_bytes, plan.estimate.parts)


def test_a_thousand_cards_on_paper() -> None:
    one, many = (
        estimate(EstimateOptions(ds=("zero3",), gpus=gpus, nodes=nodes, gpu_memory=24), CPU).rows[0]
        for gpus, nodes in ((8, 1), (1024, 128))
    )
    assert many.peak_bytes < one.peak_bytes
    assert many.host_bytes == one.host_bytes  # eight ranks on each machine


def test_mistakes_in_one_error() -> None:
    options = EstimateOptions(gpu_memory=-1, micro_batch=0, recompute="some")
    with pytest.raises(UserError) as error:
        estimate(options, CPU)
    for words in ("--gpu-memory must be above 0", "--micro-batch must be above 0", "--recompute some"):
        assert words in str(error.value)
    with pytest.raises(UserError, match="did you mean 'gpt2_large'"):
        estimate(EstimateOptions(model="gpt2_larg"), CPU)
    with pytest.raises(UserError, match="--context 4096 is longer"):
        estimate(EstimateOptions(context=4096), CPU)


def test_the_command_prints_a_table_or_json_and_says_by_its_exit_code_whether_anything_fits(tmp_path: Path) -> None:
    table = run_cli("memory-estimate", "--ds", "zero2", "--gpu-memory", 24, cwd=tmp_path)
    assert table.returncode == 0, table.stderr
    words = " ".join(table.stdout.split())
    assert "zero2 6x8x1 none 21.90 0.5 6 2.9" in words and "not measured on a GPU" in words
    larger = run_cli(
        "memory-estimate", "--ds", "zero2", "--micro-batch", 12, "--gpu-memory", 24, "--json", cwd=tmp_path
    )
    assert larger.returncode == 1, larger.stderr
    (row,) = json.loads(larger.stdout)["rows"]
    assert (row["largest_micro_batch"], row["fits"]) == (6, False)
    assert "--micro-batch 6 --accumulation 16" in row["change"]
    assert run_cli("memory-estimate", "--gpus", 0, cwd=tmp_path).returncode == 2


def test_not_even_one_sequence_is_a_mistake_with_the_smallest_change(tmp_path: Path) -> None:
    hopeless = ("memory-estimate", "--ds", "zero2", "--model", "gpt2_xl", "--gpu-memory", 24)
    answer = run_cli(*hopeless, "--json", cwd=tmp_path)
    assert answer.returncode == 2
    assert answer.stderr.startswith("Error: zero2 does not fit: not even micro-batch 1")
    assert "--ds zero2_offload" in answer.stderr and "Traceback" not in answer.stderr
    assert "micro-batch 1" not in run_cli(*hopeless, cwd=tmp_path).stdout  # it is said once
    (row,) = json.loads(answer.stdout)["rows"]
    assert row["largest_micro_batch"] == 0 and "zero2_offload" in row["change"]
    # Of the shipped profiles, which nobody named, none fits: that is an answer and no mistake.
    every = run_cli("memory-estimate", "--gpu-memory", 2, cwd=tmp_path)
    assert every.returncode == 1 and not every.stderr, every.stderr
    assert "not even micro-batch 1 fits" in " ".join(every.stdout.split())


def test_a_size_of_ones_own_and_a_profile_that_names_only_its_global_batch(tmp_path: Path, models_file: Path) -> None:
    profile = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}, "train_batch_size": 24}
    (tmp_path / "own.json").write_text(json.dumps(profile), encoding="utf-8")
    asked = ("memory-estimate", "--ds", "own.json", "--model", "small", "--models-file", models_file, "--json")
    result = json.loads(run_cli(*asked, "--gpus", 2, cwd=tmp_path).stdout)
    assert result["model"]["emb_dim"] == 32
    assert [result["rows"][0][name] for name in ("micro_batch", "accumulation", "ranks")] == [12, 1, 2]
    options = EstimateOptions(ds=(str(tmp_path / "own.json"),), gpus=5)
    with pytest.raises(UserError, match="train_batch_size 24 does not divide by 5 ranks"):
        estimate(options, CPU)
    with pytest.raises(UserError, match="--global-batch 64 is not micro-batch 6 x 2 ranks; .* 4, 8"):
        estimate(replace(options, gpus=2, global_batch=64, micro_batch=6), CPU)


@pytest.mark.parametrize("asked", [{"micro_batch": 7}, {"accumulation": 5}, {"micro_batch": 8}, {"accumulation": 64}])
def test_the_estimate_and_the_trainer_agree_on_the_batch(
    asked: dict[str, int], tmp_path: Path, wide_corpus: Path
) -> None:
    profile = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}, "train_batch_size": 512}
    path = tmp_path / "own.json"
    path.write_text(json.dumps(profile), encoding="utf-8")

    def trained() -> tuple[int, int]:
        options = TrainOptions(ds=str(path), model="gpt2_tiny", data=wide_corpus, out=tmp_path / "logs", **asked)
        plan = resolve(options, ranks=1, machine=CPU, only_measured=True)
        return plan.micro_batch, plan.accumulation

    def estimated() -> tuple[int, int]:
        (row,) = estimate(EstimateOptions(ds=(str(path),), **asked), CPU).rows
        return row.micro_batch, row.accumulation

    if 512 % next(iter(asked.values())):
        for answer in (trained, estimated):
            with pytest.raises(UserError, match="own: train_batch_size 512 is not"):
                answer()
    else:
        assert trained() == estimated() and estimated()[0] * estimated()[1] == 512


def test_a_global_batch_that_is_asked_for_never_changes() -> None:
    def batches(**asked: Any) -> set[tuple[int, int]]:
        rows = estimate(EstimateOptions(**asked), CPU).rows
        assert {row.global_batch for row in rows} == {asked["global_batch"]}
        return {(row.micro_batch, row.accumulation) for row in rows}

    assert batches(ds=("zero2",), global_batch=512, accumulation=512) == {(1, 512)}
    assert (4, 128) in batches(global_batch=512)  # of a micro-batch of 6, in a profile that nobody named
    for wrong in (
        {"global_batch": 7, "accumulation": 2},
        {"global_batch": 512, "micro_batch": 3, "accumulation": 7},
        {"global_batch": 512, "ds": ("zero2",)},
    ):
        with pytest.raises(UserError, match="--global-batch .* is not"):
            batches(**wrong)


def test_a_policy_that_compiled_blocks_cannot_have_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "compiled.json"
    path.write_text(json.dumps({"gpt2ds": {"compile": True}, "train_micro_batch_size_per_gpu": 1}), encoding="utf-8")
    for answer in (estimate, find_fit):
        with pytest.raises(UserError, match="--recompute narrow does not go with compiled blocks"):
            answer(EstimateOptions(ds=(str(path),), recompute="narrow"), CPU)


@pytest.mark.parametrize("size", [float("inf"), float("nan"), 1e300, -1, 0.5])
def test_a_card_that_makes_no_sense_is_a_mistake(size: float, tmp_path: Path, wide_corpus: Path) -> None:
    with pytest.raises(UserError, match="--gpu-memory"):
        estimate(EstimateOptions(gpu_memory=size), CPU)
    with pytest.raises(UserError, match="--gpu-memory"):
        resolve(TrainOptions(gpu_memory=size, data=wide_corpus, out=tmp_path), ranks=1, machine=CPU)


def test_what_nccl_leaves_may_be_nothing() -> None:
    assert estimate(EstimateOptions(ds=("zero2",), gpu_memory=1), CPU).room_bytes > 0
    with pytest.raises(UserError, match="nothing for tensors beside NCCL"):
        estimate(EstimateOptions(ds=("zero2",), gpu_memory=1, gpus=2), CPU)


def test_another_size_of_the_same_gpu_has_its_workspace() -> None:
    hopper = replace(CPU, gpus=(replace(RTX_4090, compute_capability=(9, 0)),))
    own, smaller, usual = (
        estimate(EstimateOptions(ds=("zero2",), gpu_memory=size), machine).rows[0].setting.workspace_bytes
        for size, machine in ((None, hopper), (16, hopper), (16, CPU))
    )
    assert own == smaller > usual


def test_on_several_gpus_it_says_what_each_holds_and_sends(tmp_path: Path) -> None:
    paper = ("memory-estimate", "--gpus", 1024, "--nodes", 128, "--ds", "zero3", "--ds", "zero1", "--gpu-memory", 24)
    shown = run_cli(*paper, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    words = " ".join(shown.stdout.split())
    three, one = estimate(EstimateOptions(gpus=1024, nodes=128, ds=("zero3", "zero1"), gpu_memory=24), CPU).rows
    for row in (three, one):
        gradients, weights = (f"{size / 2**30:.2f}" for size in (row.traffic.gradients, row.traffic.weights))
        assert f"{gradients} {weights}" in words
    assert one.traffic.gradients == three.traffic.gradients * 2 // 8  # once a step, but there and back
    alone = run_cli("memory-estimate", "--gpus", 1, "--ds", "zero3", "--gpu-memory", 24, cwd=tmp_path)
    assert "weights sent" in words and "weights sent" not in alone.stdout


def test_explain_names_every_part_of_the_peak(tmp_path: Path) -> None:
    shown = run_cli("memory-estimate", "--ds", "zero2", "--gpu-memory", 24, "--explain", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    (row,) = estimate(EstimateOptions(ds=("zero2",)), CPU).rows
    lines = shown.stdout.splitlines()
    for name, size in row.parts.items():
        assert any(line.strip().startswith(name) and f"{size / 2**30:.2f}" in line for line in lines), name


def test_explain_answers_why_mixed_precision_saved_nothing(tmp_path: Path) -> None:
    asked = ("memory-estimate", "--ds", "zero2", "--gpu-memory", 24, "--micro-batch", 2, "--accumulation", 1)
    shown = run_cli(*asked, "--explain", cwd=tmp_path)
    words = " ".join(shown.stdout.split())
    assert "Why did mixed precision not reduce my memory? gpt2_large, micro-batch 2" in words
    # In GiB, 2 sequences: fp32 21.1 and autocast 22.9 with attention by matrices; each fits 2 on such a card at most.
    assert "fp32, AdamW 21.1 (2)" in words and "AdamW 22.9 (1)" in words
    result = json.loads(run_cli(*asked, "--explain", "--json", cwd=tmp_path).stdout)
    assert {one["precision"] for one in result["mixed_precision"]} == {"fp32", "autocast", "16 bits"}


def test_the_picture(tmp_path: Path) -> None:
    def drawn(name: str, **asked: Any) -> bytes:
        return write_plot(estimate(EstimateOptions(**asked), CPU), tmp_path / f"{name}.png").read_bytes()

    one, again, other, every = (
        drawn("a", ds=("zero2",)),
        drawn("b", ds=("zero2",)),
        drawn("c", ds=("zero3",)),
        drawn("d"),
    )
    assert all(image.startswith(b"\x89PNG") and len(image) > 10_000 for image in (one, other, every))
    assert one == again != other
    with pytest.raises(UserError, match="ends in .png"):
        write_plot(estimate(EstimateOptions(ds=("zero2",)), CPU), tmp_path / "picture.jpg")
    missing = run_cli("memory-estimate", "--ds", "zero2", "--plot", "nowhere/a.png", cwd=tmp_path)
    assert missing.returncode == 2 and "No such file" in missing.stderr
    shown = run_cli("memory-estimate", "--ds", "zero2", "--gpu-memory", 24, "--plot", "e.png", cwd=tmp_path)
    assert shown.returncode == 0 and (tmp_path / "e.png").read_bytes().startswith(b"\x89PNG")


def test_it_is_instant_and_imports_no_torch() -> None:
    code = (
        "import sys, time\n"
        "from gpt2ds.devices import Machine; from gpt2ds.estimate.rows import EstimateOptions, estimate\n"
        "from gpt2ds.estimate.change import changes_needed; from gpt2ds.estimate.fit import find_fit\n"
        "import gpt2ds.cli, gpt2ds.estimate.table\n"
        "machine, options = Machine(cpu_name='', cores=1, host_memory_bytes=1), EstimateOptions()\n"
        "changes_needed(estimate(options, machine), options, machine)\n"
        "assert time.process_time() < 1, time.process_time()\n"  # 0.4 s; of the processor, which others use as well
        "find_fit(options, machine)\n"
        "assert not {'torch', 'deepspeed', 'numpy', 'matplotlib'} & set(sys.modules), 'too heavy'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
