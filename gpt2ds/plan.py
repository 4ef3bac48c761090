"""The Plan: one object with everything about a run resolved and checked before torch or DeepSpeed is touched.

Model, DeepSpeed profile, batch arithmetic, data, schedule and memory come together here; every mistake that can be seen
now is listed in one error. What is estimated is what is trained: the memory formula takes its setting from the same
Plan.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2ds.corpus.shards import Corpus
from gpt2ds.devices import Machine, card_bytes, peak_flops
from gpt2ds.ds_profile import DsProfile
from gpt2ds.gpt2.config import GPT2Config
from gpt2ds.memory.formula import Estimate
from gpt2ds.options import DEFAULTS, TrainOptions

# Before --hours has been turned into a number of steps, the learning rate climbs as if warm-up took so many steps.
WARMUP_STEPS_UNKNOWN_END = 200
WARMUP_STEPS_MOST = 700


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """The learning rate's course, and where the run ends."""

    kind: str
    peak_lr: float
    min_lr_ratio: float
    warmup_steps: int
    total_steps: int | None
    """None under `hours` until the speed has been measured."""
    decay_fraction: float
    hours: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A run, resolved. `to_dict` is what stands in plan.json."""

    run: str
    folder: Path
    options: TrainOptions
    model: GPT2Config
    profile: DsProfile
    corpus: Corpus
    machine: Machine
    ranks: int
    micro_batch: int
    accumulation: int
    context: int
    recompute: str
    loss_chunk: int
    schedule: Schedule
    resumed: bool
    """Whether the run folder's newest checkpoint is gone on from."""
    evaluate_every: int | None
    device_bytes: int
    estimate: Estimate | None
    notes: tuple[str, ...]

    @property
    def global_batch(self) -> int:
        """Sequences per optimizer step, over all ranks."""
        return self.micro_batch * self.accumulation * self.ranks

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step, over all ranks."""
        return self.global_batch * self.context

    @property
    def device_kind(self) -> str:
        """`cuda` or `cpu`."""
        return self.machine.kind

    @property
    def peak_flops(self) -> float | None:
        """Of all devices of the run together, in the compute dtype; None where it is not known."""
        if not self.machine.gpus:
            return None
        one = peak_flops(self.machine.gpus[0].name, self.profile.dtype)
        return one * self.ranks if one else None

    @property
    def device_size_bytes(self) -> int:
        """What a rank's memory is compared with: the card, the smaller card that is tried, or the host's memory."""
        if not self.machine.gpus:
            return self.machine.host_memory_bytes
        asked = self.options.gpu_memory
        return card_bytes(asked) if asked else min(gpu.total_bytes for gpu in self.machine.gpus)

    @property
    def rank_timeout_seconds(self) -> float:
        """A rank that does not move for so long counts as hung."""
        return float(self.options.get("rank_timeout")) * 60

    def ds_config(self) -> dict[str, Any]:
        """The dict that `deepspeed.initialize` is given."""
        return self.profile.ds_config(micro_batch=self.micro_batch, accumulation=self.accumulation, ranks=self.ranks)

    def identity(self) -> dict[str, Any]:
        """What must not change when a run is resumed: with another value it would be another run."""
        model = {key: value for key, value in self.model.to_dict().items() if key != "name"}
        return {f"model {key}": value for key, value in model.items()} | {
            "dtype": self.profile.dtype,
            "optimizer states": self.profile.states_dtype,
            "global batch": self.global_batch,
            "data": self.corpus.digest,
            "seed": self.options.get("seed"),
        }

    def to_dict(self) -> dict[str, Any]:
        """The plan as plan.json holds it: sections of flat values."""
        options, profile, schedule, corpus = self.options, self.profile, self.schedule, self.corpus
        gpus = self.machine.gpus
        return {
            "run": {
                "name": self.run,
                "seed": options.get("seed"),
                "rank_timeout_minutes": options.get("rank_timeout"),
            },
            "model": self.model.to_dict(),
            "batch": {
                "micro_batch": self.micro_batch,
                "accumulation": self.accumulation,
                "ranks": self.ranks,
                "global_batch": self.global_batch,
                "tokens_per_step": self.tokens_per_step,
                "context": self.context,
            },
            "deepspeed": {
                "profile": profile.name,
                "zero_stage": profile.zero_stage,
                "dtype": profile.dtype,
                "grad_accum_dtype": profile.grad_accum_dtype,
                "offload_optimizer": profile.offload_optimizer,
                "offload_param": profile.offload_param,
                "gradient_clipping": profile.gradient_clipping,
                "recompute": self.recompute,
                "loss_chunk": self.loss_chunk,
            },
            "optimizer": {
                "peak_lr": schedule.peak_lr,
                "betas": list(profile.betas),
                "eps": profile.eps,
                "weight_decay": profile.weight_decay,
            },
            "schedule": {
                "kind": schedule.kind,
                "warmup_steps": schedule.warmup_steps,
                "total_steps": schedule.total_steps,
                "min_lr_ratio": schedule.min_lr_ratio,
                "decay_fraction": schedule.decay_fraction,
                "hours": schedule.hours,
            },
            "data": {
                "folder": str(corpus.folder),
                "name": corpus.name,
                "train_tokens": corpus.train_tokens,
                "val_tokens": corpus.val_tokens,
                "train_windows": count_windows(corpus, "train", self.context),
                "val_windows": count_windows(corpus, "val", self.context),
                "digest": corpus.digest,
            },
            "evaluation": {
                "interval_steps": self.evaluate_every,
                "windows": self.evaluation_windows,
                "micro_batch": options.get("evaluation_micro_batch"),
                "sample_prompt": options.get("sample_prompt"),
                "sample_tokens": options.get("sample_tokens"),
            },
            "checkpoints": {
                "interval_steps": options.save_every,
                "interval_minutes": options.get("save_minutes"),
                "keep": options.get("keep"),
            },
            "devices": {
                "kind": self.device_kind,
                "name": gpus[0].name if gpus else self.machine.cpu_name,
                "count": self.ranks if gpus else 1,
                "memory_bytes": self.device_size_bytes,
                "usable_bytes": self.device_bytes,
                "peak_flops": self.peak_flops,
            },
            "memory": {
                "predicted_peak_bytes": self.estimate.peak_bytes if self.estimate else None,
                "source": "formula" if self.estimate else "no prediction for a CPU",
                "phase": self.estimate.phase if self.estimate else None,
                "parts": self.estimate.parts if self.estimate else {},
            },
            "identity": self.identity(),
            "options": options.to_dict(),
        }

    @property
    def evaluation_windows(self) -> int:
        """Validation windows of each evaluation."""
        asked = self.options.evaluation_windows or (
            64 if self.device_kind == "cpu" else DEFAULTS["evaluation_windows"][0]
        )
        return min(asked, count_windows(self.corpus, "val", self.context))


def count_windows(corpus: Corpus, split: str, context: int) -> int:
    """Windows of context + 1 tokens, overlapping by one, that the shards of a split hold; none straddles two shards."""
    shards = corpus.train if split == "train" else corpus.val
    return sum(max(0, (shard.tokens - 1) // context) for shard in shards)


def evaluation_interval(total_steps: int | None) -> int | None:
    """Steps between evaluations when the user names none: about 20 over a run, never more than 500 steps apart."""
    if total_steps is None:
        return None
    return max(1, min(500, total_steps // int(DEFAULTS["evaluations"][0])))


def warmup_steps(total_steps: int | None) -> int:
    """Steps of warm-up when the user names none."""
    if total_steps is None:
        return WARMUP_STEPS_UNKNOWN_END
    return max(1, min(WARMUP_STEPS_MOST, int(total_steps * DEFAULTS["warmup_fraction"][0])))
