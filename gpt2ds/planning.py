"""From what the user asked for to a Plan: everything decided and checked before torch or DeepSpeed is touched.

All mistakes that can be seen now are found now, in profile, devices, data, batch arithmetic, disk and run folder, and
stand in one error.
"""

import difflib
import fcntl
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from gpt2ds.batch_arithmetic import batch_of, largest_divisor
from gpt2ds.corpus.shards import Corpus, check_ids, open_corpus
from gpt2ds.devices import (
    CONTEXT_BYTES,
    NCCL_BYTES,
    Machine,
    card_bytes,
    gpu_memory_problem,
    processes_on_gpu,
    ranks_here,
    this_machine,
)
from gpt2ds.ds_profile import DsProfile, load_profile
from gpt2ds.ds_rules import RECOMPUTE_POLICIES
from gpt2ds.errors import UserError
from gpt2ds.estimate.rows import LOSS_CHUNK, memory_setting, policies_of, recompute_problem
from gpt2ds.gpt2.config import MODELS, GPT2Config, find_model, with_context
from gpt2ds.memory.fit import fastest_that_fits, fits, largest_micro_batch, largest_model
from gpt2ds.memory.formula import Estimate, predict
from gpt2ds.memory.host import predict_host
from gpt2ds.memory.setting import MemorySetting
from gpt2ds.options import DEFAULTS, PEAK_LR, TrainOptions
from gpt2ds.plan import Plan, Schedule, count_windows, evaluation_interval, warmup_steps
from gpt2ds.requirements import disk_problem, host_memory_problem, missing_requirements
from gpt2ds.run_folder import check_same_run, earlier_global_batch, run_folder

GIB = 2**30

# Of steps, tokens, seeds: what 64 bits hold with room to count on.
LARGEST_NUMBER = 10**18

T = TypeVar("T")


def resolve(options: TrainOptions, *, ranks: int, machine: Machine | None = None, only_measured: bool = False) -> Plan:
    """Everything about a run decided and checked. Touches no GPU and imports no torch.

    ranks: processes of the run (WORLD_SIZE). only_measured: a few steps for their speed and memory; no folder or disk
    for checkpoints is asked for then, and the text may be shorter than a step. Raises UserError with every mistake
    found, a line each.
    """
    machine = machine or this_machine()
    # A resumed run takes from its earlier session what was not asked for now, so this comes before everything else.
    asked = options
    folder, options, resumed = (options.out, options, False) if only_measured else run_folder(options)
    planner = _Planner(options, machine, ranks, only_measured)
    if resumed and asked.accumulation is None:
        planner.global_batch = earlier_global_batch(folder)
        planner.micro_batch_is_asked = asked.micro_batch is not None
    return planner.plan(folder, resumed)


class _Planner:
    """One resolution: what was asked, what is decided so far, and the problems and notes on the way."""

    def __init__(self, options: TrainOptions, machine: Machine, ranks: int, only_measured: bool) -> None:
        self.options = options
        self.machine = machine
        self.ranks = ranks
        self.ranks_here = ranks_here(ranks)
        self.only_measured = only_measured
        self.global_batch: int | None = None
        """A resumed run's, which other ranks or micro-batches must come to as well."""
        self.micro_batch_is_asked = True
        self.notes: list[str] = []
        self.problems: list[str] = []

    def plan(self, folder: Path, resumed: bool) -> Plan:
        self.check_ranges()
        profile = self.attempt(lambda: load_profile(Path(self.options.get("ds"))))
        corpus = self.attempt(self.open_corpus)
        named = self.options.model
        model = self.attempt(lambda: find_model(named, self.options.models_file)) if named else None
        if profile:
            self.check_machine(profile)
        self.stop_at_problems()
        assert profile is not None and corpus is not None
        self.profile, self.corpus = profile, corpus
        self.recompute = self.options.recompute or profile.recompute
        self.notes += profile.notes()
        self.device_bytes = self.usable_bytes()

        model = model or self.default_model()
        context = self.options.context or model.context_length
        if context > model.context_length:
            raise UserError(
                f"--context {context} is longer than the {model.context_length} tokens that {model.name} can see; "
                f"use at most {model.context_length}."
            )
        model = with_context(model, context)
        micro_batch, accumulation = self.batch(model)
        global_batch = micro_batch * accumulation * self.ranks
        estimate = self.estimate(model, micro_batch, accumulation)
        self.check_host_memory(model, micro_batch, accumulation)
        self.check_data(model, global_batch)
        if not self.only_measured:
            self.check_disk(folder, model)
        self.stop_at_problems()
        schedule = self.schedule(model, global_batch)
        plan = Plan(
            run=folder.name,
            folder=folder,
            # What was chosen by default is kept, so that a resumed run does not choose again.
            options=replace(self.options, model=model.name, data=corpus.folder),
            model=model,
            profile=profile,
            corpus=corpus,
            machine=self.machine,
            ranks=self.ranks,
            micro_batch=micro_batch,
            accumulation=accumulation,
            context=context,
            recompute=self.recompute,
            loss_chunk=profile.loss_chunk or LOSS_CHUNK[self.machine.kind],
            schedule=schedule,
            resumed=resumed,
            evaluate_every=self.options.evaluate_every or evaluation_interval(schedule.total_steps),
            device_bytes=self.device_bytes,
            estimate=estimate,
            notes=tuple(self.notes),
        )
        if resumed:
            check_same_run(plan)
        return plan

    def attempt(self, part: Callable[[], T]) -> T | None:
        """The part's result, or None and its problem noted, so that the next part can be checked as well."""
        try:
            return part()
        except UserError as error:
            self.problems += [line.removeprefix("  - ") for line in str(error).splitlines()]
            return None

    def stop_at_problems(self) -> None:
        """Raises UserError if there were any."""
        if self.problems:
            raise UserError.from_list(self.problems)

    def check_ranges(self) -> None:
        """Values of single options that make no sense."""
        for name in (
            *("micro_batch", "accumulation", "context", "steps", "tokens", "hours", "lr", "keep"),
            *("evaluate_every", "evaluation_windows", "evaluation_micro_batch", "save_every", "save_minutes"),
            *("sample_tokens", "rank_timeout"),
        ):
            value = getattr(self.options, name)
            if value is not None and not 0 < value < LARGEST_NUMBER:
                said = f"--{name.replace('_', '-')} must be above 0 and below 10^18, not {str(value)[:30]}."
                self.problems.append(said)
        if abs(self.options.seed or 0) >= LARGEST_NUMBER:
            self.problems.append("--seed must be between -10^18 and 10^18.")
        size = self.options.gpu_memory
        if size is not None and (problem := gpu_memory_problem(size)):
            self.problems.append(problem)
        if (self.options.warmup_steps or 0) < 0:
            self.problems.append(f"--warmup-steps must be 0 or more, not {self.options.warmup_steps}.")
        if sum(getattr(self.options, name) is not None for name in ("steps", "tokens", "hours")) > 1:
            self.problems.append("--steps, --tokens and --hours each say where the run ends: give one of them.")
        if self.options.save_every is not None and self.options.save_minutes is not None:
            self.problems.append("--save-every and --save-minutes each say how often to save: give one of them.")
        for name, value, allowed in (
            ("schedule", self.options.get("schedule"), ("cosine", "constant", "wsd")),
            ("recompute", self.options.recompute or "none", RECOMPUTE_POLICIES),
        ):
            if value not in allowed:
                near = difflib.get_close_matches(value, allowed, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                self.problems.append(f"--{name} {value}: {hint}It is one of {', '.join(allowed)}.")

    def check_machine(self, profile: DsProfile) -> None:
        """Whether this machine has what the profile needs."""
        recompute = self.options.recompute or profile.recompute
        self.problems += missing_requirements(profile, recompute, self.machine, self.ranks_here)
        if problem := recompute_problem(profile, self.options.recompute):
            self.problems.append(problem)

    def check_host_memory(self, model: GPT2Config, micro_batch: int, accumulation: int) -> None:
        """Whether the host can build the model and hold what is offloaded to it; on a CPU, all of the training."""
        setting = self.setting(model, micro_batch, accumulation)
        if self.machine.kind == "cpu":
            # There every byte is the host's. What is offloaded only moves from one part of it to another.
            on_host = replace(setting, offload_optimizer=False, offload_param=False)
            parts = {name: size * self.ranks_here for name, size in predict(on_host).parts.items()}
        else:
            parts = self.host_parts(setting)
        if problem := host_memory_problem(parts, self.machine):
            self.problems.append(problem)

    def host_parts(self, setting: MemorySetting) -> dict[str, int]:
        """What the host must hold beside the GPUs."""
        return predict_host(setting, ranks_here=self.ranks_here, pinned=self.profile.pins_memory)

    def open_corpus(self) -> Corpus:
        """The user's shards, or the embedded text, prepared if need be."""
        if self.options.data is not None:
            return open_corpus(self.options.data)
        from gpt2ds.corpus.embedded import EMBEDDED_FOLDER, prepare_embedded

        try:
            EMBEDDED_FOLDER.parent.mkdir(parents=True, exist_ok=True)
            with EMBEDDED_FOLDER.with_suffix(".lock").open("w") as lock:
                # Every rank plans; the first one prepares the text and the others find it done.
                fcntl.flock(lock, fcntl.LOCK_EX)
                corpus = prepare_embedded(EMBEDDED_FOLDER)
        except OSError as error:
            raise UserError(
                f"The embedded text cannot be prepared in {EMBEDDED_FOLDER} ({error.strerror}): start where it can "
                "be written, or give --data."
            ) from error
        self.notes.append(
            f"No --data: training on the embedded text, the documentation on this machine "
            f"({corpus.train_tokens:,} tokens, digest {corpus.digest[:12]}, which changes with the Python version)."
        )
        return corpus

    def usable_bytes(self) -> int:
        """What one rank's tensors may take: the smallest card's, or the smaller card's that the user wants to try."""
        if not self.machine.gpus:
            return self.machine.host_memory_bytes
        usable = min(gpu.free_bytes for gpu in self.machine.gpus[: self.ranks_here]) - CONTEXT_BYTES
        if self.options.gpu_memory:
            usable = min(usable, card_bytes(self.options.gpu_memory))
        usable -= NCCL_BYTES if self.ranks > 1 else 0
        if usable <= 0:
            fullest = min(self.machine.gpus[: self.ranks_here], key=lambda gpu: gpu.free_bytes)
            held = ", ".join(f"{name} (pid {pid})" for pid, name, _ in processes_on_gpu(fullest) or [])
            raise UserError(
                f"{fullest.name} has only {fullest.free_bytes / GIB:.2f} GiB free: end what holds the rest"
                f"{f' ({held})' if held else ''}, or choose another card with CUDA_VISIBLE_DEVICES."
            )
        return usable

    def setting(self, model: GPT2Config, micro_batch: int, accumulation: int) -> MemorySetting:
        """What the memory formula needs to know of this run."""
        return memory_setting(
            replace(self.options, recompute=self.recompute),
            self.profile,
            model,
            ranks=self.ranks,
            micro_batch=micro_batch,
            accumulation=accumulation,
            machine=self.machine,
        )

    def default_model(self) -> GPT2Config:
        """The largest size predicted to fit at the profile's micro-batch; the tiny one on a CPU."""
        if self.machine.kind == "cpu":
            self.notes.append("No --model: gpt2_tiny, because there is no GPU here.")
            return MODELS["gpt2_tiny"]
        micro_batch = self.options.micro_batch or self.profile.micro_batch or 1
        accumulation = self.options.accumulation or self.profile.accumulation or 1
        models = [
            model
            for model in MODELS.values()
            if not host_memory_problem(self.host_parts(self.setting(model, micro_batch, accumulation)), self.machine)
        ]
        best = largest_model(models, lambda model: self.setting(model, micro_batch, accumulation), self.device_bytes)
        room = f"{self.device_bytes / GIB:.1f} GiB"
        if best is None:
            raise UserError(
                f"No GPT-2 size fits into {room} with {self.profile.name} at micro-batch {micro_batch}: "
                "give a smaller --micro-batch or another profile."
            )
        self.notes.append(
            f"No --model: {best.name}, the largest GPT-2 that {self.profile.name} is predicted to fit into {room} "
            f"at micro-batch {micro_batch}."
        )
        return best

    def batch(self, model: GPT2Config) -> tuple[int, int]:
        """(micro_batch, accumulation). A global batch that the profile fixes, or an earlier session, never changes."""
        asked = self.options.micro_batch
        if self.global_batch and asked and not self.micro_batch_is_asked:
            asked = largest_divisor(self.global_batch // self.ranks, asked)
        micro_batch, accumulation = batch_of(
            self.profile,
            self.ranks,
            micro_batch=asked,
            accumulation=self.options.accumulation,
            global_batch=self.global_batch,
            named="The run's global batch of",
            rounded=True,
        )
        return self.auto_batch(model, accumulation) if micro_batch is None else (micro_batch, accumulation)

    def auto_batch(self, model: GPT2Config, per_rank: int) -> tuple[int, int]:
        """(micro_batch, accumulation) that should be fastest of those predicted to fit; with them the recompute policy,
        where neither the user nor the profile names one.
        """
        policies = policies_of(self.profile, self.options.recompute)
        room = self.device_bytes // (self.ranks_here if self.machine.kind == "cpu" else 1)
        found = fastest_that_fits(self.setting(model, 1, per_rank), room, policies=policies)
        if found is None:
            return 1, per_rank  # and `estimate` says that it does not fit
        self.recompute = found.recompute
        policy = f", recompute {found.recompute}" if len(policies) > 1 else ""
        self.notes.append(
            f"Micro-batch {found.micro_batch}, accumulation {found.accumulation}{policy}: the fastest that is "
            f"predicted to fit at the global batch of {per_rank * self.ranks}."
        )
        return found.micro_batch, found.accumulation

    def estimate(self, model: GPT2Config, micro_batch: int, accumulation: int) -> Estimate | None:
        """The predicted memory on a GPU, with a note when it does not fit; on a CPU where somebody will measure it."""
        setting = self.setting(model, micro_batch, accumulation)
        if self.machine.kind == "cpu":
            return self.estimate_on_cpu(setting) if self.options.watch_memory else None
        estimate = predict(setting)
        if not fits(estimate, self.device_bytes):
            most = largest_micro_batch(setting, self.device_bytes)
            advice = f"at most {most} is" if most else "not even 1 is; take a ZeRO-3 or an offload profile"
            self.notes.append(
                f"The predicted peak of {estimate.peak_bytes / GIB:.2f} GiB at micro-batch {micro_batch} is not "
                f"expected to fit into {self.device_bytes / GIB:.2f} GiB: {advice}."
            )
        return estimate

    def estimate_on_cpu(self, setting: MemorySetting) -> Estimate | None:
        """What all tensors of a rank will take."""
        if self.profile.compile:
            self.problems.append(
                "--watch-memory does not see the tensors inside of compiled blocks: leave it out, or take a profile "
                "without compile."
            )
        if setting.model.drop_rate:
            self.notes.append(
                "--watch-memory: no prediction to compare with, because on a CPU dropout takes attention without a "
                "fused kernel, and the formula is about a GPU's."
            )
            return None
        if setting.offload_optimizer or setting.offload_param:
            self.notes.append(
                "--watch-memory: no prediction to compare with, because on a CPU offloaded tensors stay in the same "
                "memory as all others."
            )
            return None
        return predict(setting)

    def check_data(self, model: GPT2Config, global_batch: int) -> None:
        """Whether the shards are of this model's vocabulary and hold a step's windows."""
        corpus, context = self.corpus, model.context_length
        if corpus.vocab_size > model.vocab_size:
            self.problems.append(
                f"{corpus.folder} holds tokens of a vocabulary of {corpus.vocab_size}, {model.name} has "
                f"{model.vocab_size}: prepare the text again with `gpt2ds prepare`, or give the model that vocab_size."
            )
        else:
            self.attempt(lambda: check_ids(corpus, model.vocab_size))
        train, val = count_windows(corpus, "train", context), count_windows(corpus, "val", context)
        if train < (1 if self.only_measured else global_batch):
            fix = f"a global batch of at most {train}" if train else "a shorter --context"
            self.problems.append(
                f"{corpus.folder} has {train} training windows of {context} tokens, fewer than the {global_batch} "
                f"sequences of one step: give more text, or {fix}."
            )
        if val == 0 and not self.only_measured:
            self.problems.append(
                f"{corpus.folder} has no validation window of {context} tokens: give more text or a shorter --context."
            )

    def check_disk(self, folder: Path, model: GPT2Config) -> None:
        """Whether the checkpoints that will be kept, and the one being written, have room."""
        if problem := disk_problem(folder, model, self.profile.dtype, self.options.get("keep")):
            self.problems.append(problem)

    def schedule(self, model: GPT2Config, global_batch: int) -> Schedule:
        """Learning rate and length."""
        options, tokens_per_step = self.options, global_batch * model.context_length
        peak_lr = options.lr or self.profile.lr
        if peak_lr is None:
            # Nearest in ratio: 200M parameters are nearer to 124M than to 355M.
            nearest = min(PEAK_LR, key=lambda size: max(size / model.parameters, model.parameters / size))
            peak_lr = PEAK_LR[nearest]
            if model.parameters > 50e6 and tokens_per_step < 65_536:
                self.notes.append(
                    f"The default peak learning rate {peak_lr:g} is meant for about 0.5M tokens a step; this run takes "
                    f"{tokens_per_step:,}. More --accumulation, or a smaller --lr, is safer."
                )
        total = options.steps
        if options.tokens is not None:
            total = max(1, round(options.tokens / tokens_per_step))
        if total is None and options.hours is None:
            total = max(1, count_windows(self.corpus, "train", model.context_length) // global_batch)
            self.notes.append(f"No --steps, --tokens or --hours: one pass over the training text, {total:,} steps.")
        return Schedule(
            kind=options.get("schedule"),
            peak_lr=peak_lr,
            min_lr_ratio=float(DEFAULTS["min_lr_ratio"][0]),
            warmup_steps=warmup_steps(total) if options.warmup_steps is None else options.warmup_steps,
            total_steps=total,
            decay_fraction=float(DEFAULTS["decay_fraction"][0]),
            hours=options.hours,
        )
