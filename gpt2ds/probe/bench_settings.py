"""The settings of a bench: what the user asked for, each resolved to a plan or to the sentence that refuses it."""

import itertools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpt2ds.devices import Machine
from gpt2ds.ds_profile import load_profile, shipped_profiles
from gpt2ds.errors import UserError
from gpt2ds.memory.fit import fits
from gpt2ds.options import DEFAULTS, TrainOptions
from gpt2ds.plan import Plan
from gpt2ds.planning import resolve

Note = Callable[[str], None]

# The first step makes Adam's moments and the second finds the allocator and the libraries as they stay.
WARM_UP_STEPS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchOptions:
    """The options of `gpt2ds bench`; the settings are the product of ds, micro_batch and recompute."""

    ds: tuple[str, ...] = ()
    """Profiles; none for all shipped ones."""
    model: str | None = None
    models_file: Path | None = None
    data: Path | None = None
    micro_batch: tuple[int, ...] = ()
    recompute: tuple[str, ...] = ()
    accumulation: int = 2
    context: int | None = None
    gpus: int = 1
    gpu_memory: float | None = None
    steps: int = 5
    largest: bool = False
    timeout_seconds: float = 600.0
    out: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One setting as asked for; `plan` when it is possible, else the `refusal`."""

    label: str
    ds: str
    micro_batch: int | None
    recompute: str | None
    plan: Plan | None
    refusal: str | None


def all_candidates(options: BenchOptions, machine: Machine, note: Note) -> tuple[BenchOptions, list[Candidate]]:
    """Every setting that was asked for, and the options with the model decided.

    Raises UserError for options that no setting can mend, and when not one setting is possible.
    """
    _check(options, machine)
    if options.model is None:
        options = replace(options, model=_default_model(options, machine, note))
    micro_batches = [1] if options.largest else options.micro_batch or [None]
    product = itertools.product(_profiles(options), micro_batches, options.recompute or [None])
    candidates = [resolved(options, machine, *setting) for setting in dict.fromkeys(product)]
    if not any(candidate.plan for candidate in candidates):
        raise UserError.from_list(_sentences(str(candidate.refusal) for candidate in candidates))
    return options, candidates


def _sentences(errors: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(line.removeprefix("  - ") for error in errors for line in error.splitlines()))


def _profiles(options: BenchOptions) -> tuple[str, ...]:
    return options.ds or tuple(str(path) for path in shipped_profiles())


def _check(options: BenchOptions, machine: Machine) -> None:
    problems = []
    if "RANK" in os.environ:
        problems.append("bench starts its ranks by itself: run it without a launcher, with --gpus N.")
    problems += [
        f"--{name} must be above 0, not {value:g}."
        for name, value in (("gpus", options.gpus), ("steps", options.steps), ("timeout", options.timeout_seconds))
        if not value > 0
    ]
    if options.largest and not machine.gpus:
        problems.append("--largest looks for the limit of a GPU's memory and there is none here: leave it out.")
    if options.largest and options.micro_batch:
        problems.append("--largest tries micro-batches by itself: leave --micro-batch out, or --largest.")
    if problems:
        raise UserError.from_list(problems)


def _default_model(options: BenchOptions, machine: Machine, note: Note) -> str:
    """The one that training would take, with the default profile or the first possible one of those named: settings
    compare only with the same model."""
    refusals = []
    for ds in options.ds or (DEFAULTS["ds"][0],):
        asked = replace(_asked(options, ds, None), accumulation=None)
        try:
            plan = resolve(asked, ranks=options.gpus, machine=machine, only_measured=True)
        except UserError as error:
            refusals.append(str(error))
            continue
        for sentence in plan.notes:
            if sentence.startswith("No --model"):
                note(sentence)
        return plan.model.name
    raise UserError.from_list(_sentences(refusals))


def _asked(options: BenchOptions, ds: str, recompute: str | None) -> TrainOptions:
    return TrainOptions(
        ds=ds,
        model=options.model,
        models_file=options.models_file,
        data=options.data,
        accumulation=options.accumulation,
        context=options.context,
        recompute=recompute,
        gpu_memory=options.gpu_memory,
        steps=options.steps + WARM_UP_STEPS,
    )


def resolved(
    options: BenchOptions, machine: Machine, ds: str, micro_batch: int | None, recompute: str | None
) -> Candidate:
    """One setting with its plan or its refusal."""
    asked = _asked(options, ds, recompute)
    try:
        if micro_batch is None:
            # A micro-batch that the profile leaves open follows from its global batch; the bench's short accumulation
            # comes after that.
            micro_batch = load_profile(Path(ds)).micro_batch or (
                resolve(
                    replace(asked, accumulation=None), ranks=options.gpus, machine=machine, only_measured=True
                ).micro_batch
            )
        plan = resolve(replace(asked, micro_batch=micro_batch), ranks=options.gpus, machine=machine, only_measured=True)
        refusal = None
    except UserError as error:
        plan, refusal = None, str(error)
    stems = [Path(name).stem for name in dict.fromkeys(options.ds)]
    label = Path(ds).stem if stems.count(Path(ds).stem) < 2 else ds
    return Candidate(label=label, ds=ds, micro_batch=micro_batch, recompute=recompute, plan=plan, refusal=refusal)


def described(candidate: Candidate) -> dict[str, Any]:
    """What a record says of its setting, and what was predicted for it."""
    plan = candidate.plan
    record: dict[str, Any] = {
        "profile": candidate.label,
        "micro_batch": candidate.micro_batch,
        "recompute": candidate.recompute,
    }
    if plan is None:
        return record
    profile, estimate = plan.profile, plan.estimate
    return record | {
        "recompute": plan.recompute,
        "accumulation": plan.accumulation,
        "context": plan.context,
        "ranks": plan.ranks,
        "tokens_per_step": plan.tokens_per_step,
        "loss_chunk": plan.loss_chunk,
        "compile": profile.compile,
        "zero_stage": profile.zero_stage,
        "dtype": profile.dtype,
        "grad_accum_dtype": profile.grad_accum_dtype,
        "offload_optimizer": profile.offload_optimizer,
        "offload_param": profile.offload_param,
        "ds_config": plan.ds_config(),
        "predicted": None
        if estimate is None
        else {
            "peak_bytes": estimate.peak_bytes,
            "phase": estimate.phase,
            "parts": estimate.parts,
            "fits": fits(estimate, plan.device_bytes),
        },
    }
