"""Watch a model run a few tokens with its own cache: which modules keep more from token to token than keys and values.

No list of class names says which layers are recurrent. A module is stateful if running it changes a tensor that the
cache holds, other than by `Cache.update`, or one that the module itself holds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from lethe_compile.kernels.recurrent.call import Path

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_DEPTH = 8  # of containers in a cache


@dataclass(frozen=True, eq=False)
class Leaf:
    """A value that a cache or a module holds, as it was when looked at."""

    value: Any
    version: int

    def differs(self, before: Leaf | None) -> bool:
        """Whether something else stands here than `before`, or a tensor was written to."""
        if before is None:
            return True
        if isinstance(self.value, Tensor) or isinstance(before.value, Tensor):
            return self.value is not before.value or self.version != before.version
        return type(self.value) is not type(before.value) or self.value != before.value


Leaves = dict[Path, Leaf]


def leaves_of(root: Any) -> Leaves:
    """Tensors and plain values that an object holds, in its attributes and in dictionaries and lists of them."""
    found: Leaves = {}
    _walk(root, (), found, set())
    return found


def _walk(value: Any, path: Path, found: Leaves, seen: set[int]) -> None:
    if isinstance(value, (Tensor, *_PLAIN)):
        found[path] = Leaf(value, value._version if isinstance(value, Tensor) else 0)
        return
    if id(value) in seen or len(path) > _DEPTH:
        return
    seen.add(id(value))
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    elif hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)) and not callable(value):
        items = vars(value).items()
    for key, inner in list(items):
        if isinstance(key, (str, int)):
            _walk(inner, (*path, key), found, seen)


def changes(before: Leaves, after: Leaves) -> list[Path]:
    """Where something is that was not there, or was something else, in the order of `after`."""
    return [path for path, leaf in after.items() if leaf.differs(before.get(path))]


def attributes_of(module: nn.Module) -> Leaves:
    """The tensors, or None in the place of one, that a module itself holds beside its parameters."""
    own = {key: value for key, value in vars(module).items() if value is None or isinstance(value, Tensor)}
    return leaves_of({**own, **module._buffers})


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards modules hold the tensors, and None in the place of them, that they held before."""
    before = [(module, attributes_of(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, leaves in before:
            for (name,), leaf in leaves.items():
                setattr(module, str(name), leaf.value)


def is_cache(value: Any) -> bool:
    """Whether a value is a cache of transformers; torch's pytrees would take some kinds of it apart."""
    from transformers.cache_utils import Cache

    return isinstance(value, Cache)


def cache_in(*arguments: Any) -> Any:
    """The model's cache among the arguments of a call, or None."""
    leaves = tree_flatten(arguments, is_leaf=is_cache)[0]
    return next((leaf for leaf in leaves if is_cache(leaf)), None)


@dataclass
class Discovery:
    """What one forward of a model with a cache shows: which modules change what."""

    in_cache: dict[nn.Module, None] = field(default_factory=dict)
    """Innermost modules, of those handed the cache, that change tensors in it which are no keys and values."""
    on_module: dict[nn.Module, None] = field(default_factory=dict)
    """Modules on which a tensor was replaced or written."""
    updates: list[nn.Module] = field(default_factory=list)
    """The innermost module at each `Cache.update`: once for each layer of keys and values."""
    around_updates: set[nn.Module] = field(default_factory=set)
    """Modules that were running at one of those."""


def discover(model: nn.Module, forward: Callable[[], Any]) -> Discovery:
    """Run `forward`, which runs `model` with a cache of its own making, and see who changes what."""
    watcher = _Watcher()
    before = [(module, attributes_of(module)) for module in model.modules()]
    with watcher.watching(model):
        forward()
    result = watcher.result
    result.on_module = {module: None for module, leaves in before if changes(leaves, attributes_of(module))}
    return result


class _Watcher:
    """Attributes each change of the cache to the innermost running module that was handed the cache."""

    def __init__(self) -> None:
        self.result = Discovery()
        self._caches: list[Any] = []  # the model's, and those inside it
        self._last: Leaves = {}
        self._keys_and_values: set[Path] = set()
        self._running: list[tuple[nn.Module, bool]] = []  # and whether it was handed the cache

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        handles = []
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for cache in self._caches:
                vars(cache).pop("update", None)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        cache = cache_in(args, kwargs)
        if cache is not None and not any(cache is known for known in self._caches):
            self._adopt(cache)
        if cache is not None:
            self._settle()
        self._running.append((module, cache is not None))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._running[-1][1]:
            self._settle()
        self._running.pop()

    def _adopt(self, cache: Any) -> None:
        self._caches = [cache, *(inner for inner in vars(cache).values() if is_cache(inner))]
        self._last = leaves_of(cache)
        for one in self._caches:
            one.update = self._watched(one.update)

    def _watched(self, update: Callable[..., Any]) -> Callable[..., Any]:
        """`Cache.update`, and what it changes noted as keys and values."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            self._settle()
            result = update(*args, **kwargs)
            now = leaves_of(self._caches[0])
            self._keys_and_values.update(changes(self._last, now))
            self._last = now
            self.result.updates.append(self._innermost())
            self.result.around_updates.update(module for module, _ in self._running)
            return result

        return watched

    def _innermost(self) -> nn.Module:
        return next(module for module, handed in reversed(self._running) if handed)

    def _settle(self) -> None:
        now = leaves_of(self._caches[0])
        changed = (path for path in changes(self._last, now) if path not in self._keys_and_values)
        if any(isinstance(now[path].value, Tensor) for path in changed):
            self.result.in_cache.setdefault(self._innermost())
        self._last = now


@dataclass
class Record:
    """One call of a stateful module.

    `found` and `left` are what it changed, as it was before and after the call: paths begin with "cache", or "module"
    for what hangs on the module, and tensors are copies.
    """

    module: nn.Module
    arguments: tuple[Any, Any]
    found: dict[Path, Any] = field(default_factory=dict)
    left: dict[Path, Any] = field(default_factory=dict)
    returned: Any = None


class Recorder:
    """Records the calls of some modules while their model runs.

    `cache` is the cache that the model makes, `empty` a copy of it as it was before anything was in it.
    """

    def __init__(self, model: nn.Module, modules: list[nn.Module]) -> None:
        self.cache: Any = None
        self.empty: Any = None
        self._model, self._modules = model, modules
        self._records: list[Record] = []
        self._open: list[tuple[Record, Leaves, dict[Path, Any]]] = []

    @contextmanager
    def recording(self) -> Iterator[list[Record]]:
        """Inside this context, calls go to the list that it gives."""
        self._records = []
        handles = [m.register_forward_pre_hook(self._meet_cache, with_kwargs=True) for m in self._model.modules()]
        for module in self._modules:
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave))
        try:
            yield self._records
        finally:
            for handle in handles:
                handle.remove()

    def _meet_cache(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.cache is None and (cache := cache_in(args, kwargs)) is not None:
            self.cache, self.empty = cache, copy.deepcopy(cache)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        record = Record(module, _copies((args, kwargs)))
        before = self._state(module)
        self._records.append(record)
        self._open.append((record, before, {path: _copies(leaf.value) for path, leaf in before.items()}))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        record, before, values = self._open.pop()
        after = self._state(module)
        for path in changes(before, after):
            record.found[path] = values.get(path)
            record.left[path] = _copies(after[path].value)
        record.returned = _copies(output)

    def _state(self, module: nn.Module) -> Leaves:
        state = {("cache", *path): leaf for path, leaf in leaves_of(self.cache).items()}
        for name, inner in module.named_modules():
            prefix = ("module", *name.split(".")) if name else ("module",)
            state |= {(*prefix, *path): leaf for path, leaf in attributes_of(inner).items()}
        return state


def _copies(value: Any) -> Any:
    """Nested arguments with a copy of each tensor; a cache among them stays itself."""

    def copied(leaf: Any) -> Any:
        return leaf.clone() if isinstance(leaf, Tensor) else leaf

    return tree_map(copied, value, is_leaf=is_cache)
