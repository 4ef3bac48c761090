"""`gpt2ds memory-estimate`: what each profile would take on a GPU, whether it fits, and what would. No torch, no GPU.

The setting that is estimated here is the one that a plan trains: both come from `memory_setting`.
"""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from gpt2ds.batch_arithmetic import batch_of
from gpt2ds.devices import CONTEXT_BYTES, NCCL_BYTES, Machine, card_bytes, gpu_memory_problem
from gpt2ds.ds_profile import DsProfile, load_profile, shipped_profiles
from gpt2ds.ds_rules import RECOMPUTE_POLICIES, section
from gpt2ds.errors import UserError
from gpt2ds.estimate.limits import left_out
from gpt2ds.gpt2.config import GPT2Config, find_model, with_context
from gpt2ds.gpt2.policies import POLICIES, recomputed_flops_per_token
from gpt2ds.memory.communication import Traffic, traffic
from gpt2ds.memory.fit import MICRO_BATCH_MOST, fastest_that_fits, fits, largest_micro_batch, tensor_bytes
from gpt2ds.memory.formula import predict
from gpt2ds.memory.host import predict_host
from gpt2ds.memory.setting import CUBLAS_WORKSPACE_BYTES, DTYPE_BYTES, LARGE_CUBLAS_WORKSPACE_BYTES, MemorySetting
from gpt2ds.options import TrainOptions

# Tokens whose logits exist at the same time, where the profile names none. Measured on an AMD EPYC with 2 cores: in
# fp32 512 is a tenth faster than 128 or 1,024, in bf16 they are equal. For a GPU 1,024 is an assumption.
LOSS_CHUNK = {"cpu": 512, "cuda": 1024}

# The card that is assumed where there is none: what gpt2ds is made for.
ASSUMED_CARD_GB = 24.0


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimateOptions:
    """What is asked of an estimate; None takes the profile's value or, for the cards, the machine's."""

    model: str = "gpt2_large"
    models_file: Path | None = None
    ds: tuple[str, ...] = ()
    gpus: int | None = None
    nodes: int = 1
    gpu_memory: float | None = None
    micro_batch: int | None = None
    accumulation: int | None = None
    context: int | None = None
    recompute: str | None = None
    loss_chunk: int | None = None
    global_batch: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One profile's estimate, on each of `ranks` GPUs."""

    profile: str
    zero_stage: int
    dtype: str
    ranks: int
    micro_batch: int
    accumulation: int
    global_batch: int
    recompute: str
    recompute_percent: float
    """Arithmetic that the policy adds, in percent of a step's."""
    peak_bytes: int
    phase: str
    parts: dict[str, int]
    fits: bool
    margin_bytes: int
    """What stays free of what tensors may take; negative when the setting does not fit."""
    largest_micro_batch: int
    """Everything else equal; 0 when not even one sequence fits."""
    host_bytes: int
    host_parts: dict[str, int]
    traffic: Traffic
    """What each rank sends in an optimizer step."""
    source: DsProfile
    setting: MemorySetting
    """What the figures are computed from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimates:
    """All rows, and the card that they are for."""

    model: GPT2Config
    device: str
    room_bytes: int
    """What torch can reserve on each GPU."""
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "source": "formula, not measured on a GPU",
            "model": self.model.to_dict(),
            "device": self.device,
            "room_bytes": self.room_bytes,
            "rows": [_plain(row) for row in self.rows],
        }


def _plain(row: Row) -> dict[str, Any]:
    about = {field.name: getattr(row, field.name) for field in fields(row) if field.name not in ("source", "setting")}
    return about | {"traffic": asdict(row.traffic), "not_counted": left_out(row.source)}


def estimate(options: EstimateOptions, machine: Machine) -> Estimates:
    """Estimates every profile asked for, the shipped ones by default.

    Raises UserError with every mistake in the options, a line each.
    """
    model, ranks = model_and_ranks(options, machine)
    device, room = card(options, machine, ranks=ranks)
    rows = []
    for profile in load_profiles(options):
        setting = _setting(profile, options, machine, model, ranks, room)
        rows.append(row_of(profile, setting, nodes=options.nodes, room=room))
    return Estimates(model=model, device=device, room_bytes=room, rows=tuple(rows))


def model_and_ranks(options: EstimateOptions, machine: Machine) -> tuple[GPT2Config, int]:
    """(the model at the asked context, GPUs of all nodes). Raises UserError with every mistake in the options."""
    _check(options)
    model = find_model(options.model, options.models_file)
    if (options.context or 0) > model.context_length:
        raise UserError(
            f"--context {options.context} is longer than the {model.context_length} tokens that {model.name} can see; "
            f"use at most {model.context_length}."
        )
    if options.context:
        model = with_context(model, options.context)
    return model, options.gpus or max(1, len(machine.gpus)) * options.nodes


def card(options: EstimateOptions, machine: Machine, *, ranks: int) -> tuple[str, int]:
    """(the card in words, bytes that torch can reserve on it): the machine's fullest GPU, or the size asked for.

    Raises UserError when nothing is left for tensors.
    """
    device, room = _card(options, machine, ranks=ranks)
    if room <= 0:
        nccl = f" beside NCCL's {NCCL_BYTES / 2**30:.1f} GiB on several GPUs" if ranks > 1 else ""
        raise UserError(f"{device} leaves nothing for tensors{nccl}: take a larger --gpu-memory.")
    return device, room


def room_bytes(options: EstimateOptions, machine: Machine, *, ranks: int) -> int:
    """What torch can reserve on a card; 0 or less where nothing is left."""
    return _card(options, machine, ranks=ranks)[1]


def _card(options: EstimateOptions, machine: Machine, *, ranks: int) -> tuple[str, int]:
    nccl = NCCL_BYTES if ranks > 1 else 0
    if machine.gpus and options.gpu_memory is None:
        fullest = min(machine.gpus, key=lambda gpu: gpu.free_bytes)
        return f"{fullest.name}, what is free on it now", fullest.free_bytes - CONTEXT_BYTES - nccl
    size = options.gpu_memory or ASSUMED_CARD_GB
    words = f"a card of {size:g} GB" + ("" if options.gpu_memory else " (no GPU here)")
    return words, card_bytes(size) - nccl


def memory_setting(
    options: TrainOptions,
    profile: DsProfile,
    model: GPT2Config,
    *,
    ranks: int,
    micro_batch: int,
    accumulation: int,
    machine: Machine | None = None,
) -> MemorySetting:
    """What the memory formula needs to know of a model under a profile. machine: the one that it runs on, GPUs or CPUs;
    by default one with the cards that most people have.
    """
    kind = machine.kind if machine else "cuda"
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
        loss_chunk=profile.loss_chunk or LOSS_CHUNK[kind],
        reduce_bucket_elements=profile.reduce_bucket_elements,
        overlap_comm=profile.overlap_comm,
        offload_optimizer=profile.offload_optimizer is not None,
        offload_param=profile.offload_param is not None,
        live_parameter_elements=profile.live_parameter_elements,
        prefetch_elements=profile.prefetch_elements,
        reuse_distance_elements=profile.reuse_distance_elements,
        immediate_grad_update=profile.immediate_grad_update,
        sub_group_elements=profile.sub_group_elements,
        master_bytes=profile.master_bytes,
        moment_bytes=profile.moment_bytes,
        workspace_bytes=_workspace_bytes(machine) if machine else CUBLAS_WORKSPACE_BYTES,
    )


def _workspace_bytes(machine: Machine) -> int:
    """What cuBLAS takes on the machine's GPUs."""
    if not machine.gpus:
        return 0
    large = any((gpu.compute_capability or (8, 0)) >= (9, 0) for gpu in machine.gpus)
    return LARGE_CUBLAS_WORKSPACE_BYTES if large else CUBLAS_WORKSPACE_BYTES


def policies_of(profile: DsProfile, asked: str | None) -> tuple[str, ...]:
    """The recompute policies that a search may choose from: the one asked for, else the one that the profile names,
    else all that it can have.
    """
    if asked:
        return (asked,)
    if "recompute" in section(profile.raw, "gpt2ds") or profile.raw.get("activation_checkpointing") is not None:
        return (profile.recompute,)
    return possible_policies(profile)


def possible_policies(profile: DsProfile) -> tuple[str, ...]:
    """The recompute policies that the profile's blocks can have."""
    return ("none", "full") if profile.compile else tuple(POLICIES)


def recompute_problem(profile: DsProfile, asked: str | None) -> str | None:
    """A sentence when the profile's blocks cannot have the policy asked for, else None."""
    if asked is None or asked in possible_policies(profile):
        return None
    return f"--recompute {asked} does not go with compiled blocks: take none or full, or a profile without compile."


def load_profiles(options: EstimateOptions) -> list[DsProfile]:
    """The profiles asked for, the shipped ones by default. Raises UserError when one cannot have the policy asked
    for.
    """
    profiles = [load_profile(name) for name in options.ds or shipped_profiles()]
    problems = [
        f"{profile.name}: {problem}"
        for profile in profiles
        if (problem := recompute_problem(profile, options.recompute))
    ]
    if problems:
        raise UserError.from_list(problems)
    return profiles


def setting_of(
    profile: DsProfile,
    options: EstimateOptions,
    machine: Machine,
    model: GPT2Config,
    *,
    ranks: int,
    micro_batch: int,
    accumulation: int,
) -> MemorySetting:
    """A profile's setting with what was asked for, on GPUs like the machine's, where it has any."""
    found = memory_setting(
        TrainOptions(recompute=options.recompute, context=options.context),
        profile,
        model,
        ranks=ranks,
        micro_batch=micro_batch,
        accumulation=accumulation,
        machine=machine if machine.gpus else None,
    )
    return replace(found, loss_chunk=options.loss_chunk or found.loss_chunk)


def _setting(
    profile: DsProfile, options: EstimateOptions, machine: Machine, model: GPT2Config, ranks: int, room: int
) -> MemorySetting:
    """The setting that a profile's row is about."""
    micro_batch, accumulation = batch_of(
        profile,
        ranks,
        micro_batch=options.micro_batch,
        accumulation=options.accumulation,
        global_batch=options.global_batch,
        rounded=not options.ds,
    )
    start = setting_of(
        profile, options, machine, model, ranks=ranks, micro_batch=micro_batch or 1, accumulation=accumulation
    )
    if micro_batch is None:
        return fastest_that_fits(start, room, policies=policies_of(profile, options.recompute)) or start
    return start


def row_of(profile: DsProfile, setting: MemorySetting, *, nodes: int, room: int) -> Row:
    """A profile's estimate at a setting. room: bytes that torch can reserve on each GPU."""
    ranks = setting.ranks
    predicted = predict(setting)
    # Ranks of one node share its host.
    host = predict_host(setting, ranks_here=-(-ranks // nodes), pinned=profile.pins_memory)
    return Row(
        profile=profile.name,
        zero_stage=profile.zero_stage,
        dtype=profile.dtype,
        ranks=ranks,
        micro_batch=setting.micro_batch,
        accumulation=setting.accumulation,
        global_batch=setting.micro_batch * setting.accumulation * ranks,
        recompute=setting.recompute,
        recompute_percent=recompute_percent(setting),
        peak_bytes=predicted.peak_bytes,
        phase=predicted.phase,
        parts=predicted.parts,
        fits=fits(predicted, room),
        margin_bytes=tensor_bytes(room) - predicted.peak_bytes,
        largest_micro_batch=largest_micro_batch(setting, room, most=max(MICRO_BATCH_MOST, setting.micro_batch)),
        host_bytes=sum(host.values()),
        host_parts=host,
        traffic=traffic(setting, gradient_bytes=gradient_bytes(profile)),
        source=profile,
        setting=setting,
    )


def recompute_percent(setting: MemorySetting) -> float:
    """Arithmetic that the recompute policy adds, in percent of a step's."""
    flops = recomputed_flops_per_token(setting.model, setting.recompute, setting.context)
    return round(100 * flops / setting.model.flops_per_token(setting.context), 1)


def gradient_bytes(profile: DsProfile) -> int | None:
    """Bytes of each gradient on its way between ranks where the profile says so, else None."""
    return DTYPE_BYTES.get(profile.settings.get("communication_data_type") or "")


def _check(options: EstimateOptions) -> None:
    problems = [
        f"--{name.replace('_', '-')} must be above 0, not {value}."
        for name in (*("gpus", "nodes", "micro_batch", "accumulation", "context", "loss_chunk", "global_batch"),)
        if (value := getattr(options, name)) is not None and not value > 0
    ]
    if options.gpu_memory is not None and (problem := gpu_memory_problem(options.gpu_memory)):
        problems.append(problem)
    if options.recompute not in (None, *RECOMPUTE_POLICIES):
        problems.append(f"--recompute {options.recompute}: it is one of {', '.join(RECOMPUTE_POLICIES)}.")
    if options.gpus and options.gpus % options.nodes:
        problems.append(f"--gpus {options.gpus} do not divide by {options.nodes} nodes: give the GPUs of all nodes.")
    if problems:
        raise UserError.from_list(problems)
