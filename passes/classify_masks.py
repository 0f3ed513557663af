"""Classify masks: prove by evaluation what each site's mask lets a query see, then drop the operand.

A mask is never dropped because it looks causal. The sub-graph that computes it is run on sequences longer than twice any
window, with two different token ids and with left padding, and must equal a causal band exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from lethe_compile.passes.base import Note, PassResult, refuse
from lethe_compile.passes.evaluate import evaluate, sample_inputs
from lethe_compile.passes.program import SITE_OP, Mask, Program, ancestors, is_call, remove_dead, shape_of

aten = torch.ops.aten

_ARITHMETIC = (aten.sub, aten.add, aten.rsub, aten.lt, aten.le, aten.gt, aten.ge, aten.mul, aten.floor_divide)
_DIRECT = 48  # constants up to here are evaluated as they are; a larger one is varied instead
_PADDING = 5
_LONGEST_TABLE = 16384
_DENIED = -1e4  # an additive mask denies with the dtype's lowest value or -inf; fp16's is -65504
_STANDINS = (range(7, _DIRECT, 6), range(10, _DIRECT, 6))  # two disjoint choices of small values for large constants


class NotABand(Exception):
    """The mask is something else than a causal band; the message says what."""


@dataclass(frozen=True)
class ClassifyMasks:
    """Prove each site's mask to be a causal band, keep the proof's result on the site, drop the operand.

    ``attention_site(q, k, v, mask, …)  =>  attention_site(q, k, v, None, …)`` with ``Site.mask = Mask(window)``

    Conditions: for every real query i of every sample row, the keys it sees are the real keys j with ``j <= i`` and, for a
    sliding window w, ``i - j < w``. A window too long to evaluate is proved through its constant: the sub-graph is run
    twice with the constant replaced by small values, and the band must follow it.
    """

    name: ClassVar[str] = "classify-masks"

    def run(self, program: Program) -> PassResult:
        proved: dict[Any, Mask] = {}
        sites, notes = [], []
        for site in program.sites:
            operand = site.node.args[3]
            if not isinstance(operand, fx.Node):
                raise refuse("its attention is not causal: it has no mask", program, site.layer, "is it a decoder?")
            try:
                mask = proved.get(operand) or prove(program, operand)
            except NotABand as reason:
                raise refuse(str(reason), program, site.layer) from reason
            proved[operand] = mask
            sites.append(replace(site, mask=mask))
            window = "" if mask.window is None else f", window {mask.window}"
            notes.append(Note(site.node.name, f"{mask.kind}{window}: proved on {operand.name}", site.layer))
        for site in sites:
            site.node.update_arg(3, None)
        remove_dead(program.graph)
        program.module.recompile()
        return PassResult(replace(program, sites=tuple(sites)), tuple(notes))


def prove(program: Program, mask: fx.Node) -> Mask:
    """What the mask computed at `mask` is.

    Raises:
        NotABand: it is not a causal band, with the reason.
    """
    nodes = ancestors(mask)
    if any(is_call(n, SITE_OP) for n in nodes):
        raise NotABand("its mask depends on what other layers compute")
    constants = sorted({c for n in nodes if is_call(n, *_ARITHMETIC) for c in n.args if _is_int(c) and abs(c) > 1})
    large = [c for c in constants if abs(c) > _DIRECT]
    if not large:
        return Mask(_band(program, mask, None))
    return Mask(_follow(program, mask, large))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _follow(program: Program, mask: fx.Node, large: list[int]) -> int | None:
    """The window when it is set by one of the constants `large`, each of which stands in turn for two small values."""
    if len(large) > len(_STANDINS[0]):
        raise NotABand(f"its mask uses {len(large)} large constants, too many to vary one by one")
    choices = [dict(zip(large, standins, strict=False)) for standins in _STANDINS]
    widths = [_band(program, mask, choice) for choice in choices]
    if widths[0] is None and widths[1] is None:
        return None
    for constant in large:
        offsets = {width - choice[constant] for width, choice in zip(widths, choices, strict=True) if width is not None}
        if None not in widths and len(offsets) == 1:
            return constant + offsets.pop()
    raise NotABand(f"its mask is a band of {widths} tokens that follows none of the constants {large}")


def _band(program: Program, mask: fx.Node, standin: dict[int, int] | None) -> int | None:
    """The width of the causal band that the mask is on every sample, None for a band without end."""
    substitute = _substitution(standin) if standin else None
    device = program.input_ids.meta["val"].device
    tokens, widths = _sample_length(program, mask), set()
    for token in (0, 1):
        inputs = sample_inputs(2, tokens, padding=_PADDING, token=token, device=device)
        value = evaluate(program.module, mask, inputs, substitute)
        padded = any(n.target == "attention_mask" for n in ancestors(mask))
        real = inputs["attention_mask"].bool() if padded else torch.ones_like(inputs["attention_mask"], dtype=torch.bool)
        widths.add(_width(_allowed(value, tokens), real))
    if len(widths) != 1:
        raise NotABand("its mask depends on the content of the sequence")
    return widths.pop()


def _sample_length(program: Program, mask: fx.Node) -> int:
    """Tokens to evaluate at: over twice any directly evaluated window, and all of a mask that is stored as a table."""
    tables = [shape_of(n) for n in ancestors(mask) if n.op == "get_attr" and len(shape_of(n)) >= 2]
    stored = min((int(size) for shape in tables for size in shape[-2:] if size > 1), default=0)
    if stored > _LONGEST_TABLE:
        raise NotABand(f"its mask is a stored table of {stored} tokens, too long to evaluate")
    return stored or 2 * _DIRECT + _PADDING + 4


def _substitution(standin: dict[int, int]) -> Callable[[fx.Node, Any], Any]:
    def rewrite(node: fx.Node, args: Any) -> Any:
        if not is_call(node, *_ARITHMETIC):
            return args
        return tuple(standin.get(a, a) if _is_int(a) else a for a in args)

    return rewrite


def _allowed(mask: Tensor, tokens: int) -> Tensor:
    """[rows or 1, tokens, tokens] of what a boolean or additive mask lets through; it must not differ by head."""
    if mask.dtype != torch.bool:
        denied = mask <= _DENIED
        if not bool((denied | (mask == 0)).all()):
            raise NotABand("its mask is an additive bias, which depends on positions or heads")
        mask = ~denied
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape)).expand(-1, -1, tokens, tokens)
    if not bool((mask == mask[:, :1]).all()):
        raise NotABand("its mask differs from head to head")
    return mask[:, 0]


def _width(allowed: Tensor, real: Tensor) -> int | None:
    """Width of the band, checked element by element over real queries; `allowed` [1 | rows, N, N], `real` [rows, N]."""
    rows, tokens = real.shape
    allowed = allowed.expand(rows, -1, -1)
    index = torch.arange(tokens, device=allowed.device)
    age = index[:, None] - index
    if bool(allowed[0].triu(1).any()):
        raise NotABand("its attention is not causal: a query sees later keys")
    seen = int(allowed[0, -1].sum())
    window = None if seen == tokens else seen
    band = (age >= 0) if window is None else (age >= 0) & (age < window)
    expected = band & real[:, None, :]
    if not bool((allowed == expected)[real].all()):
        wrong = ((allowed != expected) & real[:, :, None]).nonzero()[0].tolist()
        kind = "a causal mask" if window is None else f"a sliding window of {window}"
        raise NotABand(f"its mask is not {kind}: row {wrong[0]}, query {wrong[1]}, key {wrong[2]} differs")
    return window
