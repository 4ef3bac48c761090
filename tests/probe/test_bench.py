"""`gpt2ds bench`: real steps on the CPU, every way to fail beside them, and what is reported of a GPU's memory."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console
from support import cpu_environment, run_cli

from gpt2ds.devices import GPU, MIB, Machine, card_bytes
from gpt2ds.errors import UserError
from gpt2ds.probe.bench import largest_that_runs
from gpt2ds.probe.bench_plot import write_plot
from gpt2ds.probe.bench_report import report, summary
from gpt2ds.probe.bench_settings import BenchOptions, all_candidates, described

GIB = 2**30
PNG = b"\x89PNG"

# Far above what torch and DeepSpeed take, and less than the first block of the large micro-batch: queries, keys and
# values alone are 0.6 GB in bf16.
LIMIT_BYTES = int(1.5 * GIB)
TOO_MANY = 100_000

LIMITED = f"""
import resource
resource.setrlimit(resource.RLIMIT_DATA, ({LIMIT_BYTES}, {LIMIT_BYTES}))
from gpt2ds.cli import main
main()
"""


def arguments(models_file: Path, corpus_folder: Path, *more: Any) -> list[str]:
    words = ["bench", "--model", "small", "--models-file", models_file, "--data", corpus_folder, "--out", "out", *more]
    return [str(word) for word in words]


def test_settings_that_run_beside_others_that_do_not(tmp_path: Path, models_file: Path, corpus_folder: Path) -> None:
    words = ["--ds", "zero2", "--ds", "fp32_baseline", "--ds", "zero2_fp16", "--recompute", "full", "--steps", 2]
    words += ["--micro-batch", TOO_MANY, "--micro-batch", 2]
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, *arguments(models_file, corpus_folder, *words)],
        cwd=tmp_path,
        env=cpu_environment(),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    bench = read_bench(tmp_path)
    settings = {(record["profile"], record["micro_batch"]): record for record in bench["settings"]}
    assert len(settings) == 6
    for (profile, size), record in settings.items():
        if profile == "zero2_fp16":
            assert record["result"] == "refused"
            assert "needs a CUDA GPU" in record["why"]
        elif size == TOO_MANY:
            assert record["result"] == "out of memory", record["why"]
            assert record["why"].startswith("tried to allocate ")
            assert "in step 1, micro-batch 1 of 2" in record["why"]
            assert "can't allocate memory" in (tmp_path / "out" / record["log"]).read_text(encoding="utf-8")
        else:
            assert_measured(record, tokens_per_step=size * 2 * 32, ranks=1)
    assert bench["device"]["kind"] == "cpu"
    assert "not comparable with GPU memory" in bench["memory_is"]
    assert bench["versions"]["torch"]
    # The table: the fastest first, what failed last, and what resident memory is not.
    rows = [line for line in result.stdout.splitlines() if line.startswith("│")]
    speeds = [float(row.split("│")[4].strip().replace(",", "")) for row in rows[:2]]
    assert speeds == sorted(speeds, reverse=True)
    assert sorted(row.split("│")[4].strip() for row in rows[2:]) == ["out of memory"] * 2 + ["refused"] * 2
    assert "not a GPU" in result.stdout
    assert "predicted" not in result.stdout.split("Measured on a CPU")[0]
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(PNG)


def test_two_ranks(tmp_path: Path, models_file: Path, corpus_folder: Path) -> None:
    words = ["--ds", "zero2", "--gpus", 2, "--micro-batch", 2, "--steps", 1, "--accumulation", 3]
    result = run_cli(*arguments(models_file, corpus_folder, *words), cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    (record,) = read_bench(tmp_path)["settings"]
    assert_measured(record, tokens_per_step=2 * 2 * 3 * 32, ranks=2)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["bench.json", "bench.png"]


def read_bench(folder: Path) -> dict[str, Any]:
    bench: dict[str, Any] = json.loads((folder / "out" / "bench.json").read_text(encoding="utf-8"))
    return bench


def assert_measured(record: dict[str, Any], *, tokens_per_step: int, ranks: int) -> None:
    assert record["result"] == "measured", record["why"]
    assert record["tokens_per_step"] == tokens_per_step
    assert len(record["warm_up_seconds"]) == 2
    median = sum(record["step_seconds"]) / len(record["step_seconds"])  # of one step or two
    assert record["tokens_per_second"] == pytest.approx(tokens_per_step / median, rel=0.02)
    assert record["losses"][-1] < record["losses"][0], "real steps learn"
    assert len(record["peak_bytes"]) == ranks
    assert all(100 * MIB < size < LIMIT_BYTES for size in record["peak_bytes"])
    assert record["predicted"] is None
    assert record["mfu"] is None


def workers_of(process: subprocess.Popen[str], ranks: int) -> list[psutil.Process]:
    """The bench's workers by rank, once all are there."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        children = psutil.Process(process.pid).children()
        found: dict[str, psutil.Process] = {}
        with suppress(psutil.Error, KeyError):  # one that has just been forked, or has just ended
            for child in children:
                if any("bench_worker" in word for word in child.cmdline()):
                    found[child.environ()["RANK"]] = child
        if len(found) == ranks:
            return [found[rank] for rank in sorted(found)]
        time.sleep(0.05)
    process.kill()
    raise AssertionError("no workers")


def start_bench(folder: Path, words: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gpt2ds", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=cpu_environment(), stdout=pipe, stderr=pipe, text=True)


def test_a_killed_rank_takes_the_others_along(tmp_path: Path, models_file: Path, corpus_folder: Path) -> None:
    words = arguments(
        models_file, corpus_folder, "--ds", "zero2", "--gpus", 2, "--micro-batch", 1, "--steps", 1_000_000
    )
    process = start_bench(tmp_path, words)
    workers = workers_of(process, 2)
    # Late enough that rank 0 waits for the other, and may say so as well.
    while not any(connection.status == psutil.CONN_ESTABLISHED for connection in workers[1].net_connections()):
        time.sleep(0.05)
    workers[1].send_signal(signal.SIGKILL)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, output + errors
    (record,) = json.loads((tmp_path / "out" / "bench.json").read_text(encoding="utf-8"))["settings"]
    assert record["result"] == "out of memory"
    assert "rank 1 was killed (SIGKILL)" in record["why"]
    assert not psutil.wait_procs(workers, timeout=20)[1]  # a dead one may wait a moment for being buried


def test_a_signal_ends_the_ranks_as_well(tmp_path: Path, models_file: Path, corpus_folder: Path) -> None:
    words = arguments(
        models_file, corpus_folder, "--ds", "zero2", "--gpus", 2, "--micro-batch", 1, "--steps", 1_000_000
    )
    process = start_bench(tmp_path, words)
    workers = workers_of(process, 2)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, output + errors
    assert not psutil.wait_procs(workers, timeout=20)[1]  # a dead one may wait a moment for being buried


def test_a_setting_that_never_ends_is_ended(tmp_path: Path, models_file: Path, corpus_folder: Path) -> None:
    words = arguments(models_file, corpus_folder, "--ds", "zero2", "--micro-batch", 1, "--timeout", 0.5)
    result = run_cli(*words, cwd=tmp_path)
    assert result.returncode == 1
    assert "timed out: no end within 0.5 s (--timeout)" in result.stdout.replace("\n", " ")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--ds", "zero2", "--largest"], "there is none here"),
        (["--ds", "zero2", "--gpus", 0], "--gpus must be above 0"),
        (["--ds", "zero2", "--micro-batch", 0], "--micro-batch must be above 0"),
        (["--ds", "zero9"], "did you mean"),
        (["--ds", "zero2_fp16"], "needs a CUDA GPU"),
        (["--ds", "zero2", "--context", 33], "--context 33 is longer"),
        (["--ds", "zero2", "--recompute", "ful"], "did you mean full?"),
    ],
)
def test_what_cannot_be_run_at_all_is_refused(
    tmp_path: Path, models_file: Path, corpus_folder: Path, more: list[Any], words: str
) -> None:
    result = run_cli(*arguments(models_file, corpus_folder, *more), cwd=tmp_path)
    assert result.returncode == 2
    assert words in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("limit", [0, 1, 2, 7, 66, 105, 4096])
@pytest.mark.parametrize("guess", [0, 1, 6, 66, 4096])
def test_the_search_for_the_largest_micro_batch(limit: int, guess: int) -> None:
    tried: list[int] = []

    def runs(size: int) -> bool:
        tried.append(size)
        return size <= limit

    assert largest_that_runs(guess, runs) == (limit, limit + 1 if limit < 4096 else None)
    assert len(set(tried)) == len(tried)
    assert len(tried) <= 2 + 2 * abs(limit - guess).bit_length()


def test_the_search_ends_at_another_failure() -> None:
    assert largest_that_runs(4, lambda size: True if size < 6 else None) == (5, None)


CARD = Machine(
    cpu_name="a CPU",
    cores=16,
    host_memory_bytes=64 * GIB,
    gpus=(GPU(name="NVIDIA GeForce RTX 4090", total_bytes=24_564 * MIB, free_bytes=24_100 * MIB),),
)


def test_settings_for_a_card_are_resolved_with_their_prediction(corpus_folder: Path) -> None:
    options = BenchOptions(
        ds=("zero2", "zero3", "nonsense"),
        model="gpt2_large",
        data=corpus_folder,
        context=256,
        micro_batch=(4, 400),
        recompute=("none",),
        gpu_memory=24,
    )
    _, candidates = all_candidates(options, CARD, lambda sentence: None)
    assert [candidate.plan is not None for candidate in candidates] == [True] * 4 + [False] * 2
    small, large = (described(candidate) for candidate in candidates[:2])
    # A step may ask for more text than there is: the windows are taken again.
    assert large["tokens_per_step"] == 400 * 2 * 256
    assert small["predicted"]["fits"]
    assert not large["predicted"]["fits"]
    assert sum(small["predicted"]["parts"].values()) == small["predicted"]["peak_bytes"]
    with pytest.raises(UserError, match="leave --micro-batch out"):
        all_candidates(replace(options, largest=True), CARD, lambda sentence: None)


def test_a_profile_that_fixes_only_the_global_batch_takes_its_micro_batch(tmp_path: Path, corpus_folder: Path) -> None:
    profile = json.loads((Path(__file__).parents[2] / "ds_configs" / "zero2.json").read_text(encoding="utf-8"))
    del profile["gradient_accumulation_steps"]
    profile |= {"train_batch_size": 4096, "train_micro_batch_size_per_gpu": "auto"}
    (tmp_path / "auto.json").write_text(json.dumps(profile), encoding="utf-8")
    options = BenchOptions(ds=(str(tmp_path / "auto.json"),), model="gpt2_small", data=corpus_folder, context=512)
    _, (candidate,) = all_candidates(options, CARD, lambda sentence: None)
    assert candidate.plan is not None, candidate.refusal
    assert candidate.plan.accumulation == 2
    assert candidate.plan.micro_batch > 8


def test_without_a_model_all_settings_take_the_one_of_training(corpus_folder: Path) -> None:
    said: list[str] = []
    options, candidates = all_candidates(BenchOptions(ds=("zero2", "zero3"), data=corpus_folder), CARD, said.append)
    assert {candidate.plan.model.name for candidate in candidates if candidate.plan} == {options.model}
    assert said[0].startswith(f"No --model: {options.model}")


def test_what_is_said_of_a_card(tmp_path: Path) -> None:
    """Predicted beside measured, whether a failure was foreseen, and the limit; figures made up for this test."""
    about = {"accumulation": 2, "recompute": "none", "profile": "zero2"}
    predicted = {"peak_bytes": 22 * GIB, "phase": "loss", "parts": {}, "fits": True}
    ran = {
        **about,
        "micro_batch": 4,
        "result": "measured",
        "why": None,
        "tokens_per_second": 12_345.6,
        "mfu": 0.41,
        "step_seconds": [0.5, 0.7, 0.6],
        "peak_bytes": [20 * GIB],
        "reserved_bytes": [21 * GIB],
        "predicted": predicted | {"difference_percent": 10.0},
    }
    failure = {"result": "out of memory", "why": "tried to allocate 2.00 GiB in step 1"}
    foreseen = {**about, "micro_batch": 8, **failure, "predicted": predicted | {"fits": False}}
    unforeseen = {**about, "micro_batch": 5, **failure, "predicted": predicted, "log": "setting-02.log"}
    bench = {
        "device": {
            "kind": "cuda",
            "name": CARD.gpus[0].name,
            "usable_bytes": card_bytes(24),
            "gpu_memory_gb": 24.0,
        },
        "model": {"name": "gpt2_large", "parameters": 774_000_000},
        **{"context": 1024, "accumulation": 2, "ranks": 1, "steps": 3, "warm_up_steps": 2},
        "settings": [foreseen, unforeseen, ran],
        "largest": [
            {"profile": "zero2", "recompute": "none", "predicted": 6, "runs": 4, "fails": 5, "how": "out of memory"}
        ],
    }
    stream = io.StringIO()
    Console(file=stream, width=140).print(report(bench))
    text = stream.getvalue()
    first = next(line for line in text.splitlines() if line.startswith("│"))
    assert all(part in first for part in ("12,346", "41.0%", "0.6", "20.00 GiB", "21.00 GiB", "22.00 GiB", "+10.0%"))
    assert "23.14 GiB" in text, "the limit of a 24 GB card: 23,700 MiB"
    assert "micro-batch 8, recompute none: out of memory: tried to allocate 2.00 GiB in step 1; as predicted" in text
    assert "although it was predicted to fit" in summary(unforeseen)
    assert "[setting-02.log]" in summary(unforeseen)
    largest = text[text.index("Largest micro-batch") :].splitlines()
    assert any(line.split() == ["│", "zero2", "│", "none", "│", "6", "│", "4", "│", "5", "│"] for line in largest)
    assert write_plot(bench, tmp_path).read_bytes().startswith(PNG)


def test_a_bench_is_not_written_over(tmp_path: Path, models_file: Path, corpus_folder: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "bench.json").write_text("{}", encoding="utf-8")
    result = run_cli(*arguments(models_file, corpus_folder, "--ds", "zero2"), cwd=tmp_path)
    assert result.returncode == 2
    assert "choose another --out" in result.stderr
    assert os.listdir(tmp_path / "out") == ["bench.json"]
