"""The trace of the engine on meta tensors beside two accounts of what two real ranks hold, phase by phase, each rank.

    python benchmarks/memory_oracles.py [--only NAME ...]

The tracker counts the storages of every tensor in a real run on this machine's CPUs. The pages are the kernel's own
count of another such run (VmHWM, less what was resident before the engine was built), in which nothing of ours counts
and nothing is fitted. On a CPU offloaded states lie in the same memory, so host and device are counted together there.
No GPU: what CUDA's kernels take inside themselves is not in it. About 30 minutes on two cores; Linux only.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gpt2ds.devices import free_port, this_machine
from gpt2ds.ds_profile import load_profile
from gpt2ds.gpt2.config import GPT2Config
from gpt2ds.probe.meta_engine import Phase, TraceRequest, trace_all

RESULTS = Path(__file__).parent / "results" / "memory_oracles.json"
WORKER = Path(__file__).parents[1] / "tests" / "probe" / "live_worker.py"

RANKS = 2
MIB = 2**20
# A page of 4 KiB is a rounding error beside this model's tensors, and a step takes seconds.
MODEL = GPT2Config(name="oracle", emb_dim=640, n_heads=10, n_layers=6, context_length=512, vocab_size=16384)
BUCKET = {"reduce_bucket_size": 4_000_000}
# Limits in proportion to so small a model: gathering, letting go and stepping in tiles all take place. gloo copies what
# it reduces and scatters, which NCCL does not: a small bucket, and more sequences where gradients are largest, keep
# those copies (21 MiB in fp32) small beside the peak.
STAGE_3 = {
    "reduce_bucket_size": 1_000_000,
    "stage3_max_live_parameters": 15_000_000,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 2_000_000,
    "stage3_param_persistence_threshold": 10_000,
    "sub_group_size": 8_000_000,
}
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is trained for two optimizer steps."""

    stage: int
    dtype: str = "bf16"
    accumulate: str = "bf16"
    accumulation: int = 2
    recompute: str = "none"
    micro_batch: int = 1
    zero: dict[str, Any] = field(default_factory=dict)


CASES = {
    "0 bf16": Case(stage=0),
    "0 fp32": Case(stage=0, dtype="fp32", accumulate="fp32", accumulation=1, recompute="products"),
    "1 bf16": Case(stage=1, accumulation=1),
    "1 bf16, fp32 sums": Case(stage=1, accumulate="fp32", recompute="narrow"),
    "1 fp32": Case(stage=1, dtype="fp32", accumulate="fp32"),
    "2 bf16, no accumulation": Case(stage=2, accumulation=1),
    "2 bf16": Case(stage=2),
    "2 bf16, fp32 sums": Case(stage=2, accumulate="fp32"),
    "2 bf16, full": Case(stage=2, recompute="full"),
    "2 bf16, products": Case(stage=2, recompute="products"),
    "2 bf16, narrow": Case(stage=2, accumulate="fp32", recompute="narrow"),
    "2 bf16, overlapped": Case(stage=2, recompute="full", zero={"overlap_comm": True}),
    "2 bf16, one bucket": Case(stage=2, micro_batch=2, recompute="full", zero={"reduce_bucket_size": 500_000_000}),
    "2 fp32": Case(stage=2, dtype="fp32", accumulate="fp32", recompute="products"),
    "2 offload": Case(stage=2, zero=OFFLOAD),
    "3 bf16, no accumulation": Case(stage=3, accumulation=1),
    "3 bf16": Case(stage=3, accumulate="fp32"),
    "3 bf16, full": Case(stage=3, accumulate="fp32", recompute="full"),
    "3 bf16, narrow": Case(stage=3, recompute="narrow", micro_batch=6, zero={"overlap_comm": False}),
    "3 fp32": Case(stage=3, dtype="fp32", accumulate="fp32", micro_batch=16),
    "3 offload": Case(stage=3, accumulate="fp32", zero=OFFLOAD),
}


def request_of(case: Case, rank: int) -> TraceRequest:
    """The case seen from one rank, with a CPU's kernels."""
    own = {0: {}, 3: STAGE_3}.get(case.stage, BUCKET)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": case.micro_batch,
        "zero_optimization": {"stage": case.stage} | own | case.zero,
        "data_types": {"grad_accum_dtype": case.accumulate},
    }
    if case.dtype != "fp32":
        settings[case.dtype] = {"enabled": True}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.json"
        path.write_text(json.dumps(settings), encoding="utf-8")
        profile = load_profile(path)
    config = profile.ds_config(micro_batch=case.micro_batch, accumulation=case.accumulation, ranks=RANKS)
    return TraceRequest(
        model=MODEL,
        ds_config=config,
        ranks=RANKS,
        rank=rank,
        recompute=case.recompute,
        loss_chunk=256,
        device="cpu",
    )


def observe(cases: Sequence[Case], oracle: str) -> list[list[list[dict[str, Any]]]]:
    """The phases of every rank, for each case of a real run, as "tracker" or "pages" sees them."""
    group = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    group |= {"LOCAL_WORLD_SIZE": str(RANKS), "DS_ACCELERATOR": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "requests.json"
        path.write_text(json.dumps([asdict(request_of(case, rank=0)) for case in cases]), encoding="utf-8")
        processes = [
            subprocess.Popen(
                [sys.executable, str(WORKER), str(path), oracle],
                env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for rank in range(RANKS)
        ]
        try:
            outputs = [process.communicate(timeout=3600 * len(cases))[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
    if any(process.returncode for process in processes):
        raise RuntimeError(f"a rank of {cases} failed under {oracle}")
    return [
        [json.loads(line.removeprefix("PHASES ")) for line in output.splitlines() if line.startswith("PHASES ")]
        for output in outputs
    ]


def beside(traced: tuple[Phase, ...], tracker: list[dict[str, Any]], pages: list[dict[str, Any]]) -> dict[str, Any]:
    """One rank's three accounts in MiB, and how far the trace's peak is from the others'."""
    phases = []
    for own, live, resident in zip(traced, tracker, pages, strict=True):
        assert own.name == live["name"] == resident["name"]
        phases.append(
            {
                "phase": own.name.partition("step 2 ")[2],
                "trace": round(own.peak_bytes / MIB, 3),
                "tracker": round(live["peak_bytes"] / MIB, 3),
                "pages": round(resident["peak_bytes"] / MIB, 3),
            }
        )
    peak = max(phase.peak_bytes for phase in traced)
    return {
        "peak_mib": round(peak / MIB, 3),
        "peak_phase": max(phases, key=lambda phase: phase["trace"])["phase"],
        "trace_over_tracker_percent": percent(peak, tracker),
        "trace_over_pages_percent": percent(peak, pages),
        "phases": phases,
    }


def percent(peak_bytes: int, real: list[dict[str, Any]]) -> float:
    """How much higher the traced peak is than that of a real run."""
    real_bytes = max(int(phase["peak_bytes"]) for phase in real)
    return round(100 * (peak_bytes / real_bytes - 1), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="the others keep their results")
    only = parser.parse_args().only
    earlier = json.loads(RESULTS.read_text(encoding="utf-8"))["cases"] if RESULTS.exists() else {}
    traces = [trace_all([request_of(CASES[name], rank) for name in only]) for rank in range(RANKS)]
    tracker = observe([CASES[name] for name in only], "tracker")
    for number, name in enumerate(only):
        pages = observe([CASES[name]], "pages")  # in fresh processes: nothing of an earlier case is resident
        ranks = [beside(traces[rank][number].phases, tracker[rank][number], pages[rank][0]) for rank in range(RANKS)]
        earlier[name] = {"settings": asdict(CASES[name]), "ranks": ranks}
        for rank, seen in enumerate(ranks):
            differences = f"{seen['trace_over_tracker_percent']:+.3f}% {seen['trace_over_pages_percent']:+.3f}%"
            print(
                f"{name:24} rank {rank} {seen['peak_mib']:8.1f} MiB {seen['peak_phase']:22} {differences}", flush=True
            )
        write({name: earlier[name] for name in CASES if name in earlier})


def write(cases: dict[str, Any]) -> None:
    """The cases so far, with the worst difference over all."""
    machine = this_machine()
    ranks = [rank for case in cases.values() for rank in case["ranks"]]
    result = {
        "what": "traced peak of two ranks beside a tensor tracker and the kernel's pages in real runs on CPUs",
        "model": asdict(MODEL),
        "units": "MiB; the second optimizer step; host memory included, which on a CPU is the device's",
        "machine": {"cpu": machine.cpu_name, "cores": machine.cores, "gpu": None},
        "versions": {name: version(name) for name in ("torch", "deepspeed")},
        "worst_percent": {
            name: max((abs(rank[f"trace_over_{name}_percent"]) for rank in ranks), default=None)
            for name in ("tracker", "pages")
        },
        "cases": cases,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
