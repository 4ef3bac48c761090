"""What may stand in a DeepSpeed JSON: every key with its type, section by section, and the keys that we refuse.

Taken from deepspeed 0.19.8 (each section names its file there; a test compares them with the installed one), because
DeepSpeed itself ignores unknown keys at the top and in half of its sections, and takes "auto" for "not given".
"""

import difflib
import json
import math
from typing import Any, NamedTuple


class Section(NamedTuple):
    """The keys of one JSON object with their specs, and where in the deepspeed package they are defined."""

    source: str
    keys: dict[str, str]


# One line for each type, "type key key ..."; a type is a key of _EXPECTED or a choice a|b|c, ? or |null allows null.
_TABLE = """
[] runtime/config.py:DeepSpeedConfig
int>0 train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps
int>0? steps_per_print vocabulary_size
number>=0 gradient_clipping
number>0 gradient_predivide_factor
bool managed_gradient_accumulation prescale_gradients zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
     wall_clock_breakdown memory_breakdown dump_state disable_python_gc disable_allgather dataloader_drop_last
mean|sum gradient_allreduce_op
fp32|bf16|fp16|null communication_data_type
debug|info|warning|error|critical|null log_level
section gpt2ds bf16 fp16 torch_autocast data_types zero_optimization optimizer activation_checkpointing checkpoint
     aio timers flops_profiler comms_logger tensorboard wandb csv_monitor comet

[bf16] runtime/precision_config.py:DeepSpeedBF16Config
bool enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states

[fp16] runtime/precision_config.py:DeepSpeedFP16Config
bool enabled auto_cast consecutive_hysteresis fp16_master_weights_and_grads
number>=0 loss_scale
int>=0 initial_scale_power
int>0 loss_scale_window hysteresis min_loss_scale

[torch_autocast] runtime/constants.py:TORCH_AUTOCAST_
bool enabled
str dtype
strings lower_precision_safe_modules

[data_types] runtime/constants.py:GRAD_ACCUM_DTYPE
dtype? grad_accum_dtype param_dtype buffer_dtype
strings keep_in_fp32_modules

[zero_optimization] runtime/zero/config.py:DeepSpeedZeroConfig
stage stage
section offload_optimizer offload_param
bool? overlap_comm
int>0 reduce_bucket_size sub_group_size zero_hpz_partition_size
int>=0 allgather_bucket_size stage3_prefetch_bucket_size stage3_param_persistence_threshold
     stage3_model_persistence_threshold stage3_max_live_parameters stage3_max_reuse_distance
     stage3_module_granularity_threshold
bool contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions compute_grad_norm
     load_from_fp32_weights elastic_checkpoint ignore_unused_parameters round_robin_gradients parameter_alignment
     zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear
     pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings enable_sanity_checks
     stage3_gather_16bit_weights_on_model_save stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential

[zero_optimization.offload_optimizer] runtime/zero/offload_config.py:DeepSpeedZeroOffloadOptimizerConfig
none|cpu|nvme device
str? nvme_path
int>=0 buffer_count
bool pin_memory pipeline_read pipeline_write fast_init super_offload
fraction ratio cpuadam_cores_perc

[zero_optimization.offload_param] runtime/zero/offload_config.py:DeepSpeedZeroOffloadParamConfig
none|cpu|nvme device
str? nvme_path
int>=0 buffer_count buffer_size max_in_cpu
bool pin_memory

[optimizer] runtime/config.py:get_optimizer_name
str type
section params
bool legacy_fusion

[optimizer.params] runtime/engine.py:_configure_basic_optimizer
number>0 lr
number>=0 eps weight_decay
betas betas
bool torch_adam fused foreach adam_w_mode bias_correction fp32_optimizer_states amsgrad

[activation_checkpointing] runtime/activation_checkpointing/config.py:ACT_CHKPT_DEFAULT
int>0? number_checkpoints
bool partition_activations contiguous_memory_optimization synchronize_checkpoint_boundary profile cpu_checkpointing

[checkpoint] runtime/model_checkpointing/constants.py:CHECKPOINT_
Ignore|Warn|Fail|IGNORE|WARN|FAIL|ignore|warn|fail tag_validation
bool load_universal use_node_local_storage checkpoint_serialization
section parallel_write

[checkpoint.parallel_write] runtime/constants.py:CHECKPOINT_PARALLEL_WRITE_
bool pipeline_stage

[aio] runtime/swap_tensor/constants.py:AIO_
int>0 block_size queue_depth intra_op_parallelism
bool single_submit overlap_events use_gds

[timers] utils/config.py:TIMERS_
section throughput

[timers.throughput] utils/config.py:DeepSpeedThroughputTimerConfig
bool enabled synchronized

[flops_profiler] profiling/constants.py:FLOPS_PROFILER_
bool enabled detailed
int>0 profile_step top_modules
int module_depth
str? output_file
number>=0 recompute_fwd_factor

[comms_logger] comm/config.py:CommsLoggerConfig
bool enabled prof_all verbose debug
strings prof_ops

[tensorboard] monitor/config.py:TensorBoardConfig
bool enabled
str output_path job_name

[csv_monitor] monitor/config.py:CSVConfig
bool enabled
str output_path job_name

[wandb] monitor/config.py:WandbConfig
bool enabled
str? group team
str project

[comet] monitor/config.py:CometConfig
bool enabled
int>0 samples_log_interval
bool? online
get|create|get_or_create|null mode
str? project workspace api_key experiment_name experiment_key
"""


def _sections(table: str) -> dict[str, Section]:
    sections: dict[str, Section] = {}
    keys: dict[str, str] = {}
    spec = ""
    for line in filter(None, table.splitlines()):
        first, *rest = line.split()
        if line.startswith("["):
            keys = {}
            sections[first[1:-1]] = Section(rest[0], keys)
        elif line.startswith(" "):
            keys |= dict.fromkeys([first, *rest], spec)
        else:
            spec = first
            keys |= dict.fromkeys(rest, spec)
    return sections


SECTIONS = _sections(_TABLE)

_OURS = "the learning rate is gpt2ds's own, a pure function of the step (DeepSpeed's schedulers drift on skipped steps)"
_REMOVED = "DeepSpeed has removed it and stops at the key"
_OTHER_PARALLEL = "gpt2ds divides the batch and the ZeRO states among the ranks, not the model"
# Whole keys that DeepSpeed knows and we do not take, with what to do instead. The key "a.b" is b in section a.
REFUSED: dict[str, str] = {
    "scheduler": f"{_OURS}: remove it, and choose the schedule and the warm-up with the options of `gpt2ds train`",
    "elasticity": f"{_REMOVED}: give train_micro_batch_size_per_gpu and gradient_accumulation_steps as numbers",
    "curriculum_learning": f"{_REMOVED}: remove it",
    "amp": f'{_REMOVED}: write "bf16": {{"enabled": true}}',
    "bfloat16": 'this is its old name: write "bf16"',
    "tensor_parallel": f"{_OTHER_PARALLEL}: remove it",
    "expert_parallel": f"{_OTHER_PARALLEL}: remove it",
    "pipeline": f"{_OTHER_PARALLEL}: remove it",
    "sequence_parallel_size": f"{_OTHER_PARALLEL}: remove it",
    "data_parallel_size": f"{_OTHER_PARALLEL}: remove it",
    "seq_parallel_communication_data_type": f"{_OTHER_PARALLEL}: remove it",
    "use_data_before_expert_parallelism": f"{_OTHER_PARALLEL}: remove it",
    "compile": "DeepSpeed only reads it after engine.compile(), which gpt2ds does not call: remove it",
    "autotuning": "it edits this file and restarts the job: remove it and let `gpt2ds memory-estimate` find the batch",
    "hybrid_engine": "it is for reinforcement learning: remove it",
    "weight_quantization": "it is for inference: remove it",
    "data_efficiency": "it acts only in DeepSpeed's own data loader, which gpt2ds does not use: remove it",
    "datastates_ckpt": "gpt2ds writes its own checkpoints with a manifest: remove it",
    "checkpoint.writer": "DeepSpeed's fast writers lose data when several ranks save: remove it",
    "zero_optimization.zenflow": "ZenFlow puts its update_interval in place of gradient_accumulation_steps "
    '("auto" becomes 0, and every loss NaN): remove it',
    "zero_optimization.mics_shard_size": f"{_REMOVED}: remove it",
    "zero_optimization.mics_hierarchical_params_gather": f"{_REMOVED}: remove it",
    "zero_optimization.zeropp_loco_param": f"{_REMOVED}: remove it",
    "zero_optimization.cpu_offload": 'write "offload_optimizer": {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'write "offload_param": {"device": "cpu"}',
    "zero_optimization.cpu_offload_use_pin_memory": 'write "offload_optimizer": {"device": "cpu", "pin_memory": true}',
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": 'write "stage3_gather_16bit_weights_on_model_save"',
    "zero_optimization.legacy_stage1": "DeepSpeed no longer has the old ZeRO-1: remove it",
    "zero_optimization.leaf_module": "it is for mixtures of experts: remove it",
    "zero_optimization.save_muon_momentum_buffer_in_memory": "it belongs to Muon: remove it",
    "optimizer.params.max_grad_norm": 'DeepSpeed refuses it here: write "gradient_clipping" at the top level',
    "optimizer.params.fp16_optimizer_states": 'write "fp32_optimizer_states": false',
} | dict.fromkeys(
    (
        "nebula",
        "compression_training",
        "quantize_training",
        "sparse_gradients",
        "eigenvalue",
        "sparse_attention",
        "graph_harvesting",
        "progressive_layer_drop",
    ),
    f"{_REMOVED}: remove it",
)

DTYPES = {"fp32": "fp32", "float32": "fp32", "float": "fp32", "bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16"} | {
    "float16": "fp16",
    "half": "fp16",
    "torch.float32": "fp32",
    "torch.bfloat16": "bf16",
    "torch.float16": "fp16",
}
_EXPECTED = {
    "bool": "true or false",
    "str": "a string",
    "number": "a number",
    "number>=0": "a number of 0 or more",
    "number>0": "a number above 0",
    "int": "a whole number",
    "int>=0": "a whole number of 0 or more",
    "int>0": "a whole number of 1 or more",
    "fraction": "a number from 0 to 1",
    "stage": "0, 1, 2 or 3",
    "dtype": '"fp32", "bf16" or "fp16"',
    "betas": "two numbers from 0 to below 1, such as [0.9, 0.95]",
    "strings": "a list of strings",
    "section": "a section in braces",
}
MOST_PROBLEMS = 50
_LARGEST = 2**63 - 1  # what torch takes as a number of elements


class _WrongValueError(Exception):
    """A value that does not meet its spec; the loop in `check_keys` turns it into a sentence."""


def check_keys(data: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Check every key and type of a profile: the sound settings (whole numbers as ints, no nulls), and the problems.

    The section "gpt2ds" is passed through: its own model checks it.
    """
    problems: list[str] = []
    return _section(data, "", problems), problems


def _section(data: dict[str, Any], name: str, problems: list[str]) -> dict[str, Any]:
    keys = SECTIONS[name].keys
    sound: dict[str, Any] = {}
    for key, value in data.items():
        if len(problems) >= MOST_PROBLEMS:
            break  # nobody reads more, and each takes a search for what was meant
        path = f"{name}.{key}" if name else key
        if path in REFUSED:
            problems.append(f"{path}: {REFUSED[path]}")
            continue
        if key not in keys:
            problems.append(f"{path}: {_unknown(key, name)}")
            near = difflib.get_close_matches(key.lower(), keys, n=1, cutoff=0.88)
            if not near or near[0] in data:
                continue
            key = near[0]  # meant most likely: checked on, so that one misspelling does not bring a second problem
            path = f"{name}.{key}" if name else key
        spec = keys[key]
        if key == "gpt2ds" and not name:
            sound[key] = value
        elif spec == "section" and isinstance(value, dict):
            sound[key] = _section(value, path, problems)
        else:
            try:
                checked = _value(value, spec, may_be_auto=path in AUTO_ALLOWED)
            except _WrongValueError as wrong:
                problems.append(f"{path}: {wrong}")
            else:
                if checked is not None:
                    sound[key] = checked
    return sound


# Where "auto" means something: the first two to us, the last to DeepSpeed.
AUTO_ALLOWED = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "data_types.keep_in_fp32_modules")


def _unknown(key: str, name: str) -> str:
    """The sentence for a key that its section does not have, with the key or the section that was meant most likely."""
    where = f"the section {name}" if name else "DeepSpeed"
    if key.startswith(("_", "#", "/")) or key.lower() in ("comment", "comments", "note", "notes"):
        return 'JSON has no comments, DeepSpeed only ignores the key: put the words into "gpt2ds": {"description": ...}'
    keys = list(SECTIONS[name].keys) + [path.rpartition(".")[2] for path in REFUSED if path.rpartition(".")[0] == name]
    if f"stage3_{key}" in keys:
        return f"write stage3_{key}"
    longer = [known for known in keys if len(key) >= 8 and key.lower() in known]
    if len(longer) == 1:
        return f"{where} has no such key: did you mean {longer[0]}?"
    homes = [other or "the top level" for other, section in SECTIONS.items() if key in section.keys and other != name]
    if near := difflib.get_close_matches(key.lower(), keys, n=1, cutoff=0.75):
        return f"{where} has no such key: did you mean {near[0]}?"
    if homes and key != "enabled":
        return f"{where} has no such key, it belongs to {' or '.join(homes)}"
    if near := difflib.get_close_matches(key.lower(), keys, n=1, cutoff=0.6):
        return f"{where} has no such key: did you mean {near[0]}? If not, remove it"
    return f"{where} has no such key and would ignore it: remove it"


def _value(value: Any, spec: str, *, may_be_auto: bool) -> Any:
    """The value in the form that DeepSpeed wants, None for a null that stands for nothing; raises _WrongValueError."""
    if value == "auto" and spec != "str":
        if may_be_auto:
            return value
        raise _WrongValueError(
            '"auto" is filled in by other programs, DeepSpeed takes it for "not given": write a value'
        )
    if value is None and spec.endswith(("?", "null")):
        return None
    spec = spec.removesuffix("?")
    expected = _EXPECTED.get(spec, " or ".join(f'"{choice}"' for choice in spec.split("|") if choice != "null"))
    good = value
    if spec in ("bool", "str"):
        sound = isinstance(value, bool if spec == "bool" else str)
    elif spec.startswith(("int", "number", "fraction", "stage")):
        sound = _is_number(value) and _in_range(value, spec)
        if sound and spec.startswith(("int", "stage")):
            good = int(value)
    elif spec == "betas":
        sound = isinstance(value, list) and len(value) == 2 and all(_is_number(x) and 0 <= x < 1 for x in value)
    elif spec == "strings":
        sound = isinstance(value, list) and all(isinstance(item, str) for item in value)
    elif spec == "dtype":
        sound = isinstance(value, str) and value in DTYPES
        good = DTYPES[value] if sound else None
    else:
        sound = isinstance(value, str) and value in spec.split("|") and value != "null"
    if sound:
        return good
    raise _WrongValueError(f"must be {expected}, not {_shown(value)}{_quoted(value, spec)}")


def _is_number(value: Any) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= _LARGEST
    return isinstance(value, float) and math.isfinite(value)


def _in_range(value: float, spec: str) -> bool:
    if spec.startswith(("int", "stage")) and (value != int(value) or value > _LARGEST):
        return False
    low_enough = value <= {"fraction": 1, "stage": 3}.get(spec, math.inf)
    return low_enough and (value > 0 if spec.endswith(">0") else value >= 0 or spec in ("int", "number"))


def _quoted(value: Any, spec: str) -> str:
    """A hint for the commonest slip, a number or a boolean in quotes."""
    if not isinstance(value, str) or spec in ("str", "dtype", "section"):
        return ""
    try:
        inner = json.loads(value.lower())
    except (ValueError, RecursionError):
        return ""
    return ": without the quotes" if isinstance(inner, bool | int | float) else ""


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return "lists within lists"
    return text if len(text) <= 60 else text[:57] + "..."
