"""`gpt2ds doctor`: what would go wrong with a run, found before it does. Every check looks and changes nothing."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gpt2ds.batch_arithmetic import batch_of
from gpt2ds.devices import CONTEXT_BYTES, NCCL_BYTES, Machine
from gpt2ds.doctor.finding import Finding, warning
from gpt2ds.doctor.gpu import check_cards, check_peers, check_torch, nvidia_driver, peers, seen_machine, torch_build
from gpt2ds.doctor.host import (
    check_allocator,
    check_build_locks,
    check_disk,
    check_host_memory,
    check_locked_memory,
    check_open_files,
    check_requirements,
    check_shared_memory,
)
from gpt2ds.doctor.ranks import check_all_reduce
from gpt2ds.ds_profile import DsProfile, load_profile
from gpt2ds.errors import UserError
from gpt2ds.estimate.rows import memory_setting
from gpt2ds.gpt2.config import MODELS, GPT2Config, find_model
from gpt2ds.memory.fit import largest_model
from gpt2ds.memory.formula import predict
from gpt2ds.memory.host import predict_host
from gpt2ds.memory.setting import MemorySetting
from gpt2ds.options import DEFAULTS, TrainOptions
from gpt2ds.requirements import nearest_folder


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorOptions:
    """What the run would be asked for; None takes what training would take."""

    ds: str | None = None
    model: str | None = None
    gpus: int | None = None
    out: Path = Path("logs")


def examine(options: DoctorOptions) -> Iterator[Finding]:
    """The findings, one after the other as they come; the last one, the all-reduce, takes some seconds.

    Raises UserError, before the first finding, for options that make no sense.
    """
    if options.gpus is not None and options.gpus < 1:
        raise UserError(f"--gpus must be at least 1, not {options.gpus}.")
    _check_folder(options.out)
    profile = load_profile(Path(options.ds or DEFAULTS["ds"][0]))
    machine, unseen = seen_machine()
    ranks = options.gpus or len(machine.gpus) or 1
    micro_batch, accumulation = batch_of(profile, ranks, micro_batch=None, accumulation=None)

    def setting(model: GPT2Config) -> MemorySetting:
        return memory_setting(
            TrainOptions(),
            profile,
            model,
            ranks=ranks,
            micro_batch=micro_batch or 1,
            accumulation=accumulation,
            machine=machine,
        )

    model = find_model(options.model) if options.model else _default_model(machine, ranks, setting)
    parts = _host_parts(setting(model), profile, machine, ranks)
    return _findings(options, profile, machine, unseen, ranks, model, parts)


def _findings(
    options: DoctorOptions,
    profile: DsProfile,
    machine: Machine,
    unseen: Finding | None,
    ranks: int,
    model: GPT2Config,
    host_parts: dict[str, int],
) -> Iterator[Finding]:
    build, driver, cuda = torch_build(), nvidia_driver(), machine.kind == "cuda"
    seen = driver
    if driver and driver.cards and machine.gpus:  # hidden ones are nobody's trouble
        seen = replace(driver, cards=tuple(driver.cards[gpu.nvml_index] for gpu in machine.gpus))
    yield check_torch(build, seen)
    if unseen:
        yield unseen
    else:
        yield from check_cards(machine, driver, usable=build is not None and build.cuda is not None)
    cards = machine.gpus[:ranks]
    if len(cards) > 1 and (finding := check_peers(cards, peers(cards))):
        yield finding
    yield from check_requirements(profile, machine, ranks, build.cuda if build else None)
    yield from check_build_locks(needed=profile.compiled_operators is not None)
    yield check_shared_memory(ranks, cuda)
    yield from check_disk(options.out, model, profile.dtype, DEFAULTS["keep"][0])
    yield check_host_memory(host_parts, machine, model)
    for limit in (check_locked_memory(profile), check_open_files(), check_allocator(cuda)):
        if limit:
            yield limit
    if unseen:
        yield warning("all-reduce", "Not tried, because no card would be seen.", "Mend CUDA_VISIBLE_DEVICES first.")
        return
    # On a CPU two, also when one would train: what is asked is whether ranks find each other. More than the cores could
    # be more processes than the machine bears.
    yield check_all_reduce(len(cards) if cuda else max(2, min(ranks, machine.cores)), cuda=cuda)


def _check_folder(out: Path) -> None:
    try:
        place = nearest_folder(out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be looked at: {error.strerror}. Name another folder.") from error
    if not place.is_dir():
        raise UserError(f"--out {out}: {place} is a file, name a folder.")


def _default_model(machine: Machine, ranks: int, setting: Callable[[GPT2Config], MemorySetting]) -> GPT2Config:
    """What training would take: the largest that fits the smallest card, the tiny one on a CPU or where none fits."""
    if machine.kind == "cpu":
        return MODELS["gpt2_tiny"]
    room = min(gpu.free_bytes for gpu in machine.gpus[:ranks]) - CONTEXT_BYTES - (NCCL_BYTES if ranks > 1 else 0)
    return largest_model(MODELS.values(), setting, room) or MODELS["gpt2_tiny"]


def _host_parts(setting: MemorySetting, profile: DsProfile, machine: Machine, ranks: int) -> dict[str, int]:
    """What the host must hold: beside the cards what is offloaded, on a CPU all of the training."""
    if machine.kind == "cuda":
        return predict_host(setting, ranks_here=ranks, pinned=profile.pins_memory)
    on_host = replace(setting, offload_optimizer=False, offload_param=False)
    return {name: size * ranks for name, size in predict(on_host).parts.items()}
