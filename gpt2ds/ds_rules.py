"""Settings that are sound one by one and wrong together: what DeepSpeed ignores silently, or answers with a riddle.

Each rule reads settings that `ds_keys.check_keys` has passed and gives sentences that say what to write instead.
"""

from collections.abc import Callable, Collection, Iterator
from typing import Any

Settings = dict[str, Any]

RECOMPUTE_POLICIES = ("none", "products", "alternate", "narrow", "attention", "full", "host")

OPTIMIZERS = {"adamw": "AdamW", "adam": "Adam"}  # those that gpt2ds trains GPT-2 with; "Adam" is AdamW to DeepSpeed too


def combination_problems(settings: Settings, broken: Collection[str] = ()) -> list[str]:
    """Every combination in the settings that does not do what it says, one sentence each, with the cure.

    `broken` names the keys that had no sound value: rules that depend on one of them are silent, as they would guess.
    """
    return [
        problem
        for rule, needs in _RULES
        if not any(_same_or_inside(a, b) or _same_or_inside(b, a) for a in needs.split() for b in broken)
        for problem in rule(settings)
    ]


def _same_or_inside(path: str, outer: str) -> bool:
    return path == outer or path.startswith(outer + ".")


def section(settings: Settings, path: str) -> Settings:
    """The section at a dotted path, empty when it is not there."""
    for name in path.split("."):
        settings = settings.get(name, {})
    return settings


def dtype_of(settings: Settings) -> str:
    """The type of the weights in forward and backward: "fp32", "bf16" or "fp16"."""
    return next((name for name in ("bf16", "fp16") if section(settings, name).get("enabled")), "fp32")


def stage_of(settings: Settings) -> int:
    """The ZeRO stage, 0 when the section is missing."""
    return int(section(settings, "zero_optimization").get("stage", 0))


def offload_of(settings: Settings, what: str) -> str | None:
    """Where `what` ("optimizer" or "param") is offloaded to: "cpu", "nvme" or None."""
    device = section(settings, f"zero_optimization.offload_{what}").get("device", "none")
    return None if device == "none" else str(device)


def optimizer_name(settings: Settings) -> str:
    """The optimizer in DeepSpeed's spelling; AdamW when the profile names none."""
    name = str(section(settings, "optimizer").get("type", "AdamW"))
    return OPTIMIZERS.get(name.lower(), name)


def _batch(settings: Settings) -> Iterator[str]:
    total = settings.get("train_batch_size")
    micro = settings.get("train_micro_batch_size_per_gpu")
    accumulation = settings.get("gradient_accumulation_steps")
    if total is None and micro is None:
        yield (
            "the batch is missing: write train_micro_batch_size_per_gpu (sequences per GPU at a time) and "
            "gradient_accumulation_steps as numbers"
        )
        return
    if micro == "auto" and total is None:
        yield (
            'train_micro_batch_size_per_gpu "auto" needs a train_batch_size: the sequences per optimizer step '
            "that are kept whatever fits on a GPU"
        )
    if accumulation == "auto" and micro != "auto":
        yield 'gradient_accumulation_steps "auto" goes only with train_micro_batch_size_per_gpu "auto": write a number'
    if total is None:
        return
    known = 1
    names = []
    for name, value in (("train_micro_batch_size_per_gpu", micro), ("gradient_accumulation_steps", accumulation)):
        if isinstance(value, int):
            known *= value
            names.append(f"{name} {value}")
    if total % known:
        below, above = total // known * known, (total // known + 1) * known
        nearest = f"{below} or {above}" if below else f"{above}"
        yield (
            f"train_batch_size {total} is not {' × '.join(names)} × a number of ranks: write {nearest}, "
            "or leave train_batch_size out"
        )


def _precision(settings: Settings) -> Iterator[str]:
    bf16, fp16 = section(settings, "bf16"), section(settings, "fp16")
    stage, dtype = stage_of(settings), dtype_of(settings)
    if bf16.get("enabled") and fp16.get("enabled"):
        yield "bf16 and fp16 are both enabled: keep bf16 on Ampere cards and newer ones, fp16 on older ones"
        return
    if section(settings, "torch_autocast").get("enabled"):
        with_it = "the weights are in 16 bits already" if dtype != "fp32" else "its weights stay in fp32, 16 bytes each"
        yield f'torch_autocast saves no memory ({with_it}): remove it and write "bf16": {{"enabled": true}}'
    accumulate = section(settings, "data_types").get("grad_accum_dtype", None)
    if accumulate not in (None, "fp32", dtype):
        yield f'data_types.grad_accum_dtype "{accumulate}" under {dtype} weights: write "fp32"' + (
            f' or "{dtype}"' if dtype != "fp32" else ""
        )
    elif stage == 0 and dtype != "fp32" and accumulate == "fp32":
        yield (
            f'data_types.grad_accum_dtype "fp32": DeepSpeed has no fp32 accumulation for {dtype} without ZeRO: '
            f'write "{dtype}", or "zero_optimization": {{"stage": 1}}'
        )
    parameters = section(settings, "data_types").get("param_dtype", dtype)
    if parameters != dtype:
        yield f'data_types.param_dtype "{parameters}" contradicts the weights in {dtype}: remove it'
    communication = settings.get("communication_data_type", dtype)
    if communication not in ("fp32", dtype):
        yield f'communication_data_type "{communication}" under {dtype} weights: remove it, or write "fp32"'
    if bf16.get("enabled") and not bf16.get("check_grad_overflow", True):
        yield "bf16.check_grad_overflow false lets a step with NaN gradients reach the weights: remove it"


def _sixteen_bit_states(settings: Settings) -> Iterator[str]:
    bf16, fp16 = section(settings, "bf16"), section(settings, "fp16")
    master = bool(bf16.get("bf16_master_weights_and_grads"))
    states = bool(bf16.get("bf16_optimizer_states"))
    offloaded = offload_of(settings, "optimizer") is not None
    torch_adam = section(settings, "optimizer.params").get("torch_adam")
    if states and not master:
        yield "bf16.bf16_optimizer_states needs bf16_master_weights_and_grads: true beside it"
    for name, asked, enabled in (
        ("bf16.bf16_master_weights_and_grads", master, bf16.get("enabled")),
        ("fp16.fp16_master_weights_and_grads", fp16.get("fp16_master_weights_and_grads"), fp16.get("enabled")),
    ):
        if not asked:
            continue
        if not enabled:
            yield f'{name} has no effect here: write "enabled": true beside it'
        elif stage_of(settings) == 0:
            yield f'{name} works only with ZeRO: write "zero_optimization": {{"stage": 2}}'
        elif not states and not offloaded:
            cure = "bf16_optimizer_states: true beside it, or " if name.startswith("bf16") else ""
            yield f'{name} needs {cure}"offload_optimizer": {{"device": "cpu"}}'
        elif offloaded and torch_adam:
            yield f"{name} with offload needs DeepSpeed's own CPU Adam: remove torch_adam and fused"
    accumulate = section(settings, "data_types").get("grad_accum_dtype")
    if master and stage_of(settings) == 1 and accumulate == "fp32":
        yield (
            "bf16.bf16_master_weights_and_grads is ignored by ZeRO-1 with fp32 accumulation, its states stay in fp32: "
            'write "data_types": {"grad_accum_dtype": "bf16"} or ZeRO stage 2'
        )


def _zero(settings: Settings) -> Iterator[str]:
    zero, stage = section(settings, "zero_optimization"), stage_of(settings)
    if stage == 0 and zero.get("overlap_comm"):
        yield "zero_optimization.overlap_comm has no effect at stage 0: remove it, or write stage 1, 2 or 3"
    if zero.get("allgather_bucket_size", 0) % 2:
        yield "zero_optimization.allgather_bucket_size must be even"
    if zero.get("elastic_checkpoint"):
        yield "zero_optimization.elastic_checkpoint does nothing any more (other numbers of ranks fail): remove it"
    if not zero.get("compute_grad_norm", True):
        yield "zero_optimization.compute_grad_norm false: clipping and the check for NaN need the norm: remove it"
    if zero.get("stage3_module_granularity_threshold", 0):
        yield "zero_optimization.stage3_module_granularity_threshold above 0 fails in the backward pass: remove it"
    for key in ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights"):
        if zero.get(key) and stage < 3:
            yield f"zero_optimization.{key} acts only at stage 3: remove it, or write stage 3"
    if zero.get("zero_hpz_partition_size", 1) > 1 and stage < 3:
        yield "zero_optimization.zero_hpz_partition_size acts only at stage 3: remove it, or write stage 3"
    scatters = stage >= 2 and zero.get("reduce_scatter", True)
    if scatters and settings.get("prescale_gradients"):
        yield f'prescale_gradients does not go with ZeRO-{stage}: remove it, or write "reduce_scatter": false'
    if scatters and settings.get("gradient_predivide_factor", 1) != 1:
        yield f'gradient_predivide_factor does not go with ZeRO-{stage}: remove it, or write "reduce_scatter": false'


def _offload(settings: Settings) -> Iterator[str]:
    stage = stage_of(settings)
    for what, least in (("optimizer", 1), ("param", 3)):
        name = f"zero_optimization.offload_{what}"
        options, device = section(settings, name), offload_of(settings, what)
        if options and "device" not in options:
            yield f'{name} without a device offloads nothing: write "device": "cpu"'
        if device and stage < least:
            at = "stage 3" if least == 3 else "stage 1, 2 or 3"
            yield f"{name} is ignored at ZeRO stage {stage}: write {at}, or remove it"
        elif device == "nvme" and stage < 3:
            yield f'{name} to nvme is taken for cpu at ZeRO stage {stage}: write stage 3, or "device": "cpu"'
        if device == "nvme" and not options.get("nvme_path"):
            yield f'{name} to nvme needs a folder on that disk: write "nvme_path": "/path/on/the/disk"'
    options = section(settings, "zero_optimization.offload_optimizer")
    params = section(settings, "optimizer.params")
    if options.get("super_offload"):
        yield "zero_optimization.offload_optimizer.super_offload is for Grace Hopper chips only: remove it"
    if options.get("ratio", 1) < 1 and stage < 3:
        yield "zero_optimization.offload_optimizer.ratio below 1 works only at ZeRO stage 3: write stage 3 or remove it"
    elif options.get("ratio", 1) < 1 and params.get("torch_adam"):
        yield "zero_optimization.offload_optimizer.ratio needs DeepSpeed's own CPU Adam: remove torch_adam and fused"
    if offload_of(settings, "optimizer") == "nvme" and params.get("torch_adam"):
        yield "zero_optimization.offload_optimizer to nvme needs DeepSpeed's CPU Adam: remove torch_adam and fused"


def _optimizer(settings: Settings) -> Iterator[str]:
    given = section(settings, "optimizer")
    name, params = optimizer_name(settings), section(settings, "optimizer.params")
    if given and "type" not in given:
        yield 'optimizer without a type: write "type": "AdamW"'
        return
    if name not in OPTIMIZERS.values():
        reasons = {
            "muon": "it would also orthogonalise the embeddings wte and wpe, whose names it does not know",
            "lamb": "its norms per tensor are wrong on ZeRO's flat partitions",
            "onebitadam": "DeepSpeed has removed it",
            "zerooneadam": "DeepSpeed has removed it",
            "onebitlamb": "DeepSpeed has removed it",
        }
        reason = reasons.get(name.lower(), "the learning rates and the memory plan of gpt2ds are those of AdamW")
        yield f'optimizer.type "{name}": {reason}: write "AdamW"'
    if params.get("fused") and params.get("foreach"):
        yield "optimizer.params: fused and foreach exclude each other: keep fused, which needs no temporaries"
    if params.get("amsgrad"):
        yield "optimizer.params.amsgrad keeps a third state, for which the memory plan has no place: remove it"
    if stage_of(settings) == 0 and dtype_of(settings) != "fp32":
        own = ["bias_correction", "fp32_optimizer_states"]
        own = ["torch_adam: false"] * (params.get("torch_adam") is False) + [key for key in own if key in params]
        if own:
            yield (
                f"optimizer.params.{own[0]} takes DeepSpeed's own Adam, which is untested with 16 bits at ZeRO "
                "stage 0: remove it, or write stage 1"
            )
    for key in ("fused", "foreach"):
        if key in params and not params.get("torch_adam", True):
            yield f'optimizer.params.{key} is PyTorch\'s: write "torch_adam": true beside it'
    for key in ("bias_correction", "fp32_optimizer_states"):
        if key in params and (params.get("torch_adam") or "fused" in params or "foreach" in params):
            yield f"optimizer.params.{key} is DeepSpeed's own and PyTorch's Adam does not take it: remove it"


def _recompute(settings: Settings) -> Iterator[str]:
    block = section(settings, "activation_checkpointing")
    reasons = {
        "partition_activations": "without tensor parallelism it saves nothing",
        "contiguous_memory_optimization": "it needs partition_activations, which saves nothing here",
        "number_checkpoints": "gpt2ds recomputes every block",
        "synchronize_checkpoint_boundary": "it acts only in DeepSpeed's own checkpointing, which gpt2ds does not use",
        "profile": "it acts only in DeepSpeed's own checkpointing, which gpt2ds does not use",
    }
    for key, reason in reasons.items():
        if block.get(key):
            yield f'activation_checkpointing.{key}: {reason}: remove it ("activation_checkpointing": {{}} is enough)'
    policy = section(settings, "gpt2ds").get("recompute", "host")
    if block.get("cpu_checkpointing") and policy != "host":
        yield (
            f'activation_checkpointing.cpu_checkpointing keeps what "gpt2ds": {{"recompute": "{policy}"}} does not: '
            "remove one of them"
        )


def _compile(settings: Settings) -> Iterator[str]:
    own = section(settings, "gpt2ds")
    if not own.get("compile"):
        return
    if stage_of(settings) == 3:
        yield (
            "gpt2ds.compile: ZeRO-3 fetches weights in hooks that break every compiled block apart: "
            "remove it, or write stage 1 or 2"
        )
    to_host = section(settings, "activation_checkpointing").get("cpu_checkpointing")
    policy = own.get("recompute", "host" if to_host else "none")
    if policy == "host":
        yield "gpt2ds.compile does not go with block inputs in host memory (cpu_checkpointing): remove one of them"
    elif policy not in ("none", "full"):
        yield (
            f'gpt2ds.compile: the products that the recompute policy "{policy}" keeps do not exist in compiled blocks: '
            'write "none" or "full"'
        )


def _eight_bit_states(settings: Settings) -> Iterator[str]:
    if not section(settings, "gpt2ds").get("eight_bit_states"):
        return
    if offload_of(settings, "optimizer"):
        yield "gpt2ds.eight_bit_states: offloaded states take no memory of the GPU: remove one of the two"
    if section(settings, "bf16").get("bf16_master_weights_and_grads"):
        yield "gpt2ds.eight_bit_states needs fp32 master weights: remove bf16_master_weights_and_grads"
    if stage_of(settings) not in (1, 2):
        yield f"gpt2ds.eight_bit_states works with ZeRO stage 1 and 2, not {stage_of(settings)}: write stage 2"
    if not settings.get("zero_allow_untested_optimizer", True):
        yield "gpt2ds.eight_bit_states: its AdamW is not DeepSpeed's own: remove zero_allow_untested_optimizer false"
    for key in ("bias_correction", "fp32_optimizer_states", "foreach", "adam_w_mode"):
        if key in section(settings, "optimizer.params"):
            yield f"gpt2ds.eight_bit_states: bitsandbytes' AdamW does not take optimizer.params.{key}: remove it"


def _elsewhere(settings: Settings) -> Iterator[str]:
    if not settings.get("managed_gradient_accumulation", True):
        yield "managed_gradient_accumulation false: gpt2ds leaves the counting of micro-batches to DeepSpeed: remove it"
    if settings.get("memory_breakdown"):
        yield (
            "memory_breakdown: DeepSpeed resets CUDA's peak memory in the middle of a step, and the log's comparison "
            "with the prediction would be wrong: remove it (the training log has the memory of every step)"
        )
    if settings.get("gradient_allreduce_op") == "sum":
        yield 'gradient_allreduce_op "sum" makes gradients grow with the number of ranks: remove it'
    for key in ("load_universal", "use_node_local_storage"):
        if section(settings, "checkpoint").get(key):
            yield f"checkpoint.{key}: where checkpoints lie and which one is loaded is for `gpt2ds train`: remove it"


# Each rule with the keys without which it cannot judge.
_RULES: tuple[tuple[Callable[[Settings], Iterator[str]], str], ...] = (
    (_batch, "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps"),
    (_precision, "bf16.enabled fp16.enabled data_types zero_optimization.stage"),
    (_sixteen_bit_states, "bf16 fp16 data_types zero_optimization.stage zero_optimization.offload_optimizer optimizer"),
    (_zero, "zero_optimization.stage"),
    (_offload, "zero_optimization.stage zero_optimization.offload_optimizer zero_optimization.offload_param"),
    (_optimizer, "optimizer.type"),
    (_recompute, "activation_checkpointing gpt2ds"),
    (_compile, "gpt2ds activation_checkpointing zero_optimization.stage"),
    (_eight_bit_states, "gpt2ds bf16 optimizer zero_optimization.stage zero_optimization.offload_optimizer"),
    (_elsewhere, "checkpoint"),
)
