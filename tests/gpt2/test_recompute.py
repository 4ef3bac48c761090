"""Every recompute policy on one process, in fp32: the plain model's loss and gradients, and only the arithmetic that it
is said to cost.
"""

import shutil
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2ds.gpt2.config import GPT2Config
from gpt2ds.gpt2.loss import whole_cross_entropy
from gpt2ds.gpt2.model import GPT2
from gpt2ds.gpt2.policies import POLICIES, PRODUCTS, recomputed_flops_per_token
from gpt2ds.gpt2.recompute import ATTENTION_KERNELS

B, T, D, L = 2, 33, 32, 2
TOKENS = B * T  # 66 = 3 · 22 = 5 · 13 + 1 = 65 + 1
sdpa = F.scaled_dot_product_attention
CHUNKS = {"divides": 22, "one token left over": 13, "all but one token": 65, "larger than the batch": 1000}
ON_CPU = sorted(set(POLICIES) - {"host"})

needs_cuda = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
EVERYWHERE = [
    *(pytest.param(policy, "cpu", id=policy) for policy in ON_CPU),
    *(pytest.param(policy, "cuda", id=f"{policy}-cuda", marks=needs_cuda) for policy in sorted(POLICIES)),
]

# What a policy computes again, said once more and not read from `policies`. With dropout the second forward runs to the
# end of the block, past the last product.
AGAIN = {
    "none": set(),
    "products": set(),
    "alternate": {"proj"},
    "narrow": {"fc"},
    "attention": {"qkv", "proj", "fc"},
    "full": {"qkv", "proj", "fc", "attention"},
}
# The kernel has to draw its mask again; and the mask after the last product comes only after that product.
AGAIN_WITH_DROPOUT = {name: again | {"attention"} if name != "none" else again for name, again in AGAIN.items()}
AGAIN_WITH_DROPOUT |= {name: AGAIN["full"] | {"out"} for name in ("attention", "full")}


def config_of(drop_rate: float = 0.0) -> GPT2Config:
    return GPT2Config(name="x", emb_dim=D, n_heads=2, n_layers=L, context_length=T, vocab_size=501, drop_rate=drop_rate)


def build(policy: str, *, chunk: int = 1000, drop_rate: float = 0.0, device: str = "cpu") -> GPT2:
    torch.manual_seed(4)
    model = GPT2(config_of(drop_rate), recompute=policy, loss_chunk=chunk)
    for parameter in model.parameters():  # a bias of zero and a gain of one would hide one that is left out
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.1, std=0.3)
    return model.to(device)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 501, (B, T + 1), generator=torch.manual_seed(3))
    return tokens[:, :-1], tokens[:, 1:]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def loss_and_gradients(model: GPT2, *, whole: bool = False, seed: int = 5) -> dict[str, torch.Tensor]:
    ids, targets = (tensor.to(model.wte.weight.device) for tensor in batch())
    torch.manual_seed(seed)
    if whole:
        loss = whole_cross_entropy(model.hidden(ids).flatten(0, 1), model.wte.weight, targets.flatten())
    else:
        loss = model(ids, targets)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    return {"loss": loss.detach(), **gradients}


def assert_same(results: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 2e-6) -> None:
    assert results.keys() == expected.keys()
    worst = max(expected, key=lambda name: relative(results[name], expected[name]))
    assert relative(results[worst], expected[worst]) <= tolerance, worst


@pytest.mark.parametrize(("policy", "device"), EVERYWHERE)
@pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS.keys())
def test_loss_and_every_gradient_are_the_plain_models(policy: str, device: str, chunk: int) -> None:
    plain = loss_and_gradients(build("none", device=device), whole=True)
    assert len(plain) == 1 + 4 + 11 * L  # the loss; wte, wpe and ln_f; four matrices and seven vectors of each block
    assert_same(loss_and_gradients(build(policy, chunk=chunk, device=device)), plain)


@pytest.mark.parametrize(("policy", "device"), EVERYWHERE)
def test_dropout_draws_the_same_masks_again(policy: str, device: str) -> None:
    plain = loss_and_gradients(build("none", drop_rate=0.2, device=device), whole=True)
    assert_same(loss_and_gradients(build(policy, chunk=13, drop_rate=0.2, device=device)), plain)
    other = loss_and_gradients(build("none", drop_rate=0.2, device=device), seed=6)
    assert relative(other["h.0.mlp.c_fc.weight"], plain["h.0.mlp.c_fc.weight"]) > 0.1  # there is something to draw


@torch.library.custom_op("gpt2ds_test::attention", mutates_args=())
def drawing_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention that draws its own dropout once, in its forward pass, as CUDA's kernels do and no CPU kernel does."""
    mask = (torch.rand_like(v) >= p).to(v.dtype) / (1 - p)
    return sdpa(q, k, v * mask, is_causal=True), mask


def keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], output[1])


def drawing_attention_backward(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    q, k, v, mask = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
    with torch.enable_grad():
        y = sdpa(q, k, v * mask, is_causal=True)
    return *torch.autograd.grad(y, (q, k, v), gradient), None


drawing_attention.register_autograd(drawing_attention_backward, setup_context=keep_for_backward)


@pytest.mark.parametrize("policy", ON_CPU)
def test_attention_that_draws_its_own_dropout_leaves_the_later_masks_alone(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that is kept does not run again and draws nothing, and all masks after it would be others."""
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda q, k, v, dropout_p, is_causal: drawing_attention(q, k, v, dropout_p)[0],
    )
    monkeypatch.setattr(
        "gpt2ds.gpt2.recompute.ATTENTION_KERNELS", ATTENTION_KERNELS | {torch.ops.gpt2ds_test.attention.default}
    )
    plain = loss_and_gradients(build("none", drop_rate=0.2))
    assert_same(loss_and_gradients(build(policy, drop_rate=0.2)), plain)


class Operations(TorchDispatchMode):
    """Counts matrix products and attention kernels, by operation and shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in ATTENTION_KERNELS or func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            shapes = [tuple(argument.shape) for argument in args if isinstance(argument, torch.Tensor)]
            self.seen[func, *shapes[-3 if func in ATTENTION_KERNELS else -2 :]] += 1
        return func(*args, **(kwargs or {}))


def operations(model: GPT2) -> Counter[tuple[Any, ...]]:
    ids, targets = batch()
    with Operations() as mode:
        model(ids, targets).backward()
    return mode.seen


def name_of(operation: tuple[Any, ...]) -> str:
    """The product that an operation of the forward pass is."""
    func, *shapes = operation
    if func in ATTENTION_KERNELS:
        return "attention"
    by_shape = {((TOKENS, D * rows), (D * rows, D * columns)): name for name, (rows, columns) in PRODUCTS.items()}
    return by_shape[tuple(shapes)]


@pytest.mark.parametrize("drop_rate", [0.0, 0.2])
@pytest.mark.parametrize("policy", ON_CPU)
def test_only_the_named_products_run_again_once_per_block(policy: str, drop_rate: float) -> None:
    plain, seen = operations(build("none", drop_rate=drop_rate)), operations(build(policy, drop_rate=drop_rate))
    assert not plain - seen  # nothing is left out
    again = {name_of(operation): times for operation, times in (seen - plain).items()}
    expected = (AGAIN_WITH_DROPOUT if drop_rate else AGAIN)[policy]
    if drop_rate:  # on a CPU, attention with dropout is no kernel of its own
        expected = expected - {"attention"}
    assert again == dict.fromkeys(expected, L)


@pytest.mark.parametrize("drop_rate", [0.0, 0.2])
@pytest.mark.parametrize("policy", ON_CPU)
def test_the_flops_that_are_predicted_are_those_of_these_products(policy: str, drop_rate: float) -> None:
    flops = {name: 2 * rows * columns * D * D for name, (rows, columns) in PRODUCTS.items()} | {"attention": 4 * T * D}
    expected = (AGAIN_WITH_DROPOUT if drop_rate else AGAIN)[policy]
    assert recomputed_flops_per_token(config_of(drop_rate), policy, T) == L * sum(flops[name] for name in expected)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("policy", ["none", "full"])
def test_compiled_blocks_give_the_same_loss_and_gradients(policy: str) -> None:
    plain = loss_and_gradients(build("none"), whole=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build(policy, chunk=13)
    for block in model.h:
        block.compile()
    # The compiler sums in another order: single rounding errors, not single digits.
    assert_same(loss_and_gradients(model), plain, tolerance=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
