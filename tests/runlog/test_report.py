"""The training log and its pictures, written from run folders as a run leaves them."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from gpt2ds.errors import UserError
from gpt2ds.runlog.metrics import History, RunLog, read_records
from gpt2ds.runlog.plots import write_plots
from gpt2ds.runlog.report import write_report

PICTURES = ["learning_rate.png", "memory.png", "throughput.png", "train_loss.png", "val_loss.png"]
GIB = 2**30
COMMAND = "deepspeed gpt2ds/cli.py train --ds ds_configs/zero2.json"
PLAN: dict[str, Any] = {
    "run": {"name": "novels", "seed": 1337},
    "model": {
        "name": "gpt2_medium",
        "emb_dim": 1024,
        "vocab_size": 50257,
        "qkv_bias": False,
        "parameters": 354_749_440,
    },
    "batch": {"micro_batch": 8, "accumulation": 4, "ranks": 2, "tokens_per_step": 65_536, "context": 1024},
    "deepspeed": {"profile": "zero2", "zero_stage": 2, "dtype": "bf16", "offload_param": None},
    "optimizer": {"peak_lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-8},
    "schedule": {"kind": "cosine", "warmup_steps": 10, "total_steps": 200, "hours": None},
    "data": {"folder": "data/a|b", "name": "novels", "train_tokens": 15_400_000},
    "devices": {"kind": "cuda", "name": "RTX 4090", "count": 2, "memory_bytes": 24 * GIB, "peak_flops": 1.65e14},
    "memory": {
        "predicted_peak_bytes": 20 * GIB,
        "source": "formula",
        "parts": {"parameters": 3 * GIB, "Adam": 17 * GIB},
    },
    "options": {"ds": "zero2", "hours": None},
}
HOSTILE = "they ```are``` `````\n\n# ripe | </details> **x** <script>\r\n\x1b[31m \ud800 end"


def start(log: RunLog, step: int = 0, resumed_from: str | None = None) -> None:
    gpus = [{"name": "RTX 4090", "total_bytes": 24 * GIB}] * 2
    log.record(
        "start",
        step,
        resumed_from=resumed_from,
        command=COMMAND + (" --resume" if resumed_from else ""),
        ranks=2,
        hardware={"host_cores": 32, "host_memory_bytes": 128 * GIB, "cpu_name": "EPYC", "gpus": gpus},
        versions={"gpt2ds": "0.1", "torch": "2.13.0"},
        total_steps=200,
        hours=None,
        notes=["micro-batch 8, the largest that fits"],
    )


def steps(log: RunLog, first: int, last: int, seed: int = 0, ranks: int = 2, every: int = 50, **changed: Any) -> None:
    """Steps like those of a real run, with an evaluation and a sample every so often."""
    noise = np.random.default_rng(seed)
    for step in range(first, last + 1):
        fields = {
            "loss": 3 + 7 * math.exp(-step / 40) + noise.normal(0, 0.05),
            "lr": 3e-4 * min(1, step / 10),
            "grad_norm": 0.6 + 4 * math.exp(-step / 20) + abs(noise.normal(0, 0.05)),
            "tokens": step * 65_536,
            "tokens_per_second": 28_800 * (1 + noise.normal(0, 0.01)),
            "step_seconds": 2.3,
            "elapsed_seconds": 2.3 * step,
            "mfu": 0.39,
            "memory_bytes": [17 * GIB + rank * GIB // 2 for rank in range(ranks)],
            "reserved_bytes": [19 * GIB] * ranks,
            "skipped_steps": 0,
            "loss_scale": None,
        }
        log.record("step", step, **(fields | changed))
        if step % every == 0:
            log.record("evaluation", step, val_loss=3.2 + 7 * math.exp(-step / 40), windows=64, seconds=4.25)
            log.record("sample", step, prompt="Fruits are *good*", text=HOSTILE)


def prepared(folder: Path, plan: dict[str, Any] = PLAN) -> RunLog:
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "ds_config.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    return RunLog(folder)


@pytest.fixture(scope="module")
def completed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted at step 120, went on from 100, left out a step and came to its end."""
    folder = tmp_path_factory.mktemp("logs") / "novels"
    with prepared(folder) as log:
        start(log)
        log.record("evaluation", 0, val_loss=10.9, windows=64, seconds=4.25)
        steps(log, 1, 120)
        log.record("checkpoint", 100, name="step_100", bytes=5 * GIB, seconds=11.3)
        log.record("end", 120, reason="interrupted by SIGINT", tokens=120 * 65_536, elapsed_seconds=276.0)
        start(log, 100, "step_100")
        steps(log, 101, 149, seed=1)
        steps(log, 150, 150, seed=2, loss=math.nan, grad_norm=math.inf, skipped_steps=1)
        log.record("incident", 150, what="Step 150 was left out: a gradient | was not finite.")
        steps(log, 151, 200, seed=3, skipped_steps=1)
        log.record("end", 200, reason="completed", tokens=200 * 65_536, elapsed_seconds=460.0)
    assert write_report(folder) == folder / "training_log.md"
    return folder


def section(text: str, title: str) -> str:
    return re.split(r"^## ", text, flags=re.M)[
        [part.split("\n")[0] for part in re.split(r"^## ", text, flags=re.M)].index(title)
    ]


def test_the_log_of_a_completed_run_holds_everything(completed: Path) -> None:
    text = (completed / "training_log.md").read_text("utf-8")
    assert text.startswith("# Training log: novels\n\n**Completed at step 200 of 200.**\n")
    assert "To go on" not in text
    summary = section(text, "Summary")
    assert "| Best validation loss | 3.2472 (perplexity 25.72) at step 200 |" in summary
    assert "| Tokens trained on | 13,107,200 |" in summary and "| Training time | 0:07:40 |" in summary
    assert "| MFU, median | 39.0% |" in summary
    assert "| Peak memory | 17.50 GiB on rank 1, 72.9% of the device's 24.00 GiB |" in summary
    rows = re.findall(r"^\| ([\d,]+) \|", section(text, "Progress"), flags=re.M)
    assert rows[0] == "1" and rows[-1] == "200" and len(rows) == 25
    evaluations = section(text, "Evaluation results")
    assert "| 50 | 3,276,800 | 5.2055 | 182.28 | 64 | 4.2 |" in evaluations
    assert "| **200** | **13,107,200** | **3.2472** | **25.72** | **64** | **4.2** |" in evaluations
    memory = section(text, "Memory")
    # The log of a version that wrote no comparison.
    assert "| predicted peak (formula) | 20.00 GiB |  | 83.3% |  |" in memory
    assert "| measured, rank 1 | 17.50 GiB | 19.00 GiB | 72.9% | -12.5% |" in memory
    assert "| Adam | 17.00 GiB | 18,253,611,008 |" in memory
    configuration = section(text, "Configuration")
    for row in ("`vocab_size` | 50,257", "`betas` | 0.9, 0.95", "`warmup_steps` | 10 steps", "`seed` | 1337"):
        assert f"| {row} |" in configuration
    for row in ("`memory_bytes` | 24.00 GiB (25,769,803,776 bytes)", "`peak_flops` | 165 TFLOP/s", "`qkv_bias` | no"):
        assert f"| {row} |" in configuration
    assert r"| `folder` | data/a\|b |" in configuration
    assert (
        "<details>\n<summary>The DeepSpeed configuration, <code>ds_config.json</code></summary>\n\n```json\n{\n" in text
    )
    assert "| GPU 1 | RTX 4090, 24.00 GiB |" in section(text, "Hardware")
    assert "| torch | 2.13.0 |" in section(text, "Versions")
    assert f"```bash\n{COMMAND}\n{COMMAND} --resume\n```" in section(text, "Command")
    assert "| step_100 | 100 | 5.00 GiB | 11.3 |" in section(text, "Checkpoints")
    events = re.findall(
        r"^\| [\d-]{10} [\d:]{8} \| (\d+) \| (.*) \|$", section(text, "Sessions and incidents"), flags=re.M
    )
    assert events == [
        ("0", "started"),
        ("120", "ended: interrupted by SIGINT"),
        ("100", "resumed from step_100"),
        ("150", r"incident: Step 150 was left out: a gradient \| was not finite."),
        ("200", "ended: completed"),
    ]
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (completed / picture).stat().st_size > 10_000
    assert sorted(re.findall(r"!\[.*?\]\((.*?)\)", text)) == PICTURES


def test_hostile_samples_stay_inside_their_fence(completed: Path) -> None:
    samples = section((completed / "training_log.md").read_text("utf-8"), "Sample outputs")
    blocks = re.findall(r"^Step (\d+): \*\*([^\n]*)\*\*\n\n``````text\n(.*?)\n``````$", samples, flags=re.M | re.S)
    assert [step for step, _, _ in blocks] == ["200", "150", "100", "50"]
    assert {prompt for _, prompt, _ in blocks} == {r"Fruits are \*good\*"}
    for _, _, text in blocks:
        assert "`" * 6 not in text
        assert text == "they ```are``` `````\n\n# ripe | </details> **x** <script>\n[31m  end"
    outside = re.sub(r"^``````text\n.*?^``````$", "", samples, flags=re.M | re.S)
    assert "<" not in outside and "\x1b" not in samples


def test_the_report_is_a_function_of_the_folder(completed: Path, tmp_path: Path) -> None:
    copy = tmp_path / "novels"
    shutil.copytree(completed, copy)
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    write_report(copy)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before, "no other bytes, no file left over"


def test_interrupted_with_a_torn_line_and_no_evaluation(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with prepared(folder) as log:
        start(log)
        steps(log, 1, 7)
        log.record("end", 7, reason="interrupted by SIGTERM", tokens=7 * 65_536, elapsed_seconds=16.1)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "step", "step": 8, "lo')
    text = write_report(folder).read_text()
    assert "**Interrupted by SIGTERM at step 7 of 200.**" in text
    assert "```bash\ngpt2ds train --name novels --resume --gpus 2\n```" in text
    assert "No evaluation yet." in text and "No sample yet." in text and "| Best validation loss | none yet |" in text


@pytest.mark.parametrize(
    ("count", "outcome"), [(-1, "Not started yet"), (0, "Running, or stopped"), (1, "Running"), (2, "Running")]
)
def test_a_run_of_hardly_any_steps(tmp_path: Path, count: int, outcome: str) -> None:
    folder = tmp_path / "run"
    with prepared(folder, {"model": {}, "batch": {}} if count < 0 else PLAN) as log:
        if count >= 0:
            start(log)
            steps(log, 1, count, every=1)
    text = write_report(folder).read_text()
    assert f"**{outcome}" in text
    assert sorted(path.name for path in folder.glob("*.png")) == PICTURES


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        write_report(tmp_path / "absent")
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(UserError, match=r"ds_config\.json, metrics\.jsonl is missing"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "ds_config.json").write_text("{")
    with pytest.raises(UserError, match=r"ds_config\.json is not JSON"):
        write_report(tmp_path)
    (tmp_path / "ds_config.json").write_text("{}")
    with pytest.raises(UserError, match="no model and no batch"):
        write_report(tmp_path)
    assert not list(tmp_path.glob("*.png")) and not (tmp_path / "training_log.md").exists()


def pixels(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(matplotlib.image.imread(path))[..., :3]


def plots_of(folder: Path, plan: dict[str, Any] = PLAN, **changed: Any) -> dict[str, np.ndarray[Any, Any]]:
    with RunLog(folder) as log:
        steps(log, 1, 40, every=10, **changed)
    paths = write_plots(History.of(read_records(folder / "metrics.jsonl")), plan, folder)
    assert sorted(path.name for path in paths) == PICTURES
    return {path.stem: pixels(path) for path in paths}


def test_pictures_show_their_data(tmp_path: Path) -> None:
    base = plots_of(tmp_path / "a")
    for name, picture in base.items():
        assert picture.shape[1] == 1200, "8 inches at 150 dpi: sharp at 800 pixels"
        assert (picture < 0.9).any(axis=2).mean() > 0.01, f"{name} is nearly empty"
    for index, (changed, fields) in enumerate(
        (
            ({"train_loss", "memory"}, {"loss": 5.0, "memory_bytes": [10 * GIB, 11 * GIB]}),
            ({"throughput", "learning_rate"}, {"tokens_per_second": 10.0, "grad_norm": 1.0}),
        )
    ):
        other = plots_of(tmp_path / str(index), **fields)
        assert {name for name, picture in base.items() if not np.array_equal(picture, other[name])} == changed


@pytest.mark.filterwarnings("error")
def test_pictures_of_numbers_gone_wrong(tmp_path: Path) -> None:
    everything = {"loss": math.nan, "grad_norm": math.inf, "tokens_per_second": math.nan, "mfu": None}
    cpu = PLAN | {"devices": {"kind": "cpu", "memory_bytes": 900 * GIB}, "memory": {"predicted_peak_bytes": None}}
    plots_of(tmp_path / "nan", plan=cpu, ranks=12, reserved_bytes=None, **everything)
    plots_of(tmp_path / "zero", loss=0.0, grad_norm=0.0, tokens_per_second=0.0, tokens=0, memory_bytes=[0], lr=0.0)
    with RunLog(tmp_path / "ranks") as log:
        steps(log, 1, 5, ranks=4, every=1)
        log.record("evaluation", 5, val_loss=math.inf, windows=1, seconds=1.0)
        log.record("start", 5, resumed_from="x")
        steps(log, 6, 60, ranks=1, every=100)
        steps(log, 61, 61, loss=1e6)
    write_plots(History.of(read_records(tmp_path / "ranks" / "metrics.jsonl")), PLAN, tmp_path / "ranks")


def test_one_loss_that_is_not_finite_leaves_the_curve(completed: Path) -> None:
    blue = np.array([0x1F, 0x6F, 0xB4]) / 255
    solid = (np.abs(pixels(completed / "train_loss.png") - blue) < 0.01).all(axis=2)
    columns = np.flatnonzero(solid.any(axis=0))
    assert columns.max() - columns.min() > 1000, "the running mean goes from the first step to the last"
    assert np.isin(np.arange(columns.min(), columns.max()), columns).mean() > 0.95
