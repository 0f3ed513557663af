"""Quantised weights: the plain tensors that hold them, and layers that torch.export cannot trace as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch._aot_autograd.subclass_parametrization import unwrap_tensor_subclass_parameters
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lethe_compile.errors import UnsupportedGraphError

_LOAD = "load it with BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)"


def plain_tensors(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """A parameter by name, or the tensors inside it where it is a tensor subclass that wraps some, as torchao's are."""
    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    for inner in tensor.__tensor_flatten__()[0]:
        yield from plain_tensors(f"{name}.{inner}", getattr(tensor, inner))


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor infinity; torch itself cannot ask this of an 8-bit float."""
    return bool(torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all())


@contextmanager
def exportable(model: nn.Module) -> Iterator[None]:
    """Inside this context torch.export sees plain tensors and ops where the model has quantised layers.

    Tensor subclasses, such as torchao's, are taken apart into the tensors that they hold, so that dequantisation
    becomes part of the graph. bitsandbytes' int8 linear layers keep their scales on the parameter object and beside it,
    where tracing loses them: stand-ins call the same ops on the same tensors.

    Raises:
        UnsupportedGraphError: a layer of bitsandbytes that cannot be captured; names it.
    """
    modules = list(model.named_modules())
    wrapping = [m for _, m in modules if any(map(is_traceable_wrapper_subclass, m._parameters.values()))]
    layers = [(path, m) for path, m in modules if type(m).__module__.startswith("bitsandbytes.")]
    stand_ins = [(path, layer, _Int8Linear(path, layer)) for path, layer in layers]
    with ExitStack() as stack:
        for module in wrapping:
            stack.enter_context(_taken_apart(module))
        for path, layer, stand_in in stand_ins:
            stack.callback(_replace, model, path, layer)
            _replace(model, path, stand_in)
        yield


@contextmanager
def _taken_apart(module: nn.Module) -> Iterator[None]:
    """The tensor subclasses among a module's own parameters as parametrizations of the plain tensors inside them."""
    kind, parameters, children = type(module), dict(module._parameters), dict(module._modules)
    try:
        module._modules.clear()  # so that it does not go deeper
        unwrap_tensor_subclass_parameters(module)
        module._modules.update(children)
        yield
    finally:  # the very objects, in their order
        module.__class__ = kind
        module._parameters.clear()
        module._parameters.update(parameters)
        module._modules.clear()
        module._modules.update(children)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


class _Int8Linear(nn.Module):
    """``bitsandbytes.nn.Linear8bitLt`` without outliers: activations quantised by token, int8 product, then scaled.

    Args:
        path: the layer's place in the model, for errors.
        layer: the layer whose weights, scales and bias are shared.
    """

    def __init__(self, path: str, layer: Any) -> None:
        super().__init__()
        weight, scale = _int8_weight(path, layer)
        self.weight = nn.Parameter(weight, requires_grad=False)  # [out, in] int8
        self.register_buffer("scale", scale)  # [out] float32, the largest magnitude of each row
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """``[…, in] -> […, out]`` in the dtype of `x`."""
        tokens = x.reshape(-1, x.shape[-1]).to(torch.float16)
        values, scale, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(tokens, 0.0)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        out = torch.ops.bitsandbytes.int8_scaled_mm(values, self.weight, scale, self.scale, bias=bias, dtype=x.dtype)
        return out.reshape(*x.shape[:-1], self.weight.shape[0])  # type: ignore[no-any-return]


def _int8_weight(path: str, layer: Any) -> tuple[Tensor, Tensor]:
    """The int8 weight ``[out, in]`` of a Linear8bitLt and its scales ``[out]``."""
    kind = type(layer).__name__
    if kind != "Linear8bitLt":
        raise UnsupportedGraphError(f"bitsandbytes' {kind} cannot be captured, only its Linear8bitLt", where=path)
    state = layer.state
    if state.threshold > 0:
        raise UnsupportedGraphError(
            f"its int8 layer computes columns above {state.threshold} in full precision, and looks for them among all"
            " tokens of a call: a token's logits then depend on its batch, and differ step by step",
            where=path,
            hint=_LOAD,
        )
    # bitsandbytes moves both from the parameter to the state at the first forward.
    weight = state.CB if state.CB is not None else getattr(layer.weight, "CB", None)
    scale = state.SCB if state.SCB is not None else getattr(layer.weight, "SCB", None)
    if state.has_fp16_weights or weight is None or scale is None:
        raise UnsupportedGraphError("its int8 layer quantises its weights at every call", where=path, hint=_LOAD)
    return weight, scale
