"""Where autograd adds a gradient to another in place, as it does when nobody watches.

Under a dispatch mode it makes a new tensor of every such sum (PyTorch 2.13, torch/csrc/autograd/input_buffer.cpp:
can_accumulate_inplace; aten/src/ATen/TensorSubclassLikeUtils.h), so that watching a run would change what it takes: by
a whole embedding for a tied head.
"""

import functools
import sys
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def would_be_in_place(operation: Any, arguments: tuple[Any, ...]) -> bool:
    """Whether this operation, seen by a dispatch mode, is a sum that autograd would make in its first argument."""
    return (
        _is_sum_of_gradients(operation)
        and torch.ops.aten.is_non_overlapping_and_dense(arguments[0])
        and _holders(arguments) == holders_of_one_alone()
    )


@functools.cache
def holders_of_one_alone() -> tuple[int, int, int]:
    """How many references a dispatch mode counts to a gradient that only autograd holds.

    Counted once and not written down: it depends on torch and on Python.
    """
    counted = []

    class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, operation: Any, _: Any, arguments: Any = (), named: Any = None) -> Any:
            if _is_sum_of_gradients(operation):
                counted.append(_holders(arguments))
            return operation(*arguments, **(named or {}))

    count: Any = Count
    with torch.enable_grad(), count():
        x = torch.ones(1, device="cpu", requires_grad=True)
        (x.sin() + x.cos()).backward()  # type: ignore[no-untyped-call]
    return counted[0] if counted else (0, 0, 0)


def _is_sum_of_gradients(operation: Any) -> bool:
    """An addition in the backward pass; one that Python asks for has Python as another holder."""
    in_backward = not torch.is_grad_enabled() and torch._C._current_autograd_node() is not None
    return in_backward and operation is torch.ops.aten.add.Tensor


def _holders(arguments: tuple[Any, ...]) -> tuple[int, int, int]:
    """References to the first argument: of C++ to the tensor and to its storage, and of Python."""
    storage = arguments[0].untyped_storage()
    return arguments[0]._use_count(), torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(arguments[0])
