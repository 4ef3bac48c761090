"""Traced peaks of tiny models, recorded with the pinned torch and deepspeed: what another version of them moves.

python tests/probe/canary.py    writes canary.json anew, with the versions that are installed
"""

import json
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gpt2ds.ds_profile import load_profile
from gpt2ds.gpt2.config import GPT2Config
from gpt2ds.probe.meta_engine import TraceRequest, trace_all

RECORD = Path(__file__).with_name("canary.json")

Peaks = dict[str, dict[str, int]]
"""Bytes by setting and phase."""

TINY = GPT2Config(name="tiny", emb_dim=64, n_heads=2, n_layers=2, context_length=64, vocab_size=1024)
LIMITS = {
    "reduce_bucket_size": 40_000,
    "stage3_max_live_parameters": 60_000,
    "stage3_prefetch_bucket_size": 40_000,
    "stage3_param_persistence_threshold": 1_000,
    "sub_group_size": 80_000,
}


def request(stage: int) -> TraceRequest:
    """A tiny bf16 model under one ZeRO stage, seen from the last of two ranks, with CUDA's kernels."""
    zero = {"stage": stage} | {key: value for key, value in LIMITS.items() if stage == 3 or key == "reduce_bucket_size"}
    settings = {"train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": True}, "zero_optimization": zero}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "canary.json"
        path.write_text(json.dumps(settings), encoding="utf-8")
        config = load_profile(path).ds_config(micro_batch=4, accumulation=2, ranks=2)
    return TraceRequest(model=TINY, ds_config=config, ranks=2, loss_chunk=64, recompute="narrow")


def installed() -> dict[str, str]:
    """torch's and deepspeed's versions without the name of the build ("+cpu")."""
    return {name: version(name).partition("+")[0] for name in ("torch", "deepspeed")}


def traced_peaks() -> Peaks:
    """Of the installed versions."""
    traces = trace_all([request(stage) for stage in range(4)])
    return {
        f"ZeRO-{stage}": {phase.name: phase.peak_bytes for phase in seen.phases} for stage, seen in enumerate(traces)
    }


def moved(before: Peaks, now: Peaks) -> list[str]:
    """Every phase whose peak differs, a line each with the bytes before and now."""
    lines = []
    for setting in sorted(before | now):
        old, new = before.get(setting, {}), now.get(setting, {})
        for phase in old | new:
            if phase not in new:
                lines.append(f"{setting}, {phase}: held {old[phase]:,} bytes, is no longer there")
            elif phase not in old:
                lines.append(f"{setting}, {phase}: was not there, holds {new[phase]:,} bytes")
            elif old[phase] != new[phase]:
                change = new[phase] / old[phase] - 1
                lines.append(f"{setting}, {phase}: held {old[phase]:,} bytes, now {new[phase]:,} ({change:+.2%})")
    return lines


def judge(record: dict[str, Any], versions: dict[str, str], lines: list[str]) -> None:
    """Fails when the recorded versions themselves moved something; warns when others did."""
    if not lines:
        return
    report = "\n".join(["the traced memory moved:", *lines])
    if versions == record["versions"]:
        raise AssertionError(f"{report}\nIf that was the intent: python tests/probe/canary.py")
    other = ", ".join(
        f"{name} {found} (recorded with {record['versions'][name]})"
        for name, found in versions.items()
        if found != record["versions"][name]
    )
    warnings.warn(f"{other}: {report}", stacklevel=2)


if __name__ == "__main__":
    RECORD.write_text(json.dumps({"versions": installed(), "peaks": traced_peaks()}, indent=1) + "\n", encoding="utf-8")
