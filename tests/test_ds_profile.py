"""Every rule has a JSON that breaks it; key tables and shipped profiles are held against the installed DeepSpeed.

Run as a script, this file is the probe: it asks DeepSpeed itself (in a process of its own) and prints what it answered.
"""

import copy
import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt2ds import ds_profile
from gpt2ds.ds_keys import REFUSED, SECTIONS
from gpt2ds.ds_profile import DsProfile, load_profile, shipped_profiles
from gpt2ds.errors import UserError

ZERO2: dict[str, Any] = json.loads((Path(__file__).parents[1] / "ds_configs" / "zero2.json").read_text())
MINIMAL: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2}
REMOVE = object()


def changed(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of `base` with dotted keys set (or removed, by REMOVE)."""
    data = copy.deepcopy(base)
    for path, value in changes.items():
        *folders, key = path.split("/")
        section = data
        for folder in folders:
            section = section.setdefault(folder, {})
        if value is REMOVE:
            del section[key]
        else:
            section[key] = value
    return data


def load(folder: Path, data: Any) -> DsProfile:
    path = folder / "mine.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return load_profile(path)


def refusal(folder: Path, data: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, data)
    return str(caught.value)


MICRO, ACCUMULATION, TOTAL = "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"
ZERO, OFFLOAD = "zero_optimization", "zero_optimization/offload_optimizer"
CPU = {"device": "cpu"}
STATES = {"bf16/bf16_master_weights_and_grads": True, "bf16/bf16_optimizer_states": True}

# name: (changes to zero2.json, words that the one sentence must have)
BROKEN: dict[str, tuple[dict[str, Any], list[str]]] = {
    # keys
    "misspelt top": ({"gradient_acumulation_steps": 4}, ["gradient_accumulation_steps", "did you mean"]),
    "british zero": ({ZERO: REMOVE, "zero_optimisation": {"stage": 2}}, ["did you mean zero_optimization"]),
    "upper case": ({"bf16": REMOVE, "BF16": {"enabled": True}}, ["did you mean bf16"]),
    "misspelt in zero": ({f"{ZERO}/overlap_com": True}, [f"{ZERO}.overlap_com:", "did you mean overlap_comm"]),
    "wrong section": ({"reduce_bucket_size": 5}, [f"belongs to {ZERO}"]),
    "far off": ({"micro_batch_size": 4}, ["did you mean train_micro_batch_size_per_gpu?"]),
    "further off": ({f"{ZERO}/max_live_params": 4}, ["did you mean stage3_max_live_parameters? If not, remove it"]),
    "unprefixed stage3": ({f"{ZERO}/max_live_parameters": 5}, ["write stage3_max_live_parameters"]),
    "comment": ({"_comment": "hello"}, ["no comments", "description"]),
    "comment within": ({"optimizer/comment": "hello"}, ["optimizer.comment", "description"]),
    "nonsense": ({"xyzzy": 1}, ["xyzzy", "remove it"]),
    "misspelt ours": ({"gpt2ds/recomputed": "full"}, ["gpt2ds.recomputed", "did you mean recompute"]),
    "in monitor": ({"wandb": {"enabled": False, "projekt": "x"}}, ["wandb.projekt", "did you mean project"]),
    "in optimizer": ({"optimizer/params/learning_rate": 1e-3}, ["optimizer.params.learning_rate", "remove"]),
    # types and ranges
    "micro 2.5": ({MICRO: 2.5}, [MICRO, "whole number", "2.5"]),
    "micro 0": ({MICRO: 0}, ["1 or more"]),
    "micro true": ({MICRO: True}, ["whole number", "true"]),
    "micro string": ({MICRO: "4"}, ["whole number", "without the quotes"]),
    "clipping negative": ({"gradient_clipping": -1.0}, ["0 or more", "-1.0"]),
    "clipping string": ({"gradient_clipping": "1.0"}, ["without the quotes"]),
    "lr string": ({"optimizer/params/lr": "1e-3"}, ["optimizer.params.lr", "without the quotes"]),
    "lr 0": ({"optimizer/params/lr": 0}, ["above 0"]),
    "betas one": ({"optimizer/params/betas": [0.9]}, ["two numbers"]),
    "betas 1": ({"optimizer/params/betas": [0.9, 1]}, ["below 1"]),
    "enabled string": ({"bf16/enabled": "true"}, ["bf16.enabled", "without the quotes"]),
    "stage string": ({f"{ZERO}/stage": "2"}, ["0, 1, 2 or 3", "without the quotes"]),
    "stage 4": ({f"{ZERO}/stage": 4}, ["0, 1, 2 or 3"]),
    "zero boolean": ({ZERO: True}, [f"{ZERO}:", "a section in braces"]),
    "bucket string": ({f"{ZERO}/reduce_bucket_size": "5e8"}, ["reduce_bucket_size", "without the quotes"]),
    "bucket null": ({f"{ZERO}/reduce_bucket_size": None}, ["reduce_bucket_size", "null"]),
    "bucket huge": ({f"{ZERO}/reduce_bucket_size": 1e30}, ["reduce_bucket_size", "1e+30"]),
    "odd bucket": ({f"{ZERO}/allgather_bucket_size": 5}, ["even"]),
    "accum type": ({"data_types/grad_accum_dtype": "float64"}, ["grad_accum_dtype", '"fp32"']),
    "device": ({OFFLOAD: {"device": "disk"}}, ["offload_optimizer.device", '"nvme"']),
    "print 0": ({"steps_per_print": 0}, ["steps_per_print", "1 or more"]),
    "breakdown": ({"wall_clock_breakdown": "true"}, ["true or false", "without the quotes"]),
    "strings": ({"comms_logger": {"enabled": False, "prof_ops": [1]}}, ["prof_ops", "list of strings"]),
    "chunk 0": ({"gpt2ds/loss_chunk": 0}, ["gpt2ds.loss_chunk", "1 or more"]),
    "chunk true": ({"gpt2ds/loss_chunk": True}, ["gpt2ds.loss_chunk"]),
    "policy": ({"gpt2ds/recompute": "some"}, ["gpt2ds.recompute", "'none'", "'full'"]),
    "ours no section": ({"gpt2ds": 3}, ["gpt2ds: must be a section"]),
    # "auto"
    "auto lr": ({"optimizer/params/lr": "auto"}, ["optimizer.params.lr", '"auto"', "write a value"]),
    "auto clipping": ({"gradient_clipping": "auto"}, ['"auto"', "write a value"]),
    "auto bf16": ({"bf16/enabled": "auto"}, ["bf16.enabled", '"auto"']),
    "auto micro alone": ({MICRO: "auto"}, ["needs a train_batch_size"]),
    "auto accumulation": ({ACCUMULATION: "auto"}, ["goes only with"]),
    # the batch
    "no batch": ({MICRO: REMOVE}, ["the batch is missing"]),
    "triple": ({TOTAL: 100}, ["100 is not", "size_per_gpu 6 × gradient_accumulation_steps 8", "96 or 144"]),
    "too small": ({TOTAL: 10}, ["write 48,"]),
    "auto with accumulation": ({MICRO: "auto", TOTAL: 12}, ["12 is not gradient_accumulation_steps 8", "8 or 16"]),
    # precision
    "both": ({"fp16": {"enabled": True}}, ["bf16 and fp16", "older"]),
    "autocast": ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, ["torch_autocast", "remove"]),
    "autocast fp32": ({"bf16": REMOVE, "torch_autocast": {"enabled": True}}, ["torch_autocast", "fp32"]),
    "accum fp16": ({"data_types/grad_accum_dtype": "fp16"}, ["under bf16", 'write "fp32" or "bf16"']),
    "accum of fp32": ({"bf16": REMOVE, "data_types/grad_accum_dtype": "bf16"}, ["under fp32"]),
    "stage 0 fp32 accum": ({ZERO: {"stage": 0}}, ["no fp32 accumulation for bf16 without ZeRO", '"stage": 1']),
    "param dtype": ({"data_types/param_dtype": "fp16"}, ["param_dtype", "contradicts"]),
    "communication": ({"communication_data_type": "fp16"}, ["communication_data_type", '"fp32"']),
    "overflow": ({"bf16/check_grad_overflow": False}, ["NaN"]),
    "states alone": ({"bf16/bf16_optimizer_states": True}, ["bf16_master_weights_and_grads: true"]),
    "master alone": ({"bf16/bf16_master_weights_and_grads": True}, ["bf16_optimizer_states: true", "offload"]),
    "master disabled": ({"bf16": {"bf16_master_weights_and_grads": True}}, ["no effect", '"enabled": true']),
    "master stage 0": (STATES | {ZERO: {"stage": 0}, "data_types": REMOVE}, ["bf16_master", "only with ZeRO"]),
    "states offload": (STATES | {OFFLOAD: CPU}, ["CPU Adam", "remove torch_adam"]),
    "states zero1": (STATES | {f"{ZERO}/stage": 1}, ["ignored by ZeRO-1", '"bf16"']),
    "fp16 master": (
        {"bf16": REMOVE, "fp16": {"enabled": True, "fp16_master_weights_and_grads": True}},
        ["fp16_master_weights_and_grads needs", "offload_optimizer"],
    ),
    # ZeRO and offload
    "offload 0": (
        {f"{ZERO}/stage": 0, OFFLOAD: CPU, "data_types/grad_accum_dtype": "bf16"},
        ["offload_optimizer is ignored", "stage 1, 2 or 3"],
    ),
    "param 2": ({f"{ZERO}/offload_param": CPU}, ["offload_param is ignored", "write stage 3"]),
    "nvme 2": ({OFFLOAD: {"device": "nvme", "nvme_path": "/x"}, "optimizer": {"type": "AdamW"}}, ["taken for cpu"]),
    "nvme no path": (
        {f"{ZERO}/stage": 3, OFFLOAD: {"device": "nvme"}, "optimizer": {"type": "AdamW"}},
        ["nvme_path"],
    ),
    "nvme torch": ({f"{ZERO}/stage": 3, OFFLOAD: {"device": "nvme", "nvme_path": "/x"}}, ["CPU Adam"]),
    "no device": ({OFFLOAD: {"pin_memory": True}}, ["without a device", '"cpu"']),
    "super": ({OFFLOAD: CPU | {"super_offload": True}}, ["super_offload", "remove"]),
    "ratio 2": ({OFFLOAD: CPU | {"ratio": 0.5}}, ["ratio", "stage 3"]),
    "ratio torch": ({f"{ZERO}/stage": 3, OFFLOAD: CPU | {"ratio": 0.5}}, ["ratio", "CPU Adam"]),
    "overlap 0": (
        {ZERO: {"stage": 0, "overlap_comm": True}, "data_types/grad_accum_dtype": "bf16"},
        ["overlap_comm has no effect"],
    ),
    "elastic": ({f"{ZERO}/elastic_checkpoint": True}, ["elastic_checkpoint", "remove"]),
    "norm": ({f"{ZERO}/compute_grad_norm": False}, ["compute_grad_norm", "NaN"]),
    "granularity": ({f"{ZERO}/stage": 3, f"{ZERO}/stage3_module_granularity_threshold": 9}, ["granularity"]),
    "hpz": ({f"{ZERO}/zero_hpz_partition_size": 8}, ["zero_hpz_partition_size", "only at stage 3"]),
    "qgz": ({f"{ZERO}/zero_quantized_gradients": True}, ["zero_quantized_gradients", "only at stage 3"]),
    "prescale": ({"prescale_gradients": True}, ["prescale_gradients", "reduce_scatter"]),
    "predivide": ({"gradient_predivide_factor": 2.0}, ["gradient_predivide_factor", "reduce_scatter"]),
    # the optimizer
    "no type": ({"optimizer/type": REMOVE}, ["without a type", '"AdamW"']),
    "muon": ({"optimizer": {"type": "Muon"}}, ["Muon", "wte", '"AdamW"']),
    "one bit": ({"optimizer": {"type": "OneBitAdam"}}, ["removed", '"AdamW"']),
    "lamb": ({"optimizer": {"type": "Lamb"}}, ["Lamb", '"AdamW"']),
    "unknown optimizer": ({"optimizer": {"type": "Sophia"}}, ["Sophia", '"AdamW"']),
    "fused and foreach": ({"optimizer/params/foreach": True}, ["exclude each other"]),
    "amsgrad": ({"optimizer/params/amsgrad": True}, ["third state"]),
    "fused alone": ({"optimizer/params/torch_adam": False}, ['"torch_adam": true']),
    "theirs": ({"optimizer/params/bias_correction": True}, ["bias_correction", "remove"]),
    "grad norm": ({"optimizer/params/max_grad_norm": 1.0}, ["gradient_clipping"]),
    # recomputation and the rest
    "partition": ({"activation_checkpointing": {"partition_activations": True}}, ["tensor parallelism"]),
    "cpu checkpointing": (
        {"activation_checkpointing": {"cpu_checkpointing": True}, "gpt2ds": {"recompute": "narrow"}},
        ["cpu_checkpointing", "narrow", "remove one"],
    ),
    "contiguous": ({"activation_checkpointing": {"contiguous_memory_optimization": True}}, ["partition_activations"]),
    "number": ({"activation_checkpointing": {"number_checkpoints": 4}}, ["every block"]),
    "unknown checkpointing": ({"activation_checkpointing": {"enabled": True}}, ["activation_checkpointing.enabled"]),
    "unmanaged": ({"managed_gradient_accumulation": False}, ["managed_gradient_accumulation"]),
    "sum": ({"gradient_allreduce_op": "sum"}, ["number of ranks"]),
    "memory breakdown": ({"memory_breakdown": True}, ["memory_breakdown", "peak memory"]),
    "universal": ({"checkpoint": {"load_universal": True}}, ["load_universal"]),
    "scheduler": ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "learning rate", "gpt2ds train"]),
    "compile": ({"compile": {"deepcompile": True}}, ["compile", "remove"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_rule_refuses_with_its_sentence(name: str, tmp_path: Path) -> None:
    changes, words = BROKEN[name]
    message = refusal(tmp_path, changed(ZERO2, changes))
    assert "\n" not in message, "one mistake, one sentence"
    assert message.startswith(str(tmp_path / "mine.json"))
    missing = [word for word in words if word not in message]
    assert not missing, message


@pytest.mark.parametrize("path", REFUSED)
def test_refused_keys_say_what_to_do(path: str, tmp_path: Path) -> None:
    value: Any = {"type": "x"} if path == "scheduler" else {}
    message = refusal(tmp_path, changed(ZERO2, {path.replace(".", "/"): value}))
    assert f"{path}: {REFUSED[path]}" in message
    assert "remove" in REFUSED[path] or "write" in REFUSED[path] or "give" in REFUSED[path]


def test_all_mistakes_stand_in_one_error(tmp_path: Path) -> None:
    message = refusal(
        tmp_path,
        changed(ZERO2, {MICRO: 2.5, "bf16/enabled": "true", "scheduler": {}, "optimizer/type": "Muon", "xyzzy": 1}),
    )
    assert len(message.splitlines()) == 5
    assert all(word in message for word in (MICRO, "bf16.enabled", "scheduler", "Muon", "xyzzy"))


SYNTAX = {
    "comma": ('{\n  "a": 1,\n}', ["line 3, column 1", "comma", "}"]),
    "comment": ('{\n  // words\n  "a": 1\n}', ["line 2, column 3", "no comments", "// words"]),
    "quotes": ("{\n  'a': 1\n}", ["line 2, column 3", "double quotes", "'a': 1"]),
    "missing comma": ('{\n  "a": 1\n  "b": 2\n}', ["line 3, column 3", "comma is missing", '"b": 2']),
    "python": ('{\n  "a": True\n}', ["line 2, column 8", "lower case"]),
    "empty": ("", ["line 1, column 1"]),
    "cut off": ('{"a": {"b": 1', ["line 1"]),
    "array": ("[1]", ["object in braces"]),
    "half a pair": ('{"\\ud800": 1}', ["remove it"]),
    "nan": ('{"gradient_clipping": NaN}', ["NaN is not JSON"]),
    "twice": ('{"bf16": {"enabled": true, "enabled": false}}', ['"enabled"', "twice"]),
    "deep": ("[" * 100_000, ["not a DeepSpeed JSON"]),
    "digits": ('{"a": ' + "9" * 5000 + "}", ["not a DeepSpeed JSON"]),
}


@pytest.mark.parametrize("name", SYNTAX)
def test_syntax_errors_name_the_place(name: str, tmp_path: Path) -> None:
    text, words = SYNTAX[name]
    message = refusal(tmp_path, text)
    assert all(word in message for word in words), message


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"zero7.json does not exist: did you mean zero.*shipped profiles: fp32_base"):
        load_profile(Path("zero7.json"))
    with pytest.raises(UserError, match="is a folder"):
        load_profile(tmp_path)
    with pytest.raises(UserError, match=r"cannot be read.*File name too long"):
        load_profile("a" * 5000)
    (tmp_path / "latin.json").write_bytes(b'{"gpt2ds": {"description": "caf\xe9"}}')
    with pytest.raises(UserError, match=r"not UTF-8 \(byte 31\)"):
        load_profile(tmp_path / "latin.json")


def test_bare_names_mean_shipped_profiles_unless_a_file_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        load_profile("zero2").path == load_profile("zero2.json").path == shipped_profiles()[3].with_name("zero2.json")
    )
    (tmp_path / "zero2.json").write_text(json.dumps(MINIMAL))
    assert load_profile("zero2.json").micro_batch == 2


def test_profiles_of_an_installation_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    share = tmp_path / "share" / "gpt2ds" / "ds_configs"
    share.mkdir(parents=True)
    (share / "zero2.json").write_text(json.dumps(ZERO2))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(ds_profile, "__file__", str(tmp_path / "site-packages" / "gpt2ds" / "ds_profile.py"))
    assert shipped_profiles() == [share / "zero2.json"]


# name: stage, dtype, accumulation type, optimizer and parameter offload, recompute
SHIPPED = {
    "fp32_baseline": (0, "fp32", "fp32", None, None, "none"),
    "gpt2_large_16gb": (3, "bf16", "bf16", None, None, "attention"),
    "gpt2_large_24gb": (2, "bf16", "fp32", None, None, "products"),
    "gpt2_large_24gb_8bit": (2, "bf16", "fp32", None, None, "none"),
    "gpt2_large_24gb_bf16_states": (2, "bf16", "bf16", None, None, "none"),
    "gpt2_large_2x24gb": (1, "bf16", "fp32", None, None, "none"),
    "gpt2_medium_24gb": (2, "bf16", "fp32", None, None, "none"),
    "gpt2_xl_24gb_bf16_states": (2, "bf16", "bf16", None, None, "attention"),
    "gpt2_xl_24gb_offload": (2, "bf16", "bf16", "cpu", None, "products"),
    "gpt2_xl_2x24gb": (1, "bf16", "fp32", None, None, "attention"),
    "zero1": (1, "bf16", "fp32", None, None, "none"),
    "zero2": (2, "bf16", "fp32", None, None, "none"),
    "zero2_fp16": (2, "fp16", "fp32", None, None, "none"),
    "zero2_offload": (2, "bf16", "bf16", "cpu", None, "full"),
    "zero3": (3, "bf16", "fp32", None, None, "full"),
    "zero3_fp16": (3, "fp16", "fp32", None, None, "full"),
    "zero3_offload": (3, "bf16", "fp32", "cpu", "cpu", "full"),
}


def test_the_shipped_profiles_are_these() -> None:
    assert [path.stem for path in shipped_profiles()] == sorted(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_profile(name: str) -> None:
    p = load_profile(name)
    found = (p.zero_stage, p.dtype, p.grad_accum_dtype, p.offload_optimizer, p.offload_param, p.recompute)
    assert found == SHIPPED[name]
    assert p.micro_batch and p.accumulation and p.global_batch is None, "numbers, for any number of ranks"
    assert "auto" not in json.dumps(p.raw)
    assert (p.gradient_clipping, p.optimizer, p.lr) == (1.0, "AdamW", None)
    assert (p.betas, p.eps, p.weight_decay) == ((0.9, 0.95), 1e-8, 0.1)
    assert p.description.endswith(".") and p.use_when.endswith(".")
    reduced = p.eight_bit_states or p.master_bytes == 2 or (p.grad_accum_dtype == "bf16" and not p.offload_optimizer)
    assert bool(p.risk) == reduced, "what rounds more than the others says so"
    assert p.reduce_bucket_elements <= 50_000_000
    completed = p.ds_config(micro_batch=p.micro_batch, accumulation=p.accumulation, ranks=2)
    assert completed.pop(TOTAL) == p.micro_batch * p.accumulation * 2
    assert completed == p.raw, "nothing is left to complete: raw DeepSpeed sees what gpt2ds sees"


# stage, dtype, offloaded: the type in which micro-batches are summed when the profile does not say
ACCUMULATION_TYPES = {
    (0, "fp32", False): "fp32",
    (1, "fp32", False): "fp32",
    (2, "fp32", True): "fp32",
    (3, "fp32", True): "fp32",
    (0, "bf16", False): "bf16",
    (1, "bf16", False): "fp32",
    (2, "bf16", False): "fp32",
    (3, "bf16", False): "fp32",
    (0, "fp16", False): "fp16",
    (1, "fp16", False): "fp32",
    (2, "fp16", False): "fp32",
    (3, "fp16", False): "fp32",
    (1, "bf16", True): "bf16",
    (2, "bf16", True): "bf16",
    (2, "fp16", True): "fp16",
    (3, "bf16", True): "fp32",
}


def bare(stage: int, dtype: str, offloaded: bool) -> dict[str, Any]:
    """The least that a user would write."""
    changes: dict[str, Any] = {ACCUMULATION: 2, ZERO: {"stage": stage}}
    if dtype != "fp32":
        changes[dtype] = {"enabled": True}
    if offloaded:
        changes[OFFLOAD] = CPU
    return changed(MINIMAL, changes)


@pytest.mark.parametrize("case", ACCUMULATION_TYPES, ids=str)
def test_completed_accumulation_type(case: tuple[int, str, bool], tmp_path: Path) -> None:
    stage, dtype, offloaded = case
    profile = load(tmp_path, bare(*case))
    assert profile.grad_accum_dtype == ACCUMULATION_TYPES[case]
    assert profile.settings.get("bf16", {}).get("immediate_grad_update", False) == (
        (stage, dtype, offloaded) == (1, "bf16", False)
    )
    said = [note for note in profile.notes() if note.startswith("gradients accumulate in")]
    assert len(said) == (dtype != "fp32")
    if ACCUMULATION_TYPES[case] == dtype != "fp32":
        assert "without ZeRO" in said[0] if stage == 0 else "on the GPUs" in said[0]


def test_completions(tmp_path: Path) -> None:
    profile = load(tmp_path, changed(MINIMAL, {"bf16": {"enabled": True}, ZERO: {"stage": 3}}))
    config = profile.ds_config(micro_batch=2, accumulation=1, ranks=4)
    zero = config[ZERO]
    assert zero["reduce_bucket_size"] == 20_000_000 and zero["stage3_max_reuse_distance"] == 0
    assert zero["stage3_max_live_parameters"] <= 100_000_000 and zero["stage3_prefetch_bucket_size"] <= 50_000_000
    assert config["gradient_clipping"] == 1.0 and config[TOTAL] == 8
    assert config["optimizer"]["params"]["torch_adam"] and config["optimizer"]["params"]["fused"]
    assert config["timers"] == {"throughput": {"enabled": False}}
    assert len(profile.notes()) == 6 and "scheduler" not in config
    assert config is not profile.ds_config(micro_batch=2, accumulation=1, ranks=4)
    assert profile.raw == changed(MINIMAL, {"bf16": {"enabled": True}, ZERO: {"stage": 3}}), "raw stays as it was"


def test_what_the_user_chose_stays(tmp_path: Path) -> None:
    chosen = {
        "gradient_clipping": 0.0,
        f"{ZERO}/reduce_bucket_size": 5e7,
        "optimizer/params": {"lr": 6e-4, "torch_adam": True, "foreach": True, "betas": [0.8, 0.9]},
        "timers/throughput/enabled": True,
        "data_types/grad_accum_dtype": "bfloat16",
    }
    profile = load(tmp_path, changed(ZERO2, chosen))
    assert (profile.gradient_clipping, profile.reduce_bucket_elements, profile.lr) == (0.0, 50_000_000, 6e-4)
    assert profile.betas == (0.8, 0.9) and profile.grad_accum_dtype == "bf16"
    config = profile.ds_config(micro_batch=1, accumulation=1, ranks=1)
    assert "fused" not in config["optimizer"]["params"] and config["timers"]["throughput"]["enabled"]
    assert isinstance(config[ZERO]["reduce_bucket_size"], int)


def test_deepspeeds_own_adam_where_only_that_works(tmp_path: Path) -> None:
    for changes in (
        {ZERO: {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}, "optimizer": REMOVE},
        {ZERO: {"stage": 3, "offload_optimizer": CPU | {"ratio": 0.5}}, "optimizer": REMOVE},
        STATES | {OFFLOAD: CPU, "optimizer": REMOVE, "data_types": REMOVE},
        {"optimizer": {"type": "AdamW", "params": {"fp32_optimizer_states": False}}},
    ):
        profile = load(tmp_path, changed(ZERO2, changes))
        assert "torch_adam" not in profile.ds_config(micro_batch=1, accumulation=1, ranks=1)["optimizer"]["params"]
        assert any("DeepSpeed's own Adam" in note for note in profile.notes())


def test_batches(tmp_path: Path) -> None:
    def batch(**keys: Any) -> tuple[Any, ...]:
        profile = load(tmp_path, keys)
        return profile.micro_batch, profile.accumulation, profile.global_batch, profile.settings.get(MICRO) == "auto"

    assert batch(**{MICRO: 4}) == (4, 1, None, False)
    assert batch(**{MICRO: 4.0, ACCUMULATION: 2}) == (4, 2, None, False)
    assert batch(**{TOTAL: 64, MICRO: 4, ACCUMULATION: 2}) == (4, 2, 64, False)
    assert batch(**{TOTAL: 64, MICRO: 4}) == (4, None, 64, False)
    assert batch(**{TOTAL: 64, ACCUMULATION: 2}) == (None, 2, 64, False)
    assert batch(**{TOTAL: 64}) == (None, 1, 64, False)
    assert batch(**{TOTAL: 64, MICRO: "auto"}) == (None, None, 64, True)
    assert batch(**{TOTAL: 64, MICRO: "auto", ACCUMULATION: "auto"}) == (None, None, 64, True)
    assert batch(**{TOTAL: 64, MICRO: "auto", ACCUMULATION: 4}) == (None, 4, 64, True)


def test_recompute_and_loss_chunk(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL).recompute == "none" and load(tmp_path, MINIMAL).loss_chunk is None
    assert load(tmp_path, changed(MINIMAL, {"activation_checkpointing": {}})).recompute == "full"
    assert load(tmp_path, changed(MINIMAL, {"gpt2ds/recompute": "full"})).recompute == "full"
    both = load(tmp_path, changed(MINIMAL, {"gpt2ds": {"recompute": "none"}, "activation_checkpointing": {}}))
    assert both.recompute == "none" and any("overrules" in note for note in both.notes())
    assert load(tmp_path, changed(MINIMAL, {"gpt2ds/loss_chunk": 4096})).loss_chunk == 4096


NOTED: dict[str, tuple[dict[str, Any], str]] = {
    "stage3 at 2": ({f"{ZERO}/stage3_max_live_parameters": 5e7}, "without effect at ZeRO stage 2: stage3_max_live"),
    "hpz": ({f"{ZERO}/stage": 3, f"{ZERO}/zero_hpz_partition_size": 2}, "second copy"),
    "qwz": ({f"{ZERO}/stage": 3, f"{ZERO}/zero_quantized_weights": True}, "CUDA kernels"),
    "16-bit sums": ({"data_types/grad_accum_dtype": "bf16"}, "gradients accumulate in bf16: the profile says so"),
    "16-bit states": (STATES | {"data_types": REMOVE}, "keeps the optimizer's gradients in bf16"),
}


@pytest.mark.parametrize("name", NOTED)
def test_what_a_user_may_wonder_about_is_noted(name: str, tmp_path: Path) -> None:
    changes, words = NOTED[name]
    assert any(words in note for note in load(tmp_path, changed(ZERO2, changes)).notes())


def test_buffers_that_the_memory_plan_reads(tmp_path: Path) -> None:
    zero3, two, bare3 = load_profile("zero3"), load_profile("zero2"), load(tmp_path, bare(3, "bf16", False))
    assert (two.overlap_comm, zero3.overlap_comm, bare3.overlap_comm) == (False, True, True)
    assert bare3.live_parameter_elements == 50_000_000 and bare3.sub_group_elements == 50_000_000
    assert two.reduce_bucket_elements == bare3.reduce_bucket_elements == 20_000_000


HARMLESS = {
    "tensorboard": {"enabled": True, "output_path": "x", "job_name": "y"},
    "wandb": {"enabled": True, "group": None, "team": "t", "project": "p"},
    "csv_monitor": {"enabled": True},
    "comet": {"enabled": True, "samples_log_interval": 10, "mode": "create", "online": None},
    "flops_profiler": {"enabled": True, "module_depth": -1, "output_file": None},
    "comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]},
    "wall_clock_breakdown": True,
    "log_level": "info",
    "dump_state": True,
    "steps_per_print": 100,
    "communication_data_type": "fp32",
    "disable_python_gc": True,
    "checkpoint": {"tag_validation": "Fail"},
    "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None, "profile": False},
}


def test_harmless_keys_pass(tmp_path: Path) -> None:
    config = load(tmp_path, ZERO2 | HARMLESS).ds_config(micro_batch=1, accumulation=1, ranks=1)
    assert config["wandb"] == {"enabled": True, "team": "t", "project": "p"}, "null means not given"


def test_import_is_light() -> None:
    heavy = "torch", "deepspeed", "pydantic", "numpy"
    code = f"import sys, gpt2ds.ds_profile; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Fuzzing: whatever a profile is turned into, it is accepted whole or refused with a sentence.
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(["auto", "fp32", "cpu"])
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))
NAMES = sorted({key for section in SECTIONS.values() for key in section.keys})
MUTATION = st.tuples(
    st.integers(0, 10_000),
    st.sampled_from(["set", "delete", "add", "move"]),
    st.one_of(st.sampled_from(NAMES), st.sampled_from(sorted(REFUSED)), st.text(max_size=12)),
    st.one_of(SCALARS, st.sampled_from([0, 1, 2, 3, True, False, 0.5, CPU, {"enabled": True}, {}]), VALUES),
)


def mutate(data: dict[str, Any], mutations: list[tuple[int, str, str, Any]]) -> dict[str, Any]:
    data = copy.deepcopy(data)
    for number, action, name, value in mutations:
        places = [(data, key) for key in data]
        places += [(inner, key) for inner in data.values() if isinstance(inner, dict) for key in inner]
        if not places:
            return data
        section, key = places[number % len(places)]
        if action == "set":
            section[key] = copy.deepcopy(value)
        elif action == "add":
            section[name] = copy.deepcopy(value)
        else:
            moved = section.pop(key)
            if action == "move":
                data[name] = moved
    return data


@given(start=st.sampled_from(sorted(SHIPPED)), mutations=st.lists(MUTATION, min_size=1, max_size=3))
@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
def test_fuzzed_profiles_load_or_are_refused(
    tmp_path_factory: pytest.TempPathFactory, start: str, mutations: list[tuple[int, str, str, Any]]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    data = mutate(load_profile(start).raw, mutations)
    try:
        profile = load(folder, data)
    except UserError as error:
        str(error).encode()
        return
    everything = {name: getattr(profile, name) for name in dir(profile) if not name.startswith("_")}
    assert everything["grad_accum_dtype"] in ("fp32", profile.dtype)
    config = profile.ds_config(micro_batch=2, accumulation=3, ranks=2)
    again = load(folder, config)
    assert again.ds_config(micro_batch=2, accumulation=3, ranks=2) == config, "a written ds_config is a profile again"


@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode(errors="surrogatepass")))
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_fuzzed_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.json"
    path.write_bytes(content)
    with pytest.raises(UserError):
        load_profile(path)


@pytest.fixture(scope="module")
def deepspeed_says(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the installed DeepSpeed reads and accepts, from one process on the CPU."""
    answer = tmp_path_factory.mktemp("probe") / "answer.json"
    # gpt2ds/'s parent is on the path of an installed package or a clone alike; the probe runs without GPU or compiler.
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, __file__, str(answer)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answered: dict[str, Any] = json.loads(answer.read_text())
    return answered


@pytest.mark.parametrize("name", [name for name in SECTIONS if name != "optimizer.params"])
def test_key_tables_are_those_of_the_installed_deepspeed(name: str, deepspeed_says: dict[str, Any]) -> None:
    ours = set(SECTIONS[name].keys) - {"gpt2ds"}
    refused = {path.rpartition(".")[2] for path in REFUSED if path.rpartition(".")[0] == name}
    theirs = set(deepspeed_says["keys"][name])
    assert ours - theirs == set(), "keys that DeepSpeed would ignore"
    assert theirs - ours - refused == set(), "keys that we would wrongly call unknown"


def test_adam_parameters_are_those_of_the_installed_optimizers(deepspeed_says: dict[str, Any]) -> None:
    popped = {"torch_adam", "adam_w_mode", "fp32_optimizer_states"}
    assert set(SECTIONS["optimizer.params"].keys) <= set(deepspeed_says["keys"]["optimizer.params"]) | popped


@pytest.mark.parametrize("name", [name for name in SHIPPED if "fp16" not in name])
def test_raw_deepspeed_trains_each_shipped_profile(name: str, deepspeed_says: dict[str, Any]) -> None:
    run = deepspeed_says["shipped"][name]
    assert (run["steps"], run["skipped"], run["optimizer"]) == (2, 0, "AdamW")
    assert run["accumulates"] == f"torch.{ {'fp32': 'float32', 'bf16': 'bfloat16'}[SHIPPED[name][2]] }"
    assert run["losses"][1] < run["losses"][0]


@pytest.mark.parametrize("case", [case for case in ACCUMULATION_TYPES if case[1] != "fp16"], ids=str)
def test_deepspeed_trains_each_completed_profile(case: tuple[int, str, bool], deepspeed_says: dict[str, Any]) -> None:
    run = deepspeed_says["completed"][str(case)]
    assert (run["steps"], run["skipped"], run["optimizer"]) == (2, 0, "AdamW")
    assert run["accumulates"] == f"torch.{ {'fp32': 'float32', 'bf16': 'bfloat16'}[ACCUMULATION_TYPES[case]] }"
    assert run["losses"][1] < run["losses"][0]


def probe(answer: Path) -> None:
    """Runs in its own process: the keys that DeepSpeed asks for, and two optimizer steps of each profile."""
    import deepspeed
    import deepspeed.ops
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.runtime.config import DeepSpeedConfig

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else init_distributed compiles it
    store = torch.distributed.FileStore(str(answer.with_suffix(".store")), 1)  # no port to collide on
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    deepspeed.init_distributed("gloo")

    class Asked(dict[str, Any]):
        """A dict that remembers which keys were asked for."""

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.asked: set[str] = set()

        def __contains__(self, key: object) -> bool:
            self.asked.add(str(key))
            return super().__contains__(key)

        def __getitem__(self, key: str) -> Any:
            self.asked.add(key)
            return super().__getitem__(key)

        def get(self, key: str, default: Any = None) -> Any:
            self.asked.add(key)
            return super().get(key, default)

        def keys(self) -> Any:
            return self

    sections = ("checkpoint", "aio", "flops_profiler", "activation_checkpointing", "torch_autocast", "data_types")
    top = Asked({MICRO: 1, "gradient_accumulation_steps": 1} | {name: Asked() for name in (*sections, "timers")})
    top["optimizer"] = Asked({"type": "AdamW"})
    top["torch_autocast"] = Asked({"dtype": "bf16", "lower_precision_safe_modules": []})
    top["checkpoint"]["parallel_write"] = Asked()
    DeepSpeedConfig(top)
    keys = {"": top.asked | {"scheduler", "optimizer"}}
    keys |= {name: top[name].asked for name in (*sections, "optimizer", "timers")}
    keys["checkpoint.parallel_write"] = top["checkpoint"]["parallel_write"].asked
    for name, section in SECTIONS.items():
        module, _, symbol = section.source.partition(":")
        found = getattr(importlib.import_module("deepspeed." + module[:-3].replace("/", ".")), symbol, None)
        if found is not None and hasattr(found, "model_fields"):
            keys[name] = {field.alias or key for key, field in found.model_fields.items()}
    adams = (torch.optim.AdamW, FusedAdam, DeepSpeedCPUAdam)
    keys["optimizer.params"] = {key for adam in adams for key in inspect.signature(adam.__init__).parameters}

    class Tiny(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.wte = torch.nn.Embedding(40, 16)
            self.block = torch.nn.Sequential(
                torch.nn.Linear(16, 32, bias=False), torch.nn.GELU(), torch.nn.Linear(32, 16)
            )

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            logits = self.block(self.wte(ids)) @ self.wte.weight.T  # (B, T, V)
            return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten())

    def train(config: dict[str, Any]) -> dict[str, Any]:
        model = Tiny()
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
        ids = torch.arange(32).view(2, 16)
        losses = []
        for _ in range(2 * config["gradient_accumulation_steps"]):
            loss = engine(ids)
            engine.backward(loss)
            engine.step()
            losses.append(float(loss))
        return {
            "steps": engine.global_steps,
            "skipped": engine.skipped_steps,
            "optimizer": type(engine.basic_optimizer).__name__,
            "accumulates": str(engine.get_data_types()[1]),
            "losses": [losses[0], losses[-1]],
        }

    small = {MICRO: 2, ACCUMULATION: 2}
    shipped = {
        path.stem: json.loads(path.read_text()) | small for path in shipped_profiles() if "fp16" not in path.stem
    }
    completed = {}
    for case in ACCUMULATION_TYPES:
        if case[1] != "fp16":
            completed[str(case)] = load(answer.parent, bare(*case)).ds_config(micro_batch=2, accumulation=2, ranks=1)
    said = {
        "keys": {name: sorted(found) for name, found in keys.items()},
        "shipped": {name: train(config) for name, config in shipped.items()},
        "completed": {name: train(config) for name, config in completed.items()},
    }
    answer.write_text(json.dumps(said))


if __name__ == "__main__":
    probe(Path(sys.argv[1]))
