"""Weights that a model is captured without: parameters of the right shape that take no memory.

Each is one number, seen as often as its shape has entries, until a rank fetches its own part (`parts.Fetch`). Where
a proof needs the numbers themselves, it reads them for its own time with the reader that such a weight may carry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lethe_compile.errors import InputError

_READER = "_lethe_reads"


def absent(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype | None, device: torch.device | str | None) -> Tensor:
    """A tensor of zeros, ``shape``, that takes the memory of one number."""
    return torch.zeros((), dtype=dtype, device=device).expand(shape)


def is_absent(weight: Any) -> bool:
    """Whether this parameter holds no weights: one number in the place of all. A single number is always there."""
    return isinstance(weight, nn.Parameter) and weight.numel() > 1 and lies_nowhere(weight)


def lies_nowhere(tensor: Tensor) -> bool:
    """Whether each of its entries is the same number in memory."""
    return tensor.numel() > 1 and tensor.layout == torch.strided and not any(tensor.stride())


def set_reader(weight: nn.Parameter, read: Callable[[], Tensor]) -> None:
    """Let proofs have the whole of an absent weight from `read`."""
    setattr(weight, _READER, read)


def known(value: Any, name: str) -> Any:
    """`value` itself, or where it is an absent weight, what its reader reads.

    Raises:
        InputError: it is absent and nothing reads it.
    """
    if not is_absent(value):
        return value
    read = getattr(value, _READER, None)
    if read is None:
        raise InputError(f"a proof needs the numbers of {name}, and the model has no weights: load them")
    return read()
