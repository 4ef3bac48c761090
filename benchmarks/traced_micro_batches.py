"""The largest micro-batch on a 24 GB card, by a trace of the very DeepSpeed engine on meta tensors, and by the formula.

    python benchmarks/traced_micro_batches.py [--only NAME ...]

Needs no GPU; every figure is a trace (live bytes and what CUDA kernels take inside, plus cuBLAS's workspaces), not a
measurement. The last rank is traced, over the second optimizer step of two micro-batches. About 15 minutes on two
cores.
"""

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gpt2ds.devices import this_machine
from gpt2ds.ds_profile import DsProfile, load_profile, shipped_profiles
from gpt2ds.estimate.rows import memory_setting
from gpt2ds.gpt2.config import MODELS
from gpt2ds.gpt2.policies import POLICIES
from gpt2ds.memory.formula import MIB, predict
from gpt2ds.memory.setting import CUBLAS_WORKSPACE_BYTES, MemorySetting
from gpt2ds.options import TrainOptions
from gpt2ds.probe.meta_engine import TraceRequest, trace

RESULTS = Path(__file__).parent / "results" / "traced_micro_batches.json"

# A 24 GB card has about 23,700 MiB to reserve, of which the allocator's blocks leave this to tensors.
LIMIT_BYTES = 22_900 * MIB
ACCUMULATION = 2
BUCKET = 20_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model under bf16 and ZeRO-2 whose micro-batch is sought, or under a shipped profile with the profile's own."""

    model: str
    recompute: str = ""
    profile: str = ""
    ranks: int = 1
    accumulate: str = "fp32"
    zero: dict[str, Any] = field(default_factory=dict)


CASES = {
    "large": Case(model="gpt2_large", recompute="none"),
    "large_full": Case(model="gpt2_large", recompute="full"),
    "large_full_2_cards": Case(model="gpt2_large", recompute="full", ranks=2),
    "xl_offload": Case(
        model="gpt2_xl",
        recompute="none",
        accumulate="bf16",
        zero={"offload_optimizer": {"device": "cpu", "pin_memory": True}},
    ),
}
CASES |= {f"large_{policy}": Case(model="gpt2_large", recompute=policy) for policy in POLICIES if policy != "none"}
# bitsandbytes has no operations on meta tensors.
CASES |= {
    path.stem: Case(model="_".join(path.stem.split("_")[:2]), profile=path.stem, ranks=2 if "_2x" in path.stem else 1)
    for path in shipped_profiles()
    if path.stem.startswith("gpt2_") and not path.stem.endswith("8bit")
}


class Search:
    """Traces of one case, each micro-batch once."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.profile = _profile(case)
        self.traced: dict[int, dict[str, Any]] = {}

    def setting(self, micro_batch: int) -> MemorySetting:
        """The case as the formula takes it."""
        model = MODELS[self.case.model]
        setting = memory_setting(
            TrainOptions(),
            self.profile,
            model,
            ranks=self.case.ranks,
            micro_batch=micro_batch,
            accumulation=ACCUMULATION,
        )
        return replace(setting, recompute=self.case.recompute or self.profile.recompute)

    def fits(self, micro_batch: int) -> bool:
        """Whether the traced peak stays below the limit."""
        if micro_batch not in self.traced:
            setting = self.setting(micro_batch)
            estimate = predict(setting)
            config = self.profile.ds_config(micro_batch=micro_batch, accumulation=ACCUMULATION, ranks=self.case.ranks)
            seen = trace(
                TraceRequest(
                    model=setting.model,
                    ds_config=config,
                    ranks=setting.ranks,
                    recompute=setting.recompute,
                    loss_chunk=setting.loss_chunk,
                )
            )
            peak_bytes = seen.peak_bytes + CUBLAS_WORKSPACE_BYTES
            self.traced[micro_batch] = {
                "micro_batch": micro_batch,
                "traced_peak_mib": round(peak_bytes / MIB, 1),
                "traced_phase": seen.phase,
                "formula_peak_mib": round(estimate.peak_bytes / MIB, 1),
                "formula_phase": estimate.phase,
                "fits": peak_bytes <= LIMIT_BYTES,
            }
            print(f"  {self.traced[micro_batch]}", flush=True)
        return bool(self.traced[micro_batch]["fits"])

    def largest(self) -> int:
        """The largest micro-batch that fits; the next one has been traced as well. 0 when not even 1 fits."""
        low = max(1, self.formula())
        step = 1
        if self.fits(low):
            while self.fits(low + step):
                low, step = low + step, 2 * step
            high = low + step
        else:
            high, low = low, max(0, low - step)
            while low and not self.fits(low):
                step *= 2
                high, low = low, max(0, low - step)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(middle) else (low, middle)
        return low

    def formula(self) -> int:
        """The formula's own answer under the same limit."""
        allowed = 1
        while predict(self.setting(allowed + 1)).peak_bytes <= LIMIT_BYTES:
            allowed += 1
        return allowed if predict(self.setting(allowed)).peak_bytes <= LIMIT_BYTES else 0


def _profile(case: Case) -> DsProfile:
    if case.profile:
        return load_profile(case.profile)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": case.accumulate},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": BUCKET, "overlap_comm": False} | case.zero,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "zero2.json"
        path.write_text(json.dumps(settings), encoding="utf-8")
        return load_profile(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    earlier = json.loads(RESULTS.read_text(encoding="utf-8"))["cases"] if RESULTS.exists() else {}
    for name in arguments.only:
        print(name, flush=True)
        search = Search(CASES[name])
        if CASES[name].profile:
            assert search.profile.micro_batch, "shipped profiles hold numbers"
            search.fits(search.profile.micro_batch)
            found = {}
        else:
            found = {"largest_traced": search.largest(), "largest_by_formula": search.formula()}
        earlier[name] = (
            {key: value for key, value in asdict(CASES[name]).items() if value}
            | found
            | {
                "traces": [search.traced[size] for size in sorted(search.traced)],
            }
        )
        machine = this_machine()
        result = {
            "what": "largest micro-batch, by a trace of DeepSpeed on meta tensors and by the formula; no GPU",
            "limit_mib": LIMIT_BYTES // MIB,
            "cublas_workspace_mib": CUBLAS_WORKSPACE_BYTES // MIB,
            "settings": "bf16, sequences of 1,024 tokens, accumulation 2, bucket 2e7, loss chunk 1,024, last rank, "
            "second optimizer step",
            "machine": {"cpu": machine.cpu_name, "cores": machine.cores, "gpu": None},
            "versions": {package: version(package) for package in ("torch", "deepspeed")},
            "cases": {case: earlier[case] for case in CASES if case in earlier},
        }
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {found}", flush=True)


if __name__ == "__main__":
    main()
