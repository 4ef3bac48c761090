"""Memory that runs out is an answer: exit code 3, what was asked for, and a setting that fits, ready to copy."""

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support import PROFILES, cpu_environment

from gpt2ds.devices import GPU, MIB, Machine, card_bytes
from gpt2ds.memory.fit import fastest_that_fits, fits
from gpt2ds.memory.formula import predict
from gpt2ds.options import TrainOptions
from gpt2ds.planning import resolve
from gpt2ds.training.out_of_memory import _setting, explain, is_out_of_memory

pytestmark = pytest.mark.usefixtures("roomy_disk")

WORKER = Path(__file__).with_name("limited_worker.py")
GIB = 2**30
RTX_4090 = GPU(name="NVIDIA GeForce RTX 4090", total_bytes=24_564 * MIB, free_bytes=24_207 * MIB)
ONE_4090 = Machine(cpu_name="a CPU", cores=8, host_memory_bytes=64 * GIB, gpus=(RTX_4090,))


def run_limited(cwd: Path, mib: int, *arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(WORKER), str(mib), *map(str, arguments)],
        cwd=cwd,
        env=cpu_environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_a_real_shortage_ends_with_a_setting_that_runs(tmp_path: Path, wide_corpus: Path, models_file: Path) -> None:
    profile = json.loads((PROFILES / "zero2.json").read_text(encoding="utf-8"))
    profile["gpt2ds"]["loss_chunk"] = 4096
    (tmp_path / "own.json").write_text(json.dumps(profile), encoding="utf-8")
    common = ("--ds", "own.json", "--model", "small", "--models-file", models_file, "--data", wide_corpus)
    common += ("--evaluation-windows", 2, "--sample-tokens", 2, "--evaluate-every", 50)
    first = run_limited(
        tmp_path, 4000, "train", *common, "--micro-batch", 32, "--accumulation", 8, "--steps", 1, "--name", "a"
    )
    assert first.returncode == 0, first.stderr
    checkpoint = tmp_path / "logs" / "a" / "checkpoints" / "step-00000001"
    manifest = (checkpoint / "manifest.json").read_bytes()
    # All 256 windows at once: the logits of a chunk of 4,096 tokens take 1.2 GB.
    short = run_limited(
        *(tmp_path, 900, "train", "--name", "a", "--resume", "--steps", 2),
        *("--micro-batch", 256, "--accumulation", 1),
    )
    assert short.returncode == 3, short.stdout + short.stderr
    assert "Traceback" not in short.stderr
    message = short.stderr.strip().splitlines()
    assert message[0].startswith("Out of memory on rank 0 (the CPU), in step 2: ")
    assert " more could not be had, in " in message[0]
    assert message[1].startswith("Predicted peak: ") and "activations" in message[1]
    assert message[-1] == "The last checkpoint, step-00000001, is untouched."
    assert (checkpoint / "manifest.json").read_bytes() == manifest
    log = [json.loads(line) for line in (tmp_path / "logs" / "a" / "metrics.jsonl").read_text().splitlines()]
    assert log[-1]["reason"] == "failed: out of memory"

    command = shlex.split(message[-2])
    assert command[:2] == ["gpt2ds", "train"] and "--resume" in command
    given = dict(pairwise(command))
    assert int(given["--micro-batch"]) * int(given["--accumulation"]) == 256
    again = run_limited(tmp_path, 4000, *command[1:])
    assert again.returncode == 0, again.stderr


def test_the_answer_on_a_gpu_names_the_parts_and_a_smaller_setting(wide_corpus: Path, tmp_path: Path) -> None:
    options = TrainOptions(ds="zero2", model="gpt2_large", data=wide_corpus, out=tmp_path / "logs", micro_batch=12)
    plan = resolve(replace(options, accumulation=4), ranks=1, machine=ONE_4090)
    error = RuntimeError("CUDA out of memory. Tried to allocate 1.20 GiB. GPU 0 has ...")
    message = explain(error, plan, rank=1, doing="in step 7", checkpoint=None)
    assert "on rank 1 (NVIDIA GeForce RTX 4090), in step 7: 1.20 GiB more could not be had" in message
    assert "Usable for tensors when the run was planned: 23." in message
    assert "on this GPU" in message
    assert "activations" in message and "moments" in message
    command = shlex.split(message.splitlines()[-1])
    given = dict(pairwise(command))
    assert (given["--micro-batch"], given["--accumulation"]) == ("8", "6")
    assert given["--recompute"] == "products"
    assert "--resume" not in command and "--name" not in command


def test_the_next_setting_fits_and_keeps_the_global_batch(wide_corpus: Path, tmp_path: Path) -> None:
    options = TrainOptions(ds="zero2", model="gpt2_large", data=wide_corpus, out=tmp_path, micro_batch=6)
    plan = resolve(replace(options, accumulation=8), ranks=1, machine=ONE_4090)
    setting = _setting(plan)
    for room in (24, 20, 16):
        found = fastest_that_fits(setting, card_bytes(room))
        assert found is not None
        assert fits(predict(found), card_bytes(room))
        assert found.micro_batch * found.accumulation == 48
    assert fastest_that_fits(setting, card_bytes(8)) is None
    # Predicted to fit and yet it did not: the next one must need less.
    peak = predict(setting).peak_bytes
    lower = fastest_that_fits(setting, card_bytes(24), most_peak_bytes=int(peak * 0.95))
    assert lower is not None and predict(lower).peak_bytes <= 0.95 * peak


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (MemoryError(), True),
        (RuntimeError("std::bad_alloc"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_another_profile_where_no_setting_of_this_one_fits(wide_corpus: Path, tmp_path: Path) -> None:
    options = TrainOptions(ds="zero2", model="gpt2_xl", data=wide_corpus, out=tmp_path, micro_batch=1, accumulation=64)
    plan = resolve(options, ranks=1, machine=ONE_4090)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.00 GiB")
    command = shlex.split(explain(error, plan, rank=0, doing="in step 1", checkpoint="step-00000001").splitlines()[-2])
    assert command[command.index("--ds") + 1] == "zero2_offload"
    assert "--resume" not in command
    # The same on a host that could not hold the states, and with nothing else to turn to.
    small = replace(plan, machine=replace(ONE_4090, host_memory_bytes=16 * GIB))
    assert "smaller --model" in explain(error, small, rank=0, doing="in step 1", checkpoint=None).splitlines()[-1]
