"""What to change, and as little as possible, when a profile does not fit: every answer is checked by the formula."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from gpt2ds.devices import Machine
from gpt2ds.ds_profile import DsProfile, load_profile
from gpt2ds.errors import UserError
from gpt2ds.estimate.rows import EstimateOptions, Estimates, Row, possible_policies, room_bytes, setting_of
from gpt2ds.gpt2.config import MODELS, with_context
from gpt2ds.gpt2.policies import recomputed_flops_per_token
from gpt2ds.memory.fit import divisors, fits
from gpt2ds.memory.formula import predict
from gpt2ds.memory.setting import MemorySetting

# The sizes in which cards are sold, in GB.
CARD_SIZES_GB = (8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 141, 192)

GPUS_MOST = 1024

SMALLER_CHUNKS = (512, 256, 128)
SMALLER_BUCKET_ELEMENTS = 5_000_000

# In the order of what they cost: more traffic, then transfers to the host in every step.
OTHER_PROFILES = {
    "bf16": ("zero2", "zero3", "zero2_offload", "zero3_offload"),
    "fp16": ("zero2_fp16", "zero3_fp16"),
    "fp32": ("zero2", "zero2_offload"),
}

# In words, with the setting and the options of the card that it would be.
Change = tuple[str, MemorySetting, EstimateOptions]


def changes_needed(estimates: Estimates, options: EstimateOptions, machine: Machine) -> tuple[str | None, ...]:
    """For every row that does not fit a sentence with what would make it fit; None for the others."""
    return tuple(
        None if row.fits else _change_of(row, estimates.room_bytes, options, machine) for row in estimates.rows
    )


def stop_if_hopeless(estimates: Estimates, changes: Sequence[str | None]) -> None:
    """Raises UserError when no row fits even at micro-batch 1, with the smallest change for each."""
    if is_hopeless(estimates):
        pairs = zip(estimates.rows, changes, strict=True)
        raise UserError.from_list([f"{row.profile} does not fit: {change}" for row, change in pairs])


def is_hopeless(estimates: Estimates) -> bool:
    """Whether no row fits even at micro-batch 1."""
    return not any(row.fits or row.largest_micro_batch for row in estimates.rows)


def smallest_change(
    profile: DsProfile, setting: MemorySetting, options: EstimateOptions, machine: Machine
) -> tuple[str, MemorySetting | None]:
    """The first change that makes the setting fit, in the order in which they hurt, and the setting that it makes; None
    where no such change is known.
    """
    for words, changed, own in _changes(profile, setting, options, machine):
        if fits(predict(changed), room_bytes(own, machine, ranks=changed.ranks)):
            return words, changed
    return "a smaller model (--models-file takes sizes of your own)", None


def _change_of(row: Row, room: int, options: EstimateOptions, machine: Machine) -> str:
    per_rank = row.micro_batch * row.accumulation
    lacking = f"{-row.margin_bytes / 2**30:.1f} GiB are missing at micro-batch {row.micro_batch}"
    if not row.largest_micro_batch:
        # What it was checked at is part of the answer: at the profile's own micro-batch it may not fit.
        one = replace(row.setting, micro_batch=1, accumulation=per_rank)
        change, changed = smallest_change(row.source, one, options, machine)
        batch = f", with --micro-batch 1 --accumulation {changed.accumulation}" if changed else ""
        return f"not even micro-batch 1 fits. The smallest change that does: {change}{batch}."
    for size in reversed(divisors(per_rank)):
        # Where nothing was accumulated before, sums of gradients come with the smaller micro-batch.
        smaller = replace(row.setting, micro_batch=size, accumulation=per_rank // size)
        if size <= row.largest_micro_batch and fits(predict(smaller), room):
            change = f"--micro-batch {size} --accumulation {per_rank // size}"
            break
    else:
        change = f"--micro-batch {row.largest_micro_batch} and a smaller global batch"
    for policy, more in _more_recompute(row.source, row.setting):
        if fits(predict(more), room):
            change += f", or --recompute {policy} as it is"
            break
    return f"{lacking}; it fits with {change}."


def _more_recompute(profile: DsProfile, setting: MemorySetting) -> list[tuple[str, MemorySetting]]:
    """The policies beyond the setting's own, the cheapest first."""
    by_cost = sorted(
        (policy for policy in possible_policies(profile) if policy != "host"),
        key=lambda policy: recomputed_flops_per_token(setting.model, policy, setting.context),
    )
    more = by_cost[by_cost.index(setting.recompute) + 1 :] if setting.recompute in by_cost else []
    return [(policy, replace(setting, recompute=policy)) for policy in more]


def _changes(
    profile: DsProfile, setting: MemorySetting, options: EstimateOptions, machine: Machine
) -> Iterator[Change]:
    more = _more_recompute(profile, setting)
    for policy, changed in more:
        yield f"--recompute {policy}", changed, options
    # What comes next alone, and on top of the most recompute.
    for least, prefix in [(setting, "")] + [(changed, f"--recompute {policy} and ") for policy, changed in more[-1:]]:
        for chunk in SMALLER_CHUNKS:
            if chunk < min(setting.loss_chunk, setting.micro_batch * setting.context):
                least = replace(least, loss_chunk=chunk)
                yield f'{prefix}"loss_chunk": {chunk} in the profile', least, options
        if setting.zero_stage in (1, 2) and setting.overlap_comm:
            least = replace(least, overlap_comm=False)
            yield f'{prefix}"overlap_comm": false in the profile', least, options
        if setting.zero_stage and setting.reduce_bucket_elements > SMALLER_BUCKET_ELEMENTS:
            least = replace(least, reduce_bucket_elements=SMALLER_BUCKET_ELEMENTS)
            yield f'{prefix}"reduce_bucket_size": {SMALLER_BUCKET_ELEMENTS} in the profile', least, options
    for name in OTHER_PROFILES[profile.dtype]:
        if name != profile.name:
            yield from _as_profile(name, setting, options, machine)
    # Halving the accumulation for twice the ranks keeps the global batch; more than a thousand are not on sale.
    ranks = 2 * setting.ranks
    while ranks <= GPUS_MOST and setting.accumulation * setting.ranks % ranks == 0:
        for changed, how in [(setting, ""), *[(one, f" with --recompute {policy}") for policy, one in more[-1:]]]:
            accumulation = setting.accumulation * setting.ranks // ranks
            grown = replace(changed, ranks=ranks, accumulation=accumulation)
            yield f"--gpus {ranks}{how}", grown, replace(options, gpus=ranks)
        ranks *= 2
    for size in CARD_SIZES_GB:
        bigger = replace(options, gpu_memory=float(size))
        yield f"a card of {size} GB (--gpu-memory {size})", setting, bigger
    for model in sorted(MODELS.values(), key=lambda one: -one.parameters):
        if model.parameters < setting.model.parameters:
            context = min(setting.context, model.context_length)
            smaller = replace(setting, model=with_context(model, context), context=context)
            yield f"--model {model.name}", smaller, options


def _as_profile(name: str, setting: MemorySetting, options: EstimateOptions, machine: Machine) -> Iterator[Change]:
    """The same batch under another shipped profile: as it is, and with the most recompute."""
    profile = load_profile(name)
    changed = setting_of(
        profile,
        options,
        machine,
        setting.model,
        ranks=setting.ranks,
        micro_batch=setting.micro_batch,
        accumulation=setting.accumulation,
    )
    yield f"--ds {name}", changed, options
    for policy, more in _more_recompute(profile, changed)[-1:]:
        yield f"--ds {name} --recompute {policy}", more, options
