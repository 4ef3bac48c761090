"""How long a checkpoint stalls training and a resume takes, beside torch.save and torch.load of the same bytes.

    python benchmarks/checkpoint_time.py [--model gpt2_small] [--repeats 5] [--folder FOLDER]

ZeRO-2 in bf16 (zero2.json) on this machine's CPUs, with 1 rank and with 2. In each repetition come, in a drawn order
and each after the disk has come to rest: our checkpoint; torch.save of the same tensors by the same ranks; torch.save
with what ours does beyond it, fsync and sha256. Resuming likewise, from the page cache and from the disk: ours (verify,
load, weights made anew), torch.load(weights_only=True), that with sha256. FOLDER must be on the disk to be measured.
Where others use the machine, the processors' seconds compare better than the clock's.
"""

import argparse
import io
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt2ds.devices import free_port, this_machine
from gpt2ds.files import file_sha256

RESULTS = Path(__file__).parent / "results"
KEY = "RESULTS "

# By what was done and by whom: each time's seconds and processors' seconds.
Seconds = dict[str, dict[str, list[tuple[float, float]]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2_small")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        measure(arguments.model, arguments.repeats, arguments.folder)
        return
    machine = this_machine()
    result: dict[str, Any] = {
        "what": "seconds until all ranks are done, medians and ranges: the same bytes, ranks and disk",
        "model": arguments.model,
        "profile": "zero2 (bf16), CPU",
        "machine": {"cpu": machine.cpu_name, "cores": machine.cores, "gpu": None},
        "python": platform.python_version(),
        "repeats": arguments.repeats,
        "load_average": os.getloadavg()[0],
        "ranks": {},
    }
    for ranks in (1, 2):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            result["ranks"][ranks] = run_ranks(ranks, arguments, folder)
    result["load_average_after"] = os.getloadavg()[0]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "checkpoint_time.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def run_ranks(ranks: int, arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    """This file as each rank of a group; what rank 0 found."""
    rendezvous = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, __file__, "--model", arguments.model, "--repeats", str(arguments.repeats)]
    processes = [
        subprocess.Popen(
            [*command, "--folder", folder],
            env=os.environ | rendezvous | {"RANK": str(rank), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"},
            stdout=subprocess.PIPE if rank == 0 else None,
            text=True,
        )
        for rank in range(ranks)
    ]
    found: dict[str, Any] = {}
    for line in processes[0].stdout or ():
        if line.startswith(KEY):
            found = json.loads(line.removeprefix(KEY))
        else:
            print(line, end="", flush=True)
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit("a rank failed")
    return found


def measure(model: str, repeats: int, folder: Path) -> None:
    """One rank; rank 0 prints what was found."""
    import numpy as np
    import torch
    import torch.distributed as dist

    from gpt2ds.corpus.shards import header
    from gpt2ds.options import TrainOptions
    from gpt2ds.planning import resolve
    from gpt2ds.training import checkpoints
    from gpt2ds.training.engine import TrainingEngine, share, start_ranks, stop_ranks
    from gpt2ds.training.manifest import verify
    from gpt2ds.training.restoring import load
    from gpt2ds.training.states import KINDS, MOMENTS, OptimizerStates

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    data = folder / f"data-{rank}"  # checkpoints do not depend on it
    data.mkdir()
    for split in ("val", "train"):
        content = np.zeros(100_000, dtype="<u2").tobytes()
        (data / f"zeros_{split}_000000.bin").write_bytes(header(100_000) + content)
    options = TrainOptions(
        ds="zero2", model=model, data=data, out=folder, name="a", micro_batch=1, accumulation=1, steps=10, keep=1
    )
    plan = resolve(options, ranks=world)
    ranks = start_ranks("cpu")
    engine = TrainingEngine(plan, ranks, io.StringIO())
    states = OptimizerStates(engine)
    states.prepare()
    with torch.no_grad():
        for tile in states.tiles:
            with states.open(tile):
                for fragment in tile.fragments:
                    for kind in MOMENTS:
                        states.piece(tile, kind, fragment).normal_().abs_()
    saved, plain = folder / "checkpoints", folder / f"plain-{rank}"
    plain.mkdir()

    def ours() -> None:
        checkpoints.save(engine, saved, position_of(1), 1, {})

    def plain_files() -> list[Path]:
        return sorted(plain.glob("*.pt"))

    def torch_save() -> None:
        for tile in states.tiles:
            with states.open(tile):
                pieces = {
                    (kind, fragment.parameter): states.piece(tile, kind, fragment)
                    for kind in KINDS
                    for fragment in tile.fragments
                }
                torch.save(pieces, plain / f"{tile.number}.pt")
        if rank == 0:
            torch.save(dict(engine.gathered_weights()), plain / "model.pt")

    def torch_save_safely() -> None:
        torch_save()
        for path in plain_files():
            with path.open("rb") as file:
                os.fsync(file.fileno())
            file_sha256(path)

    def torch_load() -> None:
        for path in plain_files():
            if path.name != "model.pt":  # a resume needs no weights in the compute type
                torch.load(path, weights_only=True)

    def torch_load_safely() -> None:
        for path in plain_files():
            file_sha256(path)
        torch_load()

    def timed(function: Callable[[], Any]) -> tuple[float, float]:
        """(seconds until all ranks are done, the processors' seconds of all ranks together)."""
        dist.barrier()
        start, worked = time.perf_counter(), time.process_time()
        function()
        cpu = torch.tensor(time.process_time() - worked, dtype=torch.float64)
        dist.all_reduce(cpu)
        return time.perf_counter() - start, float(cpu)

    def rest() -> None:
        os.sync()
        dist.barrier()

    def forget() -> None:
        """Takes the files out of the page cache."""
        for path in [*folder.rglob("*.safetensors"), *folder.rglob("*.pt")]:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        dist.barrier()

    saving = {"ours": ours, "torch_save": torch_save, "torch_save_fsync_sha256": torch_save_safely}
    loading: dict[str, Callable[[], Any]] = {
        "ours": lambda: load(engine, saved, print),
        "ours_verify": lambda: [verify(path) for path in saved.glob("step-*") if rank == 0],
        "torch_load": torch_load,
        "torch_load_sha256": torch_load_safely,
    }
    seconds: Seconds = {"save": {}, "resume_from_cache": {}, "resume_from_disk": {}}
    draw = random.Random(0)  # the same order on every rank
    sizes: dict[str, int] = {}
    for repeat in range(repeats + 1):  # the first one only warms up
        for name in draw.sample(sorted(saving), len(saving)):
            for path in plain_files():
                path.unlink()
            if rank == 0:
                shutil.rmtree(saved, ignore_errors=True)
            rest()
            taken = timed(saving[name])
            if repeat:
                seconds["save"].setdefault(name, []).append(taken)
            sizes[name] = sum(path.stat().st_size for path in [*folder.rglob("*.safetensors"), *folder.rglob("*.pt")])
            dist.barrier()
        ours()
        for path in plain_files():
            path.unlink()
        torch_save()
        rest()
        for place in ("resume_from_cache", "resume_from_disk"):
            names = sorted(loading) if place == "resume_from_cache" else ["ours", "torch_load"]
            for name in draw.sample(names, len(names)):
                if place == "resume_from_disk":
                    forget()
                taken = timed(loading[name])
                if repeat:
                    seconds[place].setdefault(name, []).append(taken)
        if rank == 0:
            so_far = {
                kind: {name: [round(each, 2) for each in column[-1]] for name, column in rows.items()}
                for kind, rows in seconds.items()
            }
            print(f"{world} ranks, {repeat} of {repeats}: {so_far}", flush=True)
    if rank == 0:
        print(KEY + json.dumps(summary(seconds, sizes)), flush=True)
    share(None)
    stop_ranks()


def position_of(step: int) -> Any:
    """A position of which nothing matters here."""
    from gpt2ds.training.manifest import Position

    return Position(
        step=step,
        sequences_seen=0,
        passed_over=[],
        elapsed_seconds=0.0,
        skipped_steps=0,
        returns=0,
        learning_rate={},
        evaluate_every=None,
        speed_measured=False,
        schedule={},
        evaluated_at=0,
        val_loss=None,
        losses=[],
    )


def summary(seconds: Seconds, sizes: dict[str, int]) -> dict[str, Any]:
    """Medians and ranges, and how ours compares with the median of what does the same by other means."""
    found: dict[str, Any] = {"bytes": sizes}
    for kind, columns in seconds.items():
        found[kind] = rows = {}
        for name, column in sorted(columns.items()):
            rows[name] = {
                "median": median(column, 0),
                "range": [round(min(column)[0], 3), round(max(column)[0], 3)],
                "cpu_median": median(column, 1),
            }
        for name in sorted(columns):
            if not name.startswith("ours"):
                for key, which in (("ours_over_this", 0), ("ours_over_this_cpu", 1)):
                    rows[name][key] = round(median(columns["ours"], which) / median(columns[name], which), 2)
    return found


def median(column: list[tuple[float, float]], which: int) -> float:
    """Of the seconds (0) or the processors' seconds (1)."""
    return round(statistics.median(each[which] for each in column), 3)


if __name__ == "__main__":
    main()
