"""ZeRO-3: which weights are whole on a GPU at a time.

References are to deepspeed 0.19.8, runtime/zero/partitioned_param_coordinator.py.
"""

from gpt2ds.memory.setting import MemorySetting


def gathered_bytes(setting: MemorySetting, block: int) -> int:
    """Weights gathered while this block is at work; the number of blocks stands for the loss."""
    model = setting.model
    if setting.zero_stage < 3 or (setting.ranks == 1 and not setting.offload_param):
        return 0
    d, L = model.emb_dim, model.n_layers
    # The model itself uses the token embedding, for its head, so that it stays from the first module to the last.
    always = model.vocab_size * d
    at_work = (4 * d * d if setting.recompute == "none" else 12 * d * d) if block < L else 0
    # A block's weights are needed again when what comes behind it has gone forward and backward, and forward once more
    # to be recomputed; they stay if that is near enough (:634).
    passes = 2 if setting.recompute == "none" else 3
    kept_blocks = min(L, setting.reuse_distance_elements // (passes * model.block_parameters))
    kept = model.block_parameters * (kept_blocks if block == L else max(0, kept_blocks - (L - block)))
    needed = always + at_work + kept
    # What is fetched ahead fills the rest of the limit: each of the nine modules of a block asks for more than it uses.
    ahead = min(setting.live_parameter_elements, always + model.block_parameters * min(block + 1, L))
    if setting.prefetch_elements == 0 or setting.live_parameter_elements <= needed:
        ahead = 0
    return setting.dtype_bytes * max(needed, ahead)
