"""Locate the cache of a decode step: its cache goes, and the graph becomes one of whole sequences."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from lethe_compile.passes.base import Note, PassResult
from lethe_compile.passes.mask_constants import NotABand
from lethe_compile.passes.program import Program
from lethe_compile.passes.step import Steps, refusal
from lethe_compile.passes.step_masks import prove
from lethe_compile.passes.step_positions import find_positions
from lethe_compile.passes.step_sites import StepSite, find_sites
from lethe_compile.passes.whole_sequence import WholeSequence


@dataclass(frozen=True)
class LocateCache:
    """Replace the cache that a decode step carries by the keys and values of the graph's own tokens.

    =====================================================================  ==============================
    before                                                                 after
    =====================================================================  ==============================
    attention over ``cat([past, k], dim=-2)``, with `past` an input and    attention over ``k``
    the result, or its last tokens, an output
    attention over a buffer or input in which `index_copy`, `index_put`,   attention over ``k``
    `slice_scatter`, `copy` … put ``k`` at the token's position
    attention over ``roll(buffer, -1)`` with ``k`` in its last slot        attention over ``k``
    a mask of the newest token over all slots                              one of the tokens over each other
    `input_pos`, `cache_position`, a counter, the length of the past       input `position_ids`
    one token, or T, of a fixed number of rows, or of B                    B rows of T tokens
    =====================================================================  ==============================

    Conditions: run on labels, the operators between a cache and what attention reads move elements alone, put a new
    token where its position says, and keep the others; the result is what the next step starts from; nothing else reads
    the cache. The mask of a step, evaluated with many numbers of tokens before it, shows a causal band over what the
    cache holds. Every position is the number of tokens before, plus a constant. A graph without `Program.step` stays
    as it is.
    """

    name: ClassVar[str] = "locate-cache"

    def run(self, program: Program) -> PassResult:
        if program.step is None:
            return PassResult(program)
        steps = Steps(program)
        sites = [_with_band(steps, site) for site in find_sites(program, steps)]
        rooms = [site.key.cache.room for site in sites if site.key.cache.room is not None]
        longest = min(rooms, default=None)
        positions = find_positions(program, steps, sites, longest)
        module = WholeSequence(program, steps, sites, positions).build()
        notes = [_note(site, layer, program.step.least) for layer, site in enumerate(sites)]
        return PassResult(replace(program, module=module, step=None, longest=longest), tuple(notes))


def _with_band(steps: Steps, site: StepSite) -> StepSite:
    try:
        return replace(site, band=prove(steps, site.mask, site.key))
    except NotABand as reason:
        raise refusal(site.result, str(reason)) from reason


def _note(site: StepSite, layer: int, least: int) -> Note:
    cache = site.key.cache
    kind = cache.kind if cache.room is None else f"{cache.kind}, room for {cache.room} tokens"
    mask = site.band.kind if site.band.window is None else f"{site.band.kind}, window {site.band.window}"
    text = (
        f"'{cache.state.name}' and '{site.value.cache.state.name}' gone ({kind});"
        f" the step's mask: {mask}, {site.band.evidence}"
    )
    if least and cache.kind == "shift":
        text += f", captured for {least} tokens before it or more, and completed for fewer"
    return Note(site.result.name, text, layer)
