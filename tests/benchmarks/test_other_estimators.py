"""The negative control: DeepSpeed's own estimator misses what ours hits, and the page says what the results say."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support import TESTS, cpu_environment, load_benchmark

from gpt2ds.gpt2.config import MODELS
from gpt2ds.memory.setting import CUBLAS_WORKSPACE_BYTES
from gpt2ds.probe.meta_engine import trace_all

others = load_benchmark("other_estimators")

SHALLOW = replace(MODELS["gpt2_large"], n_layers=3)

CASES = [
    others.Case(model="gpt2_large", profile=profile, ranks=2, micro_batch=micro_batch, recompute=recompute)
    for profile, micro_batch, recompute in (("zero2", 4, "none"), ("zero2", 16, "full"), (others.PLAIN, 8, "none"))
]


def test_deepspeeds_estimator_misses_what_ours_hits() -> None:
    for case, seen in zip(CASES, trace_all([case.request(SHALLOW) for case in CASES]), strict=True):
        peak_bytes = seen.peak_bytes + CUBLAS_WORKSPACE_BYTES
        setting = case.setting(SHALLOW)
        assert others.ours(setting) == pytest.approx(peak_bytes, rel=0.002), case
        assert others.deepspeed_says(setting) < 0.95 * peak_bytes, case


def test_deepspeed_is_asked_about_the_same_run() -> None:
    """20 bytes a parameter on one card and 11 on two; 2 under offload; at ZeRO-3 18 / W and the largest layer."""
    model = MODELS["gpt2_large"]

    def per_parameter(profile: str, ranks: int) -> float:
        case = others.Case(model=model.name, profile=profile, ranks=ranks, micro_batch=8, recompute="none")
        return float(others.deepspeed_says(case.setting()) / model.parameters)

    assert per_parameter("zero2", 1) == pytest.approx(20)
    assert per_parameter("zero2", 2) == pytest.approx(11)
    assert per_parameter("zero2_offload", 1) == pytest.approx(2)
    largest_layer = 4 * model.vocab_size * model.emb_dim / model.parameters
    assert per_parameter("zero3", 2) == pytest.approx(9 + largest_layer)
    assert per_parameter("zero3_offload", 2) == pytest.approx(largest_layer)


def test_eleuthers_answer_is_read(tmp_path: Path) -> None:
    """A stand-in that answers in the calculator's words with what it was asked."""
    calculator = tmp_path / "calc.py"
    calculator.write_text(
        "import sys\nassert sys.argv[1:7] == ['--num-gpus', '2', '--zero-stage', '2', '--batch-size-per-gpu', '16']\n"
        "assert '--checkpoint-activations' in sys.argv\n"
        "print('Per-GPU Memory Required for Training: 12.50 GiB')\n",
        encoding="utf-8",
    )
    assert others.eleuther_says(CASES[1].setting(), calculator) == 12.5 * 2**30
    calculator.write_text("print('something else')", encoding="utf-8")
    with pytest.raises(SystemExit, match="something else"):
        others.eleuther_says(CASES[1].setting(), calculator)


def test_the_page_holds_the_results() -> None:
    result = json.loads(others.RESULTS.read_text(encoding="utf-8"))
    text = others.PAGE.read_text(encoding="utf-8")
    assert others.in_page(result, text) == text
    assert [case["mib"]["trace"] > 0 for case in result["cases"]] == [True] * len(others.CASES)


def test_a_path_that_is_not_there_is_refused() -> None:
    script = TESTS.parent / "benchmarks" / "other_estimators.py"
    done = subprocess.run(
        [sys.executable, script, "--eleuther", "nowhere.py"],
        env=cpu_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "nowhere.py: there is no such file" in done.stderr
