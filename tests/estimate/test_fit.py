"""`memory-estimate --fit`: the plan fits, none with less recompute does, the global batch never moves, and what is
written is the same plan again.
"""

import json
import shlex
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import pytest
from support import run_cli

from gpt2ds.devices import GPU, MIB, Machine
from gpt2ds.ds_profile import load_profile, shipped_profiles
from gpt2ds.errors import UserError
from gpt2ds.estimate.fit import command, find_fit, write_profile
from gpt2ds.estimate.rows import EstimateOptions, estimate, memory_setting, recompute_percent
from gpt2ds.gpt2.policies import POLICIES
from gpt2ds.memory.fit import divisors, fits, has_enough_tokens
from gpt2ds.memory.formula import predict
from gpt2ds.options import TrainOptions
from gpt2ds.planning import resolve

pytestmark = pytest.mark.usefixtures("roomy_disk")

CPU = Machine(cpu_name="a CPU", cores=2, host_memory_bytes=64 * 2**30)
RTX_4090 = GPU(name="NVIDIA GeForce RTX 4090", total_bytes=24_564 * MIB, free_bytes=24_207 * MIB)
EXACT = [
    profile
    for profile in map(load_profile, shipped_profiles())
    if not profile.risk and profile.dtype == "bf16" and not profile.offload_optimizer
]

QUESTIONS = [
    EstimateOptions(model=model, gpus=gpus, gpu_memory=gb, global_batch=batch)
    for (model, gpus, gb), batch in zip(
        product(("gpt2_small", "gpt2_large", "gpt2_xl"), (1, 2, 8), (16, 24, 80)),
        (512, 48, 80, 512, 1024, 8, 72, 512, 240) * 3,
        strict=True,
    )
]


@pytest.mark.parametrize("options", QUESTIONS, ids=lambda one: f"{one.model}-{one.gpus}x{one.gpu_memory:g}GB")
def test_the_plan_fits_and_no_plan_with_less_recompute_does(options: EstimateOptions) -> None:
    found = find_fit(options, CPU)
    best, room = found.best, found.estimates.room_bytes
    assert fits(predict(best.setting), room) and best.fits and best.margin_bytes >= 0
    for plan in found.estimates.rows:
        assert plan.micro_batch * plan.accumulation * plan.ranks == options.global_batch
        assert fits(predict(plan.setting), room)
    # By trying everything: without offload, and with a micro-batch that fills a card, nothing needs less arithmetic.
    assert options.gpus and options.global_batch
    per_rank = options.global_batch // options.gpus
    cheaper = []
    for profile, size, policy in product(EXACT, divisors(per_rank)[::-1], POLICIES):
        setting = memory_setting(
            TrainOptions(recompute=policy),
            profile,
            best.setting.model,
            ranks=options.gpus,
            micro_batch=size,
            accumulation=per_rank // size,
        )
        better = best.setting.offload_optimizer or recompute_percent(setting) < best.recompute_percent
        if better and policy != "host" and has_enough_tokens(setting) and fits(predict(setting), room):
            cheaper.append((profile.name, size, policy))
            break
    assert not cheaper


def test_zero_1_comes_before_2_on_several_gpus_and_3_after_both_and_offload_last() -> None:
    several = find_fit(EstimateOptions(gpus=2, gpu_memory=80), CPU).estimates.rows
    assert [row.zero_stage for row in several] == [1, 2, 3, 2, 3]
    assert [row.setting.offload_optimizer for row in several] == [False, False, False, True, True]
    assert several[0].traffic.total < several[1].traffic.total
    # Where a model's own profile is the plan as it stands, it is named.
    two = find_fit(EstimateOptions(gpus=2, gpu_memory=24), CPU)
    assert two.best.profile == "gpt2_large_2x24gb"
    alone = find_fit(EstimateOptions(gpu_memory=24), CPU)
    assert alone.best.profile == "gpt2_large_24gb"
    assert (alone.best.micro_batch, alone.best.accumulation, alone.best.recompute) == (8, 64, "products")
    only_offload = find_fit(EstimateOptions(model="gpt2_xl", gpu_memory=24), CPU)
    assert only_offload.best.setting.offload_optimizer


def test_what_is_left_out_by_default_can_be_asked_for() -> None:
    usual = {row.profile for row in find_fit(EstimateOptions(gpu_memory=80), CPU).estimates.rows}
    assert not usual & {"fp32_baseline", "zero2_fp16", "gpt2_large_24gb_8bit"}
    asked = find_fit(EstimateOptions(ds=("zero2_fp16", "gpt2_large_24gb_8bit"), gpu_memory=24), CPU)
    assert {row.profile for row in asked.estimates.rows} == {"zero2_fp16", "gpt2_large_24gb_8bit"}
    turing = replace(RTX_4090, name="NVIDIA GeForce RTX 2080 Ti", compute_capability=(7, 5))
    old = find_fit(EstimateOptions(model="gpt2_small"), replace(CPU, gpus=(turing,)))
    assert {row.dtype for row in old.estimates.rows} == {"fp16"}


def test_the_global_batch_is_asked_for_the_profiles_own_or_half_a_million_tokens() -> None:
    assert find_fit(EstimateOptions(global_batch=60), CPU).global_batch == 60
    assert find_fit(EstimateOptions(ds=("zero2",)), CPU).global_batch == 48
    assert find_fit(EstimateOptions(ds=("zero2", "zero3")), CPU).global_batch == 512
    assert find_fit(EstimateOptions(model="gpt2_small", context=512), CPU).global_batch == 1024
    assert find_fit(EstimateOptions(micro_batch=4, accumulation=5, gpus=2), CPU).global_batch == 40
    # What the program chooses has divisors, whatever the context and the GPUs.
    for gpus, context in ((3, 1024), (7, 1024), (1, 500)):
        per_rank = find_fit(EstimateOptions(gpus=gpus, context=context), CPU).global_batch / gpus
        assert per_rank in (64, 128, 1024)
    with pytest.raises(UserError, match="--global-batch 7 is not accumulation 2"):
        find_fit(EstimateOptions(global_batch=7, accumulation=2), CPU)
    with pytest.raises(UserError, match="--global-batch 25 does not divide by 2 ranks; .* 24 and 26"):
        find_fit(EstimateOptions(gpus=2, global_batch=25), CPU)
    with pytest.raises(UserError, match="The global batch of 512 is not micro-batch 5 x 1 rank; "):
        find_fit(EstimateOptions(micro_batch=5), CPU)
    with pytest.raises(UserError, match="--global-batch 20 is not micro-batch 5 x accumulation 2"):
        find_fit(EstimateOptions(micro_batch=5, accumulation=2, global_batch=20), CPU)


def test_what_is_asked_for_is_kept() -> None:
    options = EstimateOptions(micro_batch=2, recompute="attention", loss_chunk=256, gpu_memory=24)
    setting = find_fit(options, CPU).best.setting
    assert (setting.micro_batch, setting.recompute, setting.loss_chunk) == (2, "attention", 256)
    assert find_fit(EstimateOptions(accumulation=128, gpu_memory=24), CPU).best.micro_batch == 4


@pytest.mark.parametrize(
    "options",
    [
        EstimateOptions(gpu_memory=24),
        EstimateOptions(gpu_memory=24, gpus=2, loss_chunk=256),
        EstimateOptions(gpu_memory=16, recompute="host", ds=("zero2",)),
        EstimateOptions(model="gpt2_xl", gpu_memory=24),
        EstimateOptions(gpu_memory=24, ds=("gpt2_large_24gb_8bit",), global_batch=72),
        EstimateOptions(gpu_memory=24, ds=("gpt2_xl_24gb_bf16_states",), model="gpt2_xl", global_batch=72),
        EstimateOptions(model="gpt2_medium", gpus=1024, nodes=128),
    ],
    ids=str,
)
def test_a_written_profile_is_the_same_plan_again(options: EstimateOptions, tmp_path: Path) -> None:
    best = find_fit(options, CPU).best
    path = tmp_path / "plan.json"
    write_profile(best, path)
    again = replace(options, ds=(str(path),), recompute=None, loss_chunk=None, global_batch=None)
    (row,) = estimate(again, CPU).rows
    assert row.setting == best.setting
    assert (row.peak_bytes, row.parts, row.host_parts) == (best.peak_bytes, best.parts, best.host_parts)
    raw = json.loads(path.read_text(encoding="utf-8"))
    assert ("activation_checkpointing" in raw) == (best.recompute != "none")
    assert raw["train_batch_size"] == best.global_batch
    profile = load_profile(path)
    assert (profile.risk, profile.eight_bit_states) == (best.source.risk, best.source.eight_bit_states)
    assert best.setting.model.name in profile.description and "predicted peak" in profile.use_when
    before = path.read_bytes()
    with pytest.raises(UserError, match="exists already"):
        write_profile(best, path)
    assert path.read_bytes() == before


def test_the_command_trains_the_plan(tmp_path: Path, wide_corpus: Path) -> None:
    machine = replace(CPU, gpus=(RTX_4090, RTX_4090))
    options = EstimateOptions(global_batch=128)
    found = find_fit(options, machine)
    path = tmp_path / "plan.json"
    write_profile(found.best, path)
    for line in (command(found.best, options), command(found.best, options, written=path)):
        words = shlex.split(line)
        assert words[:5] == ["deepspeed", "--num_gpus", "2", "gpt2ds/cli.py", "train"]
        given = {name[2:].replace("-", "_"): value for name, value in pairwise(words[5:]) if name.startswith("--")}
        kept = {name: int(value) for name, value in given.items() if value.isdigit()}
        plan = resolve(
            TrainOptions(**given | kept, data=wide_corpus, out=tmp_path / "logs"),  # type: ignore[arg-type]
            ranks=2,
            machine=machine,
        )
        assert plan.global_batch == 128
        assert plan.estimate is not None and plan.estimate.peak_bytes == found.best.peak_bytes
    paper = EstimateOptions(gpus=1024, nodes=128, context=512)
    assert "--num_nodes 128 --num_gpus 8 " in command(find_fit(paper, CPU).best, paper)


def test_a_plan_for_this_machine_needs_what_this_machine_has() -> None:
    machine = replace(CPU, gpus=(RTX_4090,), host_memory_bytes=8 * 2**30)
    with pytest.raises(UserError, match="GiB of host memory"):
        find_fit(EstimateOptions(model="gpt2_xl"), machine)
    both = find_fit(EstimateOptions(gpus=None, ds=("zero2", "zero3_offload")), machine)
    assert [row.profile for row in both.estimates.rows] == ["zero2"]
    assert both.left_out[0].startswith("zero3_offload: This run needs")
    # On paper, for another machine, it is only said.
    assert find_fit(EstimateOptions(model="gpt2_xl", gpus=1, gpu_memory=24), machine).best.host_bytes > 8 * 2**30


def test_fp32_comes_after_16_bits_and_twins_are_the_same_training(tmp_path: Path) -> None:
    asked = EstimateOptions(model="gpt2_small", ds=("fp32_baseline", "zero2"), global_batch=512)
    assert [row.profile for row in find_fit(asked, CPU).estimates.rows] == ["zero2", "fp32_baseline"]
    raw = json.loads(next(path for path in shipped_profiles() if path.stem == "zero2").read_text(encoding="utf-8"))
    for name, own in (("same", {}), ("clipped", {"gradient_clipping": 0.5})):
        (tmp_path / f"{name}.json").write_text(json.dumps(raw | own), encoding="utf-8")
    paths = [str(tmp_path / f"{name}.json") for name in ("same", "clipped")]
    rows = find_fit(EstimateOptions(ds=("zero2", *paths)), CPU).estimates.rows
    assert {row.profile for row in rows} == {"zero2", "clipped"}


def test_nothing_fits() -> None:
    with pytest.raises(UserError, match=r"No plan for gpt2_xl fits.*smallest change that fits: a card of 8 GB"):
        find_fit(EstimateOptions(model="gpt2_xl", gpu_memory=1.5), CPU)


def test_the_command_line(tmp_path: Path) -> None:
    arguments = ("memory-estimate", "--fit", "--gpus", 2, "--gpu-memory", 24)
    shown = run_cli(*arguments, "--write", "plan.json", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    words = " ".join(shown.stdout.split())
    assert "gpt2_large_2x24gb (ZeRO-1) 8x32x2 none" in words and "not measured on a GPU" in words
    assert "deepspeed --num_gpus 2 gpt2ds/cli.py train --ds plan.json --model gpt2_large" in shown.stdout
    again = run_cli(*arguments, "--json", cwd=tmp_path)
    result = json.loads(again.stdout)
    assert result["global_batch"] == 512 and result["rows"][0]["profile"] == "gpt2_large_2x24gb"
    assert result["profile"] == json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert "--micro-batch 8 --accumulation 32 --recompute none" in result["command"]
    taken = run_cli(*arguments, "--write", "plan.json", cwd=tmp_path)
    assert taken.returncode == 2 and "exists already" in taken.stderr
    nothing = ("memory-estimate", "--fit", "--model", "gpt2_xl", "--gpu-memory", 1.5, "--json")
    for ds, code in (((), 1), (("--ds", "zero3"), 2)):
        answer = run_cli(*nothing, *ds, cwd=tmp_path)
        result = json.loads(answer.stdout)
        assert answer.returncode == code and not result["rows"] and "No plan for gpt2_xl fits" in result["problem"]
    alone = run_cli("memory-estimate", "--write", "other.json", cwd=tmp_path)
    assert alone.returncode == 2 and "--fit" in alone.stderr and not (tmp_path / "other.json").exists()
