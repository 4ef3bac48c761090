"""The Plan: one object with everything about a run resolved and checked before torch or DeepSpeed is touched.

Model, DeepSpeed profile, batch arithmetic, data, schedule and memory come together here; every mistake that can be seen
now is listed in one error. What is estimated is what is trained: the memory formula takes its setting from the same Plan.
"""

import difflib
import fcntl
import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpt2ds.corpus.shards import Corpus, check_ids, open_corpus
from gpt2ds.devices import Machine, card_bytes, peak_flops, this_machine
from gpt2ds.ds_profile import DsProfile, load_profile
from gpt2ds.errors import UserError
from gpt2ds.gpt2.config import MODELS, GPT2Config, find_model, with_context
from gpt2ds.memory.fit import fits, largest_micro_batch, largest_model
from gpt2ds.memory.formula import Estimate, MemorySetting, predict
from gpt2ds.options import DEFAULTS, PEAK_LR, TrainOptions

GIB = 2**30

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
    schedule: Schedule
    resume_from: str | None
    """The run folder's state at start: None for a new run, else "resume"."""
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

    def ds_config(self) -> dict[str, Any]:
        """The dict that `deepspeed.initialize` is given."""
        return self.profile.ds_config(micro_batch=self.micro_batch, accumulation=self.accumulation, ranks=self.ranks)

    def identity(self) -> dict[str, Any]:
        """What must not change when a run is resumed: with another value it would be another run."""
        model = {key: value for key, value in self.model.to_dict().items() if key != "name"}
        return {f"model {key}": value for key, value in model.items()} | {
            "dtype": self.profile.dtype,
            "global batch": self.global_batch,
            "data": self.corpus.digest,
            "seed": self.options.get("seed"),
        }

    def to_dict(self) -> dict[str, Any]:
        """The plan as plan.json holds it: sections of flat values."""
        options, profile, schedule, corpus = self.options, self.profile, self.schedule, self.corpus
        gpus = self.machine.gpus
        return {
            "run": {"name": self.run, "seed": options.get("seed")},
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
                "loss_chunk": profile.loss_chunk,
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
                "memory_bytes": self.device_bytes,
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
        asked = self.options.evaluation_windows or (64 if self.device_kind == "cpu" else DEFAULTS["evaluation_windows"][0])
        return min(asked, count_windows(self.corpus, "val", self.context))


def count_windows(corpus: Corpus, split: str, context: int) -> int:
    """Windows of context + 1 tokens, overlapping by one, that the shards of a split hold; none straddles two shards."""
    shards = corpus.train if split == "train" else corpus.val
    return sum(max(0, (shard.tokens - 1) // context) for shard in shards)


def resolve(options: TrainOptions, *, ranks: int, machine: Machine | None = None) -> Plan:
    """Everything about the run decided and checked. Touches no GPU and imports no torch.

    ranks: processes of the run, WORLD_SIZE. Raises UserError with every mistake found.
    """
    machine = machine or this_machine()
    folder, options, resume_from = _run_folder(options)
    notes: list[str] = []
    profile = load_profile(Path(options.get("ds")))
    notes += profile.notes()
    problems = _device_problems(profile, machine, ranks)
    problems += _range_problems(options)
    if problems:
        raise UserError.from_list(problems)
    corpus = _corpus(options, notes)

    def setting(model: GPT2Config, micro_batch: int, accumulation: int) -> MemorySetting:
        return _memory_setting(options, profile, model, ranks, micro_batch, accumulation)

    device_bytes = _device_bytes(options, machine)
    model = _model(options, profile, machine, device_bytes, setting, notes)
    context = options.context or model.context_length
    if context > model.context_length:
        raise UserError(
            f"--context {context} is longer than the {model.context_length} tokens that {model.name} can see; "
            f"use at most {model.context_length}."
        )
    model = with_context(model, context)
    micro_batch, accumulation = _batch(options, profile, ranks, model, device_bytes, setting, notes)
    estimate = None
    if machine.kind == "cuda":
        estimate = predict(setting(model, micro_batch, accumulation))
        if not fits(estimate, device_bytes):
            best = largest_micro_batch(setting(model, micro_batch, accumulation), device_bytes)
            advice = f"at most {best} is predicted to fit" if best else "not even 1 fits; take a ZeRO-3 or offload profile"
            notes.append(
                f"The predicted peak of {estimate.peak_bytes / GIB:.2f} GiB does not fit into {device_bytes / GIB:.2f} GiB "
                f"at micro-batch {micro_batch}: {advice}."
            )

    _check_data(corpus, model, context, micro_batch * accumulation * ranks)
    schedule = _schedule(options, profile, corpus, model, micro_batch * accumulation * ranks, context, notes)
    options = replace(options, model=options.model or model.name, data=options.data or corpus.folder)
    plan = Plan(
        run=folder.name,
        folder=folder,
        options=options,
        model=model,
        profile=profile,
        corpus=corpus,
        machine=machine,
        ranks=ranks,
        micro_batch=micro_batch,
        accumulation=accumulation,
        context=context,
        recompute=options.recompute or profile.recompute,
        schedule=schedule,
        resume_from=resume_from,
        evaluate_every=options.evaluate_every or evaluation_interval(schedule.total_steps),
        device_bytes=device_bytes,
        estimate=estimate,
        notes=tuple(notes),
    )
    if resume_from:
        _check_same_run(plan)
    return plan


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


def newest_run(logs: Path) -> Path | None:
    """The run folder that was written to last."""
    runs = [path for path in logs.glob("*/plan.json")] if logs.is_dir() else []
    return max(runs, key=lambda path: path.stat().st_mtime).parent if runs else None


def _run_folder(options: TrainOptions) -> tuple[Path, TrainOptions, str | None]:
    """(the run's folder, the options completed from an earlier session's, "resume" or None)."""
    if not options.resume:
        # The launcher starts ranks at slightly different times: rank 0's plan is the one that counts, name included.
        name = options.run or time.strftime("%Y%m%d-%H%M%S")
        if Path(name).name != name or name in (".", ".."):
            raise UserError(f"--run is a name below {options.logs}/, not a path: '{name}'.")
        folder = options.logs / name
        if (folder / "plan.json").exists():
            raise UserError(f"The run folder {folder} exists already: add --resume to go on with it, or choose another --run.")
        return folder, options, None
    named = options.logs / options.run if options.run else newest_run(options.logs)
    if named is None or not (named / "plan.json").is_file():
        where = f"{named} is no run folder" if named else f"there is no run below {options.logs}/"
        raise UserError(f"--resume has nothing to go on with: {where}. Leave --resume out to start a new run.")
    earlier = _read_plan(named)
    return named, replace(options.over(earlier.get("options", {})), run=named.name), "resume"


def _read_plan(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'plan.json'} cannot be read ({error}): choose another --run to start a new one.") from error
    return content


def _check_same_run(plan: Plan) -> None:
    earlier = _read_plan(plan.folder).get("identity", {})
    differing = [
        f"{key} was {earlier.get(key)!r} and is now {value!r}"
        for key, value in plan.identity().items()
        if earlier.get(key) != value
    ]
    if differing:
        raise UserError(
            f"The run folder {plan.folder} belongs to another plan: {'; '.join(differing)}. "
            "Repeat the earlier settings to resume it, or choose another --run."
        )


def _device_problems(profile: DsProfile, machine: Machine, ranks: int) -> list[str]:
    problems = []
    if profile.dtype == "fp16" and machine.kind == "cpu":
        problems.append(
            f"{profile.name} trains in fp16, which needs a CUDA GPU: take the bf16 profile of the same stage "
            f"(zero{profile.zero_stage}.json), which also runs on a CPU."
        )
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or ranks)
    if machine.gpus and local > len(machine.gpus):
        problems.append(
            f"{local} ranks on this machine but {len(machine.gpus)} GPU{'s' * (len(machine.gpus) > 1)}: "
            f"start at most {len(machine.gpus)} (--num_gpus {len(machine.gpus)})."
        )
    return problems


def _range_problems(options: TrainOptions) -> list[str]:
    problems = [
        f"--{name.replace('_', '-')} must be above 0, not {value}."
        for name in (
            "micro_batch accumulation context steps tokens hours lr evaluate_every evaluation_windows "
            "evaluation_micro_batch save_every save_minutes keep gpu_memory"
        ).split()
        if (value := getattr(options, name)) is not None and not value > 0
    ]
    if options.warmup_steps is not None and options.warmup_steps < 0:
        problems.append(f"--warmup-steps must be 0 or more, not {options.warmup_steps}.")
    if sum(getattr(options, name) is not None for name in ("steps", "tokens", "hours")) > 1:
        problems.append("--steps, --tokens and --hours each say where the run ends: give one of them.")
    for name, value, allowed in (
        ("schedule", options.get("schedule"), ("cosine", "constant", "wsd")),
        ("recompute", options.recompute or "none", ("none", "full")),
    ):
        if value not in allowed:
            near = difflib.get_close_matches(value, allowed, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            problems.append(f"--{name} {value}: {hint}It is one of {', '.join(allowed)}.")
    return problems


def _corpus(options: TrainOptions, notes: list[str]) -> Corpus:
    if options.data is not None:
        return open_corpus(options.data)
    from gpt2ds.corpus.embedded import prepare_embedded

    folder = Path("data/embedded")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        # Every rank plans; the first one prepares the text and the others find it done.
        fcntl.flock(lock, fcntl.LOCK_EX)
        corpus = prepare_embedded(folder)
    notes.append(
        f"No --data: training on the embedded text, the documentation on this machine "
        f"({corpus.train_tokens:,} tokens, digest {corpus.digest[:12]}, which changes with the Python version)."
    )
    return corpus


def _device_bytes(options: TrainOptions, machine: Machine) -> int:
    """What one rank's tensors may take: the smallest card of the run, or the smaller card that the user wants to try."""
    if not machine.gpus:
        return machine.host_memory_bytes
    usable = min(min(gpu.free_bytes, gpu.total_bytes) for gpu in machine.gpus)
    return min(usable, card_bytes(options.gpu_memory)) if options.gpu_memory else usable


def _memory_setting(
    options: TrainOptions, profile: DsProfile, model: GPT2Config, ranks: int, micro_batch: int, accumulation: int
) -> MemorySetting:
    return MemorySetting(
        model=model,
        context=min(options.context or model.context_length, model.context_length),
        micro_batch=micro_batch,
        accumulation=accumulation,
        ranks=ranks,
        zero_stage=profile.zero_stage,
        dtype=profile.dtype,
        grad_accum_dtype=profile.grad_accum_dtype,
        recompute=options.recompute or profile.recompute,
        loss_chunk=profile.loss_chunk,
        reduce_bucket_elements=profile.reduce_bucket_elements,
        overlap_comm=profile.overlap_comm,
        offload_optimizer=profile.offload_optimizer is not None,
        offload_param=profile.offload_param is not None,
        live_parameter_elements=profile.live_parameter_elements,
        sub_group_elements=profile.sub_group_elements,
    )


def _model(
    options: TrainOptions, profile: DsProfile, machine: Machine, device_bytes: int, setting: Any, notes: list[str]
) -> GPT2Config:
    if options.model is not None:
        return find_model(options.model, options.models_file)
    if machine.kind == "cpu":
        notes.append("No --model: gpt2_tiny, because there is no GPU here.")
        return MODELS["gpt2_tiny"]
    micro_batch = options.micro_batch or profile.micro_batch or 1
    accumulation = options.accumulation or profile.accumulation or 1
    best = largest_model(MODELS.values(), lambda model: setting(model, micro_batch, accumulation), device_bytes)
    if best is None:
        raise UserError(
            f"No GPT-2 size fits into {device_bytes / GIB:.1f} GiB with {profile.name} at micro-batch {micro_batch}: "
            "give a smaller --micro-batch or another profile."
        )
    notes.append(
        f"No --model: {best.name}, the largest GPT-2 that {profile.name} is predicted to fit "
        f"into {device_bytes / GIB:.1f} GiB at micro-batch {micro_batch}."
    )
    return best


def _batch(
    options: TrainOptions,
    profile: DsProfile,
    ranks: int,
    model: GPT2Config,
    device_bytes: int,
    setting: Any,
    notes: list[str],
) -> tuple[int, int]:
    """(micro_batch, accumulation); the global batch that the profile or an earlier session fixed never changes."""
    micro_batch = options.micro_batch or profile.micro_batch
    accumulation = options.accumulation or profile.accumulation
    wanted = profile.global_batch if not (options.micro_batch and options.accumulation) else None
    if micro_batch is None and wanted is None:
        raise UserError(
            f"{profile.name} names neither train_micro_batch_size_per_gpu nor train_batch_size: add one, or give --micro-batch."
        )
    if wanted is None:
        assert micro_batch is not None
        return micro_batch, accumulation or 1
    if wanted % ranks:
        near = [size for size in (wanted // ranks * ranks, (wanted // ranks + 1) * ranks) if size]
        raise UserError(
            f"train_batch_size {wanted} does not divide by {ranks} ranks; the nearest that do are "
            f"{' and '.join(map(str, near))}."
        )
    per_rank = wanted // ranks
    if micro_batch is None:
        most = largest_micro_batch(setting(model, 1, 2), device_bytes) if model and device_bytes else per_rank
        divisors = [size for size in range(1, per_rank + 1) if per_rank % size == 0 and size <= max(most, 1)]
        micro_batch = max(divisors)
        notes.append(f"Micro-batch {micro_batch}: the largest divisor of {per_rank} sequences per rank predicted to fit.")
        accumulation = None
    if per_rank % micro_batch or (accumulation and micro_batch * accumulation != per_rank):
        divisors = [size for size in range(1, per_rank + 1) if per_rank % size == 0]
        near = sorted(divisors, key=lambda size: abs(size - micro_batch))[:2]
        raise UserError(
            f"train_batch_size {wanted} is not micro-batch {micro_batch} x accumulation {accumulation or '?'} x {ranks} ranks; "
            f"with this batch the nearest micro-batches are {', '.join(map(str, sorted(near)))} "
            f"with accumulation {', '.join(str(per_rank // size) for size in sorted(near))}."
        )
    return micro_batch, per_rank // micro_batch


def _check_data(corpus: Corpus, model: GPT2Config, context: int, global_batch: int) -> None:
    if corpus.vocab_size > model.vocab_size:
        raise UserError(
            f"{corpus.folder} holds tokens of a vocabulary of {corpus.vocab_size}, {model.name} has {model.vocab_size}: "
            "prepare the text again with `gpt2ds prepare`, or give the model that vocab_size."
        )
    check_ids(corpus, model.vocab_size)
    train, val = count_windows(corpus, "train", context), count_windows(corpus, "val", context)
    problems = []
    if train < global_batch:
        fix = f"a global batch of at most {train}" if train else "a shorter --context"
        problems.append(
            f"{corpus.folder} has {train} training windows of {context} tokens, fewer than the {global_batch} sequences "
            f"of one step: give more text, or {fix}."
        )
    if val == 0:
        problems.append(f"{corpus.folder} has no validation window of {context} tokens: give more text or a shorter --context.")
    if problems:
        raise UserError.from_list(problems)


def _schedule(
    options: TrainOptions,
    profile: DsProfile,
    corpus: Corpus,
    model: GPT2Config,
    global_batch: int,
    context: int,
    notes: list[str],
) -> Schedule:
    peak_lr = options.lr or profile.lr
    if peak_lr is None:
        nearest = min(PEAK_LR, key=lambda size: abs(size / model.parameters - model.parameters / size))
        peak_lr = PEAK_LR[nearest]
        if model.parameters > 50e6 and global_batch * context < 65_536:
            notes.append(
                f"The default peak learning rate {peak_lr:g} is meant for about 0.5M tokens a step; this run takes "
                f"{global_batch * context:,}. More --accumulation, or a smaller --lr, is safer."
            )
    total = options.steps
    if options.tokens is not None:
        total = max(1, round(options.tokens / (global_batch * context)))
    if total is None and options.hours is None:
        total = max(1, count_windows(corpus, "train", context) // global_batch)
        notes.append(f"No --steps, --tokens or --hours: one pass over the training text, {total:,} steps.")
    warmup = options.warmup_steps
    return Schedule(
        kind=options.get("schedule"),
        peak_lr=peak_lr,
        min_lr_ratio=float(DEFAULTS["min_lr_ratio"][0]),
        warmup_steps=warmup_steps(total) if warmup is None else warmup,
        total_steps=total,
        decay_fraction=float(DEFAULTS["decay_fraction"][0]),
        hours=options.hours,
    )
