"""`gpt2ds memory-estimate --fit`: the fastest plan that fits at a global batch, as a command and as a profile.

One search (`memory.fit`) serves this, `"train_micro_batch_size_per_gpu": "auto"` and the answer to memory that ran out.
"""

import json
import math
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpt2ds.batch_arithmetic import check_global_batch, divided
from gpt2ds.devices import Machine
from gpt2ds.ds_profile import DsProfile, shipped_profiles
from gpt2ds.errors import UserError
from gpt2ds.estimate.change import smallest_change
from gpt2ds.estimate.rows import (
    EstimateOptions,
    Estimates,
    Row,
    card,
    load_profiles,
    model_and_ranks,
    possible_policies,
    row_of,
    setting_of,
)
from gpt2ds.files import write_atomically
from gpt2ds.gpt2.config import GPT2Config
from gpt2ds.memory.fit import fastest_that_fits, fits, slowness, tensor_bytes
from gpt2ds.memory.formula import predict
from gpt2ds.memory.setting import MemorySetting
from gpt2ds.options import DEFAULTS, TrainOptions
from gpt2ds.requirements import host_memory_problem, missing_requirements

# About what GPT-3 took for models of this size, and what every shipped profile that is named for a model takes.
TOKENS_PER_STEP = 2**19


class NothingFitsError(UserError):
    """No plan fits; the message says what would."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """What fits, the fastest plan first. `estimates` is never empty."""

    estimates: Estimates
    global_batch: int
    """Sequences per optimizer step, the same for all."""
    global_batch_from: str
    left_out: tuple[str, ...]
    """A sentence for each profile that fits the cards, but not the machine."""

    @property
    def best(self) -> Row:
        """The plan to take."""
        return self.estimates.rows[0]

    def to_dict(self, options: EstimateOptions, written: Path | None) -> dict[str, Any]:
        """For --json."""
        return self.estimates.to_dict() | {
            "global_batch": self.global_batch,
            "left_out": list(self.left_out),
            "command": command(self.best, options, written=written),
            "profile": as_profile(self.best),
        }


def find_fit(options: EstimateOptions, machine: Machine) -> Fit:
    """Every profile at its fastest setting that fits, ranked by `memory.fit.slowness`.

    Raises UserError with every mistake in the options; NothingFitsError with the smallest change that would make a plan
    fit, when none does.
    """
    model, ranks = model_and_ranks(options, machine)
    device, room = card(options, machine, ranks=ranks)
    # What the machine lacks counts only where the plan is for this machine.
    own_machine = options.gpus is None and options.gpu_memory is None and options.nodes == 1
    here = machine if machine.gpus and own_machine else None
    candidates = _candidates(options, here)
    total, whence = _global_batch(options, candidates, model, ranks)
    found: list[Row] = []
    left_out: list[str] = []
    for profile in candidates:
        start = _start(profile, options, machine, model, ranks, total)
        policies = (options.recompute,) if options.recompute else possible_policies(profile)
        search = fastest_that_fits if _is_free(options) else _fastest_policy
        setting = search(start, room, policies=policies)
        if setting is None:
            continue
        row = row_of(profile, setting, nodes=options.nodes, room=room)
        if here and (lacks := _lacks(row, here)):
            left_out.append(lacks)
        else:
            found.append(row)
    if not found:
        raise NothingFitsError.from_list(left_out or [_nothing_fits(options, machine, candidates, model, ranks, total)])
    found.sort(key=lambda row: (*slowness(row.setting), _strangeness(row)))
    return Fit(
        estimates=Estimates(model=model, device=device, room_bytes=room, rows=tuple(_without_twins(found))),
        global_batch=total,
        global_batch_from=whence,
        left_out=tuple(left_out),
    )


def command(plan: Row, options: EstimateOptions, *, written: Path | None = None) -> str:
    """What starts the plan's training. written: the profile that `write_profile` made of it, which says the rest."""
    setting = plan.setting
    name = plan.profile if plan.source.path in shipped_profiles() else str(plan.source.path)
    train = TrainOptions(
        ds=str(written or name),
        model=setting.model.name,
        models_file=options.models_file,
        context=options.context,
        micro_batch=None if written else setting.micro_batch,
        accumulation=None if written else setting.accumulation,
        recompute=None if written else setting.recompute,
    )
    launcher = ["deepspeed"] + (["--num_nodes", str(options.nodes)] if options.nodes > 1 else [])
    launcher += ["--num_gpus", str(setting.ranks // options.nodes), "gpt2ds/cli.py"]
    return shlex.join([*launcher, *shlex.split(train.command(1))[1:]])


def write_profile(plan: Row, path: Path) -> None:
    """Writes the plan as a DeepSpeed profile, complete, in plain JSON. Raises UserError when the file exists already or
    cannot be written.
    """
    check_new_profile(path)
    try:
        write_atomically(path, (json.dumps(as_profile(plan), indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(f"--write {path}: cannot be written: {error.strerror}.") from error


def check_new_profile(path: Path) -> None:
    """Raises UserError when a profile cannot be written under this name."""
    if path.exists():
        raise UserError(f"{path} exists already: give --write another name, or remove the file.")
    if path.suffix != ".json":
        raise UserError(f"--write {path}: a profile's name ends in .json.")


def as_profile(plan: Row) -> dict[str, Any]:
    """The plan as a profile's JSON. The global batch stands in it and the accumulation follows, so that on another
    number of GPUs it is the same training.
    """
    profile, setting, total = plan.source, plan.setting, plan.global_batch
    gpus = f"{setting.ranks} GPU{'s' * (setting.ranks > 1)}"
    own: dict[str, Any] = {
        "description": f"{setting.model.name} on {gpus}: {profile.dtype}, ZeRO-{setting.zero_stage}, recompute "
        f"{setting.recompute}, {total * setting.context:,} tokens a step.",
        "use_when": "What `gpt2ds memory-estimate --fit` chose: predicted peak "
        f"{plan.peak_bytes / 2**30:.2f} GiB on each GPU, {plan.margin_bytes / 2**30:.2f} GiB to spare.",
    }
    own |= {"risk": profile.risk} if profile.risk else {}
    own |= {"recompute": setting.recompute, "loss_chunk": setting.loss_chunk}
    own |= {name: True for name in ("compile", "eight_bit_states") if getattr(profile, name)}
    left = {name: value for name, value in profile.settings.items() if name not in _REPLACED}
    written = {"gpt2ds": own, "train_batch_size": total, "train_micro_batch_size_per_gpu": setting.micro_batch} | left
    if setting.recompute != "none":
        written["activation_checkpointing"] = {"cpu_checkpointing": True} if setting.recompute == "host" else {}
    return written


_REPLACED = (
    "gpt2ds",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "activation_checkpointing",
)


_WORDS = ("description", "use_when", "risk")


def _candidates(options: EstimateOptions, here: Machine | None) -> list[DsProfile]:
    """Those asked for; else the shipped ones that train like fp32 states in bf16, or in fp16 where cards lack bf16."""
    if options.ds:
        return load_profiles(options)
    old = any((gpu.compute_capability or (8, 0)) < (8, 0) for gpu in (here.gpus if here else ()))
    return [
        profile
        for profile in load_profiles(options)
        if not profile.risk and profile.dtype == ("fp16" if old else "bf16")
    ]


def _global_batch(
    options: EstimateOptions, candidates: list[DsProfile], model: GPT2Config, ranks: int
) -> tuple[int, str]:
    """(sequences per optimizer step, where the number comes from)."""
    pinned = (options.micro_batch or 0) * (options.accumulation or 0) * ranks
    name = "The global batch of"
    if options.global_batch:
        total, whence, name = options.global_batch, "asked for", "--global-batch"
    elif pinned:
        total, whence = pinned, "asked for"
    else:
        own = {
            one.global_batch or (one.micro_batch or 1) * (one.accumulation or 1) * ranks
            for one in (candidates if options.ds else [])
        }
        if len(own) == 1:
            total, whence, name = own.pop(), "the profile's own", "The profile's train_batch_size"
        else:
            # A power of two has the most divisors, and every one of them is a micro-batch.
            total = 2 ** max(0, round(math.log2(TOKENS_PER_STEP / model.context_length / ranks))) * ranks
            whence = f"{total * model.context_length / 1e6:.2f}M tokens; --global-batch takes another"
    if _is_free(options):
        check_global_batch(name, total, ranks)
    else:
        divided(name, total, ranks, options.micro_batch, options.accumulation)
    return total, whence


def _start(
    profile: DsProfile, options: EstimateOptions, machine: Machine, model: GPT2Config, ranks: int, total: int
) -> MemorySetting:
    """The setting whose micro-batch, accumulation and policy the search varies."""
    per_rank = total // ranks
    micro_batch = options.micro_batch or (per_rank // options.accumulation if options.accumulation else 1)
    return setting_of(
        profile, options, machine, model, ranks=ranks, micro_batch=micro_batch, accumulation=per_rank // micro_batch
    )


def _is_free(options: EstimateOptions) -> bool:
    return options.micro_batch is None and options.accumulation is None


def _fastest_policy(setting: MemorySetting, room: int, *, policies: tuple[str, ...]) -> MemorySetting | None:
    """The fastest policy that fits at the setting's own micro-batch."""
    every = [replace(setting, recompute=policy) for policy in policies if policy != "host" or len(policies) == 1]
    return min((one for one in every if fits(predict(one), room)), key=slowness, default=None)


def _lacks(plan: Row, machine: Machine) -> str | None:
    """What the machine has too little of for the plan."""
    problems = [host_memory_problem(plan.host_parts, machine)]
    problems += missing_requirements(plan.source, plan.recompute, machine, plan.ranks)
    return next((f"{plan.profile}: {problem}" for problem in problems if problem), None)


def _strangeness(plan: Row) -> tuple[bool, bool, bool, str]:
    """Of plans that come to the same: first the profile that needs no change, then the usual one for any model."""
    own = plan.source
    named = (own.micro_batch, own.accumulation, own.recompute)
    changed = named != (plan.micro_batch, plan.accumulation, plan.recompute)
    usual = plan.profile == Path(DEFAULTS["ds"][0]).stem
    return changed, plan.profile.startswith("gpt2_"), not usual, plan.profile


def _without_twins(plans: list[Row]) -> list[Row]:
    """Profiles that come to the same setting and to the same training once."""
    kept: list[Row] = []
    for plan in plans:
        if all(plan.setting != other.setting or _training(plan) != _training(other) for other in kept):
            kept.append(plan)
    return kept


def _training(plan: Row) -> dict[str, Any]:
    """The plan as a profile, without words."""
    profile = as_profile(plan)
    profile["gpt2ds"] = {name: value for name, value in profile["gpt2ds"].items() if name not in _WORDS}
    return profile


def _nothing_fits(
    options: EstimateOptions,
    machine: Machine,
    candidates: list[DsProfile],
    model: GPT2Config,
    ranks: int,
    total: int,
) -> str:
    """What would have to change for the candidate that is nearest to fitting."""
    settings = [_start(profile, options, machine, model, ranks, total) for profile in candidates]
    smallest = [replace(one, recompute=options.recompute or "full") for one in settings]
    nearest = min(range(len(candidates)), key=lambda index: predict(smallest[index]).peak_bytes)
    room = card(options, machine, ranks=ranks)[1]
    peak = predict(smallest[nearest]).peak_bytes
    lacking = (peak - tensor_bytes(room)) / 2**30
    change, _ = smallest_change(candidates[nearest], smallest[nearest], options, machine)
    return (
        f"No plan for {model.name} fits: at micro-batch {smallest[nearest].micro_batch} {lacking:.2f} GiB are missing "
        f"at the least, with {candidates[nearest].name}. The smallest change that fits: {change}."
    )
