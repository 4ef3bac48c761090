"""The trainer's own engine, DeepSpeed included, on meta tensors: what a GPU would hold, phase by phase, without a GPU.

`trace` starts a process of its own, because the trace needs torch and DeepSpeed to believe in a device that is not
there. Every stand-in that this takes is in this file. References are to deepspeed 0.19.8.
"""

import contextlib
import copy
import importlib
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from gpt2ds.ds_profile import load_profile
from gpt2ds.gpt2.config import GPT2Config
from gpt2ds.options import TrainOptions

if TYPE_CHECKING:
    from gpt2ds.probe.live import LiveBytes, PhasePeak
    from gpt2ds.training.engine import TrainingEngine


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceRequest:
    """What is traced: a model under a DeepSpeed configuration, seen from one rank."""

    model: GPT2Config
    ds_config: dict[str, Any]
    """As `DsProfile.ds_config` gives it: micro-batch and accumulation are read from it."""
    ranks: int = 1
    rank: int | None = None
    """None: the last one. It owns the layers whose gradients come first, and no other peaks higher where activations
    make the peak. Where they do not, under ZeRO-2 with fp32 sums, rank 0 may: it makes those of the token embedding, up
    to 4 bytes for each of its numbers.
    """
    recompute: str = "none"
    loss_chunk: int = 1024
    steps: int = 2
    """Optimizer steps; the first one makes Adam's moments, so that the steady state begins with the second."""
    device: str = "cuda"
    """Whose kernels and stream semantics are stood in for: "cuda", or "cpu" to compare with a real run on CPUs, where
    host tensors lie in the same memory and count as well.
    """
    hidden: bool = True
    """Whether what CUDA kernels allocate inside themselves counts (see live.HIDDEN_BYTES)."""
    log_events: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """One forward, backward or step of the steady state."""

    name: str
    peak_bytes: int
    operation: str
    """The operation at the peak."""
    after_bytes: int
    parts: dict[str, int]
    """What was live at the peak, by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """Live bytes of one rank's device over the last traced optimizer step. cuBLAS's workspaces are not in it."""

    peak_bytes: int
    phase: str
    parts: dict[str, int]
    phases: tuple[Phase, ...]
    events: tuple[tuple[int, int], ...]
    """For an allocator replay, from the very start: (number, bytes) at an allocation, (number, 0) when it is freed, and
    (0, 0) when the allocator's cache is emptied.
    """
    streams: dict[int, int]
    """The streams of those that are not allocated on the default one, by number."""


def trace(request: TraceRequest) -> Trace:
    """Traces in a process of its own; 5 to 40 seconds, a few hundred MB of host memory, no GPU.

    Raises RuntimeError with the end of that process's messages when it fails.
    """
    return trace_all([request])[0]


def trace_all(requests: Sequence[TraceRequest]) -> list[Trace]:
    """The same for several requests in one process, which saves its start of about 5 seconds for each.

    Their ranks, rank and device must be the same.
    """
    assert len({(request.ranks, request.rank, request.device) for request in requests}) == 1, requests
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    environment = {key: value for key, value in os.environ.items() if key != "LOCAL_SIZE"}
    done = subprocess.run(
        [sys.executable, "-m", "gpt2ds.probe.meta_engine"],
        input=json.dumps([asdict(request) for request in requests]),
        env=environment | {"PYTHONPATH": path, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the trace failed:\n{done.stderr[-4000:]}")
    return [_trace_of(result) for result in json.loads(done.stdout.splitlines()[-1])]


def _trace_of(result: dict[str, Any]) -> Trace:
    phases = tuple(Phase(**phase) for phase in result["phases"])
    peak = max(phases, key=lambda phase: phase.peak_bytes)
    return Trace(
        peak_bytes=peak.peak_bytes,
        phase=peak.name,
        parts=peak.parts,
        phases=phases,
        events=tuple((number, size) for number, size in result["events"]),
        streams={int(number): stream for number, stream in result["streams"].items()},
    )


# From here on everything runs in that other process.


def main() -> None:
    """Reads requests from standard input, writes the phases and events of each to standard output."""
    requests = [TraceRequest(**given | {"model": GPT2Config(**given["model"])}) for given in json.load(sys.stdin)]
    output = sys.stdout
    # Others print as well; the result must be the only line.
    sys.stdout = sys.stderr
    plans = [plan_of(request) for request in requests]
    adam = pretend(requests[0])
    results = [run(request, plan) for request, plan in zip(requests, plans, strict=True)]
    del adam
    print(json.dumps(results), file=output)


def run(request: TraceRequest, plan: Any) -> dict[str, Any]:
    """Builds the engine and trains it for the requested steps on meta tensors."""
    import torch
    from deepspeed.accelerator import get_accelerator
    from torch._subclasses.fake_tensor import FakeTensorMode

    from gpt2ds.probe.blocks import kernels_of
    from gpt2ds.probe.live import LiveBytes
    from gpt2ds.training import engine
    from gpt2ds.training.engine import Ranks, TrainingEngine

    cuda = request.device == "cuda"
    live = LiveBytes(device="meta" if cuda else None, hidden=request.hidden and cuda, log_events=request.log_events)
    accelerator = get_accelerator()
    accelerator.stream = lambda stream: live.on_stream(getattr(stream, "number", 0))
    accelerator.empty_cache = live.cache_emptied
    own_module: Any = engine
    own_module.GPT2 = meta_model(plan.profile.dtype)
    # Host tensors, where there are any, must not be real either: offloaded states of gpt2_xl take 30 GB. Fake tensors
    # have no values on any device, but double the time.
    host = plan.profile.zero_stage == 3 or plan.profile.offload_optimizer or request.recompute == "host"
    fake = FakeTensorMode(allow_non_fake_inputs=True) if host else contextlib.nullcontext()
    ranks = Ranks(rank=own_rank(request), world_size=request.ranks, local_rank=0, device=torch.device("meta"))
    with fake, kernels_of(request.device), live:
        live.begin("start-up", "made at start-up")
        trained = TrainingEngine(plan, ranks, io.StringIO())
        phases = train(trained, request, live)
    return {
        "phases": [asdict(phase) for phase in phases],
        "events": live.events or [],
        "streams": live.streams if live.events else {},
    }


def own_rank(request: TraceRequest) -> int:
    """The rank that is traced."""
    return request.ranks - 1 if request.rank is None else request.rank


def train(engine: "TrainingEngine", request: TraceRequest, live: "LiveBytes") -> list["PhasePeak"]:
    """Trains as the loop does, on tokens that are all 0; returns the phases of the last step.

    The engine may be a real one on CPUs.
    """
    for step in range(1, request.steps + 1):
        train_step(engine, request, live, f"step {step}")
        if step == 1:
            label_states(engine, live)
    return [phase for phase in live.finish() if phase.name.startswith(f"step {request.steps} ")]


def train_step(engine: "TrainingEngine", request: TraceRequest, live: "LiveBytes", name: str) -> None:
    """One optimizer step, a phase for each forward, backward and step."""
    import torch

    batch = request.ds_config["train_micro_batch_size_per_gpu"], request.model.context_length + 1
    for number in range(request.ds_config["gradient_accumulation_steps"]):
        if number:
            engine.end_micro_step()
        where = f"{name} micro-batch {number + 1}"
        live.begin(f"{where} forward", "made in forward")
        tokens = torch.zeros(*batch, dtype=torch.long, device=engine.ranks.device)
        ids, targets = tokens[:, :-1], tokens[:, 1:]
        backward = engine.engine.backward

        def marked(loss: Any, where: str = where, backward: Any = backward) -> Any:
            live.begin(f"{where} backward", "made in backward")
            return backward(loss)

        engine.engine.backward = marked
        engine.micro_step(ids, targets)
        engine.engine.backward = backward
    live.begin(f"{name} optimizer", "made in the step")
    engine.optimizer_step(1e-4)


def label_states(engine: "TrainingEngine", live: "LiveBytes") -> None:
    """Names what lives from step to step, so that the peak's parts can be told apart."""
    import torch

    adam = engine.optimizer
    while hasattr(adam, "optimizer"):
        adam = adam.optimizer
    live.label((parameter.data for group in adam.param_groups for parameter in group["params"]), "master weights")
    live.label((parameter.data for parameter in engine.module.parameters()), "weights")
    live.label((t for state in adam.state.values() for t in state.values() if isinstance(t, torch.Tensor)), "moments")


def plan_of(request: TraceRequest) -> Any:
    """What the engine reads of a plan; corpus, schedule and machine are of no concern to memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "traced.json"
        path.write_text(json.dumps(request.ds_config), encoding="utf-8")
        profile = load_profile(path)
    return SimpleNamespace(
        model=request.model,
        recompute=request.recompute,
        loss_chunk=request.loss_chunk,
        options=TrainOptions(),
        profile=replace(profile, compile=False),
        ds_config=lambda: copy.deepcopy(request.ds_config),
    )


def meta_model(dtype: str) -> Any:
    """The trainer's own model, but on meta and in the compute dtype from the start.

    A fake tensor's weights cannot be moved or converted in place, so the model's .to() does nothing.
    """
    from gpt2ds.gpt2.model import GPT2
    from gpt2ds.probe.blocks import built_on_meta

    class MetaGPT2(GPT2):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            with built_on_meta(dtype):
                super().__init__(*arguments, **named)

        def to(self, *_: Any, **__: Any) -> Any:
            return self

        half = bfloat16 = float = to

    return MetaGPT2


def pretend(request: TraceRequest) -> Any:
    """Changes this process for good: torch and DeepSpeed believe in ranks and a device. The result must be kept."""
    start_fake_ranks(own_rank(request), request.ranks)
    stand_in_for_a_device(request.device)
    ready_for_stage_3()
    answer_for_values()
    return stand_in_for_fused_adam()


def start_fake_ranks(rank: int, ranks: int) -> None:
    """A process group whose collectives return at once; only exchanges of Python objects need an answer."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK="0")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    dist.broadcast_object_list = lambda *_, **__: None


def ready_for_stage_3() -> None:
    """What ZeRO-3 asks beyond the accelerator: other ranks, and a device that autocast knows."""
    importlib.import_module("torch._dynamo")  # before ZeRO-3 wraps modules: its first import inside fails
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.runtime.zero import linear, partition_parameters, partitioned_param_coordinator, stage3

    # Every rank checks that it fetches the same parameters as rank 0; there is no rank 0 here.
    for module in (partition_parameters, partitioned_param_coordinator, stage3):
        module.assert_ints_same_as_other_ranks = lambda _: None
    # Autocast is not on; it is only asked whether it is.
    linear.get_accelerator = CPU_Accelerator


def stand_in_for_a_device(kind: str) -> None:
    """Makes "meta" DeepSpeed's accelerator, with CUDA's streams or, for "cpu", without."""
    import torch
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class Quiet:
        """A stream or an event on which nothing is ever pending."""

        numbers = itertools.count()

        def __init__(self, *_: Any, **__: Any) -> None:
            """Takes what a stream or an event takes; the first one, number 0, is the default stream."""
            self.number = next(self.numbers)

        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: self

    answers = {
        "is_synchronized_device": kind == "cpu",
        "device": torch.device("meta"),
        **dict.fromkeys(("device_name", "current_device", "current_device_name"), "meta"),
        **dict.fromkeys(("current_stream", "default_stream"), Quiet()),
        "device_count": 1,
        "communication_backend_name": "fake",
        "is_fp16_supported": True,
        "supported_dtypes": [torch.float32, torch.bfloat16, torch.float16],
        "is_pinned": True,
        **dict.fromkeys(("total_memory", "available_memory"), 1 << 40),
        **dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), 0),
        "reset_peak_memory_stats": None,
    }
    methods: dict[str, Any] = {name: lambda *_, value=value, **__: value for name, value in answers.items()}
    methods |= {"Stream": Quiet, "Event": Quiet}
    methods["on_accelerator"] = lambda _, tensor: tensor.device.type == "meta"
    methods["pin_memory"] = lambda _, tensor, *__, **___: tensor
    set_accelerator(type("MetaAccelerator", (CPU_Accelerator,), methods)())
    import deepspeed

    # An optional collective that would be compiled now.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def stand_in_for_fused_adam() -> Any:
    """Gives torch's own fused AdamW an operation on meta tensors: it works in place and without temporaries.

    The registration lives as long as the result.
    """
    import torch

    optimizer = importlib.import_module("torch.optim.optimizer")
    known = optimizer._get_fused_kernels_supported_devices()
    setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: [*known, "meta"])  # noqa: B010 (private)
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    for name in ("_fused_adam_", "_fused_adamw_"):
        library.impl(name, lambda *_, **__: None, "Meta")
    return library


def answer_for_values() -> None:
    """Answers where the program reads numbers out of tensors that have none; does nothing where it marks streams."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    from gpt2ds.probe.live import LiveBytes

    torch_module: Any = torch

    def replace(name: str, kind: Callable[[Any], Any] | None) -> None:
        real = getattr(torch.Tensor, name)

        def answered(tensor: torch.Tensor) -> Any:
            if tensor.device.type != "meta" and not isinstance(tensor, FakeTensor):
                return real(tensor)
            # Flags of something wrong are not set, norms and scales are 1.
            number = 0 if tensor.dtype in (torch.bool, torch.uint8) else 1
            return (kind or (float if tensor.is_floating_point() else int))(number)

        setattr(torch.Tensor, name, answered)

    for name, kind in (("item", None), ("__float__", float), ("__int__", int), ("__bool__", bool)):
        replace(name, kind)
    torch_module.Tensor.record_stream = lambda *_: None

    zeros_like = torch.zeros_like

    def without_shapes_only(*arguments: Any, **named: Any) -> torch.Tensor:
        # DeepSpeed's own meta tensors, of which it wants the shape (stage_1_and_2.py:485), take no memory.
        with LiveBytes.paused() if named.get("device") == "meta" else contextlib.nullcontext():
            return zeros_like(*arguments, **named)

    torch_module.zeros_like = without_shapes_only


if __name__ == "__main__":
    main()
