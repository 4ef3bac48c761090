"""`gpt2ds memory-estimate --trace`: the engine's own account beside the formula's, and what is reserved for it."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from support import PROFILES, run_cli

from gpt2ds.devices import CARD_OVERHEAD_BYTES, Machine
from gpt2ds.estimate.rows import EstimateOptions, Estimates, estimate
from gpt2ds.memory.fit import tensor_bytes
from gpt2ds.memory.setting import CUBLAS_WORKSPACE_BYTES
from gpt2ds.probe import traced_estimate
from gpt2ds.probe.meta_engine import Trace
from gpt2ds.probe.traced_estimate import TracedRow, to_dict, traced_rows

MIB = 2**20
CPU = Machine(cpu_name="a CPU", cores=2, host_memory_bytes=64 * 2**30)
MODEL = """
models:
  tiny: {emb_dim: 128, n_layers: 3, n_heads: 4, context_length: 128, vocab_size: 4096}
"""


def profile(folder: Path, name: str, zero: dict[str, Any] | None = None, **more: Any) -> str:
    """zero2 with buckets in proportion to so small a model, changed; returns its path."""
    settings = json.loads((PROFILES / "zero2.json").read_text(encoding="utf-8")) | more
    settings["zero_optimization"] = {"stage": 2, "reduce_bucket_size": 200_000} | (zero or {})
    path = folder / f"{name}.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("traced")
    (made / "models.yaml").write_text(MODEL, encoding="utf-8")
    return made


def estimates_of(folder: Path, *ds: str, **more: Any) -> Estimates:
    options = EstimateOptions(model="tiny", models_file=folder / "models.yaml", ds=ds, micro_batch=8, **more)
    return estimate(options, CPU)


@pytest.fixture(scope="module")
def traced(folder: Path) -> tuple[Estimates, tuple[TracedRow, ...], dict[int, Trace]]:
    """ZeRO-2 and ZeRO-3 on two GPUs, and what the trace itself gave for each stage."""
    stage_3 = {"stage": 3, "overlap_comm": True}
    estimates = estimates_of(folder, profile(folder, "two"), profile(folder, "three", stage_3), gpus=2)
    whole: dict[int, Trace] = {}

    def kept(request: Any) -> Trace:
        stage = request.ds_config["zero_optimization"]["stage"]
        return whole.setdefault(stage, real_trace(request))

    real_trace = traced_estimate.trace
    finished: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traced_estimate, "trace", kept)
        rows = traced_rows(estimates, cores=2, done=lambda: finished.append(1))
    assert len(finished) == 2
    return estimates, rows, whole


def test_the_account_by_phase_beside_the_formula(traced: Any) -> None:
    _, rows, _ = traced
    for row in rows:
        assert row.row.accumulation == 8
        seen = row.traced
        assert seen.accumulation == 2
        assert [phase.name for phase in seen.phases] == [
            *(f"micro-batch {number} {what}" for number in (1, 2) for what in ("forward", "backward")),
            "optimizer",
        ]
        assert seen.peak_bytes == max(phase.peak_bytes for phase in seen.phases)
        for phase in seen.phases:
            assert sum(phase.parts.values()) == phase.peak_bytes
            assert phase.parts["workspace"] == CUBLAS_WORKSPACE_BYTES
        assert seen.difference_percent == pytest.approx(100 * (row.row.peak_bytes / seen.peak_bytes - 1), abs=1e-3)
        assert abs(seen.difference_percent) <= (2 if row.row.zero_stage == 3 else 0.2)


def test_reserved_is_what_whole_pages_take(traced: Any) -> None:
    _, rows, whole = traced
    for row in rows:
        seen = row.traced
        assert seen.fits and not seen.retries
        # At most a page of each size is lost, on each stream.
        pages = 22 * MIB * (1 + len(set(whole[row.row.zero_stage].streams.values())))
        assert seen.peak_bytes <= seen.reserved.expandable_bytes <= seen.peak_bytes + pages
        assert seen.peak_bytes <= seen.reserved.fixed_bytes
    assert not whole[2].streams
    assert whole[3].streams  # gathers and reduces beside the default stream
    assert (0, 0) in whole[2].events  # DeepSpeed empties the cache before it makes one tensor of the weights


def test_json_has_the_trace_beside_the_formula(traced: Any) -> None:
    estimates, rows, _ = traced
    result = json.loads(json.dumps(to_dict(estimates, rows)))
    assert "trace" in result["source"]
    for given, row in zip(result["rows"], rows, strict=True):
        assert given["peak_bytes"] == row.row.peak_bytes
        assert given["trace"]["peak_bytes"] == row.traced.peak_bytes
        assert given["trace"]["reserved"]["expandable_bytes"] == row.traced.reserved.expandable_bytes
        assert given["trace"]["phases"][0]["parts"]


def test_what_cannot_be_traced_says_why_and_keeps_the_formulas_answer(folder: Path) -> None:
    nvme = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": str(folder), "pin_memory": True}}
    reasons = {
        profile(folder, "compiled", gpt2ds={"compile": True}): "torch.compile",
        profile(folder, "eight_bit", {"stage": 1}, gpt2ds={"eight_bit_states": True}): "bitsandbytes",
        profile(folder, "disk", nvme): "NVMe",
    }
    estimates = estimates_of(folder, *reasons)
    rows = traced_rows(estimates, cores=2)
    for row, reason in zip(rows, reasons.values(), strict=True):
        assert reason in row.why_not
        assert row.traced is None and row.fits and row.row.fits
    assert [row["trace"]["traced"] for row in to_dict(estimates, rows)["rows"]] == [None, None, None]


def test_a_trace_that_fails_is_one_rows_affair(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    estimates = estimates_of(folder, profile(folder, "two"), profile(folder, "again"))
    monkeypatch.setattr(sys, "executable", "false")
    rows = traced_rows(estimates, cores=2)
    assert [row.why_not for row in rows] == ["the trace failed without a word"] * 2
    assert all(row.fits for row in rows)


def test_the_command_decides_by_what_is_reserved(folder: Path) -> None:
    ds = profile(folder, "one")
    (row,) = estimates_of(folder, ds).rows
    # A card on which the tensors just fit, with what the formula leaves to the allocator; pages take more.
    room = next(size for size in range(row.peak_bytes, 2 * row.peak_bytes, 4096) if tensor_bytes(size) > row.peak_bytes)
    card = (room + 4096 + CARD_OVERHEAD_BYTES) / 2**30
    common = ("memory-estimate", "--model", "tiny", "--models-file", "models.yaml", "--micro-batch", 8, "--ds", ds)
    common = (*common, "--gpu-memory", card)
    assert run_cli(*common, cwd=folder).returncode == 0
    done = run_cli(*common, "--trace", "--explain", cwd=folder, COLUMNS="140")
    assert done.returncode == 1, done.stderr
    for expected in (r"one +forward 2 .* no *\n", "micro-batch 2 backward", "moments", "Nothing here is measured"):
        assert re.search(expected, done.stdout), done.stdout
