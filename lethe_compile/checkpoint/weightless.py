"""A model of transformers as its constructor makes it, buffers and all, but with weights that take no memory."""

from __future__ import annotations

from collections.abc import Collection
from math import nan, prod
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lethe_compile.errors import WholeOnlyError
from lethe_compile.passes.absent import Shared, absent, lies_nowhere

_SMALL = 1 << 16  # numbers: constructors may compute with what is no larger


class _NoMemory(TorchFunctionMode):
    """What `torch.empty` makes, as layers do for their weights, is one number, seen many times, or NaN where small."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.empty:
            return func(*args, **kwargs)
        size = kwargs.pop("size", args[0] if args and isinstance(args[0], (tuple, list, torch.Size)) else args)
        if prod(size) > _SMALL:
            return torch.zeros((), **kwargs).expand(tuple(size))
        made = torch.zeros(tuple(size), **kwargs)
        return made.detach().fill_(nan).requires_grad_(made.requires_grad) if made.is_floating_point() else made


def weightless(config: Any, dtype: torch.dtype, device: torch.device, **options: Any) -> Any:
    """The causal language model of a configuration, in evaluation mode, each of its weights absent.

    Good for capturing a graph, and for nothing else: who runs it fetches weights (`passes.parts.Fetch`). Buffers that
    its constructor computes are there, computed on the CPU as `from_pretrained` does. Nothing is tied.

    `options` go to `AutoModelForCausalLM.from_config`.

    Raises:
        WholeOnlyError: its constructor does not work without weights.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    try:
        with torch.device("cpu"), _NoMemory(), no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    except RuntimeError as error:  # it writes to its weights, each of which is one number
        first = str(error).split("\n")[0]
        raise WholeOnlyError(f"a {config.model_type} cannot be made without weights: {first}") from error
    return without_weights(model, device).eval()


def without_weights(model: Any, device: torch.device) -> Any:
    """The model, its parameters absent and its buffers moved to `device`."""
    shared: Shared = {}
    for parameter in model.parameters():
        parameter.data = absent(parameter.shape, parameter.dtype, device, shared)
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(path, recurse=False):
            moved = absent(buffer.shape, buffer.dtype, device) if lies_nowhere(buffer) else buffer.to(device)
            setattr(module, name.rpartition(".")[2], moved)
    return model


def initialize_buffers(model: Any, loaded: Collection[str]) -> None:
    """Let transformers compute buffers as it does after loading weights, all but those that are `loaded`.

    In the precision of then: in the constructor, the model's dtype is that of all computation.
    """
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    for name, buffer in model.named_buffers():
        if name in loaded:
            buffer._is_hf_initialized = True
    try:
        model.initialize_weights()
    except RuntimeError as error:
        first = str(error).split("\n")[0]
        raise WholeOnlyError(f"{type(model).__name__} sets its buffers by its weights: {first}") from error


def is_unset(buffer: Tensor) -> bool:
    """Whether nothing was ever written to a buffer of a weightless model."""
    return lies_nowhere(buffer) or (buffer.is_floating_point() and bool(buffer.isnan().any()))
