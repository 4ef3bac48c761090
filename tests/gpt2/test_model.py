"""The model against Hugging Face's, and its initial weights."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from gpt2.initial import check_initial
from support import run_ranks

from gpt2ds.gpt2.config import MODELS, GPT2Config
from gpt2ds.gpt2.generate import sample_tokens
from gpt2ds.gpt2.model import GPT2
from gpt2ds.gpt2.weights import from_hugging_face, load_model, save_weights, to_hugging_face

SMALL = GPT2Config(name="small", emb_dim=64, n_heads=4, n_layers=3, context_length=48, vocab_size=50257, qkv_bias=True)


def hugging_face(config: GPT2Config) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.context_length,
            n_embd=config.emb_dim,
            n_layer=config.n_layers,
            n_head=config.n_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def pair() -> tuple[GPT2, torch.nn.Module]:
    torch.manual_seed(0)
    ours = GPT2(SMALL, loss_chunk=37)
    for parameter in ours.parameters():  # biases of zero would hide a bias in the wrong place
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.1, std=0.1)
    theirs = hugging_face(SMALL)
    report = theirs.load_state_dict(to_hugging_face(ours.state_dict()), strict=False)
    assert not report.missing_keys
    assert not report.unexpected_keys
    return ours, theirs


def test_logits_and_gradients_equal_hugging_face(pair: tuple[GPT2, torch.nn.Module]) -> None:
    ours, theirs = pair
    tokens = torch.randint(0, SMALL.vocab_size, (3, SMALL.context_length + 1), generator=torch.manual_seed(1))
    ids, targets = tokens[:, :-1], tokens[:, 1:]
    logits = theirs(ids).logits
    torch.testing.assert_close(ours(ids), logits, rtol=0, atol=1e-5)

    loss = ours(ids, targets)
    reference = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, reference)
    loss.backward()
    reference.backward()
    expected = from_hugging_face({name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        ours_grad, their_grad = parameter.grad, expected[name]
        if name.endswith("c_attn.bias"):  # the key bias shifts all scores of a row alike: its true gradient is zero
            d = SMALL.emb_dim
            ours_grad, their_grad = (torch.cat([g[:d], g[2 * d :]]) for g in (ours_grad, their_grad))
        assert relative(ours_grad, their_grad) < 1e-5, name


def test_weights_travel_to_hugging_face_and_back(pair: tuple[GPT2, torch.nn.Module]) -> None:
    ours, theirs = pair
    back = from_hugging_face(theirs.state_dict())
    assert set(back) == set(ours.state_dict())
    for name, tensor in ours.state_dict().items():
        assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize(
    ("name", "millions"),
    [("gpt2_small", 124.4), ("gpt2_medium", 354.8), ("gpt2_large", 774.0), ("gpt2_xl", 1557.6)],
)
def test_parameter_counts_are_gpt2s(name: str, millions: float) -> None:
    from dataclasses import replace

    config = replace(MODELS[name], qkv_bias=True)  # as OpenAI's models have
    assert round(config.parameters / 1e6, 1) == millions
    with torch.device("meta"):
        model = GPT2(MODELS[name])
    assert sum(p.numel() for p in model.parameters()) == MODELS[name].parameters


def test_initial_standard_deviations() -> None:
    config = GPT2Config(name="wide", emb_dim=128, n_heads=2, n_layers=12, context_length=256, vocab_size=4096)
    torch.manual_seed(0)
    for name, parameter in GPT2(config).named_parameters():
        check_initial(name, parameter)


def test_initial_standard_deviations_hold_under_zero_init() -> None:
    run_ranks(Path(__file__).with_name("zero_init_worker.py"), ranks=1)


def test_recompute_and_chunk_size_change_nothing() -> None:
    config = GPT2Config(name="x", emb_dim=32, n_heads=2, n_layers=2, context_length=24, vocab_size=300)
    tokens = torch.randint(0, 300, (2, 25), generator=torch.manual_seed(3))
    results = []
    for recompute, chunk in (("none", 1024), ("full", 7)):
        torch.manual_seed(4)
        model = GPT2(config, recompute=recompute, loss_chunk=chunk)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0])
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert relative(a, b) < 2e-6


def test_recompute_keeps_only_block_inputs() -> None:
    config = GPT2Config(name="x", emb_dim=64, n_heads=2, n_layers=4, context_length=64, vocab_size=100)
    ids = torch.randint(0, 100, (2, 64))

    def saved_bytes(recompute: str) -> int:
        model, seen = GPT2(config, recompute=recompute), {}
        kept = {p.data_ptr() for p in model.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.data_ptr() not in kept:
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model.hidden(ids)
        del output
        return sum(seen.values())

    per_block = 2 * 64 * 64 * 4  # B * T * d * 4 bytes
    assert saved_bytes("none") > 4 * 15 * per_block
    assert saved_bytes("full") < 4 * 3 * per_block


def test_weights_file_brings_its_own_size(tmp_path: Path) -> None:
    config = GPT2Config(name="own", emb_dim=32, n_heads=2, n_layers=2, context_length=16, vocab_size=100)
    model = GPT2(config).eval()
    save_weights(tmp_path / "model.safetensors", config, model.state_dict())
    again = load_model(tmp_path / "model.safetensors")
    assert again.config == config
    ids = torch.randint(0, 100, (1, 16))
    assert torch.equal(model(ids), again(ids))


def test_generation_is_a_function_of_the_seed_and_honours_top_k() -> None:
    config = GPT2Config(name="own", emb_dim=32, n_heads=2, n_layers=2, context_length=8, vocab_size=100)
    torch.manual_seed(0)
    model = GPT2(config).eval()

    def run(**options: float) -> list[int]:
        defaults: dict = {"tokens": 20, "context": 8, "seed": 5, "temperature": 1.0, "top_k": 50}
        return list(sample_tokens(lambda ids: model(ids, last_only=True), [1, 2, 3], **(defaults | options)))

    assert run() == run()
    assert run() != run(seed=6)
    greedy = run(temperature=0.0)
    assert greedy == run(top_k=1)
    ids = torch.tensor([[1, 2, 3]])
    assert greedy[0] == int(model(ids)[0, -1].argmax())
