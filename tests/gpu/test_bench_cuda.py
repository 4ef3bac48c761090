"""`gpt2ds bench` on one CUDA GPU: predicted beside measured, the cap, out of memory, and the largest micro-batch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import run_cli

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MIB = 2**20

# 1.5 GB of a pretended card: gpt2_small's states need about 2.1 GiB, gpt2_tiny's 0.15.
SMALL_CARD_GB = 1.5


def bench(folder: Path, *words: Any) -> tuple[str, dict[str, Any]]:
    result = run_cli("bench", "--out", "out", *words, cwd=folder, timeout=540, DS_ACCELERATOR="cuda", COLUMNS="160")
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout, json.loads((folder / "out" / "bench.json").read_text(encoding="utf-8"))


def test_predicted_stands_beside_measured(tmp_path: Path) -> None:
    text, results = bench(
        *(tmp_path, "--model", "gpt2_small", "--ds", "zero2", "--micro-batch", 2),
        *("--recompute", "none", "--recompute", "full"),
    )
    for record in results["settings"]:
        assert record["result"] == "measured", record["why"]
        assert record["reserved_bytes"][0] >= record["peak_bytes"][0] > 0
        assert record["tokens_per_second"] > 0
        # Not a bound of the formula's quality, which its own tests state: the two figures mean the same thing.
        assert abs(record["predicted"]["difference_percent"]) < 25
    none, full = sorted(results["settings"], key=lambda record: record["recompute"], reverse=True)
    assert full["peak_bytes"][0] < none["peak_bytes"][0]
    assert results["device"]["kind"] == "cuda"
    assert results["device"]["name"] == torch.cuda.get_device_name()
    assert "CPU" not in text
    assert "difference" in text


def test_a_setting_beyond_the_cap_is_out_of_memory_and_the_next_one_runs(tmp_path: Path) -> None:
    text, results = bench(
        *(tmp_path, "--model", "gpt2_tiny", "--ds", "zero2", "--micro-batch", 4096, "--micro-batch", 1),
        *("--gpu-memory", SMALL_CARD_GB),
    )
    failed, measured = results["settings"]
    assert failed["result"] == "out of memory"
    assert failed["why"].startswith("tried to allocate ")
    assert not failed["predicted"]["fits"]
    assert "as predicted" in text
    assert measured["result"] == "measured", measured["why"]
    assert measured["reserved_bytes"][0] <= SMALL_CARD_GB * 1024 * MIB


def test_the_largest_micro_batch_is_found_by_real_runs(tmp_path: Path) -> None:
    text, results = bench(
        *(tmp_path, "--model", "gpt2_tiny", "--ds", "zero2", "--recompute", "none"),
        *("--largest", "--gpu-memory", SMALL_CARD_GB),
    )
    (found,) = results["largest"]
    assert found["fails"] == found["runs"] + 1
    outcomes = {record["micro_batch"]: record["result"] for record in results["settings"]}
    assert outcomes[found["runs"]] == "measured"
    assert outcomes[found["fails"]] == "out of memory"
    assert next(iter(outcomes)) == found["predicted"]
    assert "Largest micro-batch" in text
