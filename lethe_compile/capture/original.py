"""The decode step as it was, run with its own cache: what the rewritten graph is verified against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from lethe_compile.passes.program import State, attribute, is_symbolic
from lethe_compile.passes.step import sizes_of

_SINGLE = 3  # tokens at a sequence's end that are fed one by one, also to a step that takes several


class OriginalStep:
    """Logits of whole sequences from the unchanged step, with its own cache, from an empty one on.

    A step that takes any number of tokens gets all but the last few at once, as a prefill does. A step of a fixed
    batch is run on so many rows at a time. Buffers are afterwards what they were before.

    Args:
        call: the step.
        owner: the module whose buffers hold its state.
        example: its arguments, as `torch.export` has them: (positional, by name).
        inputs, outputs: nodes of what `call` takes and returns, flat and in order.
        roles, states, logits: what they mean.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        owner: Any,
        example: Any,
        inputs: Sequence[fx.Node],
        roles: Mapping[fx.Node, str],
        states: Sequence[State],
        outputs: Sequence[fx.Node | None],
        logits: fx.Node,
    ) -> None:
        self._call, self._owner = call, owner
        self._leaves, self._structure = tree_flatten(example)
        self._index = {node: index for index, node in enumerate(inputs)}
        self._sizes = {node: sizes_of(node) for node in inputs}
        self._dtypes = {node: node.meta["val"].dtype for node in inputs if isinstance(node.meta.get("val"), Tensor)}
        self._roles, self._states = dict(roles), tuple(states)
        self._returned = {s: outputs.index(s.after) for s in states if s.node in self._index and s.after in outputs}
        self._logits = outputs.index(logits)
        batch, tokens = self._sizes[next(n for n, role in roles.items() if role == "input_ids")]
        self._rows = None if is_symbolic(batch) else int(batch)
        shape = sizes_of(logits)
        self._chunks = is_symbolic(tokens) and len(shape) == 3 and is_symbolic(shape[1])

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Logits ``[R, T, vocab]`` of ``inputs["input_ids"]`` ``[R, T]``."""
        ids = inputs["input_ids"]
        rows = self._rows or len(ids)
        buffers = [attribute(self._owner, s.name) for s in self._states if s.node not in self._index]
        before = [buffer.clone() for buffer in buffers]
        logits = []
        try:
            for group in ids.split(rows):
                for buffer in buffers:
                    buffer.zero_()
                filled = torch.cat([group, group[:1].expand(rows - len(group), -1)])
                logits.append(self._sequence(filled)[: len(group)])
        finally:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
        return torch.cat(logits)

    def _sequence(self, ids: Tensor) -> Tensor:
        leaves, length = list(self._leaves), ids.shape[1]
        for state in self._states:
            if state.node in self._index:
                leaves[self._index[state.node]] = self._empty(state.node, len(ids), ids.device)
        first = length - _SINGLE if self._chunks and length > _SINGLE + 1 else 1
        logits, past = [], 0
        for tokens in [first] + [1] * (length - first):
            out = self._step(leaves, ids[:, past : past + tokens], past)
            logits.append(out if out.dim() == 3 else out[:, None])
            past += tokens
        return torch.cat(logits, dim=1)

    def _empty(self, node: fx.Node, rows: int, device: torch.device) -> Tensor:
        sizes = enumerate(self._sizes[node])
        shape = [s if not is_symbolic(s) else rows if dim == 0 else 0 for dim, s in sizes]
        return torch.zeros(shape, dtype=self._dtypes[node], device=device)

    def _step(self, leaves: list[Any], ids: Tensor, past: int) -> Tensor:
        """Logits of one step; the state that it returns goes into `leaves`."""
        for node, role in self._roles.items():
            leaves[self._index[node]] = self._argument(node, role, ids, past)
        args, kwargs = tree_unflatten(leaves, self._structure)
        outputs = tree_leaves(self._call(*args, **kwargs))
        for state, index in self._returned.items():
            leaves[self._index[state.node]] = outputs[index]
        logits: Tensor = outputs[self._logits]
        return logits.clone()

    def _argument(self, node: fx.Node, role: str, ids: Tensor, past: int) -> Tensor | int:
        if role == "input_ids":
            return ids
        if node not in self._dtypes:
            return past
        (rows, tokens), sizes, dtype = ids.shape, self._sizes[node], self._dtypes[node]
        if role == "attention_mask":
            total = past + tokens if is_symbolic(sizes[1]) else int(sizes[1])
            return (torch.arange(total, device=ids.device) < past + tokens).to(dtype).expand(rows, -1).contiguous()
        counts = torch.arange(past, past + tokens, device=ids.device, dtype=dtype)
        if len(sizes) == 2:
            return counts.expand(rows if is_symbolic(sizes[0]) else int(sizes[0]), -1).contiguous()
        return counts[0] if not sizes else counts if is_symbolic(sizes[0]) else counts[:1]
