"""What `gpt2ds memory-estimate` prints: nothing is cut in a narrow terminal, and the sentences below the tables."""

import json
from pathlib import Path
from typing import Any

import pytest

from gpt2ds.devices import Machine
from gpt2ds.estimate.fit import command, find_fit
from gpt2ds.estimate.limits import left_out
from gpt2ds.estimate.rows import EstimateOptions, estimate, row_of
from gpt2ds.estimate.table import explain, explain_precision, show, show_fit
from gpt2ds.memory.fit import MICRO_BATCH_MOST
from gpt2ds.memory.mixed_precision import compare

CPU = Machine(cpu_name="a CPU", cores=2, host_memory_bytes=64 * 2**30)


def own_profile(folder: Path, **own: Any) -> str:
    path = folder / "own.json"
    batch = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2}
    path.write_text(json.dumps({"bf16": {"enabled": True}} | batch | own), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("columns", [50, 60, 80])
def test_no_figure_is_cut_in_a_narrow_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    options = EstimateOptions(ds=("zero2", "gpt2_large_24gb_bf16_states"), gpus=1024, nodes=128)
    found = estimate(options, CPU)
    show(found)
    explain(found)
    shown = capsys.readouterr().out
    assert "…" not in shown and all(len(line) <= columns for line in shown.splitlines())
    for row in found.rows:
        figures = [row.peak_bytes, row.traffic.gradients, *row.parts.values()]
        assert all(f"{size / 2**30:.2f}" in shown for size in figures)


def test_a_search_that_ended_at_its_limit_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    for size in (1, 2 * MICRO_BATCH_MOST):
        options = EstimateOptions(model="gpt2_tiny", ds=("zero2",), gpu_memory=10_000, micro_batch=size)
        found = estimate(options, CPU)
        show(found)
        assert found.rows[0].fits and found.rows[0].largest_micro_batch >= size
        assert f"{max(size, MICRO_BATCH_MOST)}+" in capsys.readouterr().out


def test_whether_autocast_takes_more_is_said_by_its_sign(capsys: pytest.CaptureFixture[str]) -> None:
    def said(**asked: Any) -> str:
        found = estimate(EstimateOptions(ds=("zero2",), **asked), CPU)
        (row,) = found.rows
        explain_precision(row, compare(row.setting, found.room_bytes))
        return " ".join(capsys.readouterr().out.split())

    assert "The peak even grows here" in said(micro_batch=2, accumulation=1)
    assert "outweigh both" in said(context=128, micro_batch=32)


def test_the_sentences_below_the_plans(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    options = EstimateOptions(ds=("zero2", "zero1"), gpus=2, gpu_memory=16, global_batch=512)
    found = find_fit(options, CPU)
    show_fit(found, command(found.best, options))
    shown = " ".join(capsys.readouterr().out.split())
    assert "16 bits before fp32, a micro-batch that fills the card, the least recompute, ZeRO-3 after" in shown
    assert found.best.profile == "zero2" and "Without NVLink zero1 may be faster" in shown
    one = EstimateOptions(model="gpt2_tiny", ds=("zero2",), global_batch=1)
    found = find_fit(one, CPU)
    show_fit(found, command(found.best, one))
    shown = capsys.readouterr().out
    assert "a global batch of 1 sequence (asked for)" in shown and "Without NVLink" not in shown


def test_the_command_names_the_models_file(models_file: Path) -> None:
    options = EstimateOptions(model="small", models_file=models_file, ds=("zero2",))
    assert f"--models-file {models_file}" in command(find_fit(options, CPU).best, options)


def test_gradients_travel_in_the_type_that_the_profile_says(tmp_path: Path) -> None:
    def sent(**own: Any) -> int:
        options = EstimateOptions(ds=(own_profile(tmp_path, zero_optimization={"stage": 2}, **own),), gpus=2)
        (row,) = estimate(options, CPU).rows
        assert row_of(row.source, row.setting, nodes=1, room=2**34).traffic == row.traffic
        return row.traffic.gradients

    assert sent(communication_data_type="fp32") == 2 * sent()


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"optimizer": {"type": "AdamW", "params": {"foreach": True}}}, "without fused: more than said"),
        (
            {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 10_000_000}},
            "threshold 10,000,000: more than said",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            "ratio 0.5: more than said on the GPU",
        ),
        ({"zero_optimization": {"stage": 2, "contiguous_gradients": False}}, "contiguous_gradients false: less"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "zero_hpz_partition_size: more than said"),
    ],
    ids=str,
)
def test_what_the_prediction_leaves_out_is_said(
    own: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = estimate(EstimateOptions(ds=(own_profile(tmp_path, **own), "zero2", "zero3"), model="gpt2_small"), CPU)
    assert [bool(left_out(row.source)) for row in found.rows] == [True, False, False]
    show(found)
    shown = " ".join(capsys.readouterr().out.split())
    assert "own: the prediction leaves out" in shown and words in shown
    assert [len(row["not_counted"]) for row in found.to_dict()["rows"]] == [1, 0, 0]


def test_no_shipped_profile_has_keys_that_are_left_out() -> None:
    assert not any(left_out(row.source) for row in estimate(EstimateOptions(), CPU).rows)
