"""Every memory technique on two real ranks against plain torch on one: first gradients, and 20 steps of training."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support import PROFILES, run_ranks

# Each stage without and with accumulation; each policy at ZeRO-2 and at ZeRO-3. The global batch is 8 sequences of 31
# tokens throughout: a micro-batch has 124 tokens, or 31. Chunks of 41 and 10 leave one token over, 31 none.
EXACT: dict[str, tuple[int, int, str, int]] = {
    # name: (stage, accumulation, policy, chunk)
    "zero0_a": (0, 1, "none", 31),
    "zero0_b": (0, 4, "full", 10),
    "zero1_a": (1, 1, "narrow", 41),
    "zero1_b": (1, 4, "products", 31),
    "zero2_a": (2, 1, "none", 41),
    "zero2_b": (2, 4, "products", 10),
    "zero2_c": (2, 1, "narrow", 31),
    "zero2_d": (2, 4, "full", 1000),
    "zero2_offload": (2, 4, "alternate", 10),
    "zero3_a": (3, 4, "none", 10),
    "zero3_b": (3, 1, "products", 41),
    "zero3_c": (3, 4, "narrow", 31),
    "zero3_d": (3, 1, "full", 1000),
    "zero3_offload": (3, 4, "attention", 10),
}
if shutil.which("g++"):  # torch.compile needs it on a CPU
    EXACT |= {
        "zero0_compiled": (0, 1, "none", 31),
        "zero1_compiled": (1, 4, "full", 10),
        "zero2_compiled": (2, 1, "none", 41),
    }

# Half as wide as the other tests' model: most of the time goes into passes over the token embedding.
NARROW_MODEL = "models: {small: {emb_dim: 16, n_heads: 2, n_layers: 4, context_length: 32}}"

FETCHING_AHEAD = ("products", "narrow")

SIXTEEN_BITS = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
HAS_EIGHT_BITS = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not HAS_EIGHT_BITS, reason="needs bitsandbytes")
SMALL_STATES = {
    "states16_zero2": (2, SIXTEEN_BITS, {}),
    "states16_zero3": (3, SIXTEEN_BITS, {"recompute": "products"}),
    "states8_zero2": (2, {"bf16": {"enabled": True}}, {"eight_bit_states": True}),
}
SMALL_STATES_TESTED = [
    pytest.param(name, marks=needs_bitsandbytes if name.startswith("states8") else ()) for name in SMALL_STATES
]


def profile_of(name: str, stage: int, accumulation: int, own: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The shipped profile of a stage, in fp32 unless `more` says otherwise, and in small pieces for a small model."""
    shipped = f"zero{stage}_offload" if name.endswith("offload") else f"zero{max(stage, 1)}"
    profile = json.loads((PROFILES / f"{shipped}.json").read_text(encoding="utf-8"))
    for key in ("bf16", "data_types", "activation_checkpointing"):
        profile.pop(key, None)
    zero = profile.pop("zero_optimization") | {"stage": stage}
    if stage:
        zero["reduce_bucket_size"] = 20_000  # several buckets, and a token embedding that is larger than one
    if stage == 3:  # every parameter divided, gathered and freed by itself
        zero |= {"sub_group_size": 500_000, "stage3_prefetch_bucket_size": 20_000, "stage3_max_live_parameters": 20_000}
        zero["stage3_param_persistence_threshold"] = 0
        if own.get("recompute") in FETCHING_AHEAD:
            # In proportion as in the shipped profile: about a block on its way, and two and a half gathered. The second
            # forward of a block then fetches other weights than the first.
            zero |= {"stage3_prefetch_bucket_size": 3_300, "stage3_max_live_parameters": 8_000}
    return profile | {
        "gpt2ds": own,
        "train_micro_batch_size_per_gpu": 4 // accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.5,  # acts at every step
        **({"zero_optimization": zero} if stage else {}),
        **more,
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, corpus_folder: Path) -> dict[str, dict[str, Any]]:
    models_file = tmp_path_factory.mktemp("models") / "narrow.yaml"
    models_file.write_text(NARROW_MODEL, encoding="utf-8")
    folder = tmp_path_factory.mktemp("profiles")
    profiles = {
        name: profile_of(
            name,
            stage,
            accumulation,
            {"recompute": policy, "loss_chunk": chunk, "compile": name.endswith("compiled")},
        )
        for name, (stage, accumulation, policy, chunk) in EXACT.items()
    }
    for name, (stage, precision, own) in SMALL_STATES.items():
        if HAS_EIGHT_BITS or "eight_bit_states" not in own:
            profiles[name] = profile_of(name, stage, 1, own, **precision)
    for name, profile in profiles.items():
        (folder / f"{name}.json").write_text(json.dumps(profile), encoding="utf-8")
    spec = importlib.util.find_spec("bitsandbytes")
    packages = Path(spec.origin).parents[1] if spec and spec.origin else Path()
    worker = Path(__file__).with_name("techniques_worker.py")
    out = run_ranks(worker, folder, models_file, corpus_folder, packages, timeout=480)[0].stdout
    (line,) = [line for line in out.splitlines() if line.startswith("RESULTS ")]
    return json.loads(line.removeprefix("RESULTS "))


@pytest.mark.parametrize("name", EXACT)
def test_first_loss_and_every_gradient_are_the_plain_models(results: dict[str, dict[str, Any]], name: str) -> None:
    result = results[name]
    stage, accumulation, policy, chunk = EXACT[name]
    assert (result["stage"], result["accumulation"], result["recompute"]) == (stage, accumulation, policy)
    assert result["chunks"] == [4 // accumulation * 31, chunk]
    assert result["loss"] <= 2e-6
    difference, tensor = result["gradients"]
    # The compiler sums in another order.
    assert difference <= (1e-5 if name.endswith("compiled") else 2e-6), tensor


@pytest.mark.parametrize("name", EXACT)
def test_after_20_clipped_steps_the_weights_are_the_plain_models(results: dict[str, dict[str, Any]], name: str) -> None:
    assert results[name]["clipped"]
    difference, tensor = results[name]["weights"]
    assert difference <= 1e-5, tensor


@pytest.mark.parametrize("name", SMALL_STATES_TESTED)
def test_states_in_fewer_bits_train(results: dict[str, dict[str, Any]], name: str) -> None:
    losses = results[name]["losses"]
    assert losses[-1] < losses[0] - 0.3
    # In 8 bits every block of 256 has an fp32 scale, and tensors below 4,096 elements stay as they are.
    expected = ["torch.float32", "torch.uint8"] if name.startswith("states8") else ["torch.bfloat16"]
    assert results[name]["state_types"] == expected


@pytest.mark.parametrize("name", SMALL_STATES_TESTED)
def test_states_in_fewer_bits_are_resumed_exactly(results: dict[str, dict[str, Any]], name: str) -> None:
    assert results[name]["resumed_losses_equal"]
    assert results[name]["resumed_weights_equal"]
