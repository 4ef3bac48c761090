"""The memory formula beside the traced engine, over configurations that a seed draws from all that it covers."""

import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpt2ds.ds_profile import DsProfile, load_profile
from gpt2ds.errors import UserError
from gpt2ds.estimate.rows import memory_setting
from gpt2ds.gpt2.config import MODELS, GPT2Config, with_context
from gpt2ds.gpt2.policies import POLICIES
from gpt2ds.memory.formula import predict
from gpt2ds.memory.setting import CUBLAS_WORKSPACE_BYTES, MemorySetting
from gpt2ds.options import TrainOptions
from gpt2ds.probe.meta_engine import Trace, TraceRequest, trace

KINDS = ("replicated", "zero3", "offload")
"""What is drawn: ZeRO-0, 1 and 2; ZeRO-3; and either with states or weights in host memory."""

LIMITS = {"replicated": 0.002, "zero3": 0.02, "offload": 0.02}
"""How far the formula may be from the trace, as a share of the trace."""

SIZES = ("gpt2_small", "gpt2_medium", "gpt2_large", "gpt2_xl")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One configuration: a model and everything about its run that changes the memory."""

    model: str
    context: int
    qkv_bias: bool
    micro_batch: int
    accumulation: int
    ranks: int
    recompute: str
    loss_chunk: int
    ds: dict[str, Any]
    """The DeepSpeed profile, before it is completed."""

    def config(self) -> GPT2Config:
        """The model, its position table cut to the context."""
        return replace(with_context(MODELS[self.model], self.context), qkv_bias=self.qkv_bias)

    def profile(self) -> DsProfile:
        """The profile, checked and completed; raises UserError where DeepSpeed would not do what it says."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "drawn.json"
            path.write_text(json.dumps(self.ds | {"train_micro_batch_size_per_gpu": self.micro_batch}))
            return load_profile(path)

    def setting(self) -> MemorySetting:
        """The case as the formula takes it."""
        options = TrainOptions(context=self.context, recompute=self.recompute)
        setting = memory_setting(
            options,
            self.profile(),
            self.config(),
            ranks=self.ranks,
            micro_batch=self.micro_batch,
            accumulation=self.accumulation,
        )
        return replace(setting, loss_chunk=self.loss_chunk)

    def request(self) -> TraceRequest:
        """The case as the trace takes it."""
        batch = {"ranks": self.ranks, "micro_batch": self.micro_batch, "accumulation": self.accumulation}
        return TraceRequest(
            model=self.config(),
            ds_config=self.profile().ds_config(**batch),
            ranks=self.ranks,
            recompute=self.recompute,
            loss_chunk=self.loss_chunk,
        )


def draw(seed: int, count: int, kind: str, *, sizes: Sequence[str] = SIZES) -> list[Case]:
    """`count` legal cases of a kind; the same seed draws the same ones."""
    dice = random.Random(f"{kind} {seed}")
    return [case for case, _ in zip(_legal(dice, kind, sizes), range(count), strict=False)]


def traced(cases: Sequence[Case], *, processes: int) -> Iterator[Trace]:
    """The trace of every case in order, so many at a time; 5 to 60 seconds each."""
    with ThreadPoolExecutor(processes) as pool:
        yield from pool.map(trace, (case.request() for case in cases))


def error(case: Case, traced_peak_bytes: int) -> float:
    """How far the formula's peak is from the trace's, as a share of it; cuBLAS's workspaces, untraced, left out."""
    return (predict(case.setting()).peak_bytes - CUBLAS_WORKSPACE_BYTES) / traced_peak_bytes - 1


def _legal(dice: random.Random, kind: str, sizes: Sequence[str]) -> Iterator[Case]:
    while True:
        case = _case(dice, kind, sizes)
        try:
            case.profile()
        except UserError:
            continue
        yield case


def _case(dice: random.Random, kind: str, sizes: Sequence[str]) -> Case:
    dtype = dice.choice(("bf16", "bf16", "fp16", "fp32"))
    stage = 3 if kind == "zero3" else dice.choice((0, 1, 2))
    zero: dict[str, Any] = {"stage": stage}
    if kind == "offload":
        stage = zero["stage"] = dice.choice((1, 2, 3))
        zero["offload_optimizer"] = {"device": "cpu"}
        if stage == 3 and dice.random() < 0.5:
            zero["offload_param"] = {"device": "cpu"}
    if stage:
        zero["reduce_bucket_size"] = dice.choice((5_000_000, 20_000_000, 50_000_000, 500_000_000))
        zero["overlap_comm"] = dice.random() < 0.3
    if stage == 3:
        zero["stage3_max_live_parameters"] = dice.choice((20_000_000, 50_000_000, 200_000_000, 1_000_000_000))
        zero["stage3_prefetch_bucket_size"] = dice.choice((5_000_000, 20_000_000, 50_000_000))
        zero["stage3_max_reuse_distance"] = dice.choice((0, 1_000_000_000))
        zero["sub_group_size"] = dice.choice((50_000_000, 1_000_000_000))
    ds: dict[str, Any] = {"zero_optimization": zero}
    if dtype != "fp32":
        ds[dtype] = {"enabled": True}
        ds["data_types"] = {"grad_accum_dtype": dice.choice((dtype, "fp32"))}
    if dtype == "bf16" and stage and kind != "offload" and dice.random() < 0.2:
        ds["bf16"] |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
        ds["data_types"] = {"grad_accum_dtype": "bf16"}
    return Case(
        model=dice.choice(sizes),
        context=dice.choice((256, 512, 1024)),
        qkv_bias=dice.random() < 0.5,
        micro_batch=dice.choice((1, 2, 3, 4, 6, 8, 12, 16, 32, 64)),
        accumulation=dice.choice((1, 1, 2, 2, 8)),
        ranks=dice.choice((1, 2, 8)),
        recompute=dice.choice(tuple(POLICIES)),
        loss_chunk=dice.choice((128, 512, 1024, 4096, 65_536)),
        ds=ds,
    )
