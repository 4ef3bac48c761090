"""The CUDA grid as far as it goes without CUDA: which settings, going on where it was, sums and picture."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import TESTS, cpu_environment, load_benchmark

from gpt2ds.devices import GPU, MIB, Machine, card_bytes
from gpt2ds.ds_profile import load_profile, shipped_profiles
from gpt2ds.gpt2.policies import POLICIES
from gpt2ds.memory.fit import fits
from gpt2ds.probe.bench_settings import BenchOptions, all_candidates, described

grid = load_benchmark("memory_accuracy_grid")
report = load_benchmark("memory_accuracy_report")

ROOM = card_bytes(24)
CARD = Machine(
    cpu_name="a CPU",
    cores=16,
    host_memory_bytes=64 * 2**30,
    gpus=(GPU(name="NVIDIA GeForce RTX 4090", total_bytes=24_564 * MIB, free_bytes=24_500 * MIB),),
)


def run_script(*words: Any, cwd: Path) -> subprocess.CompletedProcess[str]:
    script = TESTS.parent / "benchmarks" / "memory_accuracy.py"
    return subprocess.run(
        [sys.executable, str(script), *map(str, words)],
        cwd=cwd,
        env=cpu_environment(),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def test_limits_come_first_and_the_grid_has_everything() -> None:
    settings = grid.settings(ROOM, 1)
    roles = [setting.role for setting in settings]
    assert roles == sorted(roles, key=["largest", "beyond", "grid"].index)
    assert len({setting.key for setting in settings}) == len(settings)
    for setting in settings:
        assert fits(setting.predicted(1), ROOM) == (setting.role != "beyond"), setting
    # A profile that is made for two cards has no largest micro-batch on one, and one that needs two is left out.
    limits = {setting.profile for setting in settings if setting.role == "largest"}
    assert {path.stem for path in shipped_profiles()} - limits == {"gpt2_xl_2x24gb"}
    early = [setting for setting in settings if setting.role == "grid"][:40]
    assert {setting.model for setting in early} == set(grid.SIZES)
    assert {setting.recompute for setting in early} == set(POLICIES)
    assert {load_profile(setting.profile).zero_stage for setting in early} == {0, 1, 2, 3}


def record(folder: Path, profile: str, recompute: str, micro_batch: int, **ended: Any) -> dict[str, Any]:
    """A line of results as a bench on a card would give it; what was measured is made up for this test."""
    options = BenchOptions(
        ds=(profile,),
        model="gpt2_large",
        data=folder,
        recompute=(recompute,),
        micro_batch=(micro_batch,),
        gpu_memory=24,
    )
    _, (candidate,) = all_candidates(options, CARD, lambda line: None)
    record = described(candidate)
    peak = record["predicted"]["peak_bytes"]
    if above := ended.pop("measured_above_percent", None):
        ended = {"result": "measured", "why": None, "peak_bytes": [round(peak * (1 + above / 100))]}
        ended["reserved_bytes"] = [round(ended["peak_bytes"][0] * 1.02)]
    key = f"gpt2_large {profile} {recompute} {micro_batch}"
    return {"key": key, "role": "grid", "predicted_bytes": peak, "record": record | ended}


@pytest.fixture(scope="module")
def results(corpus_folder: Path) -> list[dict[str, Any]]:
    no_memory = {"result": "out of memory", "why": "tried to allocate 2.00 GiB in step 1"}
    return [
        record(corpus_folder, "zero2", "none", 6, measured_above_percent=1.0) | {"role": "largest"},
        record(corpus_folder, "zero2", "none", 7, **no_memory) | {"role": "beyond"},
        record(corpus_folder, "zero1", "full", 8, measured_above_percent=-4.0),
        record(corpus_folder, "fp32_baseline", "none", 2, measured_above_percent=0.5),
        record(corpus_folder, "zero3", "full", 8, measured_above_percent=2.5),
        record(corpus_folder, "zero2", "host", 8, measured_above_percent=0.1),
        record(corpus_folder, "zero2_offload", "full", 8, result="crashed", why="rank 0 ended with code 1"),
    ]


def test_differences_are_summed_up_by_group(results: list[dict[str, Any]]) -> None:
    summed = report.summary(results)
    groups = summed["groups"]
    assert {name: group["measured"] for name, group in groups.items()} == {"ZeRO-0, 1, 2": 3, "ZeRO-3": 1, "offload": 1}
    # Measured 1% above predicted is predicted 0.99% below measured.
    assert groups["ZeRO-0, 1, 2"]["median_percent"] == pytest.approx(0.99, abs=0.01)
    assert groups["ZeRO-0, 1, 2"]["worst_percent"] == pytest.approx(4.17, abs=0.01)
    assert groups["ZeRO-0, 1, 2"]["worst_at"] == "gpt2_large zero1 full 8"
    assert groups["ZeRO-3"]["worst_percent"] == pytest.approx(-2.44, abs=0.01)
    assert groups["offload"]["most_reserved_above_allocated_percent"] == pytest.approx(2.0, abs=0.05)
    (limit,) = summed["limits"]
    assert (limit["largest"], limit["largest_runs"], limit["beyond"], limit["beyond_runs"]) == (6, True, 7, False)


def test_the_table_says_what_was_met_and_what_failed(results: list[dict[str, Any]], tmp_path: Path) -> None:
    whole = {"what": "made up", "rehearsal": False, "gpu_memory_gb": 24.0, "room_mib": 23_700} | report.summary(results)
    text = report.table(whole)
    first = next(line for line in text.splitlines() if line.startswith("ZeRO-0"))
    assert "worst +4.17%" in first and first.count("MISSED") == 1
    assert "offload: 1 settings" in text and "goal 2%: met" in text
    assert "6 runs; 7 out of memory" in text
    assert "zero2_offload full 8: crashed: rank 0 ended with code 1" in text
    for name, content in (("some.png", whole), ("none.png", whole | report.summary([]))):
        report.write_plot(content, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_without_cuda_it_says_so_and_lists(tmp_path: Path) -> None:
    refused = run_script("--out", tmp_path, cwd=tmp_path)
    assert refused.returncode == 2
    assert "there is no CUDA GPU" in refused.stderr
    listed = run_script("--dry-run", "--models", "gpt2_large", "--profiles", "zero2", cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    lines = [line.split() for line in listed.stdout.splitlines()[1:]]
    assert lines[0][1:6] == ["largest", "gpt2_large", "zero2", "none", "6"]
    assert all(line[2:4] == ["gpt2_large", "zero2"] for line in lines)
    assert not list(tmp_path.iterdir())


def test_it_goes_on_where_it_was(tmp_path: Path, corpus_folder: Path, results: list[dict[str, Any]]) -> None:
    """Of three settings one was measured, one crashed, and the line of the third was cut off by the end of the time."""
    path = tmp_path / "memory_accuracy.jsonl"
    earlier = [results[0] | {"key": "gpt2_tiny zero2 none 2"}, results[-1] | {"key": "gpt2_tiny zero1 full 2"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in earlier) + '{"key": "gpt2_ti', encoding="utf-8")
    done = run_script(
        *("--rehearse", "--data", corpus_folder, "--out", tmp_path, "--minutes", 4, "--most", 1), cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[1/2] gpt2_tiny zero1 full 2" in done.stdout
    found = report.read(path)
    assert list(found) == ["gpt2_tiny zero2 none 2", "gpt2_tiny zero1 full 2"]
    assert found["gpt2_tiny zero1 full 2"]["record"]["result"] == "measured"
    written = json.loads((tmp_path / "memory_accuracy.json").read_text(encoding="utf-8"))
    assert written["rehearsal"] and "REHEARSAL" in written["what"]
    assert {row["key"]: row["result"] for row in written["settings"]} == dict.fromkeys(found, "measured")
    assert (tmp_path / "memory_accuracy.png").exists()
    elsewhere = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
    elsewhere["about"]["device"]["name"] = "another card"
    path.write_text(json.dumps(elsewhere) + "\n", encoding="utf-8")
    mixed = run_script("--rehearse", "--data", corpus_folder, "--out", tmp_path, cwd=tmp_path)
    assert mixed.returncode == 1 and "holds results of another card" in mixed.stderr
