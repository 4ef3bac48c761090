"""Out of memory is an answer: what was asked for, what was predicted, who else holds memory, and what would fit."""

import os
import re
import traceback
from dataclasses import replace
from pathlib import Path

import torch

from gpt2ds.devices import GPU, processes_on_gpu, ranks_here
from gpt2ds.ds_profile import load_profile
from gpt2ds.estimate.rows import memory_setting
from gpt2ds.gpt2.policies import POLICIES
from gpt2ds.memory.fit import fastest_that_fits
from gpt2ds.memory.formula import predict
from gpt2ds.memory.host import predict_host
from gpt2ds.memory.setting import MemorySetting
from gpt2ds.plan import Plan
from gpt2ds.requirements import host_memory_problem, missing_requirements
from gpt2ds.runlog.metrics import gib

# The rest of a message that names bytes: CUDA's allocator, then the CPU's.
_ASKED = (re.compile(r"Tried to allocate ([\d.]+) ([KMG]iB)"), re.compile(r"tried to allocate (\d+) (bytes)"))
# What says so in errors of a general kind: torch on the host and on a GPU, C++, the operating system.
_NO_MEMORY = (
    "DefaultCPUAllocator",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
    "Cannot allocate memory",
)
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}

# A setting that ran out of memory was at its limit or beyond: the next one must be predicted to need so much less.
STEP_DOWN = 0.95


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is an allocation that failed, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(words in str(error) for words in _NO_MEMORY)


def asked_bytes(error: BaseException) -> float | None:
    """How much the allocation that failed asked for, where the message says so."""
    for pattern in _ASKED:
        if found := pattern.search(str(error)):
            return float(found[1]) * _UNITS[found[2]]
    return None


def explain(error: BaseException, plan: Plan, *, rank: int, doing: str, checkpoint: str | None) -> str:
    """The whole message. checkpoint: name of the newest complete one, or None."""
    lines = [_what_happened(error, plan, rank, doing), *_prediction(plan), *_held(plan)]
    lines += _next_setting(plan, resumable=checkpoint is not None)
    if checkpoint:
        lines.append(f"The last checkpoint, {checkpoint}, is untouched.")
    return "\n".join(lines)


def _what_happened(error: BaseException, plan: Plan, rank: int, doing: str) -> str:
    asked = asked_bytes(error)
    amount = f"{gib(asked)} more" if asked else "more memory"
    gpu = _own_gpu(plan)
    device = gpu.name if gpu else "the CPU"
    return f"Out of memory on rank {rank} ({device}), {doing}: {amount} could not be had, {_where(error)}."


def _where(error: BaseException) -> str:
    """The innermost line of ours or DeepSpeed's: torch's own frames say little about what was computed."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if {"gpt2ds", "deepspeed"} & set(Path(frame.filename).parts)
    ]
    if not frames:
        return "outside of the model"
    last = frames[-1]
    return f"in {last.name} ({Path(last.filename).name}:{last.lineno})"


def _prediction(plan: Plan) -> list[str]:
    estimate = predict(_setting(plan))
    parts = sorted(estimate.parts.items(), key=lambda part: -part[1])
    named = ", ".join(f"{name} {gib(size)}" for name, size in parts)
    lines = [f"Predicted peak: {gib(estimate.peak_bytes)} in the {estimate.phase} phase ({named})."]
    if plan.machine.gpus:
        lines.append(
            f"Usable for tensors when the run was planned: {gib(plan.device_bytes)}; torch held "
            f"{gib(torch.cuda.max_memory_allocated())} at the most in this step and had reserved "
            f"{gib(torch.cuda.max_memory_reserved())}."
        )
    return lines


def _own_gpu(plan: Plan) -> GPU | None:
    # The plan describes rank 0's machine; another node may have more cards.
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return plan.machine.gpus[min(local_rank, len(plan.machine.gpus) - 1)] if plan.machine.gpus else None


def _held(plan: Plan) -> list[str]:
    gpu = _own_gpu(plan)
    if gpu is None:
        import psutil

        memory = psutil.virtual_memory()
        return [f"Of the host's {gib(memory.total)}, {gib(memory.available)} are available."]
    running = processes_on_gpu(gpu)
    if running is None:
        return ["Which processes hold memory on this GPU, NVML does not say."]
    found = [
        f"{name} (pid {pid}) {gib(size) if size is not None else 'an unknown amount'}"
        for pid, name, size in running
        if pid != os.getpid()
    ]
    if not found:
        return ["No other process is on this GPU."]
    # In a container the numbers are those of the host, and this process has another one there.
    hidden = "" if any(pid == os.getpid() for pid, _, _ in running) else " (one of them may be this process)"
    return [f"Other processes hold on this GPU{hidden}: {', '.join(found)}."]


def _next_setting(plan: Plan, *, resumable: bool) -> list[str]:
    room, now = _room_bytes(plan), _setting(plan)
    limit = int(predict(now).peak_bytes * STEP_DOWN)
    policies = ("none", "full") if plan.profile.compile else tuple(POLICIES)
    options = plan.options
    found = fastest_that_fits(now, room, policies=policies, most_peak_bytes=limit)
    if found is None:
        # Another profile is another run: a checkpoint belongs to the ZeRO stage that wrote it.
        name, found = _other_profile(plan, room, limit)
        options, resumable = replace(options, ds=name), False
    if found is None:
        return ["Nothing smaller is predicted to fit: take a smaller --model or a shorter --context."]
    options = replace(
        options,
        micro_batch=found.micro_batch,
        accumulation=found.accumulation,
        recompute=found.recompute,
        # Without a checkpoint the run cannot be resumed, and its folder is taken.
        resume=resumable,
        name=plan.run if resumable else None,
    )
    several_nodes = plan.ranks > ranks_here(plan.ranks)
    words = f"Predicted to fit ({gib(predict(found).peak_bytes)}), at the same global batch of {plan.global_batch}"
    words += ", by the launcher that started this run:" if several_nodes else ":"
    return [words, options.command(1 if several_nodes else plan.ranks)]


def _room_bytes(plan: Plan) -> int:
    """What tensors could have now: less than was planned with when others have come since."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return plan.device_bytes
    free, _ = torch.cuda.mem_get_info()
    return min(plan.device_bytes, free + torch.cuda.memory_reserved())


def _other_profile(plan: Plan, room: int, limit: int) -> tuple[str | None, MemorySetting | None]:
    """(name, setting) of a shipped profile of the same dtype that keeps less on the GPU and can run here."""
    here = ranks_here(plan.ranks)
    for name in ("zero3", "zero2_offload", "zero3_offload"):
        profile = load_profile(name)
        batch = {"micro_batch": plan.micro_batch, "accumulation": plan.accumulation, "ranks": plan.ranks}
        options = replace(plan.options, context=plan.context)
        setting = memory_setting(options, profile, plan.model, machine=plan.machine, **batch)
        found = fastest_that_fits(setting, room, most_peak_bytes=limit)
        if found is None or profile.dtype != plan.profile.dtype or name == plan.profile.name:
            continue
        host = predict_host(found, ranks_here=here, pinned=profile.pins_memory)
        if not host_memory_problem(host, plan.machine) and not missing_requirements(
            profile, found.recompute, plan.machine, here
        ):
            return name, found
    return None, None


def _setting(plan: Plan) -> MemorySetting:
    return memory_setting(
        replace(plan.options, context=plan.context, recompute=plan.recompute),
        plan.profile,
        plan.model,
        ranks=plan.ranks,
        micro_batch=plan.micro_batch,
        accumulation=plan.accumulation,
        machine=plan.machine,
    )
