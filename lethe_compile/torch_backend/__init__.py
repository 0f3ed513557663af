"""`torch.compile(model, backend="lethe", options={...})`: the compiler behind torch.compile's interface.

`options` are the fields of `LetheConfig`; `cache_latent` stays off, since a session may begin from a cache of expanded
keys and values. What torch.compile captures must be the whole forward of one model; that
model is then compiled by `optimize`, once, whatever the graphs of it that follow: their shapes differ, the model does
not. Each graph is run beside the optimized model at its first call and must give the same logits, so that flags, masks
and positions are proved and not assumed.

Transformers' `generate` runs unchanged, with ``cache_implementation="static"``, in one of two ways::

    model.forward = torch.compile(model.forward, backend="lethe", options={...}, fullgraph=True)
    model.generate(ids, cache_implementation="static")  # pruned from the prompt on; the static cache takes no memory

    config = CompileConfig(backend="lethe", mode=None, options={...}, fullgraph=True)
    model.generate(ids, cache_implementation="static", compile_config=config)  # compiles steps alone, and on GPUs alone

The second prefills outside of torch.compile: what attention went to in the prompt is not known, and the static cache
stays allocated until `generate` returns. `optimized(model)` tells what became of the model and of its cache. Rows that
have ended go on with padding, as transformers feeds it. With ``fullgraph=True`` whatever torch.compile would run
uncompiled, behind a graph break or beyond its limit of recompilations, is an error.

Errors come from the first call of the compiled model, as they are: `UnsupportedGraphError`, `ConfigError`,
`InputError`. Raised inside torch.compile they would be wrapped, or taken for a reason to run the model uncompiled.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from lethe_compile import api
from lethe_compile.capture.region import Region
from lethe_compile.config import LetheConfig
from lethe_compile.errors import ConfigError, InputError
from lethe_compile.runtime import OptimizedModel
from lethe_compile.torch_backend.forward import Forward
from lethe_compile.torch_backend.static import Cached, Sessions

_MODES = (None, "default", "reduce-overhead")  # the last is what an optimized model does on a GPU anyway


def lethe(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., tuple[Any, ...]]:
    """The backend: called by torch.compile, with a graph; returns what runs in its place."""
    del example_inputs  # the first call brings real ones
    return _CompiledRegion(Region(graph), options, mode)


def optimized(model: nn.Module) -> OptimizedModel:
    """What this backend made of `model`, to ask for its `report()` and `cache_stats()`, or to watch its rounds.

    Takes the model, or what torch.compile returned for it. Compiled with several `options`, it is the last used.

    Raises:
        InputError: no compiled call of the model has run yet.
    """
    original = getattr(model, "_orig_mod", model)
    compiled = _compiled.get(original)
    if not compiled:
        raise InputError(f"no forward of this {type(original).__name__} has run through backend='lethe' yet")
    return next(reversed(compiled.values())).fast


# ------------------------------------------------------------------------------------------------------ optimized once


@dataclass
class _Compiled:
    """An optimized model, and the tensors that it was made from, as they were."""

    fast: OptimizedModel
    weights: list[Tensor]  # held, so that no other tensor gets the identity of one
    kinds: list[Any]
    sessions: Sessions

    def made_from(self, weights: Sequence[Tensor]) -> bool:
        same = len(weights) == len(self.weights) and all(a is b for a, b in zip(weights, self.weights, strict=True))
        return same and _kinds(weights) == self.kinds


_compiled: weakref.WeakKeyDictionary[nn.Module, dict[LetheConfig, _Compiled]] = weakref.WeakKeyDictionary()


def _kinds(weights: Sequence[Tensor]) -> list[Any]:
    return [(tensor.dtype, tensor.device) for tensor in weights]


def _optimize(model: nn.Module, config: LetheConfig, example: Mapping[str, Tensor] | None) -> _Compiled:
    known = _compiled.setdefault(model, {})
    weights = [*model.parameters(), *model.buffers()]
    found = known.pop(config, None)
    if found is None or not found.made_from(weights):
        with torch.compiler.set_stance("force_eager"):  # the model's forward may be the compiled one by now
            # A static cache that others have filled holds keys and values, from which no latent can be had back.
            fast = api.optimize(model, replace(config, cache_latent=False), example_inputs=example)
        found = _Compiled(fast, weights, _kinds(weights), Sessions())
    known[config] = found  # the last one
    return found


def _finder(model: nn.Module, config: LetheConfig) -> Callable[[], _Compiled]:
    """Finds what `_optimize` made, without holding its weights: torch.compile keeps a graph longer than its model."""
    reference = weakref.ref(model)

    def find() -> _Compiled:
        alive = reference()
        assert alive is not None, "its weights have just come as inputs"
        return _compiled[alive][config]

    return find


def _config(options: Mapping[str, Any] | None, mode: str | None) -> LetheConfig:
    if mode not in _MODES:
        known = ", ".join(repr(name) for name in _MODES)
        raise ConfigError(f"mode={mode!r} is not allowed with backend='lethe': must be one of {known}")
    return LetheConfig.from_dict(options or {})


# ------------------------------------------------------------------------------------------------------------- regions


class _CompiledRegion:
    """What runs in place of one graph; made ready by its first call, and again when the model's weights are others."""

    def __init__(self, region: Region, options: Mapping[str, Any] | None, mode: str | None) -> None:
        self._region, self._options, self._mode = region, options, mode
        self._ready: list[int] | None = None

    @torch.no_grad()
    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        owned = zip(inputs, self._region.owned, strict=True)
        weights = [id(value) for value, own in owned if own and isinstance(value, Tensor)]
        if self._ready != weights:
            self._prepare(inputs)
            self._ready = weights
        compiled = self._find()
        return self._call(compiled.fast, compiled.sessions, inputs)

    def _prepare(self, inputs: Sequence[Any]) -> None:
        region, config = self._region, _config(self._options, self._mode)
        model = region.model
        if model.training:
            raise InputError(
                f"{type(model).__name__} is in training mode, and an optimized model only infers: call eval()"
            )
        outputs, roles = region.outputs(), region.read(inputs)
        compiled = _optimize(model, config, region.example(roles, inputs))
        self._call: Forward | Cached = (Cached if roles.static or outputs.made else Forward)(region, roles, outputs)
        self._call.verify(compiled.fast, compiled.sessions, inputs)
        self._find = _finder(model, config)
