"""Stateful modules of a Hugging Face model: each call of one becomes one node in the captured graph.

A model's state-space, linear attention, recurrent and short convolution layers are found by running it (`spy`). What is
found is then shown to be all there is (`isolate`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lethe_compile.capture.isolate import SIZES, Trial, by_place, layouts_of, outputs_of, refuse_varying
from lethe_compile.capture.patches import forwards_replaced
from lethe_compile.capture.spy import Discovery, Record, Recorder, attributes_kept, discover, leaves_of
from lethe_compile.errors import UnsupportedGraphError
from lethe_compile.kernels.recurrent.call import Arguments, Layout, Path, Place, StatefulCall, Unread, put, register


@dataclass(frozen=True)
class Site:
    """A call of a stateful module as the model makes it: where its operands stand among the arguments."""

    module: nn.Module
    call: StatefulCall
    operands: tuple[str, ...]
    unread: frozenset[str]


@dataclass(frozen=True)
class Stateful:
    """The stateful calls of a model, in the order in which it makes them, and its layers of keys and values."""

    sites: tuple[Site, ...]
    attention_layers: int


Forward = Callable[[int, int, Any], Any]
"""Runs the model with a cache: (rows, tokens, the cache to go on from, or None for one of the model's own)."""


def find_stateful(model: nn.Module, forward: Forward) -> Stateful:
    """Run `model` on a few tokens and find what carries state of another kind than keys and values.

    Raises:
        UnsupportedGraphError: the model does not run with a cache, or keeps state in a way that cannot be moved out.
    """
    with torch.no_grad(), attributes_kept(model):
        found = discover(model, lambda: _run(forward, *SIZES[0], None))
        modules = _outermost(model, found)
        if not modules:
            return Stateful((), len(found.updates))
        if not found.updates:
            raise UnsupportedGraphError("none of its layers caches keys and values: there is no KV cache to prune")
        runs = [_Run.of(model, modules, forward, *sizes) for sizes in SIZES]
        sites = _Sites(model, runs).all()
    return Stateful(tuple(sites), len(found.updates))


def _run(forward: Forward, rows: int, tokens: int, cache: Any) -> None:
    try:
        forward(rows, tokens, cache)
    except Exception as error:  # whatever the model's own code raises means that there is nothing to compare with
        raise UnsupportedGraphError(
            f"the model does not run with its own cache: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
        ) from error


def _outermost(model: nn.Module, found: Discovery) -> list[nn.Module]:
    """The stateful modules, without those inside another one."""
    for module in found.in_cache:
        if module in found.around_updates:
            raise UnsupportedGraphError(
                "a module caches keys and values and keeps other state as well, which cannot be told apart",
                where=_name(model, module),
            )
    own = [module for module in found.on_module if module not in found.around_updates]
    candidates = [*found.in_cache, *(module for module in own if module not in found.in_cache)]
    inside = {inner for module in candidates for inner in module.modules() if inner is not module}
    return [module for module in candidates if module not in inside]


def _name(model: nn.Module, module: nn.Module) -> str:
    names = {inner: name for name, inner in model.named_modules()}
    return str(names[module])


@dataclass(frozen=True)
class _Run:
    """The calls of one run: a whole sequence, then one token; `empty` and `after` are the cache before and between."""

    whole: list[Record]
    step: list[Record]
    empty: Any
    after: Any

    @classmethod
    def of(cls, model: nn.Module, modules: list[nn.Module], forward: Forward, rows: int, tokens: int) -> _Run:
        recorder = Recorder(model, modules)
        with recorder.recording() as whole:
            _run(forward, rows, tokens, None)
        after = copy.deepcopy(recorder.cache)
        with recorder.recording() as step:
            _run(forward, rows, tokens, recorder.cache)
        return cls(whole, step, recorder.empty, _without_tensors(after))


def _without_tensors(cache: Any) -> Any:
    """The cache with all tensors but its own flags gone: nobody may read what another layer keeps."""
    for path, leaf in leaves_of(cache).items():
        if isinstance(leaf.value, Tensor):
            put(cache, path, Unread("a tensor of another layer's cache"))
    return cache


class _Sites:
    """Makes a `Site` of each recorded call."""

    def __init__(self, model: nn.Module, runs: list[_Run]) -> None:
        self._model, (self._first, self._second) = model, runs
        self._copies: dict[nn.Module, nn.Module] = {}

    def all(self) -> list[Site]:
        every = [self._first.whole, self._second.whole, self._first.step, self._second.step]
        if len({tuple(id(record.module) for record in records) for records in every}) > 1:
            raise UnsupportedGraphError("its stateful layers are not called alike for one token and for many")
        sites, taken = [], set[tuple[int, Path]]()
        for calls in zip(*every, strict=True):
            site = self._site(*calls)
            if site is None:
                continue
            places = {(id(site.module) if p.on_module else 0, p.path) for p in site.call.places}
            if places & taken:
                raise UnsupportedGraphError("two calls share one state", where=site.call.name)
            taken |= places
            sites.append(site)
        return sites

    def _site(self, whole: Record, other: Record, step: Record, _: Record) -> Site | None:
        """The site, or None where what changes is no state of a fixed size: the passes then see into the module."""
        name = _name(self._model, whole.module)
        places = _places(name, whole, other, step)
        if places is None:
            return None
        given = [by_place(record.arguments) for record in (whole, other, step)]
        refuse_varying(name, given)
        layouts = layouts_of(given)
        trial = Trial(whole, step, layouts, self._call(name, whole, other, step, places))
        read = trial.operands()
        for place in read:
            if layouts[place] is None:
                shapes = ", ".join(str(list(one[place].shape)) for one in given)
                reason = f"argument {place}, of shapes {shapes}, has no dimension of rows or tokens alone"
                raise UnsupportedGraphError(reason, where=name)
        return Site(whole.module, trial.call(read), tuple(read), frozenset(layouts) - {*read})

    def _call(
        self, name: str, whole: Record, other: Record, step: Record, places: tuple[Place, ...]
    ) -> Callable[[tuple[Layout, ...], Arguments, Arguments], StatefulCall]:
        """The call, but for what it is called with."""
        outputs, returned, dtype = outputs_of(name, whole, other, step)
        return partial(
            StatefulCall,
            name,
            self._copy(whole.module),
            outputs=outputs,
            returned=returned,
            dtype=dtype,
            places=places,
            touched=tuple(path[1:] for path in whole.left if path[0] == "cache"),
            empty=self._first.empty,
            after=self._first.after,
        )

    def _copy(self, module: nn.Module) -> nn.Module:
        """A module of our own that shares the original's weights: its mode and attributes are nobody else's."""
        if module not in self._copies:
            weights = {id(t): t for t in (*module.parameters(), *module.buffers())}
            self._copies[module] = copy.deepcopy(module, weights).eval()
        return self._copies[module]


def _places(name: str, whole: Record, other: Record, step: Record) -> tuple[Place, ...] | None:
    """Where the call keeps tensors of one size per row; None if what it leaves grows with the tokens."""
    kept = {path: value for path, value in whole.left.items() if isinstance(value, Tensor)}
    for path, value in kept.items():
        again, following = other.left.get(path), step.left.get(path, value)
        if not isinstance(again, Tensor) or not isinstance(following, Tensor) or not value.dim() or not again.dim():
            return None
        rows = (value.shape[0], again.shape[0], following.shape[0])
        expected = (SIZES[0][0], SIZES[1][0], SIZES[0][0])
        if rows != expected or not value.shape[1:] == again.shape[1:] == following.shape[1:]:
            return None
    for path, value in whole.left.items():
        if path not in kept and value != (again := other.left.get(path)):
            _refuse(name, f"it keeps '{_dotted(path)}', a plain value that depends on the input", value, again)
    for path, value in step.left.items():
        if path not in kept:
            _refuse(name, f"it keeps '{_dotted(path)}', which a following token changes", whole.left.get(path), value)
    return tuple(_place(name, path, value, whole.found[path]) for path, value in kept.items()) or None


def _refuse(name: str, reason: str, *values: Any) -> NoReturn:
    shown = " or ".join("a tensor" if isinstance(value, Tensor) else repr(value) for value in values)
    raise UnsupportedGraphError(f"{reason}: {shown}", where=name)


def _place(name: str, path: Path, value: Tensor, found: Any) -> Place:
    initial = None
    if isinstance(found, Tensor):
        if found.shape != value.shape or not bool((found == found[:1]).all()):
            raise UnsupportedGraphError(f"its state '{_dotted(path)}' begins unlike from row to row", where=name)
        initial = found[0]
    return Place(path[0] == "module", path[1:], tuple(value.shape[1:]), value.dtype, initial)


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))


@contextmanager
def stateful_captured(found: Stateful) -> Iterator[None]:
    """For the time of an export, each call of a stateful module is one `lethe::recurrent_site`."""
    by_module: dict[nn.Module, list[Site]] = {}
    for site in found.sites:
        by_module.setdefault(site.module, []).append(site)
    with forwards_replaced({module: _capturing(sites) for module, sites in by_module.items()}):
        yield


def _capturing(sites: list[Site]) -> Callable[..., Any]:
    """A `forward` that hands its tensors to one node; a module with several sites comes to them in turn."""
    turns = cycle([(site, register(site.call)) for site in sites])

    def forward(*args: Any, **kwargs: Any) -> Any:
        site, number = next(turns)
        given = {place: leaf for place, leaf in by_place((args, kwargs)).items() if isinstance(leaf, Tensor)}
        operands = [given.pop(place) for place in site.operands]
        padding = [leaf for place, leaf in given.items() if place not in site.unread]
        return site.call.unpack(torch.ops.lethe.recurrent_site(operands, padding, number))

    return forward
