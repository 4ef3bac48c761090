"""Micro-batch x accumulation x ranks: one answer for the trainer and the estimate. The global batch never changes."""

from gpt2ds.ds_profile import DsProfile
from gpt2ds.errors import UserError
from gpt2ds.memory.fit import divisors


def asks_for_auto(profile: DsProfile) -> bool:
    """Whether the micro-batch is left to the program, at a global batch that the profile fixes."""
    return profile.settings.get("train_micro_batch_size_per_gpu") == "auto"


def check_global_batch(name: str, total: int, ranks: int) -> None:
    """Raises UserError when so many sequences cannot be divided equally among the ranks; `name` is where they come
    from.
    """
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


def batch_of(
    profile: DsProfile,
    ranks: int,
    *,
    micro_batch: int | None,
    accumulation: int | None,
    global_batch: int | None = None,
    rounded: bool = False,
) -> tuple[int | None, int]:
    """(micro_batch, accumulation) of what was asked for and, where nothing was, the profile's; (None, the sequences of
    each rank) where "auto" leaves both to the program.

    rounded: where global_batch is asked for, the profile's own micro-batch may fall to one that divides it. Raises
    UserError when the numbers contradict each other.
    """
    total = global_batch or (None if micro_batch and accumulation else profile.global_batch)
    if total is None:
        size = micro_batch or profile.micro_batch
        if size is None:
            raise UserError(
                f"{profile.name} names neither train_micro_batch_size_per_gpu nor train_batch_size: "
                "add one, or give --micro-batch."
            )
        return size, accumulation or profile.accumulation or 1
    name = "--global-batch" if global_batch else f"{profile.name}: train_batch_size"
    if micro_batch or (global_batch and accumulation):
        return divided(name, total, ranks, micro_batch, accumulation)
    if asks_for_auto(profile) and not accumulation:
        check_global_batch(name, total, ranks)
        return None, total // ranks
    size = profile.micro_batch
    if global_batch and size:
        check_global_batch(name, total, ranks)
        if rounded:
            size = max(one for one in divisors(total // ranks) if one <= size)
        return divided(name, total, ranks, size, None)
    return divided(name, total, ranks, size, accumulation or profile.accumulation)
