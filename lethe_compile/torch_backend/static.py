"""A compiled forward with a static cache of transformers: the optimized model's paged cache takes its place.

The static cache's tensors arrive as inputs of the graph, and tell which generation a call belongs to. When the graph
meets a cache that it does not know, or that others have written since, it begins a session: from nothing, if the cache
is empty, or else from the keys and values that are in it, as a prefill outside of torch.compile leaves them. From then
on the static cache is no longer written. Its counters go on, since transformers counts tokens by them; its first layer
becomes NaN, so that nobody takes for a cache what is none any more. Its memory stays with it until it goes.

Where the prefill is compiled too, and is what allocates the cache, layers without a window get no memory: their keys
and values are one NaN, seen as tensors of the shape that transformers expects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lethe_compile.capture.region import Region, Roles
from lethe_compile.capture.region_outputs import Outputs
from lethe_compile.errors import UnsupportedGraphError
from lethe_compile.runtime import OptimizedModel
from lethe_compile.torch_backend.forward import expect_equal, last_tokens, random_ids
from lethe_compile.torch_backend.step import INSTEAD, StaticStep

if TYPE_CHECKING:
    from lethe_compile.hf_cache import LetheCache


class Sessions:
    """The sessions of one optimized model, by the tensors of the static caches whose place they have taken.

    A session ends with the static cache that it stands for.
    """

    def __init__(self) -> None:
        self._sessions = WeakIdKeyDictionary()  # Tensor -> (LetheCache, version)

    def find(self, tensor: Tensor) -> LetheCache | None:
        """The session that `tensor` belongs to, unless others have written to it since."""
        session, version = self._sessions.get(tensor, (None, None))
        found: LetheCache | None = session
        return found if version == _version(tensor) else None

    def add(self, session: LetheCache, tensors: Sequence[Tensor]) -> None:
        """Let a session take the place of a static cache with these `tensors`, those of its first layer first."""
        for tensor in tensors[:2]:
            unallocated = not any(tensor.stride())
            (tensor.as_strided((1,), (1,)) if unallocated else tensor).fill_(torch.nan)
        for tensor in tensors:
            self._sessions[tensor] = session, _version(tensor)


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was written; where torch does not count that, whether it still holds what `add` wrote."""
    if not tensor.is_inference():
        return tensor._version
    return 0 if bool(tensor[(0,) * tensor.dim()].isnan()) else 1


class Cached:
    """A graph ``token ids, static cache, … -> logits``, as a step of a session."""

    def __init__(self, region: Region, roles: Roles, outputs: Outputs) -> None:
        self._region, self._roles, self._outputs = region, roles, outputs
        self._last = last_tokens(region, roles, outputs)

    def __call__(self, fast: OptimizedModel, sessions: Sessions, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """The graph's outputs."""
        roles = self._roles
        session = self._find(sessions, inputs)
        known = session is not None
        ids = inputs[roles.input_ids]
        step = StaticStep(fast, roles, inputs, session)
        real = step.real_columns()
        if session is None:
            from lethe_compile.hf_cache import LetheCache

            session = LetheCache(fast)
            if step.columns:
                session.adopt(step.past(fast, inputs), real[:, : step.columns])
        logits = session.append(ids.long(), real, step.positions, whole=self._last != 1)
        results = self._outputs.join(logits if self._last is None else logits[:, -self._last :], inputs)
        if not known:
            given = [inputs[place] for layer in roles.static for place in (layer.values, layer.keys)]
            sessions.add(session, given or [results[place] for place in self._outputs.made])
        return results

    def _find(self, sessions: Sessions, inputs: Sequence[Any]) -> LetheCache | None:
        return None if not self._roles.static else sessions.find(inputs[self._roles.static[0].values])

    def verify(self, fast: OptimizedModel, sessions: Sessions, inputs: Sequence[Any]) -> None:
        """Run the graph and the optimized model on random ids, after random keys and values if the cache is not empty.

        Raises:
            UnsupportedGraphError: their logits differ, or the model has layers that a static cache does not show.
        """
        self._outputs.save_memory({site.mask.window for site in fast.sites if site.mask is not None})
        if fast.stateful:
            raise UnsupportedGraphError("layers keep other state than a KV cache", hint=INSTEAD)
        roles = self._roles
        ids = random_ids(fast, inputs[roles.input_ids])
        changed = {roles.input_ids: ids}
        step = StaticStep(fast, roles, inputs, self._find(sessions, inputs))
        real = step.real_columns()
        generator = torch.Generator().manual_seed(1)
        for place in (place for layer in roles.static for place in (layer.keys, layer.values)):
            shape = inputs[place].shape
            drawn = torch.randn(shape, generator=generator) if step.columns else torch.zeros(shape)
            changed[place] = drawn.to(inputs[place])
        given = [changed.get(place, value) for place, value in enumerate(inputs)]
        if step.columns:
            actual = fast.forward_after(step.past(fast, given), ids.long())
        else:
            actual = fast(ids.long(), step.positions, real)
        expected = self._region.logits(inputs, changed)
        actual = actual if self._last is None else actual[:, -self._last :]
        expect_equal(fast, actual, expected, real[:, step.columns :])
