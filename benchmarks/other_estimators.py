"""What other estimators say of the same runs: DeepSpeed's own, accelerate's, EleutherAI's; and ours, beside a trace.

    python benchmarks/other_estimators.py [--eleuther PATH/calc_transformer_mem.py]

DeepSpeed's is always there. accelerate's is asked where it is installed (pip install accelerate), EleutherAI's where
--eleuther names its file (github.com/EleutherAI/cookbook, calc/calc_transformer_mem.py), which is run as a program.
Nothing of theirs is part of this repository. No GPU: no figure here is measured on one, and all are compared with the
trace of the trainer's own DeepSpeed engine on its last rank. Writes benchmarks/results/other_estimators.json and the
tables of docs/memory-estimators.md; about 6 minutes on two cores.
"""

import argparse
import hashlib
import importlib
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gpt2ds.devices import this_machine
from gpt2ds.ds_profile import DsProfile, load_profile
from gpt2ds.estimate.rows import memory_setting
from gpt2ds.gpt2.config import MODELS, GPT2Config
from gpt2ds.memory.formula import MIB, largest_parameter, predict
from gpt2ds.memory.setting import CUBLAS_WORKSPACE_BYTES, DTYPE_BYTES, MemorySetting
from gpt2ds.options import TrainOptions
from gpt2ds.probe.meta_engine import TraceRequest, trace_all

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "other_estimators.json"
PAGE = ROOT / "docs" / "memory-estimators.md"
BEGIN, END = "<!-- written by benchmarks/other_estimators.py -->", "<!-- to here -->"

ACCUMULATION = 2

# A JSON that leaves DeepSpeed its own bucket and its own sums: what somebody who has not heard of either would write.
PLAIN = "plain ZeRO-2"
PLAIN_SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": ACCUMULATION,
    "bf16": {"enabled": True},
    "data_types": {"grad_accum_dtype": "bf16"},
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 500_000_000, "overlap_comm": False},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One run that all are asked about: bf16, sequences of 1,024 tokens, the loss in chunks of 1,024 tokens."""

    model: str
    profile: str
    ranks: int
    micro_batch: int
    recompute: str

    def setting(self, model: GPT2Config | None = None) -> MemorySetting:
        """As the formula takes it; `model` instead of the one named, for tests."""
        setting = memory_setting(
            TrainOptions(recompute=self.recompute),
            profile_of(self.profile),
            model or MODELS[self.model],
            ranks=self.ranks,
            micro_batch=self.micro_batch,
            accumulation=ACCUMULATION,
        )
        return replace(setting, loss_chunk=1024)

    def request(self, model: GPT2Config | None = None) -> TraceRequest:
        """As the traced engine takes it."""
        setting, profile = self.setting(model), profile_of(self.profile)
        return TraceRequest(
            model=setting.model,
            ds_config=profile.ds_config(micro_batch=self.micro_batch, accumulation=ACCUMULATION, ranks=self.ranks),
            ranks=self.ranks,
            recompute=self.recompute,
            loss_chunk=setting.loss_chunk,
        )


CASES = [
    Case(model="gpt2_large", profile="zero2", ranks=ranks, micro_batch=size, recompute=recompute)
    for ranks in (1, 2)
    for recompute in ("none", "full")
    for size in (2, 8, 16)
]
CASES += [
    Case(model="gpt2_large", profile=PLAIN, ranks=ranks, micro_batch=8, recompute=recompute)
    for ranks in (1, 2)
    for recompute in ("none", "full")
]
CASES += [
    Case(model=model, profile=profile, ranks=ranks, micro_batch=size, recompute=recompute)
    for model, profile, ranks, size, recompute in (
        ("gpt2_medium", "zero2", 1, 16, "none"),
        ("gpt2_medium", "zero2", 1, 64, "full"),
        ("gpt2_xl", "zero2", 2, 2, "none"),
        ("gpt2_xl", "zero2", 2, 16, "full"),
        ("gpt2_large", "zero3", 2, 8, "none"),
        ("gpt2_large", "zero3", 2, 8, "full"),
        ("gpt2_xl", "zero3", 2, 8, "full"),
        ("gpt2_xl", "zero3", 8, 8, "full"),
        ("gpt2_xl", "zero2_offload", 1, 8, "none"),
        ("gpt2_xl", "zero3_offload", 1, 8, "full"),
    )
]


def profile_of(name: str) -> DsProfile:
    """A shipped profile, or the plain one."""
    if name != PLAIN:
        return load_profile(name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plain.json"
        path.write_text(json.dumps(PLAIN_SETTINGS), encoding="utf-8")
        return load_profile(path)


def deepspeed_says(setting: MemorySetting) -> float:
    """Bytes, by what estimate_zero2_model_states_mem_needs_all_cold and its like for ZeRO-3 print as "per GPU"."""
    cards = {"num_gpus_per_node": setting.ranks, "num_nodes": 1, "cpu_offload": setting.offload_optimizer}
    with redirect_stdout(sys.stderr):  # deepspeed talks when it is imported
        if setting.zero_stage == 3:
            stage3: Any = importlib.import_module("deepspeed.runtime.zero.stage3")
            _, gpu_bytes, _ = stage3.estimate_zero3_model_states_mem_needs(
                setting.model.parameters,
                int(largest_parameter(setting)),
                cpu_offload_params=setting.offload_param,
                **cards,
            )
        else:
            stage2: Any = importlib.import_module("deepspeed.runtime.zero.stage_1_and_2")
            _, gpu_bytes = stage2.estimate_zero2_model_states_mem_needs(setting.model.parameters, **cards)
    return float(gpu_bytes)


def accelerate_says(setting: MemorySetting) -> float:
    """Bytes, by what `accelerate estimate-memory` prints as "Training using Adam" for 16 bits.

    Its command takes the model from the Hugging Face Hub; this gives its functions the trainer's own, without memory.
    """
    import torch

    from gpt2ds.gpt2.model import GPT2

    estimate: Any = importlib.import_module("accelerate.commands.estimate")
    with torch.device("meta"):
        model = GPT2(setting.model)
    total_bytes, _ = estimate.calculate_maximum_sizes(model)
    return float(max(estimate.estimate_training_usage(total_bytes, "bfloat16").values()))


def eleuther_says(setting: MemorySetting, path: Path) -> float:
    """Bytes, by what calc_transformer_mem.py prints as "Per-GPU Memory Required for Training"; told all that it asks
    for, also the type of the sums and ZeRO-3's limit.
    """
    model = setting.model
    words = [
        *("--num-gpus", setting.ranks, "--zero-stage", setting.zero_stage, "--batch-size-per-gpu", setting.micro_batch),
        *("--sequence-length", setting.context, "--vocab-size", model.vocab_size, "--hidden-size", model.emb_dim),
        *("--num-attention-heads", model.n_heads, "--num-layers", model.n_layers),
        *("--bytes-per-grad-ele", DTYPE_BYTES[setting.grad_accum_dtype]),
        *(["--zero3-max-live-params", setting.live_parameter_elements] if setting.zero_stage == 3 else []),
        *([] if setting.recompute == "none" else ["--checkpoint-activations"]),
    ]
    done = subprocess.run(
        [sys.executable, str(path), *map(str, words)], capture_output=True, text=True, timeout=60, check=False
    )
    found = re.search(r"Per-GPU Memory Required for Training: ([\d.]+) GiB", done.stdout)
    if done.returncode or not found:
        raise SystemExit(
            f"{path} did not answer as calc_transformer_mem.py does:\n{(done.stderr or done.stdout)[-500:]}"
        )
    return float(found[1]) * 1024 * MIB


def ours(setting: MemorySetting) -> float:
    """Bytes, by the closed form."""
    return float(predict(setting).peak_bytes)


def traced(cases: list[Case]) -> list[tuple[float, str]]:
    """(bytes, phase) of each case's peak; those of as many ranks share a process."""
    found: dict[Case, tuple[float, str]] = {}
    for ranks in sorted({case.ranks for case in cases}):
        same = [case for case in cases if case.ranks == ranks]
        print(f"tracing {len(same)} runs on {ranks} rank{'s' * (ranks > 1)} ...", file=sys.stderr, flush=True)
        for case, seen in zip(same, trace_all([case.request() for case in same]), strict=True):
            found[case] = (float(seen.peak_bytes + CUBLAS_WORKSPACE_BYTES), seen.phase)
    return [found[case] for case in cases]


def table(result: dict[str, Any]) -> str:
    """The results in Markdown: the trace in MiB, everything else in MiB and its difference in % of the trace."""
    names = list(result["cases"][0]["mib"])[1:]
    lines = [
        "| model | profile | GPUs | micro-batch | recompute | trace | " + " | ".join(names) + " |",
        "| --- | --- " + "| --: " * 2 + "| --- " + "| --: " * (1 + len(names)) + "|",
    ]
    for case in result["cases"]:
        cells = [case["model"], case["profile"], case["ranks"], case["micro_batch"], case["recompute"]]
        trace_mib = case["mib"]["trace"]
        cells.append(f"{trace_mib:,.0f}")
        for name in names:
            said = case["mib"][name]
            difference = 100 * (said / trace_mib - 1)
            cells.append(f"{said:,.0f} ({difference:+.{2 if name == 'formula' else 0}f}%)")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def spread(result: dict[str, Any]) -> str:
    """How far each estimator is from the trace, in Markdown; apart for offload, of which two of them know nothing."""
    lines = ["| estimator | without offload | its median size | with offload |", "| --- | --: | --: | --: |"]
    for name in list(result["cases"][0]["mib"])[1:]:
        digits = 2 if name == "formula" else 0
        off: dict[bool, list[float]] = {False: [], True: []}
        for case in result["cases"]:
            off["offload" in case["profile"]].append(100 * (case["mib"][name] / case["mib"]["trace"] - 1))
        without, with_ = (f"{min(values):+.{digits}f}% to {max(values):+.{digits}f}%" for values in off.values())
        size = statistics.median(map(abs, off[False]))
        lines.append(f"| {name} | {without} | {size:.{digits}f}% | {with_} |")
    return "\n".join(lines)


def in_page(result: dict[str, Any], text: str) -> str:
    """The text of the page with its part between the two marks written anew."""
    versions = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
    heading = f"{result['settings']}.\nVersions: {versions}."
    written = f"{heading}\n\n{table(result)}\n\nDifferences over these runs:\n\n{spread(result)}\n"
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{written}\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eleuther", type=Path, metavar="PATH", help="a downloaded calc_transformer_mem.py")
    arguments = parser.parse_args()
    eleuther: Path | None = arguments.eleuther
    if eleuther and not eleuther.is_file():
        parser.error(f"--eleuther {eleuther}: there is no such file")
    says: dict[str, Callable[[MemorySetting], float]] = {"formula": ours, "DeepSpeed": deepspeed_says}
    versions = {package: version(package) for package in ("torch", "deepspeed")}
    missing = {}
    if importlib.util.find_spec("accelerate"):
        says["accelerate"] = accelerate_says
        versions["accelerate"] = version("accelerate")
    else:
        missing["accelerate"] = "not installed: pip install accelerate"
    if eleuther:
        says["EleutherAI"] = lambda setting: eleuther_says(setting, eleuther)
        versions["calc_transformer_mem.py"] = f"sha256 {hashlib.sha256(eleuther.read_bytes()).hexdigest()[:16]}"
    else:
        missing["EleutherAI"] = (
            "not given: --eleuther PATH of calc_transformer_mem.py from github.com/EleutherAI/cookbook"
        )
    for name, why in missing.items():
        print(f"{name}: {why}", file=sys.stderr)
    rows = []
    for case, (peak_bytes, phase) in zip(CASES, traced(CASES), strict=True):
        said = {name: round(ask(case.setting()) / MIB, 1) for name, ask in says.items()}
        rows.append(asdict(case) | {"mib": {"trace": round(peak_bytes / MIB, 1)} | said, "phase": phase})
    machine = this_machine()
    result = {
        "what": "GPU memory of the same runs by a trace, by our formula and by other estimators; not measured on a GPU",
        "settings": f"bf16, sequences of 1,024 tokens, accumulation {ACCUMULATION}, loss chunk 1,024, last rank",
        "machine": {"cpu": machine.cpu_name, "cores": machine.cores, "gpu": None},
        "versions": versions,
        "cases": rows,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(in_page(result, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
