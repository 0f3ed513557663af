"""Tensor parallelism: each rank computes its share of heads, of MLPs and of the vocabulary, of one captured graph.

The model is captured whole, and the graph is cut: not modules. So `torch.export` never sees a DTensor, a hook or a
collective, masks and positions are proved on the model as it is, and every model that has a graph can be split, whether
it brings a plan or not. Weights of a rank are plain local tensors, and what it takes to be right again are
functional collectives, which Inductor and CUDA graphs know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.distributed._functional_collectives
from torch import fx

from lethe_compile.passes.base import Note, PassResult, refuse
from lethe_compile.passes.cutter import Cutter
from lethe_compile.passes.parts import Fetch, fetch_part
from lethe_compile.passes.program import (
    Program,
    Site,
    is_call,
    remove_dead,
)
from lethe_compile.passes.split_plan import Planner, style_of

aten = torch.ops.aten


@dataclass(frozen=True)
class TensorParallel:
    """Let `rank` of `ranks` compute its share, so that after each reduction every rank holds what one alone would.

    ``attention(x Wq, x Wk, x Wv) Wo + b``  =>
    ``wait(all_reduce(attention(x Wq[r], x Wk[r], x Wv[r]) Wo[r])) + b``, r its heads: an equal block of query heads,
    and the KV heads that they read
    ``act(x Wg) * (x Wu) Wd``  =>  ``wait(all_reduce(act(x Wg[r]) * (x Wu[r]) Wd[r]))``, likewise each of the experts
    ``x Whead``  =>  ``all_gather(x Whead[r])``, r a block of the vocabulary

    What lies between is found and proved by `split_plan` and `placement`: which columns are whose by gradients, what
    follows from cut values by running each call with the others' part poisoned. What cannot be cut stays whole, with a
    refusal that says why: a value is gathered before a call that mixes it, and the heads of a whole projection are cut
    out before the attention.

    Conditions: every attention's heads are a multiple of `ranks`, and KV heads divide or are divided by them; where
    ranks are more, neighbouring ones hold the same KV head, and then heads may not keep tokens of their own
    (`per_head`). Masks that depend on the content are refused: what they read of earlier tokens is cached beside keys.

    `fetch` takes a rank's part of a weight. `plan` is the model's own (transformers' `tp_plan`, module patterns to
    styles): the graph decides, the plan where that leaves a choice (`split_plan`), and where a weight stays whole that
    it would split, a refusal says so.
    """

    rank: int
    ranks: int
    group: str
    per_head: bool = False
    fetch: Fetch = fetch_part
    plan: Mapping[str, str] = field(default_factory=dict)

    name: ClassVar[str] = "tensor-parallel"

    def run(self, program: Program) -> PassResult:
        for site in program.sites:
            self._refuse(program, site)
        _join_reshapes(program)
        plan = Planner(program, self.ranks, self.plan).run()
        cutter = Cutter(self, program, plan)
        cutter.run()
        remove_dead(program.graph)
        program = replace(program, module=fx.GraphModule(program.module, program.graph), sites=tuple(cutter.sites))
        refusals = [Note(node, text, layer) for node, layer, text in cutter.whole]
        return PassResult(program, tuple(cutter.notes), (*refusals, *self._beside_plan(cutter.split)))

    def _refuse(self, program: Program, site: Site) -> None:
        ranks = self.ranks
        if site.content:
            reason = "its mask depends on the content of the sequence, and what it reads of tokens is cached once"
            raise refuse(f"tensor parallelism: {reason}", program, site.layer, "run it on one device")
        if site.heads % ranks:
            raise refuse(
                f"tensor parallelism: its {site.heads} heads are no multiple of {ranks} ranks", program, site.layer
            )
        if site.kv_heads % ranks and ranks % site.kv_heads:
            reason = f"its {site.kv_heads} KV heads neither divide {ranks} ranks nor are divided by them"
            raise refuse(f"tensor parallelism: {reason}", program, site.layer)
        if self.per_head and site.kv_heads < ranks:
            reason = f"{ranks} ranks share its {site.kv_heads} KV heads, and each of these is to keep tokens of its own"
            hint = 'a policy that keeps the same tokens for all KV heads, such as "lethe", prunes this model'
            raise refuse(f"tensor parallelism: {reason}", program, site.layer, hint)

    def _beside_plan(self, split: set[str]) -> list[Note]:
        """What the model's own plan would split, and the graph's leaves whole."""
        styles = {k: v for k, v in self.plan.items() if v.startswith(("colwise", "rowwise", "packed_"))}
        left = []
        for pattern, style in styles.items():
            if not any(style_of(name, {pattern: style}) for name in split):
                left.append(Note(pattern, f"stays whole, and transformers' tp_plan has it {style}"))
        return left


def _join_reshapes(program: Program) -> None:
    """``reshape(reshape(x, a), b)  =>  reshape(x, b)``: heads that were folded into the batch come apart again."""
    for node in program.graph.nodes:
        while is_call(node, aten.reshape, aten.view) and is_call(node.args[0], aten.reshape, aten.view):
            node.target = aten.reshape.default
            node.update_arg(0, node.args[0].args[0])
    remove_dead(program.graph)
