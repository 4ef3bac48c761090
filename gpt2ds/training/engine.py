"""The DeepSpeed engine behind a narrow door: what training needs of it, with its quirks in this file and nowhere else.

References are to deepspeed 0.19.8.
"""

import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gpt2ds.devices import free_port, ranks_here
from gpt2ds.ds_profile import DsProfile
from gpt2ds.gpt2.model import GPT2
from gpt2ds.plan import Plan
from gpt2ds.training.tensor_file import TensorSpec

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """Which of the run's processes this is."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    on_host: dist.ProcessGroup | None = None
    """Of all ranks, for small messages that must not wait for a GPU; None stands for the group of everything else."""

    def agree(self, *flags: int) -> list[int]:
        """The largest of all ranks' values of each flag, without waiting for a GPU."""
        if self.world_size == 1:
            return list(flags)
        largest = torch.tensor(flags)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.on_host)
        return [int(flag) for flag in largest]


def start_ranks(device_kind: str, *, memory_cap_bytes: int | None = None, timeout_seconds: float = 600.0) -> Ranks:
    """Joins the process group; without a launcher this process becomes the only rank.

    memory_cap_bytes: CUDA memory that torch's allocator may reserve, to try a smaller card on a bigger one.
    timeout_seconds: how long a collective waits for the other ranks.
    """
    if "RANK" not in os.environ:
        # Without these DeepSpeed looks for MPI and dies of its absence (comm/comm.py:898).
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone | {"MASTER_PORT": str(free_port())})
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    world_size = int(os.environ["WORLD_SIZE"])
    if device_kind == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        if memory_cap_bytes is not None:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, memory_cap_bytes / total), device)
        # fp32 products stay in fp32: tf32 would change what fp32 means here.
    else:
        device = torch.device("cpu")
        # The launcher leaves every rank all cores, and they then fight for them.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here(world_size)))
    import deepspeed

    if device_kind == "cpu":
        # An optional shared-memory collective that needs a C++ compiler; gloo does the same without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        deepspeed.init_distributed(
            dist_backend="nccl" if device_kind == "cuda" else "gloo",
            verbose=False,
            timeout=timedelta(seconds=timeout_seconds),
        )
    on_host = None
    if device_kind == "cuda" and world_size > 1:
        on_host = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
    return Ranks(rank=dist.get_rank(), world_size=world_size, local_rank=local_rank, device=device, on_host=on_host)


def stop_ranks() -> None:
    """Leaves the process group together, so that no rank's exit looks like a death to the others."""
    dist.barrier()
    dist.destroy_process_group()


def share(value: Any) -> Any:
    """Rank 0's value on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Every rank's value on every rank; also a barrier."""
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def gather_numbers(numbers: list[float], device: torch.device) -> list[list[float]]:
    """Every rank's numbers on every rank, in one exchange."""
    own = torch.tensor(numbers, dtype=torch.float64, device=device)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    rows: list[list[float]] = torch.stack(gathered).tolist()
    return rows


class _Chatter(io.TextIOBase):
    """A log file nobody's training depends on: what a full disk does not take is lost."""

    def __init__(self, file: Path) -> None:
        self._stream: TextIO | None = None
        with contextlib.suppress(OSError):
            self._stream = file.open("a", encoding="utf-8", buffering=1)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            if self._stream:
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            if self._stream:
                self._stream.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            if self._stream:
                self._stream.close()


@contextlib.contextmanager
def chatter_to(file: Path) -> Iterator[io.TextIOBase]:
    """DeepSpeed's log lines and deprecation warnings go to a file instead of the console; yields the open file."""
    stream = _Chatter(file)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    library = logging.getLogger("DeepSpeed")
    library.handlers[:] = [handler]
    library.propagate = False

    def to_file(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        stream.write(warnings.formatwarning(message, category, filename, lineno))

    shown, warnings.showwarning = warnings.showwarning, to_file  # type: ignore[assignment]
    try:
        yield stream
    finally:
        warnings.showwarning = shown
        library.handlers[:] = [logging.NullHandler()]
        stream.close()


class TrainingEngine:
    """One model under DeepSpeed: micro-steps, optimizer steps, and the numbers that come out of them."""

    def __init__(self, plan: Plan, ranks: Ranks, chatter: io.TextIOBase | TextIO) -> None:
        """Builds the model on the CPU from the plan's seed, the same on every rank, and hands it to DeepSpeed.

        chatter: takes what DeepSpeed prints meanwhile.
        """
        import deepspeed

        torch.manual_seed(plan.options.get("seed"))
        model = GPT2(plan.model, recompute=plan.recompute, loss_chunk=plan.loss_chunk)
        if plan.profile.compile:
            # Block by block: all have one shape, so one translation serves them, and what stands around them stays
            # as it is: the chunked loss, and DeepSpeed's hooks on the gradients.
            for block in model.h:
                block.compile()
        self.plan = plan
        self.ranks = ranks
        self.skipped_steps = 0
        self.on_progress: Callable[[], None] = lambda: None
        """Told of each forward pass and each tensor saved: whoever watches for a rank that hangs."""
        config = plan.ds_config()
        # The learning rate is ours, step by step. Until the first step it must be 0: in 16 bits ZeRO-0 makes Adam's
        # moments by a step on zero gradients (unfused_optimizer.py:425), which would decay the weights.
        config["optimizer"]["params"]["lr"] = 0.0
        groups = parameter_groups(model, plan.profile.weight_decay)
        own_optimizer = None
        if plan.profile.eight_bit_states:
            own_optimizer = _eight_bit_adamw(groups, plan.profile)
            del config["optimizer"]
            config["zero_allow_untested_optimizer"] = True
        with contextlib.redirect_stdout(chatter):  # DeepSpeed prints as well as logs
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=model, model_parameters=groups, optimizer=own_optimizer, config=config
            )
        if plan.profile.zero_stage == 0 and plan.profile.dtype != "fp32":
            # That step must not count: Adam's bias correction would make the first real one a quarter smaller.
            for state in self.optimizer.optimizer.state.values():
                state["step"].zero_()
        # The only setting in which DeepSpeed itself steps on non-finite gradients (engine.py:3505).
        self.plain = plan.profile.zero_stage == 0 and plan.profile.dtype == "fp32"
        scaler = getattr(self.optimizer, "loss_scaler", None)
        if scaler is not None and hasattr(scaler, "raise_error_at_min_scale"):
            # Else a run in fp16 ends there (loss_scaler.py:225); what to do then is for the loop to say.
            scaler.raise_error_at_min_scale = False
        self.engine.train()

    @property
    def module(self) -> GPT2:
        """The model inside; under ZeRO-3 its parameters are gathered only while a forward runs."""
        module: GPT2 = self.engine.module
        return module

    def micro_step(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Forward and backward of one micro-batch (B, T); returns its mean loss, still on the device."""
        loss: Tensor = self.engine(ids, targets)
        # A loss that is not finite makes gradients that are none either, so that the step is left out.
        self.engine.backward(loss * torch.where(torch.isfinite(loss), 1.0, torch.nan))
        self.on_progress()
        return loss.detach()

    def end_micro_step(self) -> None:
        """Tells DeepSpeed that a micro-batch within the accumulation window is done."""
        self.engine.step()

    def optimizer_step(self, lr: float) -> tuple[float, bool]:
        """Steps at this learning rate; returns (gradient norm before clipping, whether the step was taken).

        A step with a non-finite gradient anywhere is left out on every rank.
        """
        self.set_rate(lr)
        if self.plain:
            return self._plain_step()
        skipped_before = self.engine.skipped_steps
        self.engine.step()
        taken = self.engine.skipped_steps == skipped_before
        self.skipped_steps += not taken
        norm = float(self.engine.get_global_grad_norm())
        if self.plan.profile.zero_stage == 0 and self.loss_scale:
            norm /= self.loss_scale  # left in by this one (unfused_optimizer.py:224)
        return norm, taken

    @property
    def stepping_optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers that step: DeepSpeed's wrappers have one inside, and with part of it offloaded two."""
        if self.plain:
            return [self.optimizer]
        inside = (self.optimizer.optimizer, getattr(self.optimizer, "backup_optimizer", None))
        return [optimizer for optimizer in inside if optimizer is not None]

    def set_rate(self, lr: float) -> None:
        """The learning rate of the next step."""
        for optimizer in self.stepping_optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr

    def _plain_step(self) -> tuple[float, bool]:
        gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients))
        taken = math.isfinite(norm)
        if not taken:
            # For this once; the engine still counts the step and drops the gradients.
            self.optimizer.step = lambda: None
        self.engine.step()
        if not taken:
            del self.optimizer.step
        self.skipped_steps += not taken
        return norm, taken

    @property
    def loss_scale(self) -> float | None:
        """fp16's current loss scale; None in other dtypes."""
        return float(self.optimizer.loss_scale) if self.plan.profile.dtype == "fp16" else None

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Forward passes only, without dropout."""
        self.engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.engine.train()

    def loss_of(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of (B, T) without gradients; every rank must call this equally often under ZeRO-3."""
        loss: Tensor = self.engine(ids, targets)
        self.on_progress()
        return loss

    def last_logits(self, ids: Tensor) -> Tensor:
        """Logits (B, 1, V) of the next token; every rank must call this equally often under ZeRO-3."""
        logits: Tensor = self.engine(ids, last_only=True)
        self.on_progress()
        return logits

    def weight_specs(self) -> list[TensorSpec]:
        """Names, types and shapes of what `gathered_weights` yields, in its order."""
        return [
            TensorSpec(name, parameter.dtype, tuple(getattr(parameter, "ds_shape", parameter.shape)))
            for name, parameter in self.module.named_parameters()
        ]

    def gathered_weights(self) -> Iterator[tuple[str, Tensor | None]]:
        """The weights in the compute dtype one after the other on rank 0 (None elsewhere); called by all ranks.

        Under ZeRO-3 each is gathered for as long as it is looked at.
        """
        import deepspeed

        for name, parameter in self.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.plan.profile.zero_stage == 3):
                yield name, parameter.detach() if self.ranks.rank == 0 else None

    def memory(self) -> tuple[int, int | None]:
        """(bytes in use at the peak, bytes reserved) of this rank: CUDA's allocator, or the resident size on a CPU."""
        if self.ranks.device.type == "cuda":
            return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        import psutil

        return psutil.Process().memory_info().rss, None


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for AdamW: matrices decay, vectors (biases and norms) do not, as in GPT-3 and after.

    The tied head is one parameter and stands in one group.
    """
    matrices = [parameter for parameter in model.parameters() if _dimensions(parameter) >= 2]
    vectors = [parameter for parameter in model.parameters() if _dimensions(parameter) < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _eight_bit_adamw(groups: list[dict[str, Any]], profile: DsProfile) -> torch.optim.Optimizer:
    with warnings.catch_warnings():  # it names kernels for other uses that it does not find
        warnings.simplefilter("ignore")
        import bitsandbytes
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
        groups, lr=0.0, betas=profile.betas, eps=profile.eps, weight_decay=profile.weight_decay
    )
    return optimizer


def _dimensions(parameter: nn.Parameter) -> int:
    # Under zero.Init a parameter is an empty vector, and its true shape stands beside it.
    return len(getattr(parameter, "ds_shape", parameter.shape))
