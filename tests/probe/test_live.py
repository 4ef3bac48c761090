"""The count of live bytes: hand-made sequences with known sums, real CPU tensors beside meta tensors, and what GPT-2's
blocks and loss keep.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from gpt2ds.gpt2.config import MODELS, GPT2Config
from gpt2ds.gpt2.model import GPT2
from gpt2ds.gpt2.policies import POLICIES, saved_bytes_per_token
from gpt2ds.probe.blocks import kernels_of, loss_peak_bytes, saved_bytes
from gpt2ds.probe.live import LiveBytes, PhasePeak, efficient_backward_bytes, flash_backward_bytes

DEVICES = pytest.mark.parametrize("device", ["meta", "cpu"])


@DEVICES
def test_a_known_sequence(device: str) -> None:
    with LiveBytes(device=device, rounding=1) as live:
        a = torch.zeros(100, device=device)
        assert live.current_bytes == 400
        b = a.view(10, 10).t()  # no bytes of its own
        c = b + 1
        assert live.current_bytes == 800
        del a
        assert live.current_bytes == 800  # b still holds it
        del b
        assert live.current_bytes == 400
        c.mul_(2)
        assert live.current_bytes == 400
        (c + 1) + 1  # both sums die at once, the first one after the second
        assert (live.current_bytes, live.peak_bytes) == (400, 1200)
    assert live.finish()[-1].operation == "aten.add.Tensor"


@DEVICES
def test_every_block_is_rounded_up_as_cuda_does(device: str) -> None:
    with LiveBytes(device=device) as live:
        tensors = [torch.empty(count, dtype=torch.uint8, device=device) for count in (1, 512, 513)]
        assert live.current_bytes == 512 + 512 + 1024
        empty = torch.empty(0, device=device)
        assert live.current_bytes == 2048
    del tensors, empty
    assert live.current_bytes == 0


def test_a_storage_that_is_resized() -> None:
    with LiveBytes(rounding=1, log_events=True) as live:
        tensor = torch.zeros(100)
        tensor.untyped_storage().resize_(0)
        tensor.detach()
        assert live.current_bytes == 0
        tensor.untyped_storage().resize_(800)
        tensor.detach()
        assert live.current_bytes == 800
    assert [size for _, size in live.events or []] == [400, 0, 800]


def test_phases_and_labels() -> None:
    with LiveBytes(rounding=1) as live:
        live.begin("start", "states")
        weights = torch.zeros(1000)
        live.begin("forward")
        activation = weights * 2
        activation = activation * 2
        live.begin("backward", "gradients")
        live.label([weights], "weights")
        gradient = activation.clone()
        del activation
        live.begin("step")
        phases = {phase.name: phase for phase in live.finish()}
    assert phases["forward"] == PhasePeak(
        name="forward",
        peak_bytes=12_000,
        operation="aten.mul.Tensor",
        after_bytes=8_000,
        parts={"states": 4_000, "forward": 8_000},
    )
    assert phases["backward"].parts == {"weights": 4_000, "forward": 4_000, "gradients": 4_000}
    assert (phases["step"].peak_bytes, phases["step"].parts) == (8_000, {"weights": 4_000, "gradients": 4_000})
    del gradient


def test_pause_and_the_other_device() -> None:
    with LiveBytes(device="meta", rounding=1) as live:
        host = torch.zeros(10)
        with live.paused():
            shape = torch.zeros(10, device="meta")
        assert live.current_bytes == 0
        torch.zeros_like(host, device="meta") + 1
        assert live.peak_bytes == 80
    del shape


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_events_replay_to_the_same_peak(recompute: str) -> None:
    live = LiveBytes(device="meta", hidden=True, log_events=True)
    _train(_SMALL, recompute, "bf16", "meta", live)
    sizes: dict[int, int] = {}
    peak = 0
    for number, size in live.events or []:
        assert (number in sizes) == (size == 0)  # nothing is freed twice or allocated over
        if size:
            sizes[number] = size
        else:
            del sizes[number]
        peak = max(peak, sum(sizes.values()))
    assert peak == live.peak_bytes
    assert sum(sizes.values()) == live.current_bytes


def test_what_cuda_kernels_take_inside() -> None:
    # 20 heads of 64 and 1,024 rows: fp32 sums as wide as the query, and one number a row.
    query = torch.empty(8, 20, 1024, 64, device="meta", dtype=torch.bfloat16)
    assert flash_backward_bytes(query) == 8 * 1024 * (4 * 1280 + 4 * 20)
    assert flash_backward_bytes(query[:, :, :1000, :40]) == 8 * 1024 * 4 * 20 * 65
    assert efficient_backward_bytes(query) == 8 * 1024 * 4 * 20
    assert efficient_backward_bytes(query.float()) == 8 * 1024 * (4 * 1280 + 8 * 20)


@pytest.mark.parametrize(
    ("dtype", "inside"), [(torch.bfloat16, flash_backward_bytes), (torch.float32, efficient_backward_bytes)]
)
def test_what_cuda_kernels_take_inside_counts_at_the_peak(
    dtype: torch.dtype, inside: Callable[[torch.Tensor], int]
) -> None:
    peaks = []
    for hidden in (False, True):
        query = torch.empty(2, 4, 128, 64, dtype=dtype, device="meta", requires_grad=True)
        with kernels_of("cuda"), LiveBytes(device="meta", hidden=hidden) as live:
            out = F.scaled_dot_product_attention(query, query, query, is_causal=True)
            loss = out.sum()
            live.begin("backward")
            loss.backward()
        peaks.append(live.finish()[-1])
    without, complete = peaks
    assert complete.peak_bytes == sum(complete.parts.values()) > without.peak_bytes
    assert complete.parts["inside a kernel"] == inside(query)
    assert complete.operation.endswith("attention_backward.default")


_SMALL = GPT2Config(name="small", emb_dim=128, n_heads=4, n_layers=4, context_length=128, vocab_size=5000)


def _train(config: GPT2Config, recompute: str, dtype: str, device: str, live: LiveBytes) -> None:
    numbers = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model = GPT2(config, recompute=recompute, loss_chunk=200).to(device=device, dtype=numbers)
    ids = torch.zeros(4, config.context_length, dtype=torch.long, device=device)
    with kernels_of("cuda" if live.hidden else "cpu"), live:
        live.label(model.parameters(), "weights")
        live.begin("forward")
        loss = model(ids, ids)
        live.begin("backward")
        loss.backward()


@pytest.mark.parametrize("recompute", ["none", "products", "full"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_meta_tensors_take_what_real_ones_take(recompute: str, dtype: str) -> None:
    real, meta = LiveBytes(device="cpu"), LiveBytes(device="meta")
    _train(_SMALL, recompute, dtype, "cpu", real)
    _train(_SMALL, recompute, dtype, "meta", meta)
    for seen, expected in zip(meta.finish(), real.finish(), strict=True):
        # In bf16 a CPU keeps the two statistics of each token in 16 bits, at each of the 9 norms; a GPU in 32.
        statistics = 2 * 2 * 4 * _SMALL.context_length * 9 if dtype == "bf16" else 0
        assert expected.peak_bytes <= seen.peak_bytes <= expected.peak_bytes + statistics
        assert seen.operation == expected.operation


@pytest.mark.parametrize("drop_rate", [0.0, 0.1])
@pytest.mark.parametrize("recompute", POLICIES)
def test_blocks_keep_what_the_policies_say(recompute: str, drop_rate: float) -> None:
    large = replace(MODELS["gpt2_large"], n_layers=2, drop_rate=drop_rate)
    for dtype, number_bytes in (("bf16", 2), ("fp32", 4)):
        kept = saved_bytes(large, recompute, dtype, micro_batch=2, context=1024)
        expected = 2 * 2048 * saved_bytes_per_token(large, number_bytes, recompute)
        assert kept == pytest.approx(expected, rel=1e-5)  # flash attention keeps its random seed as well


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_chunked_loss_removes_12_bytes_a_logit(dtype: str) -> None:
    large, tokens, chunk = MODELS["gpt2_large"], 8192, 1024
    logits, head = 50257 * tokens, 50257 * 1280 * (2 if dtype == "bf16" else 4)
    whole = loss_peak_bytes(large, dtype, tokens, None)
    assert whole == pytest.approx(12 * logits, rel=1e-6)
    # What is left: a chunk's logits, in fp32 and in 16 bits, and the gradients of head and hidden states.
    chunked = loss_peak_bytes(large, dtype, tokens, chunk)
    one_chunk = (6 if dtype == "bf16" else 4) * 50304 * chunk
    assert chunked == pytest.approx(one_chunk + head + head * tokens // 50257, rel=0.001)
