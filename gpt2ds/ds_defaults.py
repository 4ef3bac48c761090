"""What a profile leaves open, decided here where DeepSpeed's own default is wrong for GPT-2, with the reasons."""

from typing import Any

from gpt2ds.ds_rules import Settings, dtype_of, offload_of, section, stage_of

BUCKET_ELEMENTS = 20_000_000
ADAM = {"betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}  # GPT-3's (Brown et al. 2020, appendix B)
# DeepSpeed's limits of 1e9 parameters keep every GPT-2 gathered from forward to backward (2 bytes a parameter), and its
# optimizer takes all gradients to fp32 at once; sub_group_size makes it step through tiles.
_STAGE3 = {
    "stage3_max_live_parameters": 50_000_000,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 20_000_000,
    "sub_group_size": 50_000_000,
}


def complete(settings: Settings) -> list[str]:
    """Write what is missing into `settings`, which the rules have passed; returns a sentence for each, for the log."""
    settings.setdefault("zero_optimization", {}).setdefault("stage", 0)
    notes: list[str] = []
    for part in (_batch, _gradients, _zero, _optimizer, _without_effect):
        notes += part(settings)
    settings.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)  # it synchronises
    return notes


def _batch(settings: Settings) -> list[str]:
    total = settings.get("train_batch_size")
    micro = settings.get("train_micro_batch_size_per_gpu")
    if "gradient_accumulation_steps" in settings or (total is not None and micro is not None):
        return []
    settings["gradient_accumulation_steps"] = 1
    return ["gradient_accumulation_steps is not given: 1, as DeepSpeed takes it"]


def _gradients(settings: Settings) -> list[str]:
    notes = []
    if "gradient_clipping" not in settings:
        settings["gradient_clipping"] = 1.0
        notes.append("gradient_clipping is not given: gradients are clipped to a norm of 1.0")
    stage, dtype = stage_of(settings), dtype_of(settings)
    types = settings.setdefault("data_types", {})
    given = "grad_accum_dtype" in types
    reason = _why_sixteen_bits(settings)
    accumulate = types.setdefault("grad_accum_dtype", dtype if reason else "fp32")
    if dtype != "fp32" and accumulate == "fp32" and not given:
        notes.append(f"gradients accumulate in fp32 (DeepSpeed's default is the weights' own {dtype})")
    elif accumulate != "fp32" and settings.get("gradient_accumulation_steps") != 1:
        notes.append(
            f"gradients accumulate in {accumulate}: {reason or 'the profile says so, fp32 would be more exact'}"
        )
    if stage == 1 and dtype == "bf16" and accumulate == "fp32" and not offload_of(settings, "optimizer"):
        # Without it every gradient lives twice, in bf16 beside its fp32 sum: 2 bytes a parameter (bf16_optimizer.py).
        settings["bf16"].setdefault("immediate_grad_update", True)
    return notes


def _why_sixteen_bits(settings: Settings) -> str | None:
    """Why fp32 accumulation is not the choice for this profile; None where it is (or where the weights are fp32)."""
    stage, dtype = stage_of(settings), dtype_of(settings)
    if dtype == "fp32":
        return None
    if stage == 0:
        return f"DeepSpeed has no fp32 accumulation for {dtype} without ZeRO"
    if stage < 3 and offload_of(settings, "optimizer"):
        # stage_1_and_2.py: the fp32 sums stay on the GPU even under offload; ZeRO-3 keeps them in host memory.
        return f"with the optimizer offloaded, ZeRO-{stage} would keep fp32 sums of 4 bytes a parameter on the GPUs"
    if section(settings, "bf16").get("bf16_master_weights_and_grads"):
        return "the profile keeps the optimizer's gradients in bf16"
    return None


def _zero(settings: Settings) -> list[str]:
    zero, stage = settings["zero_optimization"], stage_of(settings)
    if stage == 0:
        return []
    notes = []
    if "reduce_bucket_size" not in zero:
        zero["reduce_bucket_size"] = BUCKET_ELEMENTS
        notes.append("reduce_bucket_size is not given: 20 million elements (DeepSpeed's 500 million take 1 to 2 GB)")
    missing = {key: value for key, value in _STAGE3.items() if stage == 3 and key not in zero}
    if missing:
        zero |= missing
        values = ", ".join(f"{key} {value:,}" for key, value in missing.items())
        notes.append(f"ZeRO-3 for the sizes of GPT-2, where the profile is silent: {values}")
    return notes


def _optimizer(settings: Settings) -> list[str]:
    notes = []
    optimizer: dict[str, Any] = settings.setdefault("optimizer", {})
    optimizer.setdefault("type", "AdamW")
    params: dict[str, Any] = optimizer.setdefault("params", {})
    missing = {key: value for key, value in ADAM.items() if key not in params}
    if missing:
        params |= {key: list(value) if isinstance(value, list) else value for key, value in missing.items()}
        notes.append(
            "AdamW, where the profile is silent: " + ", ".join(f"{key} {value}" for key, value in missing.items())
        )
    if not _wants_deepspeed_adam(settings):
        if params.setdefault("torch_adam", True) and "foreach" not in params:
            # No compiler needed and no temporaries: measured 22.0004 bytes a parameter at the step, the plain loop 26.
            params.setdefault("fused", True)
    elif not params.get("torch_adam"):
        notes.append("the optimizer is DeepSpeed's own Adam, which is compiled at the first start")
    if offload_of(settings, "optimizer") and params.get("torch_adam"):
        settings.setdefault("zero_force_ds_cpu_optimizer", False)
    return notes


def _wants_deepspeed_adam(settings: Settings) -> bool:
    """Whether something in the profile works only with FusedAdam or DeepSpeedCPUAdam."""
    offload = section(settings, "zero_optimization.offload_optimizer")
    params = section(settings, "optimizer.params")
    master = section(settings, "bf16").get("bf16_master_weights_and_grads") and offload_of(settings, "optimizer")
    return bool(
        offload.get("device") == "nvme"
        or offload.get("ratio", 1) < 1
        or master
        or section(settings, "fp16").get("fp16_master_weights_and_grads")
        or "bias_correction" in params
        or "fp32_optimizer_states" in params
    )


def _without_effect(settings: Settings) -> list[str]:
    zero, stage = settings["zero_optimization"], stage_of(settings)
    notes = []
    idle = [key for key in zero if stage < 3 and (key.startswith("stage3_") or key == "sub_group_size")]
    if idle:
        notes.append(f"without effect at ZeRO stage {stage}: {', '.join(idle)}")
    if settings.get("activation_checkpointing") is not None and settings.get("gpt2ds", {}).get("recompute") == "none":
        notes.append('activation_checkpointing is without effect: "gpt2ds": {"recompute": "none"} overrules it')
    if zero.get("zero_hpz_partition_size", 1) > 1:
        notes.append(
            "zero_hpz_partition_size keeps a second copy of the weights' shards, which the memory plan leaves out"
        )
    for key in ("zero_quantized_weights", "zero_quantized_gradients"):
        if zero.get(key):
            notes.append(f"{key} needs CUDA kernels that are compiled at the first start, and changes the training")
    return notes
