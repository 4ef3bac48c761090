"""Micro-batch x accumulation x ranks: one answer for the trainer and the estimate. The global batch never changes."""

from gpt2ds.ds_profile import DsProfile
from gpt2ds.errors import UserError
from gpt2ds.memory.fit import divisors

# Sequences per step, far beyond what is trained. The divisors of larger numbers would take hours to find.
MOST_SEQUENCES = 10**6


def asks_for_auto(profile: DsProfile) -> bool:
    """Whether the micro-batch is left to the program, at a global batch that the profile fixes."""
    return profile.settings.get("train_micro_batch_size_per_gpu") == "auto"


def check_global_batch(name: str, total: int, ranks: int) -> None:
    """Raises UserError when so many sequences cannot be divided equally among the ranks; `name` is where they come
    from.
    """
    _check_size(name, total)
    if total % ranks:
        near = [size for size in (total // ranks * ranks, (total // ranks + 1) * ranks) if size]
        raise UserError(
            f"{name} {total} does not divide by {ranks} ranks; the nearest that do are {' and '.join(map(str, near))}."
            if len(near) > 1
            else f"{name} {total} does not divide by {ranks} ranks; the nearest that does is {near[0]}."
        )


def divided(name: str, total: int, ranks: int, micro_batch: int | None, accumulation: int | None) -> tuple[int, int]:
    """(micro_batch, accumulation) of a global batch, where at most one of the two is left open.

    Without both, all of a rank's sequences at once. Raises UserError when they do not come to the global batch.
    """
    check_global_batch(name, total, ranks)
    per_rank = total // ranks
    asked = micro_batch or max(1, per_rank // (accumulation or 1))
    if per_rank % asked or (accumulation and asked * accumulation != per_rank):
        sizes = divisors(per_rank)
        near = sorted(sorted(sizes, key=lambda size: abs(size - asked))[:2])
        given = f"micro-batch {micro_batch} x " if micro_batch else ""
        given += f"accumulation {accumulation} x " if accumulation else ""
        raise UserError(
            f"{name} {total} is not {given}{ranks} rank{'s' * (ranks > 1)}; the nearest micro-batches are "
            f"{', '.join(map(str, near))} with accumulation {', '.join(str(per_rank // size) for size in near)}."
        )
    return asked, per_rank // asked


def largest_divisor(total: int, most: int) -> int:
    """The largest divisor of `total` that is not above `most`."""
    return max((size for size in divisors(total) if size <= most), default=1)


def batch_of(
    profile: DsProfile,
    ranks: int,
    *,
    micro_batch: int | None,
    accumulation: int | None,
    global_batch: int | None = None,
    named: str = "--global-batch",
    rounded: bool = False,
) -> tuple[int | None, int]:
    """(micro_batch, accumulation) of what was asked for and, where nothing was, the profile's; (None, the sequences of
    each rank) where "auto" leaves both to the program.

    named: where global_batch comes from, for the message. rounded: with a global_batch the profile's own micro-batch
    may fall to one that divides it. Raises UserError when the numbers contradict each other.
    """
    for name, count in (
        ("--micro-batch", micro_batch),
        ("--accumulation", accumulation),
        (f"{profile.name}: train_micro_batch_size_per_gpu", profile.micro_batch),
        (f"{profile.name}: gradient_accumulation_steps", profile.accumulation),
    ):
        _check_size(name, count or 1)
    total = global_batch or (None if micro_batch and accumulation else profile.global_batch)
    if total is None:
        size = micro_batch or profile.micro_batch
        if size is None:
            raise UserError(
                f"{profile.name} names neither train_micro_batch_size_per_gpu nor train_batch_size: "
                "add one, or give --micro-batch."
            )
        return size, accumulation or profile.accumulation or 1
    name = named if global_batch else f"{profile.name}: train_batch_size"
    if micro_batch or (global_batch and accumulation):
        return divided(name, total, ranks, micro_batch, accumulation)
    if asks_for_auto(profile) and not accumulation:
        check_global_batch(name, total, ranks)
        return None, total // ranks
    size = profile.micro_batch
    if global_batch and size:
        check_global_batch(name, total, ranks)
        if rounded:
            size = largest_divisor(total // ranks, size)
        return divided(name, total, ranks, size, None)
    return divided(name, total, ranks, size, accumulation or profile.accumulation)


def _check_size(name: str, count: int) -> None:
    if count > MOST_SEQUENCES:
        raise UserError(f"{name} {count} is more than any run takes in a step: give at most {MOST_SEQUENCES:,}.")
