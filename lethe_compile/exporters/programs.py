"""The two programs of an artifact, step and prune, with example inputs, names and dynamic sizes to trace them by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lethe_compile.errors import UnsupportedGraphError
from lethe_compile.exporters.rounds import INPUTS as ROUND_INPUTS
from lethe_compile.exporters.rounds import RoundProgram
from lethe_compile.passes.contiguous import contiguous_step, state_names
from lethe_compile.policies import make_policy
from lethe_compile.runtime import OptimizedModel

_ROWS, _TOKENS, _CAPACITY = 2, 5, 24  # of the examples: nothing of the programs depends on them
SIZES = ("rows", "tokens", "capacity")


@dataclass(frozen=True)
class Operand:
    """An input of a program: a tensor, and which of its dimensions are `SIZES`."""

    name: str
    example: Tensor
    sizes: dict[int, str]


@dataclass(frozen=True)
class TracedProgram:
    """A program ready for `torch.export`, of any rows, tokens and capacity."""

    name: str
    module: nn.Module
    inputs: tuple[Operand, ...]
    outputs: tuple[str, ...]

    def trace(self) -> ExportedProgram:
        """The program in aten.

        Raises:
            UnsupportedGraphError: a size became a number while it was traced; names it.
        """
        examples = tuple(operand.example for operand in self.inputs)
        sizes: Any = tuple({dim: Dim.DYNAMIC for dim in operand.sizes} for operand in self.inputs)
        if not isinstance(self.module, torch.fx.GraphModule):
            sizes = _as_arguments(self.module, sizes)
        with torch.no_grad():
            self.module(*examples)  # what is constant is made now, and not while it is traced
            program = torch.export.export(
                self.module, examples, dynamic_shapes=sizes, strict=False, prefer_deferred_runtime_asserts_over_guards=True
            )
        self._check_sizes(program)
        return program

    def _check_sizes(self, program: ExportedProgram) -> None:
        values = {n.name: n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"}
        for name, operand in zip(program.graph_signature.user_inputs, self.inputs, strict=True):
            for dim, size in operand.sizes.items():
                if isinstance(values[name].shape[dim], int):
                    raise UnsupportedGraphError(
                        f"{self.name}: the number of {size} of {operand.name!r} became {values[name].shape[dim]} while"
                        " the program was traced"
                    )


def _as_arguments(module: nn.Module, sizes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Dynamic sizes of a forward whose last parameter takes the rest."""
    named = 3
    return (*sizes[:named], sizes[named:])


def step_program(fast: OptimizedModel) -> TracedProgram:
    """New tokens to logits, over contiguous caches; see `passes.contiguous.contiguous_step`.

    Raises:
        UnsupportedGraphError: as there.
    """
    module = contiguous_step(fast.program)
    rows, ids = {0: "rows"}, {0: "rows", 1: "tokens"}
    tokens = torch.ones(_ROWS, _TOKENS, dtype=torch.int64, device=fast.device)
    inputs = [
        Operand("input_ids", tokens, ids),
        Operand("positions", torch.arange(_TOKENS, device=fast.device).repeat(_ROWS, 1), ids),
        Operand("new_lengths", torch.tensor([_TOKENS, _TOKENS - 2], dtype=torch.int32, device=fast.device), rows),
    ]
    if fast.policy.decay is not None:
        inputs.append(Operand("decay", torch.tensor([fast.policy.decay], device=fast.device), {}))
    return TracedProgram("step", module, (*inputs, *cache_operands(fast)), ("logits", *next_names(fast)))


def prune_program(fast: OptimizedModel) -> TracedProgram | None:
    """One round of the policy; see `RoundProgram`. None where no round drops anything."""
    policy = make_policy(fast.config)
    module = RoundProgram(policy, fast.windows)
    if not module.has_rounds():
        return None
    device = fast.device
    examples = (
        torch.ones(_ROWS, dtype=torch.bool, device=device),
        torch.full((_ROWS,), 3, device=device),
        torch.full((_ROWS,), _CAPACITY, device=device),
    )
    given = [Operand(name, value, {0: "rows"}) for name, value in zip(ROUND_INPUTS, examples, strict=True)]
    policy.begin(len(fast.caches), _ROWS)
    state = [Operand(name, value.to(device), {1: "rows"}) for name, value in policy.state().items()]
    names = tuple(f"{operand.name}_after" for operand in state)
    return TracedProgram("prune", module, (*given, *state, *cache_operands(fast)), (*names, *next_names(fast)))


def cache_operands(fast: OptimizedModel) -> tuple[Operand, ...]:
    """The contiguous caches as inputs."""
    caches, device = len(fast.caches), fast.device
    operands = []
    for index, site in enumerate(fast.caches):
        kv_heads, *dims = site.geometry
        for kind, dim in zip("kv", dims, strict=True):
            empty = torch.zeros(_ROWS, kv_heads, _CAPACITY, dim, dtype=fast.dtype, device=device)
            operands.append(Operand(f"{kind}_{index}", empty, {0: "rows", 2: "capacity"}))
    whole = {1: "rows", 2: "capacity"}
    return (
        *operands,
        Operand("position", torch.zeros(caches, _ROWS, _CAPACITY, dtype=torch.int32, device=device), whole),
        Operand("mass", torch.zeros(caches, _ROWS, _CAPACITY, device=device), whole),
        Operand("length", torch.zeros(caches, _ROWS, dtype=torch.int32, device=device), {1: "rows"}),
    )


def next_names(fast: OptimizedModel) -> Sequence[str]:
    return [f"{name}_after" for name in state_names(len(fast.caches))]
