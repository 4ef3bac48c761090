"""The chunked loss beside DeepSpeed's, Liger's (CUDA) and all logits at once: time, peak memory, exactness.

    python benchmarks/loss_speed.py [--tokens 4096] [--rounds 3] [--chunk N]

gpt2_large's head (d = 1,280, V = 50,257), forward and backward, fp32 and bf16. Times are taken in turn in one process,
and compared round by round. The peak is what the pass takes beyond its inputs, gradients included: on CUDA by the
allocator, on a CPU by the kernel's own count of resident pages (VmHWM) in a fresh process per contender. About
10 minutes on two cores.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2ds.devices import this_machine
from gpt2ds.estimate.rows import LOSS_CHUNK
from gpt2ds.gpt2.config import MODELS
from gpt2ds.gpt2.loss import chunked_cross_entropy, whole_cross_entropy

RESULTS = Path(__file__).parent / "results"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH, VOCABULARY = MODELS["gpt2_large"].emb_dim, MODELS["gpt2_large"].vocab_size
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIB = 2**20

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def contenders(tokens: int, chunk: int) -> dict[str, Loss]:
    """The losses that can run here, each of (hidden (N, d), weight (V, d), targets (N))."""
    # So many tokens at a time are DeepSpeed's default: fp32 logits of the size of the hidden states.
    small = -(-tokens // -(-VOCABULARY // WIDTH))
    os.environ.setdefault("DS_ACCELERATOR", DEVICE)
    from deepspeed.sequence.linear_cross_entropy import vocab_parallel_linear_cross_entropy

    losses: dict[str, Loss] = {
        "gpt2ds": lambda hidden, weight, targets: chunked_cross_entropy(hidden, weight, targets, chunk),
        "gpt2ds, DeepSpeed's chunk": lambda hidden, weight, targets: chunked_cross_entropy(
            hidden, weight, targets, small
        ),
        "whole logits": whole_cross_entropy,
        "DeepSpeed": lambda hidden, weight, targets: vocab_parallel_linear_cross_entropy(hidden, weight, targets),
    }
    if DEVICE == "cuda" and find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # type: ignore[import-not-found]

        liger = LigerFusedLinearCrossEntropyLoss()
        losses["Liger"] = lambda hidden, weight, targets: liger(weight, hidden, targets)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=LOSS_CHUNK[DEVICE], help="of gpt2ds; default: %(default)s")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)  # contender and dtype, in this fresh process
    arguments = parser.parse_args()
    losses = contenders(arguments.tokens, arguments.chunk)
    if arguments.peak:
        name, dtype = arguments.peak
        print(peak_bytes(losses[name], DTYPES[dtype], arguments.tokens))
        return

    results: dict[str, dict[str, Any]] = {}
    reference = gradients_of(whole_cross_entropy, inputs(arguments.tokens, torch.float32))
    for dtype_name, dtype in DTYPES.items():
        given = inputs(arguments.tokens, dtype)
        rows: dict[str, Any] = {}
        for name, loss in losses.items():  # untimed: it also warms up
            differences = [relative(a, b) for a, b in zip(gradients_of(loss, given), reference, strict=True)]
            rows[name] = dict(zip(("loss", "grad_hidden", "grad_weight"), differences, strict=True))
        seconds: dict[str, list[float]] = {name: [] for name in losses}
        for round_ in range(arguments.rounds):
            for name, loss in losses.items():
                seconds[name].append(seconds_of(loss, given))
                print(f"{dtype_name} round {round_ + 1} {name:25} {seconds[name][-1]:.3f} s", flush=True)
        results[dtype_name] = {
            name: {
                "seconds": [round(second, 4) for second in seconds[name]],
                "times_whole": round(
                    statistics.median(
                        own / whole for own, whole in zip(seconds[name], seconds["whole logits"], strict=True)
                    ),
                    3,
                ),
                "difference_to_fp32_whole": {key: float(f"{value:.2e}") for key, value in rows[name].items()},
            }
            for name in losses
        }
        del given
    del reference
    for dtype_name, figures in results.items():
        for name in losses:
            peak = fresh_peak_bytes(name, dtype_name, arguments.tokens, arguments.chunk)
            figures[name]["peak_mib"] = round(peak / MIB, 1)
            print(
                f"{dtype_name} {name:25} {figures[name]['times_whole']:6.3f} of the time, "
                f"{figures[name]['peak_mib']:8.1f} MiB, {figures[name]['difference_to_fp32_whole']}"
            )

    machine = this_machine()
    packages = ["torch", "deepspeed", *(["liger-kernel"] if "Liger" in losses else [])]
    result = {
        "what": "cross-entropy of the tied head, forward and backward: seconds, peak bytes beyond the inputs (gradients"
        " included), and ||a-b||/||b|| against all logits in fp32",
        "machine": {
            "cpu": machine.cpu_name,
            "cores": machine.cores,
            "gpu": torch.cuda.get_device_name() if DEVICE == "cuda" else None,
        },
        "versions": {"python": platform.python_version()} | {package: version(package) for package in packages},
        "shape": {"tokens": arguments.tokens, "width": WIDTH, "vocabulary": VOCABULARY},
        "chunk_of_gpt2ds": arguments.chunk,
        "peak_by": "CUDA's allocator" if DEVICE == "cuda" else "resident pages (VmHWM) of a fresh process",
        "gradients_mib": {
            name: round((arguments.tokens + VOCABULARY) * WIDTH * dtype.itemsize / MIB, 1)
            for name, dtype in DTYPES.items()
        },
        "rounds": arguments.rounds,
        "contenders": results,
    }
    RESULTS.mkdir(exist_ok=True)
    suffix = "_cuda" if DEVICE == "cuda" else ""
    (RESULTS / f"loss_speed{suffix}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def inputs(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised hidden states, a weight as GPT-2 begins and targets; the same numbers in every dtype."""
    source = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, generator=source)
    weight = 0.02 * torch.randn(VOCABULARY, WIDTH, generator=source)
    targets = torch.randint(0, VOCABULARY, (tokens,), generator=source).to(DEVICE)
    hidden, weight = (tensor.bfloat16().to(DEVICE, dtype).requires_grad_() for tensor in (hidden, weight))
    return hidden, weight, targets


def gradients_of(loss: Loss, given: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Loss and gradients of hidden states and weight."""
    hidden, weight, targets = given
    hidden.grad = weight.grad = None
    value = loss(hidden, weight, targets)
    value.backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None and weight.grad is not None
    result = [value.detach(), hidden.grad, weight.grad]
    hidden.grad = weight.grad = None
    return result


def seconds_of(loss: Loss, given: tuple[Tensor, Tensor, Tensor]) -> float:
    """One forward and backward pass."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    gradients_of(loss, given)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def relative(a: Tensor, b: Tensor) -> float:
    """||a-b||/||b||, summed in fp64: over 64 million numbers a sum in fp32 would be wrong itself."""
    difference = torch.sub(a, b).flatten()
    return float(torch.linalg.vector_norm(difference, dtype=torch.float64)) / float(
        torch.linalg.vector_norm(b.flatten(), dtype=torch.float64)
    )


def peak_bytes(loss: Loss, dtype: torch.dtype, tokens: int) -> int:
    """The most memory of one pass beyond its inputs, in a process that has done nothing else yet."""
    gradients_of(loss, inputs(64, dtype))  # loads kernels and starts threads
    given = inputs(tokens, dtype)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients_of(loss, given)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins again from here
    before = _resident("VmRSS")
    gradients_of(loss, given)
    return _resident("VmHWM") - before


def fresh_peak_bytes(name: str, dtype: str, tokens: int, chunk: int) -> int:
    """`peak_bytes` in a process of its own."""
    command = [sys.executable, __file__, "--peak", name, dtype, "--tokens", str(tokens), "--chunk", str(chunk)]
    # Every larger block is mapped and unmapped by itself: resident pages are then what is in use.
    exact = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
    printed = subprocess.run(command, env=os.environ | exact, check=True, capture_output=True, text=True).stdout
    return int(printed.strip().splitlines()[-1])


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
