"""Weights that a model is captured without: parameters of the right shape that take next to no memory.

Each is one number, seen as often as its shape has entries, until a rank fetches its own part (`parts.Fetch`). Stacks of
matrices are one matrix, seen as often as there are experts, since grouped products look at its strides. Where a proof
needs the numbers themselves, it reads them for its own time with the reader that such a weight may carry.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lethe_compile.errors import InputError

_READER = "_lethe_reads"


Shared = MutableMapping[tuple[tuple[int, ...], torch.dtype | None], Tensor]
"""Matrices by shape and dtype, each the memory of all stacks of such."""


def absent(
    shape: tuple[int, ...] | torch.Size,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    shared: Shared | None = None,
) -> Tensor:
    """A tensor of zeros, ``shape``, that takes the memory of one number; a stack that of a matrix in `shared`."""
    if shared is None or prod(shape[:-2]) == 1:
        return torch.zeros((), dtype=dtype, device=device).expand(shape)
    key = (tuple(shape[-2:]), dtype)
    if key not in shared:
        shared[key] = torch.zeros(key[0], dtype=dtype, device=device)
    return shared[key].expand(shape)


def is_absent(weight: Any) -> bool:
    """Whether this parameter holds no weights: one number in the place of many. A single number is always there."""
    return isinstance(weight, nn.Parameter) and lies_nowhere(weight)


def lies_nowhere(tensor: Tensor) -> bool:
    """Whether its entries share their memory along the first dimension that has several."""
    if tensor.layout != torch.strided:
        return False
    return next((stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1), False)


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
