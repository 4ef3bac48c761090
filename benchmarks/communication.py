"""What ranks send each other in one optimizer step, by ZeRO stage and accumulation: bytes per parameter, as DeepSpeed's
own communication log counts them.

    python benchmarks/communication.py [--model gpt2_tiny] [--accumulations 1 4 8]

Two ranks on this machine's CPUs, bf16 with fp32 accumulation. Counted is the size of each collective's tensor; a ring
all-reduce moves twice (R-1)/R of it through every link, a gather or scatter once.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gpt2ds.devices import free_port, this_machine
from gpt2ds.ds_profile import load_profile
from gpt2ds.options import TrainOptions
from gpt2ds.planning import resolve

RESULTS = Path(__file__).parent / "results"
RANKS = 2


def one_rank(profile: str, model: str, accumulation: int) -> None:
    """Two optimizer steps on one of the ranks; rank 0 prints the second one's bytes per parameter."""
    import deepspeed.comm.comm as communication
    import torch

    from gpt2ds.training.engine import TrainingEngine, start_ranks

    ranks = start_ranks("cpu")
    options = TrainOptions(ds=profile, model=model, micro_batch=1, accumulation=accumulation)
    plan = resolve(options, ranks=RANKS, only_measured=True)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        engine = TrainingEngine(plan, ranks, nowhere)
    ids = torch.randint(0, plan.model.vocab_size, (1, plan.context))
    for step in range(2):
        communication.comms_logger.comms_dict.clear()
        communication.configure(enabled=step == 1, prof_all=True, verbose=False)
        for number in range(accumulation):
            if number:
                engine.end_micro_step()
            engine.micro_step(ids, ids)
        engine.optimizer_step(1e-3)
    sent: dict[str, float] = {}
    for name, sizes in communication.comms_logger.comms_dict.items():
        operation = name.partition(" ")[0]
        total = sum(size * entry[0] for size, entry in sizes.items())
        sent[operation] = sent.get(operation, 0.0) + total / plan.model.parameters
    if ranks.rank == 0:
        print(json.dumps(sent))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort a finished rank on the usual way out


def measure(profile: str, model: str, accumulation: int) -> dict[str, float]:
    """Bytes per parameter and step by collective, from RANKS fresh processes."""
    group = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = os.environ | group | {"DS_ACCELERATOR": "cpu", "LOCAL_WORLD_SIZE": str(RANKS)}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank-of", profile, "--model", model, "--accumulations", str(accumulation)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(RANKS)
    ]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    result: dict[str, float] = json.loads(outputs[0].strip().splitlines()[-1])
    return {name: round(size, 3) for name, size in sorted(result.items()) if size > 0.001}


def released_at_once(folder: Path) -> Path:
    """zero3 as it acts on a model far larger than what may stay gathered: every weight is released after its use."""
    raw = json.loads(load_profile("zero3").path.read_text(encoding="utf-8"))
    for key in ("param_persistence_threshold", "max_live_parameters", "prefetch_bucket_size"):
        raw["zero_optimization"][f"stage3_{key}"] = 0
    raw["gpt2ds"]["recompute"] = "none"
    del raw["activation_checkpointing"]
    path = folder / "zero3_released.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2_tiny")
    parser.add_argument("--accumulations", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        one_rank(arguments.rank_of, arguments.model, arguments.accumulations[0])
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("fp32_baseline", "zero1", "zero2", "zero3", str(released_at_once(Path(folder)))):
            profile = load_profile(name)
            about = {"ZeRO stage": profile.zero_stage, "dtype": profile.dtype}
            if profile.zero_stage == 3:
                zero = profile.settings["zero_optimization"]
                about["persistent below"] = zero["stage3_param_persistence_threshold"]
                about["live parameters"] = profile.live_parameter_elements
            for accumulation in arguments.accumulations:
                sent = measure(name, arguments.model, accumulation)
                rows.append(about | {"accumulation": accumulation} | sent)
                print(rows[-1])
    machine = this_machine()
    result = {
        "what": "bytes per parameter through collectives in one optimizer step of each of two ranks",
        "model": arguments.model,
        "machine": {"cpu": machine.cpu_name, "cores": machine.cores, "gpu": None},
        "rows": rows,
    }
    (RESULTS / "communication.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
