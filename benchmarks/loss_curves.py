"""Loss curves in bf16 of every memory technique beside plain training, on one data order, and of other data orders.

    python benchmarks/loss_curves.py FOLDER_OF_SHARDS [--steps 200] [--only NAME ...]

Each run is a fresh process on a core of its own (one run is two ranks on two) that trains gpt2_tiny at a context of 256
from the same weights; a technique may move the curve no further than another data order does. States in 16 and 8 bits
are reported for themselves: they change what the optimizer knows. The runs take about 15 minutes on two cores.
"""

import argparse
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt2ds.devices import free_port, this_machine

RESULTS = Path(__file__).parent / "results"
PROFILES = Path(__file__).parent.parent / "ds_configs"

SEQUENCES, CONTEXT = 2, 256
PEAK_LR, WARMUP_STEPS = 1e-3, 20
SMOOTHED_STEPS = 20

SIXTEEN_BITS = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}

Curve = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One training run: what differs from the plain one."""

    profile: str = "zero0"
    recompute: str = "none"
    loss_chunk: int = SEQUENCES * CONTEXT
    accumulation: int = 1
    ranks: int = 1
    data_seed: int = 1
    bf16: dict[str, bool] = field(default_factory=lambda: {"enabled": True})
    eight_bit_states: bool = False


# A chunk of 100 leaves tokens over, and with accumulation 2 the gradients are summed in fp32.
TECHNIQUES = {
    **{
        f"recompute {policy}, chunk 100": Run(recompute=policy, loss_chunk=100)
        for policy in ("products", "alternate", "narrow", "attention", "full")
    },
    "ZeRO-1": Run(profile="zero1", accumulation=2, loss_chunk=100),
    "ZeRO-2": Run(profile="zero2", accumulation=2, loss_chunk=100),
    "ZeRO-3": Run(profile="zero3", accumulation=2, loss_chunk=100, recompute="full"),
    "ZeRO-2, 2 ranks": Run(profile="zero2", ranks=2, loss_chunk=100),
    "ZeRO-2, optimizer offload": Run(profile="zero2_offload", accumulation=2, loss_chunk=100, recompute="full"),
    "ZeRO-3, optimizer and parameter offload": Run(
        profile="zero3_offload", accumulation=2, loss_chunk=100, recompute="full"
    ),
}
DATA_ORDERS = {"second data order": Run(data_seed=2), "third data order": Run(data_seed=3)}
SMALL_STATES = {
    "states in 16 bits": Run(profile="zero2", bf16=SIXTEEN_BITS),
    "states in 8 bits": Run(profile="zero2", eight_bit_states=True),
}
RUNS = {"plain": Run()} | TECHNIQUES | DATA_ORDERS | SMALL_STATES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="what `gpt2ds prepare` wrote")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", nargs="+", choices=[name for name in RUNS if name != "plain"], metavar="NAME")
    # This process is a rank of the run that this folder describes.
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        os.sched_setaffinity(0, {arguments.core})
        train(arguments.rank, arguments.data, arguments.steps)
        return
    names = ["plain", *(arguments.only or [name for name in RUNS if name != "plain"])]
    curves: dict[str, Curve] = {}
    left_out: dict[str, str] = {}
    chosen: list[str] = []
    for name in names:
        if RUNS[name].eight_bit_states and not _can_import("bitsandbytes"):
            left_out[name] = "bitsandbytes is not installed"
            continue
        chosen.append(name)
    # One run to a core: threads of one run that wait for each other would lose more on a busy machine.
    free = sorted(os.sched_getaffinity(0))
    waiting = sorted(chosen, key=lambda name: -RUNS[name].ranks)
    while waiting:
        together = [waiting.pop(0)]
        while waiting and sum(RUNS[name].ranks for name in together) + RUNS[waiting[0]].ranks <= len(free):
            together.append(waiting.pop(0))
        curves |= in_fresh_processes(together, arguments.data, arguments.steps, free)
    curves = {name: curves[name] for name in chosen}
    result = described(curves, left_out, arguments.data, arguments.steps)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "loss_curves.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(curves, RESULTS / "loss_curves.png")


def in_fresh_processes(names: list[str], data: Path, steps: int, cores: list[int]) -> dict[str, Curve]:
    """Runs side by side, a core for each rank: the loss of every step of each, the mean over its ranks."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        ranks: list[tuple[subprocess.Popen[bytes], Path]] = []
        for number, name in enumerate(names):
            run, folder = RUNS[name], Path(work, str(number))
            folder.mkdir()
            (folder / "run.json").write_text(json.dumps(asdict(run)), encoding="utf-8")
            rendezvous = {"WORLD_SIZE": str(run.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            for rank in range(run.ranks):
                command = [sys.executable, __file__, str(data), "--steps", str(steps), "--rank", str(folder)]
                command += ["--core", str(cores[len(ranks) % len(cores)])]
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
                log = folder / f"{rank}.log"
                with log.open("w") as file:
                    process = subprocess.Popen(command, env=os.environ | rendezvous | own, stdout=file, stderr=file)
                ranks.append((process, log))
        for process, log in ranks:
            if process.wait():
                sys.exit(log.read_text(encoding="utf-8"))
        curves = {}
        for number, name in enumerate(names):
            losses = [np.loadtxt(path) for path in sorted(Path(work, str(number)).glob("*.txt"))]
            curves[name] = np.asarray(np.mean(losses, axis=0), dtype=np.float64)
    for name, curve in curves.items():
        end = statistics.fmean(curve[-SMOOTHED_STEPS:])
        print(f"{name:40} {end:.4f} at the end, {time.perf_counter() - start:.0f} s", flush=True)
    return curves


def train(folder: Path, data: Path, steps: int) -> None:
    """One rank of a run: writes its loss of every step to <rank>.txt."""
    from gpt2ds.corpus.batches import Batches, Windows
    from gpt2ds.options import TrainOptions
    from gpt2ds.planning import resolve
    from gpt2ds.training.engine import TrainingEngine, start_ranks, stop_ranks
    from gpt2ds.training.evaluation import to_device

    run = Run(**json.loads((folder / "run.json").read_text(encoding="utf-8")))
    # Written by every rank under its own name: they start at the same time.
    path = folder / f"profile{os.environ['RANK']}.json"
    path.write_text(json.dumps(profile_of(run)), encoding="utf-8")
    options = TrainOptions(ds=str(path), model="gpt2_tiny", data=data, context=CONTEXT, steps=steps, out=folder)
    plan = resolve(options, ranks=run.ranks)
    ranks = start_ranks(plan.device_kind)
    engine = TrainingEngine(plan, ranks, io.StringIO())
    batches = Batches(
        Windows(plan.corpus.train, plan.context),
        global_batch=plan.global_batch,
        micro_batch=plan.micro_batch,
        rank=ranks.rank,
        ranks=ranks.world_size,
        seed=run.data_seed,
    )
    losses = []
    for step in range(steps):
        loss = 0.0
        for number, window in enumerate(batches.micro_batches(step * plan.global_batch)):
            if number:
                engine.end_micro_step()
            loss += float(engine.micro_step(*to_device(window, ranks.device)))
        losses.append(loss / plan.accumulation)
        engine.optimizer_step(PEAK_LR * min(1.0, (step + 1) / WARMUP_STEPS))
    np.savetxt(folder / f"{ranks.rank}.txt", losses)
    stop_ranks()


def profile_of(run: Run) -> dict[str, Any]:
    """The shipped profile that a run starts from, with its batch and its techniques."""
    shipped = "zero2" if run.profile == "zero0" else run.profile
    profile: dict[str, Any] = json.loads((PROFILES / f"{shipped}.json").read_text(encoding="utf-8"))
    profile.pop("activation_checkpointing", None)
    if run.profile == "zero0":
        del profile["zero_optimization"], profile["data_types"]
    elif run.bf16 == SIXTEEN_BITS:
        profile["data_types"] = {"grad_accum_dtype": "bf16"}
    return profile | {
        "bf16": profile["bf16"] | run.bf16,
        "train_micro_batch_size_per_gpu": SEQUENCES // (run.ranks * run.accumulation),
        "gradient_accumulation_steps": run.accumulation,
        "gpt2ds": {
            "recompute": run.recompute,
            "loss_chunk": run.loss_chunk,
            "eight_bit_states": run.eight_bit_states,
        },
    }


def smoothed(curve: Curve) -> Curve:
    """The mean of the last `SMOOTHED_STEPS` steps, from the first step that has so many."""
    return np.convolve(curve, np.full(SMOOTHED_STEPS, 1 / SMOOTHED_STEPS), mode="valid")


def described(curves: dict[str, Curve], left_out: dict[str, str], data: Path, steps: int) -> dict[str, Any]:
    """The result file: each curve's distance from the plain one."""
    plain = curves["plain"]
    rows: dict[str, dict[str, Any]] = {}
    for name, curve in curves.items():
        distance, smooth = np.abs(curve - plain), np.abs(smoothed(curve) - smoothed(plain))
        rows[name] = {
            "settings": asdict(RUNS[name]),
            "first_loss": round(float(curve[0]), 5),
            "final_loss": round(float(smoothed(curve)[-1]), 5),
            "difference_mean": round(float(distance.mean()), 6),
            "difference_max": round(float(distance.max()), 6),
            "smoothed_difference_mean": round(float(smooth.mean()), 6),
            "smoothed_difference_max": round(float(smooth.max()), 6),
            "smoothed_losses_every_20_steps": [round(float(loss), 4) for loss in smoothed(curve)[::20]],
        }
    techniques = [rows[name] for name in TECHNIQUES if name in rows]
    orders = [rows[name] for name in DATA_ORDERS if name in rows]
    machine = this_machine()
    corpus = json.loads((data / "corpus.json").read_text(encoding="utf-8"))
    return {
        "what": "training loss in bf16 of each memory technique against plain training (no ZeRO, no recomputation, one "
        "chunk), and of plain training on two other data orders",
        "machine": {"cpu": machine.cpu_name, "cores": machine.cores, "gpu": None},
        "versions": {"python": platform.python_version()}
        | {package: _version(package) for package in ("torch", "deepspeed", "bitsandbytes") if _can_import(package)},
        "model": "gpt2_tiny",
        "context": CONTEXT,
        "sequences_per_step": SEQUENCES,
        "steps": steps,
        "learning_rate": PEAK_LR,
        "warmup_steps": WARMUP_STEPS,
        "data_digest": corpus.get("digest"),
        "smoothed_over_steps": SMOOTHED_STEPS,
        "techniques_smoothed_difference_max": max((row["smoothed_difference_max"] for row in techniques), default=None),
        "data_orders_smoothed_difference_max": [row["smoothed_difference_max"] for row in orders],
        "final_loss_fp32_states": rows["ZeRO-2" if "ZeRO-2" in rows else "plain"]["final_loss"],
        "final_loss_small_states": {name: rows[name]["final_loss"] for name in SMALL_STATES if name in rows},
        "left_out": left_out,
        "runs": rows,
    }


def draw(curves: dict[str, Curve], path: Path) -> None:
    """Distances from the plain curve over the steps, with those of the other data orders as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plain = smoothed(curves["plain"])
    steps = np.arange(SMOOTHED_STEPS, SMOOTHED_STEPS + len(plain))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 6), layout="constrained")
    orders = [np.abs(smoothed(curves[name]) - plain) for name in DATA_ORDERS if name in curves]
    if orders:
        left.fill_between(steps, 1e-6, np.max(orders, axis=0), color="0.85", label="two other data orders")
    shown: dict[bytes, list[str]] = {}
    for name in TECHNIQUES:
        if name in curves:
            shown.setdefault(curves[name].tobytes(), []).append(name)
    for number, names in enumerate(shown.values()):  # equal to the last bit: one line
        distance = np.maximum(np.abs(smoothed(curves[names[0]]) - plain), 1e-6)
        left.plot(steps, distance, linewidth=1, color=f"C{number}", label="\n".join(names))
    left.set(yscale="log", title="techniques: the same training up to rounding", ylabel="|loss - plain loss|, nats")
    for name in DATA_ORDERS | SMALL_STATES:
        if name in curves:
            style = {"color": "0.7", "linewidth": 1} if name in DATA_ORDERS else {"linewidth": 1.5}
            right.plot(steps, smoothed(curves[name]) - plain, label=name, **style)
    right.axhline(0, color="0.3", linewidth=0.8)
    right.set(title="states in fewer bits: another optimizer", ylabel="loss - plain loss, nats")
    for axes in (left, right):
        axes.set_xlabel(f"step (mean of the last {SMOOTHED_STEPS})")
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
    figure.savefig(path, dpi=130)


def _can_import(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


if __name__ == "__main__":
    main()
