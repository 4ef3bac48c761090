"""The traced engine beside real ones on two CPU ranks: tensor for tensor, and beside what the kernel counts.

benchmarks/memory_oracles.py has more settings, each with both.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from support import TESTS, run_ranks

from gpt2ds.ds_profile import load_profile
from gpt2ds.gpt2.config import GPT2Config
from gpt2ds.probe.meta_engine import Trace, TraceRequest, trace_all

RANKS = 2
MICRO_BATCH = 8
SMALL = GPT2Config(name="small", emb_dim=128, n_heads=4, n_layers=4, context_length=64, vocab_size=4096)
# Buckets and limits in proportion to so small a model: several of each fill up.
BUCKET = {"reduce_bucket_size": 200_000}
STAGE_3 = BUCKET | {
    "stage3_max_live_parameters": 300_000,
    "stage3_prefetch_bucket_size": 200_000,
    "stage3_param_persistence_threshold": 1_000,
    "sub_group_size": 400_000,
}
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
# Pages of 4 KiB and Python's own objects, 1 to 2 MiB in all, must be little beside the tensors.
WIDE = GPT2Config(name="wide", emb_dim=768, n_heads=12, n_layers=2, context_length=64, vocab_size=8192)


def request(folder: Path, dtype: str, zero: dict[str, Any], **more: Any) -> TraceRequest:
    path = folder / f"{len(list(folder.iterdir()))}.json"
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "zero_optimization": zero,
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    if dtype != "fp32":
        settings[dtype] = {"enabled": True}
    path.write_text(json.dumps(settings), encoding="utf-8")
    config = load_profile(path).ds_config(micro_batch=MICRO_BATCH, accumulation=2, ranks=RANKS)
    common = {"model": SMALL, "ds_config": config, "ranks": RANKS, "loss_chunk": 128, "device": "cpu"}
    return TraceRequest(**common | more)


def traced(requests: Sequence[TraceRequest]) -> list[list[Trace]]:
    """Of every rank, for each request."""
    with ThreadPoolExecutor(RANKS) as pool:
        return list(pool.map(lambda rank: trace_all([replace(item, rank=rank) for item in requests]), range(RANKS)))


def observed(folder: Path, requests: Sequence[TraceRequest], oracle: str) -> list[list[list[dict[str, Any]]]]:
    """The phases of every rank of a real run, for each request."""
    path = folder / "requests.json"
    path.write_text(json.dumps([asdict(item) for item in requests]), encoding="utf-8")
    results = run_ranks(Path(__file__).with_name("live_worker.py"), path, oracle, timeout=600)
    return [
        [json.loads(line.removeprefix("PHASES ")) for line in result.stdout.splitlines() if line.startswith("PHASES ")]
        for result in results
    ]


def highest(phases: Sequence[dict[str, Any]]) -> int:
    return max(int(phase["peak_bytes"]) for phase in phases)


def test_two_real_ranks_hold_what_the_trace_says(tmp_path: Path) -> None:
    requests = [
        request(tmp_path, "bf16", {"stage": 2} | BUCKET, recompute="full"),
        request(tmp_path, "fp32", {"stage": 1} | BUCKET, recompute="products"),
        request(tmp_path, "bf16", {"stage": 3} | STAGE_3 | OFFLOAD),
    ]
    real = observed(tmp_path, requests, "tracker")
    for rank, traces in enumerate(traced(requests)):
        for item, seen, expected in zip(requests, traces, real[rank], strict=True):
            assert seen.peak_bytes == pytest.approx(highest(expected), rel=0.001)
            # gloo's threads let a gradient go a moment after its reduction is done; never where the peak is.
            late = SMALL.vocab_size * SMALL.emb_dim * (2 if "bf16" in item.ds_config else 4)
            for phase, other in zip(seen.phases, expected, strict=True):
                assert phase.name == other["name"]
                assert -late <= phase.peak_bytes - other["peak_bytes"] <= 0.001 * phase.peak_bytes
                assert sum(phase.parts.values()) == phase.peak_bytes


def kernel_counts_pages() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return "VmHWM" in Path("/proc/self/status").read_text(encoding="utf-8")


@pytest.mark.skipif(not kernel_counts_pages(), reason="this kernel does not say how much was resident at most")
def test_the_kernel_counts_what_the_trace_says(tmp_path: Path) -> None:
    wanted = request(tmp_path, "bf16", {"stage": 2, "reduce_bucket_size": 4_000_000}, model=WIDE)
    real = observed(tmp_path, [wanted], "pages")
    for (seen,), (expected,) in zip(traced([wanted]), real, strict=True):
        assert seen.peak_bytes == pytest.approx(highest(expected), rel=0.01)
        for phase, other in zip(seen.phases, expected, strict=True):
            assert phase.name == other["name"]
            assert phase.peak_bytes == pytest.approx(other["peak_bytes"], rel=0.02)


def test_the_benchmark_holds_its_bounds() -> None:
    recorded = json.loads((TESTS.parent / "benchmarks" / "results" / "memory_oracles.json").read_text(encoding="utf-8"))
    assert {case["settings"]["stage"] for case in recorded["cases"].values()} == {0, 1, 2, 3}
    for case in recorded["cases"].values():
        for rank in case["ranks"]:
            assert abs(rank["trace_over_tracker_percent"]) <= 0.1
            assert abs(rank["trace_over_pages_percent"]) <= 1
