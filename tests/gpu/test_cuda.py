"""On one CUDA GPU: every shipped profile trains, fp16 scales its loss, the flash kernel is used, the cap holds."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import PROFILES, run_cli

from gpt2ds.gpt2.config import MODELS
from gpt2ds.gpt2.model import GPT2
from gpt2ds.gpt2.policies import POLICIES, saved_bytes_per_token

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEPS = 12


@pytest.mark.parametrize("name", sorted(path.stem for path in PROFILES.glob("*.json")))
def test_every_shipped_profile_trains(tmp_path: Path, models_file: Path, corpus_folder: Path, name: str) -> None:
    if name.endswith("8bit") and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    result = run_cli(
        *("train", "--ds", name, "--model", "small", "--models-file", models_file, "--data", corpus_folder),
        *("--micro-batch", 4, "--accumulation", 2, "--steps", STEPS, "--evaluate-every", STEPS, "--name", "a"),
        *("--gpu-memory", 24),
        cwd=tmp_path,
        DS_ACCELERATOR="cuda",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = (tmp_path / "logs" / "a" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records: list[dict[str, Any]] = list(map(json.loads, lines))
    steps = [record for record in records if record["kind"] == "step"]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert steps[-1]["reserved_bytes"][0] >= steps[-1]["memory_bytes"][0] > 0
    (check,) = (record for record in records if record["kind"] == "memory")
    assert check["measured_bytes"] == [max(step["memory_bytes"][0] for step in steps[1:])]
    assert check["steps"] == STEPS - 1 and check["reserved_bytes"][0] >= check["measured_bytes"][0]
    assert (steps[-1]["loss_scale"] is not None) == name.endswith("fp16")


def test_attention_runs_on_the_flash_kernel() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (torch.randn(2, 4, 128, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises when this shape and dtype have no flash kernel
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_chunked_loss_equals_the_whole_one(dtype: torch.dtype) -> None:
    """Its softmax is taken in place, which the documentation neither promises nor forbids."""
    from gpt2ds.gpt2.loss import chunked_cross_entropy, whole_cross_entropy

    results = []
    for loss_of in (whole_cross_entropy, lambda *inputs: chunked_cross_entropy(*inputs, 100)):
        random = torch.manual_seed(0)
        hidden = torch.randn(257, 64, generator=random).to("cuda", dtype).requires_grad_()
        weight = torch.randn(50257, 64, generator=random).to("cuda", dtype).requires_grad_()
        loss = loss_of(hidden, weight, torch.randint(0, 50257, (257,), generator=random).cuda())
        loss.backward()
        results.append((loss.detach(), hidden.grad, weight.grad))
    for chunked, whole in zip(results[1], results[0], strict=True):
        assert (chunked.float() - whole.float()).norm() / whole.float().norm() < (
            2e-6 if dtype == torch.float32 else 0.02
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_recompute_policy_gives_the_same_gradients_and_keeps_what_it_says(dtype: torch.dtype) -> None:
    config = replace(MODELS["gpt2_large"], n_layers=4, vocab_size=512)
    ids = torch.randint(0, 512, (2, 1024), device="cuda")
    reference: dict[str, torch.Tensor] = {}
    kept: dict[str, float] = {}
    for policy in POLICIES:
        torch.manual_seed(0)
        model = GPT2(config, recompute=policy, loss_chunk=512).to("cuda", dtype)
        model(ids, ids).backward()  # kernels and workspaces are there from now on
        model.zero_grad(set_to_none=True)
        before = torch.cuda.memory_allocated()
        loss = model(ids, ids)
        kept[policy] = (torch.cuda.memory_allocated() - before) / (ids.numel() * config.n_layers)
        loss.backward()
        gradients = {name: parameter.grad.float() for name, parameter in model.named_parameters()}
        reference = reference or gradients
        limit = 1e-5 if dtype == torch.float32 else 0.02
        for name, gradient in gradients.items():
            assert (gradient - reference[name]).norm() <= limit * reference[name].norm(), (policy, name)
    size = torch.finfo(dtype).bits // 8
    for policy, found in kept.items():
        # What the tail of the model and the loss keep is the same for all.
        expected = saved_bytes_per_token(config, size, policy) - saved_bytes_per_token(config, size, "none")
        assert found - kept["none"] == pytest.approx(expected, abs=0.01 * saved_bytes_per_token(config, size, "none"))


def test_out_of_memory_is_an_answer(tmp_path: Path, corpus_folder: Path) -> None:
    result = run_cli(
        *("train", "--ds", "zero2", "--model", "gpt2_small", "--data", corpus_folder, "--context", 128),
        *("--micro-batch", 64, "--accumulation", 1, "--steps", 2, "--gpu-memory", 3),
        cwd=tmp_path,
        DS_ACCELERATOR="cuda",
    )
    assert result.returncode == 3, result.stdout + result.stderr
    assert "Tried to allocate" not in result.stderr and "Traceback" not in result.stderr
    assert "more could not be had" in result.stderr
    assert "Predicted peak" in result.stderr


def test_compiled_blocks_train(tmp_path: Path, models_file: Path, corpus_folder: Path) -> None:
    profile = json.loads((PROFILES / "zero2.json").read_text(encoding="utf-8"))
    profile["gpt2ds"]["compile"] = True
    (tmp_path / "own.json").write_text(json.dumps(profile), encoding="utf-8")
    result = run_cli(
        *("train", "--ds", "own.json", "--model", "small", "--models-file", models_file, "--data", corpus_folder),
        *("--micro-batch", 4, "--accumulation", 2, "--steps", STEPS, "--name", "a"),
        cwd=tmp_path,
        DS_ACCELERATOR="cuda",
    )
    assert result.returncode == 0, result.stdout + result.stderr
