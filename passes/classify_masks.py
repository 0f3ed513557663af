"""Classify masks: prove by evaluation what each site's mask lets a query see, then drop the operand.

A mask is never dropped because it looks causal. The sub-graph that computes it is run on sequences more than twice as
long as any window it can make, of two lengths, with padding left and right, and must equal a causal band exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from lethe_compile.passes.alibi import alibi_slopes
from lethe_compile.passes.base import Note, PassResult, refuse
from lethe_compile.passes.evaluate import evaluate, sample_inputs
from lethe_compile.passes.mask_constants import SMALL, Constants, NotABand, constants_of, substitution
from lethe_compile.passes.program import BIAS, SHAPE_ONLY, SITE_OP, Mask, Program, Site, ancestors, is_call, remove_dead

_STANDINS = ((7, 13, 19, 25), (10, 18, 29, 42))  # in place of large constants: small, and each moved differently
_PADDING = 5
_LONGEST = 4096  # tokens to evaluate a mask on at most
_DENIED = -1e4  # an additive mask denies with the dtype's lowest value or -inf; fp16's is -65504


@dataclass(frozen=True)
class ClassifyMasks:
    """Prove each site's mask to be a causal band, keep the proof's result on the site, drop the operand.

    ``attention_site(q, k, v, mask, …)  =>  attention_site(q, k, v, None, …)`` with ``Site.mask = Mask(window)``

    Conditions: the mask is computed from sizes, positions and padding alone, and for every real query i of every sample
    row, the keys it sees are the real keys j with ``j <= i`` and, for a sliding window w, ``i - j < w``, or, for chunks
    of w tokens, ``i // w == j // w``, counting each row's real tokens. A window too long to evaluate is proved through
    its constant: the sub-graph is run twice with the constant replaced by small values, and the band must follow it. A
    mask stored as a table is evaluated at the table's size, which then limits the model (`Mask.longest`).

    Masks that depend on the content were dealt with before, see `passes.content_masks`.

    An additive bias of scores goes the same way: ``attention_site(…, bias, …)  =>  attention_site(…, None, …)`` with
    ``Site.slopes``, if it is ALiBi's, which falls linearly with the distance of a key; see `passes.alibi`.
    """

    name: ClassVar[str] = "classify-masks"

    def run(self, program: Program) -> PassResult:
        proved: dict[fx.Node, Mask] = {}
        sites, notes = [], []
        for site in program.sites:
            if site.content:  # its mask was proved where it was kept
                sites.append(site)
                continue
            operand = site.node.args[3]
            if not isinstance(operand, fx.Node):
                raise refuse("its attention is not causal: it has no mask", program, site.layer, "is it a decoder?")
            try:
                mask = proved[operand] = proved.get(operand) or prove(program, operand)
            except NotABand as reason:
                raise refuse(str(reason), program, site.layer) from reason
            sites.append(replace(site, mask=mask, slopes=_slopes(program, site)))
            window = "" if mask.window is None else f", window {mask.window}"
            biased = "" if site.node.args[BIAS] is None else ", ALiBi"
            text = f"{mask.kind}{window}{biased}: proved on {operand.name}, {mask.evidence}"
            notes.append(Note(site.node.name, text, site.layer))
        for site in sites:
            if not site.content:
                site.node.update_arg(3, None)
                site.node.update_arg(BIAS, None)
        remove_dead(program.graph)
        program.module.recompile()
        return PassResult(replace(program, sites=tuple(sites)), tuple(notes))


def _slopes(program: Program, site: Site) -> tuple[float, ...] | None:
    bias = site.node.args[BIAS]
    if not isinstance(bias, fx.Node):
        return None
    try:
        return alibi_slopes(program, bias, site.heads)
    except NotABand as reason:
        raise refuse(str(reason), program, site.layer) from reason


def prove(program: Program, mask: fx.Node) -> Mask:
    """What the mask computed at `mask` is.

    Raises:
        NotABand: it is not a causal band, with the reason.
    """
    nodes = ancestors(mask, stop=SHAPE_ONLY)
    if any(is_call(n, SITE_OP) for n in nodes):
        raise NotABand("its mask depends on what other layers compute")
    if any(n is program.input_ids and _is_read(n, nodes) for n in nodes):
        raise NotABand("its mask depends on the content of the sequence")
    constants = constants_of(program.module, nodes)
    if constants.tables:
        longest = min(constants.tables)
        if longest > _LONGEST:
            raise NotABand(f"its mask is a stored table of {longest} tokens, too long to prove (at most {_LONGEST})")
        found = _band(program, mask, longest)
        return replace(found, longest=longest, evidence=f"{found.evidence}; a stored table of {longest} tokens")
    if constants.large:
        return _follow(program, mask, constants)
    return _band(program, mask, _sample_length(constants, {}))


def _is_read(ids: fx.Node, nodes: Sequence[fx.Node]) -> bool:
    return any(user in nodes and not is_call(user, *SHAPE_ONLY) for user in ids.users)


def _sample_length(constants: Constants, standin: dict[int, int]) -> int:
    """Tokens on which every band that the constants can make is seen to end."""
    tokens = 2 * constants.span(standin) + SMALL + _PADDING
    if tokens > _LONGEST:
        raise NotABand("its mask combines too many constants to be proved")
    return tokens


def _follow(program: Program, mask: fx.Node, constants: Constants) -> Mask:
    """The mask when one of the large constants sets its window; each stands in turn for two small values."""
    large = constants.large
    if len(large) > len(_STANDINS[0]):
        raise NotABand(f"its mask uses {len(large)} large constants, too many to vary one by one")
    choices = [dict(zip(large, standins, strict=False)) for standins in _STANDINS]
    tokens = max(_sample_length(constants, choice) for choice in choices)
    bands = [_band(program, mask, tokens, substitution(choice)) for choice in choices]
    widths = [band.window for band in bands]
    varied = "its constants " + ", ".join(map(str, large)) + " replaced by small ones, twice"
    if widths == [None, None]:
        return Mask(evidence=f"{bands[0].evidence}; {varied}")
    for constant in large:
        offsets = {width - choice[constant] for width, choice in zip(widths, choices, strict=True) if width is not None}
        if None not in widths and len(offsets) == 1 and bands[0].chunked == bands[1].chunked:
            evidence = f"{bands[0].evidence}; {varied}: the window follows {constant}"
            return replace(bands[0], window=constant + offsets.pop(), evidence=evidence)
    raise NotABand(f"its mask is a band of {widths} tokens that follows none of the constants {large}")


def _band(
    program: Program, mask: fx.Node, tokens: int, substitute: Callable[[fx.Node, Any], Any] | None = None
) -> Mask:
    """What the mask is on samples of `tokens` and fewer tokens."""
    padded = any(n.op == "placeholder" and n.target == "attention_mask" for n in ancestors(mask, stop=SHAPE_ONLY))
    found, lengths = Mask(), (tokens, max(1, tokens - tokens // 4))
    for length in lengths:
        inputs = sample_inputs(length, padding=min(_PADDING, length // 2) if padded else 0, device=program.device)
        try:
            value = evaluate(program.module, mask, inputs, substitute)
        except (RuntimeError, IndexError) as error:
            raise NotABand(f"its mask cannot be computed for {length} tokens: {error}") from error
        band = _width(_allowed(value, length), inputs["attention_mask"].bool())
        if length == tokens:
            found = band
        elif band != (Mask() if found.window is None or found.window >= length else found):
            raise NotABand("its mask depends on the length of the sequence")
    padding = ", padded left and right" if padded else ""
    return replace(found, evidence=f"evaluated element by element for {lengths[0]} and {lengths[1]} tokens{padding}")


def _allowed(mask: Tensor, tokens: int) -> Tensor:
    """[rows or 1, tokens, tokens] of what a boolean or additive mask lets through; it must not differ by head."""
    if mask.dtype != torch.bool:
        denied = mask <= _DENIED
        if not bool((denied | (mask == 0)).all()):
            raise NotABand("its mask is an additive bias, which depends on positions or heads")
        mask = ~denied
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if not {*shape[-2:]} <= {1, tokens}:
        raise NotABand(f"its mask is {list(shape)} for {tokens} tokens")
    mask = mask.reshape(shape).expand(-1, -1, tokens, tokens)
    if not bool((mask == mask[:, :1]).all()):
        raise NotABand("its mask differs from head to head")
    return mask[:, 0]


def _width(allowed: Tensor, real: Tensor) -> Mask:
    """The band, checked element by element over real queries; `allowed` [1 | rows, N, N], `real` [rows, N]."""
    allowed = allowed.expand(len(real), -1, -1)
    if bool(allowed[0].triu(1).any()):
        raise NotABand("its attention is not causal: a query sees later keys")
    blind = (~allowed[0, :, 0]).nonzero()  # queries that do not see the first key
    found = Mask()
    if len(blind):
        first = int(blind[0])
        if first == 0:
            raise NotABand("its mask hides every key from the first query")
        found = Mask(first, chunked=first > 1 and int(allowed[0, first].sum()) == 1)
    expected = _visible(found, real.cumsum(1) - 1) & real[:, None, :]
    if not bool((allowed == expected)[real].all()):
        row, query, key = ((allowed != expected) & real[:, :, None]).nonzero()[0].tolist()
        window = "" if found.window is None else f" of {found.window}"
        names = {"causal": "a causal mask", "sliding": "a sliding window", "chunked": "a mask of chunks"}
        raise NotABand(f"its mask is not {names[found.kind]}{window}: row {row}, query {query}, key {key} differs")
    return found


def _visible(mask: Mask, position: Tensor) -> Tensor:
    """[rows, N, N] of what `mask` lets real tokens at `position` [rows, N] see of each other."""
    query, key = position[:, :, None], position[:, None, :]
    causal = torch.ones_like(query == key).tril()  # tokens are in order, padding apart
    if mask.window is None:
        return causal
    near = query // mask.window == key // mask.window if mask.chunked else query - key < mask.window
    return causal & near
