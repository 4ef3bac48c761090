"""What a run needs of the host's memory: building the model, offloaded states with their pinned buffers, saving.

Units and letters as in `formula`. References are to deepspeed 0.19.8: s12 = runtime/zero/stage_1_and_2.py,
z3 = runtime/zero/stage3.py. All ranks of one machine together; the processes themselves (some 0.5 GiB each) are not in.
"""

from gpt2ds.memory.formula import largest_parameter
from gpt2ds.memory.setting import DTYPE_BYTES, MemorySetting


def predict_host(setting: MemorySetting, *, ranks_here: int, pinned: bool = True) -> dict[str, int]:
    """Bytes by name at the worst moment on one machine with `ranks_here` of the run's ranks.

    pinned: whether offload buffers are page-locked. PyTorch rounds each such block up to a power of two
    (aten/src/ATen/core/CachingHostAllocator.h), which can nearly double it.
    """
    model, s = setting.model, DTYPE_BYTES[setting.dtype]
    # Every rank builds the whole model in fp32, then turns it into 16 bits parameter by parameter.
    building: dict[str, float] = {"building the model": 4 * model.parameters * ranks_here}
    staying = {name: size * ranks_here for name, size in _offloaded(setting, pinned).items()}
    if setting.recompute == "host":
        inputs = s * model.emb_dim * setting.micro_batch * setting.context
        staying["block inputs"] = model.n_layers * _block(inputs, pinned=True) * ranks_here
    # Rank 0 collects the weights for a file of their own.
    staying["saving the weights"] = s * model.parameters
    worst = max(building, staying, key=lambda parts: sum(parts.values()))
    return {name: int(size) for name, size in worst.items()}


def _offloaded(setting: MemorySetting, pinned: bool) -> dict[str, float]:
    share = setting.model.parameters / setting.ranks
    s, a = DTYPE_BYTES[setting.dtype], DTYPE_BYTES[setting.grad_accum_dtype]
    parts: dict[str, float] = {}
    if setting.offload_param:
        parts["weights"] = _block(s * share, pinned)  # z3:906
    if not setting.offload_optimizer:
        return parts
    parts["moments"] = setting.moment_bytes * share  # made by Adam itself, not page-locked
    if setting.zero_stage == 3:
        tile = min(share, setting.sub_group_elements)
        tiles = -(-share // tile)
        parts["master weights"] = setting.master_bytes * share
        parts["gradients"] = tiles * _block(setting.master_bytes * tile, pinned)  # z3:1339
        parts["gradient sums"] = _block(a * share, pinned)  # z3:794
        return parts
    parts["master weights"] = _block(setting.master_bytes * share, pinned)  # s12:564
    parts["gradients"] = _block(setting.master_bytes * share, pinned)  # s12:940
    parts["weights on their way to the GPU"] = _block(s * share, pinned)  # s12:571
    parts["gradients on their way"] = 2 * _block(s * largest_parameter(setting), pinned)  # s12:656
    if setting.accumulation > 1 and a == s:
        parts["gradient sums"] = _block(s * share, pinned)  # s12:1825
    return parts


def _block(size: float, pinned: bool) -> float:
    return float(1 << (int(size) - 1).bit_length()) if pinned and size > 0 else size
