"""The dispatcher namespace that the operators are declared in, and how they are called."""

from typing import Any

import torch
from torch import Tensor
from torch.library import Library

library = Library("adakernels", "DEF")


def call(op: torch._ops.OpOverload, *args: Any) -> Tensor:
    """Call an operator, past its Python autograd where no gradient is wanted."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*args)
    # Entering the Python autograd only to find that there is nothing to do costs 8 µs.
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)
