"""What the memory of a run depends on."""

from dataclasses import dataclass

from gpt2ds.gpt2.config import GPT2Config

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

# cuBLAS takes a workspace through the caching allocator for each thread that multiplies, the forward pass's and
# autograd's; cuBLASLt shares it (PyTorch 2.13, aten/src/ATen/cuda/CublasHandlePool.cpp). 8,320 KiB on most cards.
CUBLAS_WORKSPACE_BYTES = 2 * 8320 * 1024
# 32 MiB on those of compute capability 9 and above.
LARGE_CUBLAS_WORKSPACE_BYTES = 2 * 32 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class MemorySetting:
    """The fields of a plan that concern memory."""

    model: GPT2Config
    context: int
    micro_batch: int
    accumulation: int
    ranks: int
    zero_stage: int
    dtype: str
    grad_accum_dtype: str
    recompute: str = "none"
    loss_chunk: int = 1024
    reduce_bucket_elements: int = 20_000_000
    overlap_comm: bool = False
    offload_optimizer: bool = False
    offload_param: bool = False
    live_parameter_elements: int = 50_000_000
    """ZeRO-3: gathered parameters beyond which nothing more is fetched ahead (stage3_max_live_parameters)."""
    prefetch_elements: int = 20_000_000
    """ZeRO-3: parameters that are fetched ahead at a time (stage3_prefetch_bucket_size)."""
    reuse_distance_elements: int = 0
    """ZeRO-3: parameters that are needed again within so many others stay gathered (stage3_max_reuse_distance)."""
    sub_group_elements: int = 1_000_000_000
    """ZeRO-3: parameters that one tile of the optimizer step covers."""
    master_bytes: int = 4
    """Of each parameter in the optimizer's own weights; 2 under bf16_master_weights_and_grads."""
    moment_bytes: float = 8
    """Of each parameter's two moments; 4 under bf16_optimizer_states, 2 and their scales in 8 bits."""
    immediate_grad_update: bool = True
    """ZeRO-1 in bf16 with fp32 sums: whether a gradient is added to its sum, and dropped, as soon as it is there."""
    workspace_bytes: int = CUBLAS_WORKSPACE_BYTES
    """What the library of matrix products keeps for itself on the device."""

    @property
    def tokens(self) -> int:
        """Of one micro-batch."""
        return self.micro_batch * self.context

    @property
    def dtype_bytes(self) -> int:
        """Of a number in forward and backward."""
        return DTYPE_BYTES[self.dtype]

    @property
    def accumulate_bytes(self) -> int:
        """Of a number in the sums of gradients."""
        return DTYPE_BYTES[self.grad_accum_dtype]

    @property
    def has_bf16_optimizer(self) -> bool:
        """DeepSpeed trains ZeRO-1 in bf16 with fp32 sums by an optimizer class of its own (engine.py:2305)."""
        return (
            self.zero_stage == 1
            and self.dtype == "bf16"
            and self.grad_accum_dtype == "fp32"
            and not self.offload_optimizer
        )
