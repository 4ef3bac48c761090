"""What of a profile the memory formula leaves out, in words: figures that are silently wrong are worse than none."""

from gpt2ds.ds_profile import DsProfile
from gpt2ds.ds_rules import section

# Elements of a tensor from which staying whole on every rank is more than the formula's rounding.
LARGE_PERSISTENT_ELEMENTS = 1_000_000


def left_out(profile: DsProfile) -> list[str]:
    """A sentence for each key that changes the memory and that the prediction does not know."""
    zero = section(profile.settings, "zero_optimization")
    params = section(profile.settings, "optimizer.params")
    stage = profile.zero_stage
    unfused = bool(params.get("torch_adam")) and not params.get("fused") and not profile.eight_bit_states
    persistent = zero.get("stage3_param_persistence_threshold", 0)
    # ZeRO-1's bf16 optimizer has no bucket.
    bucketed = stage == 2 or (stage == 1 and profile.dtype != "bf16")
    ratio = section(zero, "offload_optimizer").get("ratio", 1)
    keys = (
        (
            unfused and not profile.offload_optimizer,
            "torch's AdamW without fused",
            # Traced, gpt2_small at ZeRO-2: 1.5 bytes with foreach, 5.5 with its loop over the parameters.
            "more than said in the optimizer step, up to 6 bytes a parameter",
        ),
        (
            stage == 3 and persistent > LARGE_PERSISTENT_ELEMENTS,
            f"stage3_param_persistence_threshold {persistent:,}",
            "more than said, weights that stay whole on every GPU",
        ),
        (
            stage == 3 and profile.offload_optimizer is not None and ratio < 1,
            f"offload_optimizer.ratio {ratio:g}",
            "more than said on the GPU and less on the host",
        ),
        (
            bucketed and not zero.get("contiguous_gradients", True),
            "contiguous_gradients false",
            "less than said in the backward pass, up to a bucket",
        ),
        (
            zero.get("zero_hpz_partition_size", 1) > 1,
            "zero_hpz_partition_size",
            "more than said, a second copy of the weights' shards",
        ),
    )
    return [f"the prediction leaves out {name}: {effect}." for counts, name, effect in keys if counts]
