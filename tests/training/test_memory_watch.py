"""Predicted beside measured at the end of real runs on two CPU ranks, and of one that resumes with a wrong prediction
and fails.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support import run_cli, run_ranks

from gpt2ds.training.memory_watch import StepPeaks

# Small buckets: with the shipped ones they would be nearly all that so small a model takes.
PROFILE = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "bf16": {"enabled": True},
    "data_types": {"grad_accum_dtype": "fp32"},
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 500_000},
    "gpt2ds": {"loss_chunk": 64},
}


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, models_file: Path, corpus_folder: Path) -> Path:
    """The working directory of a run of three steps on two ranks."""
    folder = tmp_path_factory.mktemp("watched")
    (folder / "own.json").write_text(json.dumps(PROFILE), encoding="utf-8")
    result = run_cli(
        *(
            "train",
            "--ds",
            folder / "own.json",
            "--model",
            "small",
            "--models-file",
            models_file,
            "--data",
            corpus_folder,
        ),
        *("--steps", 3, "--evaluate-every", 2, "--evaluation-windows", 2, "--sample-tokens", 2),
        *("--name", "a", "--watch-memory", "--gpus", 2),
        cwd=folder,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (folder / "shown").write_text(result.stdout, encoding="utf-8")
    return folder


def test_a_real_run_holds_what_was_predicted(watched: Path) -> None:
    run = watched / "logs" / "a"
    (check,) = records(run, "memory")
    predicted = json.loads((run / "plan.json").read_text(encoding="utf-8"))["memory"]["predicted_peak_bytes"]
    assert check["predicted_bytes"] == predicted
    assert check["steps"] == 2 and check["reserved_bytes"] is None
    assert check["measured_bytes"] == pytest.approx([predicted, predicted], rel=0.01)
    steps = [record["tensor_bytes"] for record in records(run, "step")]
    assert check["measured_bytes"] == [max(sizes) for sizes in zip(*steps[1:], strict=True)]
    assert not records(run, "incident")
    log = (run / "training_log.md").read_text(encoding="utf-8")
    assert "| measured, rank 1 |" in log and "| Memory in the steps | predicted " in log
    *_, compared, ended, _ = (watched / "shown").read_text(encoding="utf-8").splitlines()
    assert compared.startswith("memory in the steps: predicted ") and ended.startswith("completed at step 3")


def test_a_wrong_prediction_is_an_incident_also_of_a_resumed_run_that_fails(watched: Path, tmp_path: Path) -> None:
    shutil.copytree(watched, tmp_path / "copy")
    run = tmp_path / "copy" / "logs" / "a"
    arguments = ("train", "--resume", "--out", run.parent, "--name", "a", "--steps", 9, "--watch-memory")
    worker = Path(__file__).with_name("memory_watch_worker.py")
    assert "failed on purpose" in run_ranks(worker, *arguments)[0].stdout
    earlier, check = records(run, "memory")
    assert check["predicted_bytes"] == pytest.approx(earlier["predicted_bytes"] / 2, rel=0.001)
    assert check["measured_bytes"] == pytest.approx(earlier["measured_bytes"], rel=0.01)
    assert check["steps"] == 1, "the session's first step is left out, the third one failed"
    (incident,) = records(run, "incident")
    assert "please report this to the maintainers of gpt2ds, with plan.json" in incident["what"]
    assert records(run, "end")[-1]["reason"] == "failed: ArithmeticError: on purpose"
    log = (run / "training_log.md").read_text(encoding="utf-8")
    assert "please report this to the maintainers" in log


def test_steps_count_after_the_first_that_was_taken_and_what_lies_between_them_is_kept() -> None:
    peaks = StepPeaks()
    steps = (
        ([8, 8], [20, 20], [0, 0], False),  # fp16 begins with a loss scale that is too high
        ([9, 9], [20, 20], [3, 1], True),
        ([5, 6], [7, 8], [2, 2], False),
        ([6, 4], [8, 7], [0, 4], True),
    )
    for measured, reserved, outside, taken in steps:
        peaks.add(measured, reserved, outside, taken=taken)
    peaks.add_outside([1, 5])
    assert (peaks.measured, peaks.reserved, peaks.outside, peaks.steps) == ([6, 6], [8, 8], [3, 5], 2)
