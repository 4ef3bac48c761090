"""From options to a plan: default model, batch arithmetic, data and disk checks, and every mistake in one error."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import PROFILES

from gpt2ds.devices import GPU, MIB, Machine, card_bytes, peak_flops, this_machine
from gpt2ds.errors import UserError
from gpt2ds.estimate.rows import EstimateOptions, estimate
from gpt2ds.options import DEFAULTS, TrainOptions
from gpt2ds.plan import Plan, count_windows
from gpt2ds.planning import resolve

pytestmark = pytest.mark.usefixtures("roomy_disk")

CPU = Machine(cpu_name="a CPU", cores=2, host_memory_bytes=24 * 2**30)
RTX_4090 = GPU(name="NVIDIA GeForce RTX 4090", total_bytes=24_564 * MIB, free_bytes=24_207 * MIB)
ONE_4090 = replace(CPU, gpus=(RTX_4090,))
TWO_4090 = replace(CPU, gpus=(RTX_4090, RTX_4090))


def plan_of(data: Path, tmp_path: Path, machine: Machine, ranks: int = 1, **options: Any) -> Plan:
    # One checkpoint: two of gpt2_xl beside the next one need 70 GiB of whatever disk the tests run on.
    given = {"data": data, "out": tmp_path / "logs"} | options
    return resolve(TrainOptions(**given), ranks=ranks, machine=machine)


def write_profile(folder: Path, **batch: Any) -> str:
    path = folder / "own.json"
    path.write_text(
        json.dumps(batch | {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}), encoding="utf-8"
    )
    return str(path)


def test_the_default_model_is_the_largest_predicted_to_fit(wide_corpus: Path, tmp_path: Path) -> None:
    plan = plan_of(wide_corpus, tmp_path, ONE_4090, ds="zero2")
    assert plan.model.name == "gpt2_large"
    assert plan.estimate is not None
    assert plan.estimate.peak_bytes < card_bytes(24)
    assert any("No --model: gpt2_large" in note for note in plan.notes)
    assert plan_of(wide_corpus, tmp_path, ONE_4090, ds="zero2", gpu_memory=16).model.name == "gpt2_medium"
    assert plan_of(wide_corpus, tmp_path, TWO_4090, ranks=2, ds="zero3").model.name == "gpt2_xl"
    assert plan_of(wide_corpus, tmp_path, CPU, ds="zero2").model.name == "gpt2_tiny"


def test_a_model_that_will_not_fit_is_said_beforehand(wide_corpus: Path, tmp_path: Path) -> None:
    plan = plan_of(wide_corpus, tmp_path, ONE_4090, ds="zero2", model="gpt2_large", micro_batch=16)
    assert any("not expected to fit" in note and "at most 6 is" in note for note in plan.notes)


def test_on_a_cpu_memory_is_predicted_where_it_is_watched(wide_corpus: Path, tmp_path: Path) -> None:
    assert plan_of(wide_corpus, tmp_path, CPU, ds="zero2").estimate is None
    plan = plan_of(wide_corpus, tmp_path, CPU, ds="zero2", watch_memory=True)
    assert plan.estimate is not None
    assert plan.estimate.peak_bytes == sum(plan.estimate.parts.values())
    assert "workspace" not in plan.estimate.parts, "that is cuBLAS's"
    assert plan.identity() == plan_of(wide_corpus, tmp_path, CPU, ds="zero2").identity()


def test_where_watching_the_memory_leads_nowhere(wide_corpus: Path, tmp_path: Path) -> None:
    settings = json.loads((PROFILES / "zero2.json").read_text(encoding="utf-8"))
    offloaded = settings | {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    (tmp_path / "offloaded.json").write_text(json.dumps(offloaded), encoding="utf-8")
    plan = plan_of(wide_corpus, tmp_path, CPU, ds=str(tmp_path / "offloaded.json"), watch_memory=True)
    assert plan.estimate is None
    assert any("offloaded tensors stay in the same memory" in note for note in plan.notes)
    sizes = tmp_path / "sizes.json"
    sizes.write_text('{"models": {"small": {"emb_dim": 64, "n_heads": 2, "n_layers": 2, "drop_rate": 0.1}}}')
    plan = plan_of(wide_corpus, tmp_path, CPU, ds="zero2", watch_memory=True, model="small", models_file=sizes)
    assert plan.estimate is None
    assert any("dropout takes attention without a fused kernel" in note for note in plan.notes)
    settings["gpt2ds"]["compile"] = True
    (tmp_path / "compiled.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(UserError, match="does not see the tensors inside of compiled blocks"):
        plan_of(wide_corpus, tmp_path, CPU, ds=str(tmp_path / "compiled.json"), watch_memory=True)


@pytest.mark.parametrize(
    ("batch", "options", "ranks", "expected"),
    [
        ({"train_micro_batch_size_per_gpu": 4}, {}, 2, (4, 1)),
        ({"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3}, {}, 2, (4, 3)),
        ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 4}, {}, 2, (4, 3)),
        ({"train_batch_size": 24, "gradient_accumulation_steps": 3}, {"micro_batch": 4}, 2, (4, 3)),
        ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 4}, {"micro_batch": 6}, 2, (6, 2)),
        ({"train_micro_batch_size_per_gpu": 4}, {"micro_batch": 2, "accumulation": 5}, 1, (2, 5)),
        ({"train_batch_size": 24, "gradient_accumulation_steps": 3}, {}, 2, (4, 3)),
        ({"train_batch_size": 24}, {}, 2, (12, 1)),
    ],
)
def test_batch_arithmetic(
    wide_corpus: Path, tmp_path: Path, batch: dict[str, int], options: dict[str, int], ranks: int, expected: tuple
) -> None:
    plan = plan_of(wide_corpus, tmp_path, CPU, ranks=ranks, ds=write_profile(tmp_path, **batch), **options)
    assert (plan.micro_batch, plan.accumulation) == expected
    assert plan.global_batch == expected[0] * expected[1] * ranks
    assert plan.tokens_per_step == plan.global_batch * plan.context
    config = plan.ds_config()
    assert config["train_batch_size"] == plan.global_batch


@pytest.mark.parametrize(
    ("batch", "options", "ranks", "words"),
    [
        ({"train_batch_size": 25}, {}, 2, "does not divide by 2 ranks; the nearest that do are 24 and 26"),
        ({"train_batch_size": 24}, {"micro_batch": 5}, 2, "nearest micro-batches are 4, 6"),
        ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 4}, {"accumulation": 4}, 2, "is not micro-batch 4"),
    ],
)
def test_batches_that_do_not_divide_name_the_nearest(
    wide_corpus: Path, tmp_path: Path, batch: dict[str, int], options: dict[str, int], ranks: int, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        plan_of(wide_corpus, tmp_path, CPU, ranks=ranks, ds=write_profile(tmp_path, **batch), **options)


def test_auto_is_the_fastest_that_fits_at_the_same_global_batch(wide_corpus: Path, tmp_path: Path) -> None:
    auto = {"train_batch_size": 96, "train_micro_batch_size_per_gpu": "auto"}

    def planned(ranks: int = 1, own: dict[str, Any] | None = None, **options: Any) -> tuple[int, int, str]:
        ds = write_profile(tmp_path, **auto | (own or {}))
        machine = ONE_4090 if ranks == 1 else TWO_4090
        plan = plan_of(wide_corpus, tmp_path, machine, ranks, ds=ds, model="gpt2_large", **options)
        assert plan.global_batch == 96
        assert plan.estimate is not None and plan.estimate.peak_bytes < plan.device_bytes
        assert any("fastest that is predicted to fit" in note for note in plan.notes)
        assert plan.ds_config()["gradient_accumulation_steps"] == plan.accumulation
        return plan.micro_batch, plan.accumulation, plan.recompute

    # A profile that is silent on recompute gets what is found; 6 would fit without any, too few to fill a card.
    assert planned() == (8, 12, "products")
    assert planned(ranks=2) == (8, 6, "none")
    # One that names a policy keeps it, and so does the user.
    assert planned(own={"gpt2ds": {"recompute": "none"}}) == (6, 16, "none")
    assert planned(own={"activation_checkpointing": {}}) == (48, 2, "full")
    assert planned(recompute="none") == (6, 16, "none")
    # The accumulation changes with the micro-batch, also where the profile has a number for it.
    assert planned(own={"gradient_accumulation_steps": 2}) == (8, 12, "products")
    # The same code answers `memory-estimate`.
    ds = write_profile(tmp_path, **auto)
    (row,) = estimate(EstimateOptions(ds=(ds,)), ONE_4090).rows
    assert (row.micro_batch, row.accumulation, row.recompute) == (8, 12, "products")


def test_auto_where_nothing_fits_and_on_a_cpu(wide_corpus: Path, tmp_path: Path) -> None:
    ds = write_profile(tmp_path, train_batch_size=96, train_micro_batch_size_per_gpu="auto")
    plan = plan_of(wide_corpus, tmp_path, ONE_4090, ds=ds, model="gpt2_xl")
    assert (plan.micro_batch, plan.accumulation) == (1, 96)
    assert any("not expected to fit" in note for note in plan.notes)
    plan = plan_of(wide_corpus, tmp_path, CPU, ds=ds, model="gpt2_small")
    assert plan.micro_batch >= 8 and plan.micro_batch * plan.accumulation == 96
    plan = plan_of(wide_corpus, tmp_path, ONE_4090, ds=ds, model="gpt2_small", micro_batch=4)
    assert (plan.micro_batch, plan.accumulation) == (4, 24)


def test_all_mistakes_stand_in_one_error(tmp_path: Path) -> None:
    profile = tmp_path / "typo.json"
    profile.write_text('{"zero_optimisation": {}, "bf16": {"enabeld": true}}', encoding="utf-8")
    with pytest.raises(UserError) as caught:
        plan_of(tmp_path / "nowhere", tmp_path, CPU, ds=str(profile), model="gpt2_smal", micro_batch=-1)
    text = str(caught.value)
    for words in ("zero_optimisation", "enabeld", "nowhere", "gpt2_smal", "--micro-batch"):
        assert words in text


def test_more_ranks_than_gpus_and_fp16_on_a_cpu_are_refused(wide_corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 ranks on this machine but 1 GPU"):
        plan_of(wide_corpus, tmp_path, ONE_4090, ranks=2)
    with pytest.raises(UserError, match="zero3_fp16 trains in fp16, which needs a CUDA GPU"):
        plan_of(wide_corpus, tmp_path, CPU, ds="zero3_fp16")
    assert plan_of(wide_corpus, tmp_path, ONE_4090, ds="zero2_fp16").profile.dtype == "fp16"


def test_bf16_on_a_card_without_it_is_refused(wide_corpus: Path, tmp_path: Path) -> None:
    turing = replace(RTX_4090, name="NVIDIA GeForce RTX 2080 Ti", compute_capability=(7, 5))
    with pytest.raises(UserError, match="bf16, which NVIDIA GeForce RTX 2080 Ti has no hardware for"):
        plan_of(wide_corpus, tmp_path, replace(CPU, gpus=(turing,)), ds="zero2", model="gpt2_small")


def test_data_that_cannot_serve_is_refused(wide_corpus: Path, tmp_path: Path, models_file: Path) -> None:
    with pytest.raises(UserError, match="390 training windows of 1024 tokens, fewer than the 800 sequences"):
        plan_of(wide_corpus, tmp_path, CPU, model="gpt2_small", micro_batch=100, accumulation=8)
    shard = wide_corpus / "wide_train_000001.bin"
    content = bytearray(shard.read_bytes())
    content[-2:] = b"\xff\xff"
    shard.write_bytes(content)
    with pytest.raises(UserError, match="65,?535"):
        plan_of(wide_corpus, tmp_path, CPU)
    shard.write_bytes(content[:-10])
    with pytest.raises(UserError, match="wide_train_000001.bin"):
        plan_of(wide_corpus, tmp_path, CPU)


def test_a_full_disk_is_seen_beforehand(wide_corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="checkpoints of .* GiB, the best one and the next one need"):
        plan_of(wide_corpus, tmp_path, CPU, model="gpt2_xl", keep=100_000)


def test_the_end_of_a_run(wide_corpus: Path, tmp_path: Path) -> None:
    def total(**options: Any) -> int | None:
        return plan_of(
            wide_corpus, tmp_path, CPU, model="gpt2_small", micro_batch=2, accumulation=5, **options
        ).schedule.total_steps

    assert total() == count_windows(plan_of(wide_corpus, tmp_path, CPU).corpus, "train", 1024) // 10
    assert total(steps=7) == 7
    assert total(tokens=102_400) == 10
    assert total(hours=1.0) is None
    with pytest.raises(UserError, match="give one of them"):
        total(steps=7, hours=1.0)


def test_peak_learning_rate_goes_by_the_nearest_size(wide_corpus: Path, tmp_path: Path) -> None:
    roomy = replace(CPU, host_memory_bytes=64 * 2**30)
    for model, rate in (("gpt2_tiny", 2e-3), ("gpt2_small", 6e-4), ("gpt2_medium", 3e-4), ("gpt2_xl", 2e-4)):
        assert plan_of(wide_corpus, tmp_path, roomy, model=model).schedule.peak_lr == rate
    assert plan_of(wide_corpus, tmp_path, roomy, model="gpt2_xl", lr=1.0).schedule.peak_lr == 1.0


def test_a_resumed_run_takes_what_was_not_asked_for_from_the_earlier_session() -> None:
    earlier = TrainOptions(model="gpt2_small", data=Path("data/x"), steps=100, lr=1e-3).to_dict()
    merged = TrainOptions(resume=True, hours=2.0).over(earlier)
    assert (merged.model, merged.data, merged.lr) == ("gpt2_small", Path("data/x"), 1e-3)
    assert (merged.steps, merged.hours) == (None, 2.0)
    assert TrainOptions(resume=True).over(earlier).steps == 100


def test_peak_rates_and_card_sizes() -> None:
    assert peak_flops("NVIDIA GeForce RTX 4090", "bf16") == 165.2e12
    assert peak_flops("NVIDIA GeForce RTX 4090", "fp32") == 82.6e12
    assert peak_flops("NVIDIA GeForce RTX 3090 Ti", "fp16") == 80.0e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("NVIDIA L40S", "bf16") == 362e12
    assert peak_flops("Unheard Of 1", "bf16") is None
    assert card_bytes(24) == 23_700 * MIB


def test_this_machine_has_cores_and_memory() -> None:
    machine = this_machine()
    assert machine.cores >= 1
    assert machine.host_memory_bytes > 2**30
    assert machine.cpu_name


def test_every_default_stands_in_the_readme() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for name, (value, reason) in DEFAULTS.items():
        assert f"| `{name}` | {value} | {reason} |" in readme
