"""The accuracy grid on a CUDA GPU: a setting that is measured and one that finds no memory, in the report."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import TESTS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_limit_of_a_small_card(tmp_path: Path) -> None:
    """gpt2_small with zero2 on a card of 4 GB: its largest predicted micro-batch, and 1.1 times that."""
    script = TESTS.parent / "benchmarks" / "memory_accuracy.py"
    words = ["--gpu-memory", "4", "--profiles", "zero2", "--most", "2", "--minutes", "8", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "memory_accuracy.json").read_text(encoding="utf-8"))
    assert written["device"]["name"] == torch.cuda.get_device_name()
    (group,) = written["groups"].values()
    assert group["measured"] >= 1
    # Not a bound of the formula's quality, which the whole grid states: the two figures mean the same thing.
    assert abs(group["worst_percent"]) < 25
    (limit,) = written["limits"]
    assert limit["largest_runs"] is True
    assert (tmp_path / "memory_accuracy.png").exists()
