"""`gpt2ds memory-estimate`: the same figures as the plan's, instantly, and answers in sentences and exit codes."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support import run_cli

from gpt2ds.devices import CONTEXT_BYTES, GPU, MIB, NCCL_BYTES, Machine, card_bytes
from gpt2ds.ds_profile import shipped_profiles
from gpt2ds.errors import UserError
from gpt2ds.estimate import EstimateOptions, estimate
from gpt2ds.options import TrainOptions
from gpt2ds.planning import resolve

CPU = Machine(cpu_name="a CPU", cores=2, host_memory_bytes=64 * 2**30)
RTX_4090 = GPU(name="NVIDIA GeForce RTX 4090", total_bytes=24_564 * MIB, free_bytes=23_000 * MIB)


def test_without_options_every_profile_for_gpt2_large_on_a_24_gb_card() -> None:
    found = estimate(EstimateOptions(), CPU)
    assert found.room_bytes == card_bytes(24)
    assert [row.profile for row in found.rows] == [path.stem for path in shipped_profiles()]
    rows = {row.profile: row for row in found.rows}
    assert rows["zero2"].largest_micro_batch == 6
    assert rows["gpt2_large_24gb"].fits and not rows["gpt2_medium_24gb"].fits
    assert rows["zero3"].recompute_percent == 21.8
    assert all(row.ranks == 1 and sum(row.parts.values()) == row.peak_bytes for row in found.rows)
    assert all(
        row.fits == (row.margin_bytes >= 0) == (row.micro_batch <= row.largest_micro_batch) for row in found.rows
    )


def test_the_machines_own_cards_count_less_what_others_hold() -> None:
    machine = replace(CPU, gpus=(replace(RTX_4090, free_bytes=24_000 * MIB), RTX_4090))
    found = estimate(EstimateOptions(ds=("zero2",)), machine)
    assert found.rows[0].ranks == 2
    assert found.room_bytes == 23_000 * MIB - CONTEXT_BYTES - NCCL_BYTES
    assert estimate(EstimateOptions(ds=("zero2",), gpu_memory=16, gpus=1), machine).room_bytes == card_bytes(16)


def test_what_is_estimated_is_what_is_planned(tmp_path: Path, wide_corpus: Path) -> None:
    machine = replace(CPU, gpus=(RTX_4090,))
    options = TrainOptions(ds="zero2", model="gpt2_large", data=wide_corpus, out=tmp_path, micro_batch=3, context=512)
    plan = resolve(replace(options, recompute="narrow"), ranks=1, machine=machine)
    asked = EstimateOptions(ds=("zero2",), micro_batch=3, context=512, recompute="narrow")
    (row,) = estimate(asked, machine).rows
    assert plan.estimate is not None
    assert (row.peak_bytes, row.parts) == (plan.estimate.peak_bytes, plan.estimate.parts)


def test_a_thousand_cards_on_paper() -> None:
    one, many = (
        estimate(EstimateOptions(ds=("zero3",), gpus=gpus, nodes=nodes, gpu_memory=24), CPU).rows[0]
        for gpus, nodes in ((8, 1), (1024, 128))
    )
    assert many.peak_bytes < one.peak_bytes
    assert many.host_bytes == one.host_bytes  # eight ranks on each machine


def test_mistakes_in_one_error() -> None:
    options = EstimateOptions(gpu_memory=-1, micro_batch=0, recompute="some")
    with pytest.raises(UserError) as error:
        estimate(options, CPU)
    for words in ("--gpu-memory must be above 0", "--micro-batch must be above 0", "--recompute some"):
        assert words in str(error.value)
    with pytest.raises(UserError, match="did you mean 'gpt2_large'"):
        estimate(EstimateOptions(model="gpt2_larg"), CPU)
    with pytest.raises(UserError, match="--context 4096 is longer"):
        estimate(EstimateOptions(context=4096), CPU)


def test_the_command_prints_a_table_or_json_and_says_by_its_exit_code_whether_anything_fits(tmp_path: Path) -> None:
    table = run_cli("memory-estimate", "--ds", "zero2", "--gpu-memory", 24, cwd=tmp_path)
    assert table.returncode == 0, table.stderr
    words = " ".join(table.stdout.split())
    assert "zero2 6x8x1 none 21.90 0.5 6 2.9" in words and "not measured on a GPU" in words
    too_large = ("--ds", "zero2", "--model", "gpt2_xl", "--gpu-memory", 24)
    nothing = run_cli("memory-estimate", *too_large, "--json", cwd=tmp_path)
    assert nothing.returncode == 1
    (row,) = json.loads(nothing.stdout)["rows"]
    assert (row["largest_micro_batch"], row["fits"]) == (0, False)
    assert run_cli("memory-estimate", "--gpus", 0, cwd=tmp_path).returncode == 2


def test_explain_names_every_part_of_the_peak(tmp_path: Path) -> None:
    shown = run_cli("memory-estimate", "--ds", "zero2", "--gpu-memory", 24, "--explain", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    (row,) = estimate(EstimateOptions(ds=("zero2",)), CPU).rows
    lines = shown.stdout.splitlines()
    for name, size in row.parts.items():
        assert any(line.strip().startswith(name) and f"{size / 2**30:.2f}" in line for line in lines), name


def test_it_is_instant_and_imports_no_torch() -> None:
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from gpt2ds.devices import Machine; from gpt2ds.estimate import EstimateOptions, estimate\n"
        "estimate(EstimateOptions(), Machine(cpu_name='', cores=1, host_memory_bytes=1))\n"
        "assert not {'torch', 'deepspeed', 'numpy'} & set(sys.modules), 'too heavy'"
    )
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    assert time.perf_counter() - start < 3  # 0.3 s on two quiet cores; a busy machine must not fail the test
