"""`gpt2ds memory-estimate`: what each profile would take on a GPU, whether it fits, and what would. No torch, no GPU.

The setting that is estimated here is the one that a plan trains: both come from `memory_setting`.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from gpt2ds.devices import CONTEXT_BYTES, NCCL_BYTES, Machine, card_bytes
from gpt2ds.ds_profile import DsProfile, load_profile, shipped_profiles
from gpt2ds.ds_rules import RECOMPUTE_POLICIES
from gpt2ds.errors import UserError
from gpt2ds.gpt2.config import GPT2Config, find_model, with_context
from gpt2ds.gpt2.policies import recomputed_flops_per_token
from gpt2ds.memory.fit import fits, largest_micro_batch, tensor_bytes
from gpt2ds.memory.formula import MemorySetting, predict
from gpt2ds.memory.host import predict_host
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
    ds: tuple[str, ...] = ()
    gpus: int | None = None
    nodes: int = 1
    gpu_memory: float | None = None
    micro_batch: int | None = None
    accumulation: int | None = None
    context: int | None = None
    recompute: str | None = None
    loss_chunk: int | None = None


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
        return asdict(self) | {"source": "formula, not measured on a GPU", "model": self.model.to_dict()}


def estimate(options: EstimateOptions, machine: Machine) -> Estimates:
    """Estimates every profile asked for, the shipped ones by default.

    Raises UserError with every mistake in the options, a line each.
    """
    _check(options)
    model = find_model(options.model)
    if (options.context or 0) > model.context_length:
        raise UserError(
            f"--context {options.context} is longer than the {model.context_length} tokens that {model.name} can see; "
            f"use at most {model.context_length}."
        )
    if options.context:
        model = with_context(model, options.context)
    here = options.gpus or max(1, len(machine.gpus)) * options.nodes
    device, room = card(options, machine, ranks=here)
    names = options.ds or tuple(path.stem for path in shipped_profiles())
    rows = [_row(load_profile(name), options, model, here, room) for name in names]
    return Estimates(model=model, device=device, room_bytes=room, rows=tuple(rows))


def card(options: EstimateOptions, machine: Machine, *, ranks: int) -> tuple[str, int]:
    """(the card in words, bytes that torch can reserve on it): the machine's fullest GPU, or the size asked for."""
    nccl = NCCL_BYTES if ranks > 1 else 0
    if options.gpu_memory is None and machine.gpus:
        fullest = min(machine.gpus, key=lambda gpu: gpu.free_bytes)
        return f"{fullest.name}, what is free on it now", fullest.free_bytes - CONTEXT_BYTES - nccl
    size = options.gpu_memory or ASSUMED_CARD_GB
    words = f"a card of {size:g} GB" + ("" if options.gpu_memory else " (no GPU here)")
    return words, card_bytes(size) - nccl


def memory_setting(
    options: TrainOptions, profile: DsProfile, model: GPT2Config, *, ranks: int, micro_batch: int, accumulation: int
) -> MemorySetting:
    """What the memory formula needs to know of a model under a profile on GPUs."""
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
        loss_chunk=profile.loss_chunk or LOSS_CHUNK["cuda"],
        reduce_bucket_elements=profile.reduce_bucket_elements,
        overlap_comm=profile.overlap_comm,
        offload_optimizer=profile.offload_optimizer is not None,
        offload_param=profile.offload_param is not None,
        live_parameter_elements=profile.live_parameter_elements,
        sub_group_elements=profile.sub_group_elements,
        master_bytes=profile.master_bytes,
        moment_bytes=profile.moment_bytes,
    )


def _row(profile: DsProfile, options: EstimateOptions, model: GPT2Config, ranks: int, room: int) -> Row:
    accumulation = options.accumulation or profile.accumulation or 1
    micro_batch = options.micro_batch or profile.micro_batch
    if micro_batch is None:  # "auto", or what the global batch leaves
        micro_batch = max(1, (profile.global_batch or ranks) // (ranks * accumulation))
    asked = TrainOptions(recompute=options.recompute, context=options.context)
    setting = memory_setting(asked, profile, model, ranks=ranks, micro_batch=micro_batch, accumulation=accumulation)
    if options.loss_chunk:
        setting = replace(setting, loss_chunk=options.loss_chunk)
    predicted = predict(setting)
    # Ranks of one node share its host.
    host = predict_host(setting, ranks_here=-(-ranks // options.nodes), pinned=profile.pins_memory)
    flops = recomputed_flops_per_token(model, setting.recompute, setting.context)
    return Row(
        profile=profile.name,
        zero_stage=profile.zero_stage,
        dtype=profile.dtype,
        ranks=ranks,
        micro_batch=micro_batch,
        accumulation=accumulation,
        global_batch=micro_batch * accumulation * ranks,
        recompute=setting.recompute,
        recompute_percent=round(100 * flops / model.flops_per_token(setting.context), 1),
        peak_bytes=predicted.peak_bytes,
        phase=predicted.phase,
        parts=predicted.parts,
        fits=fits(predicted, room),
        margin_bytes=tensor_bytes(room) - predicted.peak_bytes,
        largest_micro_batch=largest_micro_batch(setting, room),
        host_bytes=sum(host.values()),
        host_parts=host,
    )


def _check(options: EstimateOptions) -> None:
    problems = [
        f"--{name.replace('_', '-')} must be above 0, not {value}."
        for name in ("gpus", "nodes", "gpu_memory", "micro_batch", "accumulation", "context", "loss_chunk")
        if (value := getattr(options, name)) is not None and not value > 0
    ]
    if options.gpu_memory and options.gpu_memory > 0 and card_bytes(options.gpu_memory) <= 0:
        problems.append(f"--gpu-memory {options.gpu_memory:g} GB leaves nothing for tensors: take 1 or more.")
    if options.recompute not in (None, *RECOMPUTE_POLICIES):
        problems.append(f"--recompute {options.recompute}: it is one of {', '.join(RECOMPUTE_POLICIES)}.")
    if options.gpus and options.gpus % options.nodes:
        problems.append(f"--gpus {options.gpus} do not divide by {options.nodes} nodes: give the GPUs of all nodes.")
    if problems:
        raise UserError.from_list(problems)
