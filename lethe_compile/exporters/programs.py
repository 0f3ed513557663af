"""The two programs of an artifact, step and prune: their modules, and the names, sizes and types of what they take."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lethe_compile.errors import UnsupportedGraphError
from lethe_compile.exporters.rounds import INPUTS as ROUND_INPUTS
from lethe_compile.exporters.rounds import PagedRoundProgram, RoundProgram
from lethe_compile.passes.contiguous import contiguous_step, paged_step, state_names
from lethe_compile.passes.kernel_step import kernel_step
from lethe_compile.policies import make_policy
from lethe_compile.runtime import OptimizedModel

SIZES = {"rows": 2, "tokens": 5, "capacity": 24}
"""What differs from call to call, and examples of it. Nothing of a program depends on those."""
OTHER_SIZES = {"rows": 3, "tokens": 7, "capacity": 40}
_PAGES = {**SIZES, "pages": 8, "row_pages": 4}


@dataclass(frozen=True)
class Operand:
    """An input of a program: a tensor whose dimensions are numbers or names of `SIZES`."""

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype
    fill: int = 0  # of an example

    def example(self, device: torch.device, sizes: Mapping[str, int] = SIZES) -> Tensor:
        shape = [dim if isinstance(dim, int) else sizes[dim] for dim in self.shape]
        return torch.full(shape, self.fill, dtype=self.dtype, device=device)

    @property
    def dynamic(self) -> dict[int, str]:
        return {dim: size for dim, size in enumerate(self.shape) if isinstance(size, str)}


@dataclass(frozen=True)
class ExportableProgram:
    """A program of any rows, tokens and capacity, before it is traced."""

    name: str
    module: nn.Module
    inputs: tuple[Operand, ...]
    outputs: tuple[str, ...]
    device: torch.device

    def examples(self, sizes: Mapping[str, int] = SIZES) -> tuple[Tensor, ...]:
        return tuple(operand.example(self.device, {**_PAGES, **sizes}) for operand in self.inputs)

    def trace(self) -> ExportedProgram:
        """The program in aten, as `trace`."""
        return trace(self.name, self.module, self.examples(), [set(operand.dynamic) for operand in self.inputs])


def trace(name: str, module: nn.Module, examples: Sequence[Tensor], dynamic: Sequence[set[int]]) -> ExportedProgram:
    """A function of tensors in aten; `dynamic` names the dimensions of each that may have any size.

    Raises:
        UnsupportedGraphError: it cannot be traced, or a size became a number; says why.
    """
    sizes = _per_parameter(module, tuple(dict.fromkeys(dims, Dim.DYNAMIC) for dims in dynamic))
    with torch.no_grad():
        module(*examples)  # what is constant is made now, and not while it is traced
        try:
            return torch.export.export(
                module,
                tuple(examples),
                dynamic_shapes=sizes,
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
        except (RuntimeError, torch._dynamo.exc.UserError) as error:
            first = str(error).strip().split("\n")[0]
            raise UnsupportedGraphError(
                f"{name} cannot be traced for any number of rows and tokens: {first}"
            ) from error


def _per_parameter(module: nn.Module, sizes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Dynamic sizes as `torch.export` wants them: those of ``*args`` in a tuple of their own."""
    parameters = inspect.signature(module.forward).parameters.values()
    if not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return sizes
    named = sum(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters)
    return (*sizes[:named], sizes[named:]) if len(sizes) > named else sizes  # ``*args`` that are empty have no place


def step_program(fast: OptimizedModel) -> ExportableProgram:
    """New tokens to logits, over contiguous caches; see `passes.contiguous.contiguous_step`.

    Raises:
        UnsupportedGraphError: as there.
    """
    inputs = [
        Operand("input_ids", ("rows", "tokens"), torch.int64),
        Operand("positions", ("rows", "tokens"), torch.int64),
        Operand("new_lengths", ("rows",), torch.int32, fill=1),
    ]
    if fast.policy.decay is not None:
        inputs.append(Operand("decay", (1,), torch.float32, fill=1))
    inputs.extend(cache_operands(fast))
    outputs = ("logits", *_after(state_names(len(fast.caches))))
    return ExportableProgram("step", contiguous_step(fast.program), tuple(inputs), outputs, fast.device)


def paged_step_program(fast: OptimizedModel) -> ExportableProgram:
    """New tokens to logits over pages that are written in place; see `passes.contiguous.paged_step`.

    Raises:
        UnsupportedGraphError: as there.
    """
    caches, page = len(fast.caches), fast.page_size
    operands = {
        "input_ids": Operand("input_ids", ("rows", "tokens"), torch.int64),
        "positions": Operand("positions", ("rows", "tokens"), torch.int64),
        "new_lengths": Operand("new_lengths", ("rows",), torch.int32, fill=1),
        "page_table": Operand("page_table", (caches, "rows", "row_pages"), torch.int32),
        "length": Operand("length", (caches, "rows"), torch.int32),
    }
    for site in fast.caches:
        kv_heads, k_dim, v_dim = site.geometry[:3]
        group = site.cache_group
        for name, shape, dtype in (
            ("k_pages", (kv_heads, page, k_dim), fast.dtype),
            ("v_pages", (kv_heads, page, v_dim), fast.dtype),
            ("slot_position", (page,), torch.int32),
            ("slot_mass", (page,), torch.float32),
        ):
            operands[f"{name}_{group}"] = Operand(f"{name}_{group}", ("pages", *shape), dtype)
    module = paged_step(fast.program)
    names = [str(node.target) for node in module.graph.find_nodes(op="placeholder")]
    return ExportableProgram("step", module, tuple(operands[name] for name in names), ("logits",), fast.device)


def kernel_step_program(fast: OptimizedModel, name: str, most_rows: int) -> ExportableProgram:
    """New tokens to logits by the Triton kernels, caches written in place; see `passes.kernel_step`.

    `name` is "decode", of one token a row and at most so many rows, or "step", of any.

    Raises:
        UnsupportedGraphError: as there.
    """
    decode = name == "decode"
    ids = ("rows", 1 if decode else "tokens")
    inputs = (
        Operand("input_ids", ids, torch.int64),
        Operand("positions", ids, torch.int64),
        Operand("new_lengths", ("rows",), torch.int32, fill=1),
        Operand("page_table", ("rows", "row_pages"), torch.int32),
        *kernel_cache_operands(fast, ("pages",)),
    )
    module = kernel_step(fast.program, decode=decode, most_rows=most_rows)
    return ExportableProgram(name, module, inputs, ("logits",), fast.device)


def prune_program(fast: OptimizedModel, *, pages: bool = False) -> ExportableProgram | None:
    """One round of the policy; see `RoundProgram`, or with `pages` `PagedRoundProgram`.

    None where no round drops anything.
    """
    policy = make_policy(fast.config)
    fast.begin_policy(policy, 0)
    latent = tuple(site.latent for site in fast.caches)
    module = PagedRoundProgram(policy, fast.windows, latent) if pages else RoundProgram(policy, fast.windows)
    if not module.has_rounds():
        return None
    kinds = (torch.bool, torch.int64, torch.int64)
    given = [Operand(name, ("rows",), kind, fill=1) for name, kind in zip(ROUND_INPUTS, kinds, strict=True)]
    state = [Operand(name, (len(fast.caches), "rows"), value.dtype) for name, value in policy.state().items()]
    caches = kernel_cache_operands(fast, ("rows", "row_pages")) if pages else cache_operands(fast)
    outputs = _after([operand.name for operand in (*state, *caches)])
    return ExportableProgram("prune", module, (*given, *state, *caches), outputs, fast.device)


def kernel_cache_operands(fast: OptimizedModel, pages: tuple[str, ...]) -> tuple[Operand, ...]:
    """Pages of each cache as inputs, in the order of `passes.kernel_step.cache_names`; `pages` are their dimensions."""
    operands = []
    for index, site in enumerate(fast.caches):
        kv_heads, k_dim, v_dim = site.geometry[:3]
        kinds: dict[str, tuple[tuple[int | str, ...], torch.dtype]] = {
            "k": ((*pages, kv_heads, fast.page_size, k_dim), fast.dtype),
            "v": ((*pages, kv_heads, fast.page_size, v_dim), fast.dtype),
            "position": ((*pages, fast.page_size), torch.int32),
            "mass": ((*pages, fast.page_size), torch.float32),
            "length": (("rows",), torch.int32),
        }
        if site.latent:
            del kinds["v"]
        operands += [Operand(f"{kind}_{index}", shape, dtype) for kind, (shape, dtype) in kinds.items()]
    return tuple(operands)


def cache_operands(fast: OptimizedModel) -> tuple[Operand, ...]:
    """The contiguous caches as inputs, in the order of `state_names`."""
    operands = []
    for index, site in enumerate(fast.caches):
        kv_heads, *dims = site.geometry[:3]
        operands += [
            Operand(f"{kind}_{index}", ("rows", kv_heads, "capacity", dim), fast.dtype)
            for kind, dim in zip("kv", dims, strict=True)
        ]
    slots = (len(fast.caches), "rows", "capacity")
    return (
        *operands,
        Operand("position", slots, torch.int32),
        Operand("mass", slots, torch.float32),
        Operand("length", slots[:2], torch.int32),
    )


def _after(names: Sequence[str]) -> tuple[str, ...]:
    """Names of outputs that are inputs of the next call."""
    return tuple(f"{name}_after" for name in names)
