"""Predicted and measured GPU memory over a grid: model sizes x profiles x recompute policies x micro-batches.

    python benchmarks/memory_accuracy.py --dry-run      # the settings and their predictions; needs no GPU
    python benchmarks/memory_accuracy.py --minutes 9    # on a CUDA machine; the same command again goes on from there
    python benchmarks/memory_accuracy.py --minutes 0    # only the summary and the picture of what has been measured

Each setting is a `gpt2ds bench` of its own: three real optimizer steps in a fresh process, under the cap of a 24 GB
card (23,700 MiB to reserve), also on a bigger one. For every profile its largest predicted micro-batch comes first,
then 1.1 times that, which should not run, then the grid, in an order in which each setting brings the most that is new.
Appends every result to memory_accuracy.jsonl in --out (benchmarks/results), and writes memory_accuracy.json and .png
there at the end. So that a bigger card can stand in for a 24 GB one, cuBLAS's workspace and flash attention are set as
they are there (STAND_IN). A setting takes 20 to 60 seconds (a guess), so the whole grid takes hours; each call adds to
what there is.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from memory_accuracy_grid import ACCUMULATION, SIZES, Setting, settings
from memory_accuracy_report import is_final, read, summary, table, write_plot

from gpt2ds.devices import CONTEXT_BYTES, NCCL_BYTES, card_bytes, prepare_cuda, this_machine
from gpt2ds.errors import UserError
from gpt2ds.files import write_atomically
from gpt2ds.memory.formula import MIB
from gpt2ds.probe.bench import run_bench
from gpt2ds.probe.bench_settings import BenchOptions

NAME = "memory_accuracy"
RESULTS = Path(__file__).parent / "results"
STEPS = 1  # after the two that bench leaves out: memory repeats from the second step on

# On H100 and H200 cuBLAS takes 32 MiB a thread instead of 8, and attention goes to cuDNN instead of flash
# (PyTorch, aten/src/ATen/cuda/CublasHandlePool.cpp and aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
STAND_IN = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:2:16:8",
    # One switch by its older and its present name (PyTorch, sdp_utils.cpp).
    "TORCH_CUDNN_SDPA_PREFERRED": "0",
    "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",
}


def measure(setting: Setting, options: BenchOptions, folder: Path) -> dict[str, Any]:
    """One bench of one setting: its record, and what the bench says of machine and versions."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "bench"
        asked = replace(
            options,
            ds=(setting.profile,),
            model=setting.model,
            micro_batch=(setting.micro_batch,),
            recompute=(setting.recompute,),
            out=out,
        )
        try:
            bench, _ = run_bench(asked, lambda line: print(f"  {line}", flush=True))
        except UserError as error:
            print(f"  refused: {error}", flush=True)
            return {"record": {"result": "refused", "why": str(error)}}
        for log in out.glob("*.log"):  # of a setting that crashed, timed out or found no memory
            shutil.copy(log, folder / f"{NAME}_{setting.key.replace(' ', '_')}.log")
    record = bench["settings"][0]
    del record["ds_config"]  # a shipped profile
    about = {name: bench[name] for name in ("device", "versions", "ranks", "accumulation", "context", "measured_at")}
    return {"record": record, "about": about}


def run(wanted: list[Setting], arguments: argparse.Namespace) -> None:
    """Runs settings until all are done or the time is over; each result is on disk before the next begins."""
    path = arguments.out / f"{NAME}.jsonl"
    done = read(path)
    here = this_machine()
    device = here.gpus[0].name if here.gpus else here.cpu_name
    if others := {result["about"]["device"]["name"] for result in done.values() if "about" in result} - {device}:
        raise SystemExit(f"{path} holds results of {', '.join(others)}: name another folder with --out for {device}.")
    todo = [setting for setting in wanted if setting.key not in done or not is_final(done[setting.key])]
    options = BenchOptions(
        data=arguments.data,
        accumulation=ACCUMULATION,
        gpus=arguments.gpus,
        gpu_memory=None if arguments.rehearse else arguments.gpu_memory,
        steps=STEPS,
    )
    deadline = time.monotonic() + 60 * arguments.minutes
    slowest: dict[str, float] = {}
    with path.open("a+b") as file:
        if file.tell() and file.seek(-1, os.SEEK_END) >= 0 and file.read() != b"\n":
            file.write(b"\n")  # the last line was cut off
        for number, setting in enumerate(todo[: arguments.most], start=1):
            began = time.monotonic()
            left = deadline - began
            # The first one is tried whatever it takes: --minutes ends it, and nothing is known of it yet.
            if number > 1 and left < slowest.get(setting.model, max(slowest.values())):
                print(f"{len(todo) - number + 1} settings are left for another time: the same command goes on.")
                return
            print(f"[{number}/{len(todo)}] {setting.key} ({setting.role})", flush=True)
            result = measure(setting, replace(options, timeout_seconds=min(left, arguments.timeout)), arguments.out)
            slowest[setting.model] = max(slowest.get(setting.model, 0.0), time.monotonic() - began)
            predicted = setting.predicted(options.gpus)
            about_setting = {"key": setting.key, "role": setting.role, "rehearsal": arguments.rehearse}
            line = about_setting | {"predicted_bytes": predicted.peak_bytes, "phase": predicted.phase} | result
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def room(gpu_memory_gb: float, gpus: int, free_bytes: int | None = None) -> int:
    """What torch may reserve on each card: the cap, or less where the card has less to give."""
    most = card_bytes(gpu_memory_gb)
    if free_bytes is not None:
        most = min(most, free_bytes - CONTEXT_BYTES)
    return most - (NCCL_BYTES if gpus > 1 else 0)


def rehearsal() -> list[Setting]:
    """gpt2_tiny on a CPU: every part of the way but CUDA."""
    return [
        Setting(model="gpt2_tiny", profile=profile, recompute=recompute, micro_batch=2, role=role)
        for profile, recompute, role in (
            ("zero2", "none", "largest"),
            ("zero1", "full", "grid"),
            ("zero3", "none", "grid"),
        )
    ]


def list_settings(todo: list[Setting], ranks: int, room_bytes: int) -> None:
    """For --dry-run."""
    print(f"{len(todo)} settings of a GPU that can reserve {room_bytes / MIB:,.0f} MiB; predicted, not measured:")
    for number, setting in enumerate(todo, start=1):
        estimate = setting.predicted(ranks)
        over = " (above all that can be reserved)" if estimate.peak_bytes > room_bytes else ""
        print(
            f"{number:4} {setting.role:8} {setting.model:12} {setting.profile:28} {setting.recompute:10}"
            f"{setting.micro_batch:5} {estimate.peak_bytes / MIB:10,.0f} MiB at {estimate.phase}{over}"
        )


def write_report(arguments: argparse.Namespace) -> None:
    """memory_accuracy.json and .png of all that has been measured, and the tables on the terminal."""
    folder: Path = arguments.out
    results = list(read(folder / f"{NAME}.jsonl").values())
    if not results:
        print("Nothing has been measured yet.")
        return
    about: dict[str, Any] = next((result["about"] for result in results if "about" in result), {})
    room_bytes = room(arguments.gpu_memory, arguments.gpus)
    if about and not arguments.rehearse:
        room_bytes = about["device"]["usable_bytes"]
    report = {
        "what": "REHEARSAL: resident memory of processes on a CPU beside a prediction for GPUs, which must differ"
        if arguments.rehearse
        else "GPU memory predicted by the formula and measured by torch's allocator over real training steps",
        "rehearsal": arguments.rehearse,
        "gpu_memory_gb": arguments.gpu_memory,
        "room_mib": round(room_bytes / MIB),
        "environment": {name: os.environ.get(name) for name in STAND_IN},
        **about,
        **summary(results),
    }
    write_atomically(folder / f"{NAME}.json", (json.dumps(report, indent=1) + "\n").encode())
    write_plot(report, folder / f"{NAME}.png")
    print(table(report))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="stop in time; 0 only reports (default 9)")
    parser.add_argument("--gpu-memory", type=float, default=24.0, metavar="GB", help="the card to be (default 24)")
    parser.add_argument("--gpus", type=int, default=1, help="ranks of each setting (default 1)")
    parser.add_argument("--models", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument("--profiles", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--most", type=int, help="at most so many settings now")
    parser.add_argument("--data", type=Path, help="shards (default: the text that is on the machine)")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="SECONDS", help="of one setting (default 300)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results")
    parser.add_argument("--dry-run", action="store_true", help="list the settings and their predictions")
    parser.add_argument("--rehearse", action="store_true", help="gpt2_tiny on the CPU through all of it; needs --out")
    arguments = parser.parse_args()
    if arguments.rehearse and arguments.out is None:
        parser.error("--rehearse measures nothing of interest: name a folder for it with --out.")
    arguments.out = arguments.out or RESULTS
    prepare_cuda()
    for name, value in STAND_IN.items():
        os.environ.setdefault(name, value)
    gpus = this_machine().gpus[: arguments.gpus]
    if arguments.minutes > 0 and not (gpus or arguments.rehearse or arguments.dry_run):
        parser.error("there is no CUDA GPU that torch can use here; --dry-run lists what would be measured on one.")
    room_bytes = room(arguments.gpu_memory, arguments.gpus, min((gpu.free_bytes for gpu in gpus), default=None))
    wanted = rehearsal() if arguments.rehearse else settings(room_bytes, arguments.gpus)
    wanted = [
        setting
        for setting in wanted
        if (arguments.rehearse or setting.model in arguments.models)
        and setting.profile in (arguments.profiles or [setting.profile])
    ]
    if arguments.dry_run:
        list_settings(wanted, arguments.gpus, room_bytes)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        if arguments.minutes > 0:
            run(wanted, arguments)
    finally:  # also after Ctrl-C
        write_report(arguments)


if __name__ == "__main__":
    main()
