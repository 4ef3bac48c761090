"""Whole runs through the command line: resume, signals, time budgets, damaged checkpoints, and what a run leaves
behind.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import cpu_environment, free_port, run_cli

from gpt2ds.training.schedule import LearningRate

STEPS = 8


def train_arguments(models_file: Path, corpus_folder: Path, **more: Any) -> list[str]:
    options: dict[str, Any] = {
        "ds": "fp32_baseline",
        "model": "small",
        "models_file": models_file,
        "data": corpus_folder,
        "micro_batch": 2,
        "accumulation": 2,
        "steps": STEPS,
        "save_every": 4,
        "evaluate_every": 4,
        "evaluation_windows": 4,
        "sample_tokens": 3,
    } | more
    words = ["train"]
    for name, value in options.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(run, "step")}


def slowness(run: Path) -> float:
    """What a busy machine may add to a time: some of the slowest steps and evaluations that there were, in seconds."""
    steps = [record["step_seconds"] for record in records(run, "step")]
    return 3 * (max(steps) + max(record["seconds"] for record in records(run, "evaluation")))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, models_file: Path, corpus_folder: Path) -> Path:
    """A two-rank ZeRO-2 run in fp32, started by the deepspeed program as a user would, which ended by itself."""
    folder = tmp_path_factory.mktemp("finished")
    profile = json.loads((Path(__file__).parents[2] / "ds_configs" / "zero2.json").read_text(encoding="utf-8"))
    del profile["bf16"]
    (folder / "zero2_fp32.json").write_text(json.dumps(profile), encoding="utf-8")
    arguments = train_arguments(models_file, corpus_folder, ds="zero2_fp32.json", name="a")
    launcher = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", 2, "--master_port", free_port()]
    command = [*map(str, launcher), str(Path(__file__).parents[2] / "gpt2ds" / "cli.py"), *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Training log: logs/a/training_log.md" in result.stdout
    return folder


def test_a_run_leaves_everything_behind(finished: Path) -> None:
    run = finished / "logs" / "a"
    names = {path.name for path in run.iterdir()}
    assert names >= {
        *("plan.json", "ds_config.json", "metrics.jsonl", "training_log.md", "deepspeed.log", "checkpoints"),
        *("train_loss.png", "val_loss.png", "throughput.png", "memory.png", "learning_rate.png"),
    }
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*")) == ["step-00000004", "step-00000008"]
    steps = records(run, "step")
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    assert steps[-1]["tokens"] == STEPS * 2 * 2 * 2 * 32
    assert all(len(record["memory_bytes"]) == 2 for record in steps)
    assert [record["step"] for record in records(run, "evaluation")] == [0, 4, 8]
    assert records(run, "evaluation")[0]["val_loss"] == pytest.approx(math.log(50257), abs=0.5)
    assert records(run, "end")[-1]["reason"] == "completed"
    assert not records(run, "memory") and not records(run, "incident"), "nobody watched the memory"
    log = (run / "training_log.md").read_text(encoding="utf-8")
    for words in ("Fruits are good for you because", "train_loss.png", "zero2_fp32", "completed"):
        assert words in log


def test_resume_is_bit_equal_and_passes_over_a_damaged_checkpoint(
    finished: Path, tmp_path: Path, models_file: Path, corpus_folder: Path
) -> None:
    whole = losses(finished / "logs" / "a")
    shutil.copytree(finished, tmp_path / "copy")
    run = tmp_path / "copy" / "logs" / "a"
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= 6 and json.loads(line)["kind"] != "end"]
    (run / "metrics.jsonl").write_text("".join(kept), encoding="utf-8")
    damaged = run / "checkpoints" / "step-00000008" / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)

    # In a user's own environment, where nothing says that there is no GPU.
    command = [sys.executable, "-m", "gpt2ds", "train", "--resume", "--gpus", "2"]
    result = subprocess.run(command, cwd=tmp_path / "copy", capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert not result.stderr.strip(), result.stderr
    (incident,) = records(run, "incident")
    assert "step-00000008 is passed over" in incident["what"]
    assert "model.safetensors was changed" in incident["what"]
    assert records(run, "start")[-1]["resumed_from"] == "step-00000004"
    assert losses(run) == whole
    tail = [record for record in records(run, "step") if record["step"] > 4][2:]
    assert [record["loss"] for record in tail] == [whole[step] for step in range(5, STEPS + 1)]


def test_generate_evaluate_and_report_need_only_the_run_folder(finished: Path) -> None:
    text = run_cli("generate", "a", "Fruits are", "--tokens", 5, "--seed", 3, cwd=finished)
    assert text.returncode == 0, text.stderr
    assert text.stdout == run_cli("generate", "logs/a", "Fruits are", "--tokens", 5, "--seed", 3, cwd=finished).stdout
    evaluated = run_cli("evaluate", "a", "--windows", 4, cwd=finished)
    assert evaluated.returncode == 0, evaluated.stderr
    last = records(finished / "logs" / "a", "evaluation")[-1]["val_loss"]
    assert f"validation loss {last:.4f}" in evaluated.stdout
    log = finished / "logs" / "a" / "training_log.md"
    before = log.read_text(encoding="utf-8")
    log.unlink()
    assert run_cli("report", "a", cwd=finished).returncode == 0
    assert log.read_text(encoding="utf-8") == before


@pytest.mark.parametrize(("number", "gpus"), [(signal.SIGTERM, None), (signal.SIGINT, 2), (signal.SIGTERM, 2)])
def test_a_signal_ends_a_run_with_a_checkpoint_and_a_log(
    tmp_path: Path, models_file: Path, corpus_folder: Path, number: signal.Signals, gpus: int | None
) -> None:
    arguments = train_arguments(models_file, corpus_folder, name="a", steps=100_000, save_every=None, gpus=gpus)
    out = signalled(tmp_path, arguments, number, after="step")
    assert f"Resume with: gpt2ds train --name a --resume{' --gpus 2' if gpus else ''}\n" in out
    run = tmp_path / "logs" / "a"
    last = records(run, "step")[-1]["step"]
    assert records(run, "checkpoint")[-1]["name"] == f"step-{last:08d}"
    assert records(run, "end")[-1]["reason"] == f"interrupted by {number.name}"
    assert f"interrupted by {number.name}" in (run / "training_log.md").read_text(encoding="utf-8")


def signalled(folder: Path, arguments: list[str], number: signal.Signals, after: str) -> str:
    """Starts a run `a`, signals it once its metrics hold a record of this kind, and returns what it printed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gpt2ds", *arguments],
        cwd=folder,
        env=cpu_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        metrics = folder / "logs" / "a" / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (metrics.exists() and f'"kind": "{after}"' in metrics.read_text()):
            time.sleep(0.1)
        os.kill(process.pid, number)
        out, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, out
    return out


def test_a_resumed_run_keeps_the_schedule_that_hours_decided(
    tmp_path: Path, models_file: Path, corpus_folder: Path
) -> None:
    arguments = train_arguments(
        models_file, corpus_folder, name="a", steps=None, hours=15 / 3600, save_every=None, evaluate_every=None
    )
    signalled(tmp_path, arguments, signal.SIGTERM, after="schedule")
    run = tmp_path / "logs" / "a"
    (decided,) = records(run, "schedule")
    stopped = records(run, "step")[-1]
    result = run_cli("train", "--resume", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "time budget reached" in result.stdout or "completed" in result.stdout
    assert records(run, "start")[-1]["total_steps"] == decided["total_steps"]
    assert len(records(run, "schedule")) == 1
    first = next(record for record in records(run, "step") if record["step"] == stopped["step"] + 1)
    assert first["elapsed_seconds"] > stopped["elapsed_seconds"]
    assert records(run, "end")[-1]["elapsed_seconds"] < 15 + 4 + slowness(run)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_hours_end_a_run_in_time_with_a_finished_schedule(
    tmp_path: Path, models_file: Path, corpus_folder: Path, schedule: str
) -> None:
    seconds = 10.0
    arguments = train_arguments(
        models_file,
        corpus_folder,
        name="a",
        steps=None,
        hours=seconds / 3600,
        schedule=schedule,
        save_every=None,
        evaluate_every=None,
    )
    if schedule == "wsd":  # under torchrun as well
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command += [str(Path(__file__).parents[2] / "gpt2ds" / "cli.py"), *arguments]
        result = subprocess.run(
            command, cwd=tmp_path, env=cpu_environment(), capture_output=True, text=True, timeout=240, check=False
        )
    else:
        result = run_cli(*arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    run = tmp_path / "logs" / "a"
    decided = records(run, "schedule")
    assert len(decided) == {"cosine": 1, "wsd": 2}[schedule]
    assert decided[0]["total_steps"] > decided[0]["step"]
    end = records(run, "end")[-1]
    assert seconds * 0.5 < end["elapsed_seconds"] < seconds + 3 + slowness(run)
    rates = [record["lr"] for record in records(run, "step")]
    assert max(rates) == pytest.approx(2e-3)
    # Where nothing else slows the machine down all of these steps were taken, and the rate came down to its end.
    ending = decided[-1]
    fitted = LearningRate(
        kind=schedule,
        peak_lr=2e-3,
        min_lr_ratio=0.1,
        warmup_steps=decided[0]["warmup_steps"],
        total_steps=ending["total_steps"],
        decay_start=ending["step"] if schedule == "wsd" else None,
    )
    assert rates[-1] == pytest.approx(fitted.at(len(rates) - 1))
    assert fitted.at(ending["total_steps"] - 1) < 0.7 * max(rates)
    assert len(records(run, "evaluation")) > 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": "nowhere"}, "nowhere"),
        ({"data": "nowhere", "gpus": 2}, "nowhere"),
        ({"model": "gpt2-small"}, "did you mean 'gpt2_small'"),
        ({"ds": "zero2_fp16"}, "fp16, which needs a CUDA GPU"),
        ({"micro_batch": 0}, "--micro-batch must be above 0"),
        ({"hours": 1}, "give one of them"),
        ({"context": 64}, "longer than the 32 tokens"),
        ({"schedule": "cosin"}, "did you mean cosine"),
        ({"micro_batch": 100_000}, "training windows"),
        ({"name": "../elsewhere"}, "not a path"),
        ({"gpus": 0}, "--gpus must be at least 1"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    tmp_path: Path, models_file: Path, corpus_folder: Path, change: dict[str, Any], words: str
) -> None:
    result = run_cli(*train_arguments(models_file, corpus_folder, **change), cwd=tmp_path)
    assert result.returncode == 2, result.stdout + result.stderr
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert "[ERROR]" not in result.stderr  # the launcher has nothing to add
    assert not (tmp_path / "logs").exists()


def test_a_run_folder_of_another_plan_is_refused(finished: Path, models_file: Path) -> None:
    for extra, words in (
        (["--name", "a"], "exists already"),
        (["--name", "a", "--resume", "--gpus", 2, "--seed", 5], "seed was 1337 and is now 5"),
        (["--name", "a", "--resume", "--gpus", 2, "--ds", "zero2"], "dtype was 'fp32' and is now 'bf16'"),
        (["--name", "a", "--resume", "--gpus", 3], "The run's global batch of 8 does not divide by 3 ranks"),
        (["--name", "a", "--resume", "--gpus", 2, "--accumulation", 4], "global batch was 8 and is now 16"),
        (["--name", "b", "--resume"], "no run folder"),
    ):
        result = run_cli("train", "--models-file", models_file, *extra, cwd=finished)
        assert result.returncode == 2, result.stdout + result.stderr
        assert words in result.stderr
        assert "Traceback" not in result.stderr


def test_another_end_or_rate_asked_for_on_resuming_counts(
    finished: Path, tmp_path: Path, models_file: Path, corpus_folder: Path
) -> None:
    arguments = train_arguments(models_file, corpus_folder, name="a", steps=3, save_every=None, evaluate_every=100)
    assert run_cli(*arguments, cwd=tmp_path).returncode == 0
    result = run_cli("train", "--resume", "--steps", 5, "--lr", 1e-5, "--schedule", "constant", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    steps = records(tmp_path / "logs" / "a", "step")
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5]
    assert [record["lr"] for record in steps[3:]] == [1e-5, 1e-5]


def test_other_hours_asked_for_on_resuming_do_not_begin_at_the_peak(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    run = tmp_path / "copy" / "logs" / "a"
    refused = run_cli("train", "--resume", "--hours", 1e-5, cwd=tmp_path / "copy")
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "--hours 1e-05 counts those of all its sessions" in refused.stderr
    trained = records(run, "step")[-1]["elapsed_seconds"]
    result = run_cli("train", "--resume", "--hours", (trained + 8) / 3600, cwd=tmp_path / "copy")
    assert result.returncode == 0, result.stdout + result.stderr
    (decided,) = records(run, "schedule")
    rates = [record["lr"] for record in records(run, "step")[STEPS:]]
    held = rates[: decided["step"] - STEPS]
    assert len(held) >= 5 and min(held) == max(held) == pytest.approx(2e-4), (
        "the least rate, at which the run had ended"
    )
    assert rates[-1] < max(rates)

    again = run_cli("train", "--resume", cwd=tmp_path / "copy")
    assert again.returncode == 0, again.stdout + again.stderr
    assert records(run, "end")[-1]["tokens"] == records(run, "end")[-2]["tokens"], "no step after the last"


def test_pruning_keeps_the_newest_complete_ones_up_to_the_one_just_written(tmp_path: Path) -> None:
    from gpt2ds.training.checkpoints import prune
    from gpt2ds.training.manifest import MANIFEST

    for step, complete in ((2, True), (4, True), (5, False), (6, True), (8, True)):
        folder = tmp_path / f"step-{step:08d}"
        folder.mkdir()
        (folder / "file").write_text("content")
        if complete:
            (folder / MANIFEST).write_text("{}")
    prune(tmp_path, "step-00000006", keep=2)  # 8 was damaged and passed over
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000006"]


def test_pruning_keeps_the_best_of_those_that_stay(finished: Path, tmp_path: Path) -> None:
    from gpt2ds.training.checkpoints import prune
    from gpt2ds.training.manifest import read_manifest

    manifest = read_manifest(finished / "logs" / "a" / "checkpoints" / "step-00000008")
    for step, loss in ((200, 3.0), (250, 3.4), (255, 3.3), (260, None), (300, 2.9)):
        folder = tmp_path / f"step-{step:08d}"
        folder.mkdir()
        replace(manifest, position=replace(manifest.position, step=step, val_loss=loss)).write(folder)
    prune(tmp_path, "step-00000260", keep=1)  # 300 was passed over, so it is no longer the best
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000200", "step-00000260"]
