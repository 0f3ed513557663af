"""Tensors in safetensors files, of which any part can be read without the rest: alone, stacked or joined."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lethe_compile.errors import InputError

_MOST_RUNS = 64  # of entries that lie together: more are read with what lies between them, in one
_SAMPLES, _SAMPLE = 64, 1 << 10  # of a file: how many, and bytes of each


class Source(Protocol):
    """A weight as the checkpoint has it."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, dim: int, index: Sequence[int]) -> Tensor:
        """The entries `index` of dimension `dim`, ascending, on the CPU in the dtype of the checkpoint."""
        ...


def whole(source: Source) -> Tensor:
    """All of a weight."""
    return source.read(0, range(source.shape[0] if source.shape else 1))


@dataclass(frozen=True)
class Stored:
    """One tensor of a file."""

    handle: Any  # safetensors.safe_open
    key: str
    shape: tuple[int, ...]

    def read(self, dim: int, index: Sequence[int]) -> Tensor:
        if not self.shape:
            return self.handle.get_tensor(self.key)  # type: ignore[no-any-return]
        runs = list(runs_of(index))
        if len(runs) <= _MOST_RUNS:
            parts = [self._slice(dim, first, end) for first, end in runs]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
        first = runs[0][0]
        covering = self._slice(dim, first, runs[-1][1])
        return covering.index_select(dim, torch.tensor([i - first for i in index]))

    def _slice(self, dim: int, first: int, end: int) -> Tensor:
        part: Tensor = self.handle.get_slice(self.key)[(slice(None),) * dim + (slice(first, end),)]
        return part


@dataclass(frozen=True)
class Stacked:
    """Tensors of one shape along a new dimension, as of experts that the model holds together."""

    parts: tuple[Source, ...]
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        shape.insert(self.dim, len(self.parts))
        return tuple(shape)

    def read(self, dim: int, index: Sequence[int]) -> Tensor:
        if dim == self.dim:
            return torch.stack([whole(self.parts[i]) for i in index], self.dim)
        inner = dim - (dim > self.dim)
        return torch.stack([part.read(inner, index) for part in self.parts], self.dim)


@dataclass(frozen=True)
class Joined:
    """Tensors one after another along a dimension, as gates and what they gate."""

    parts: tuple[Source, ...]
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        shape[self.dim] = sum(part.shape[self.dim] for part in self.parts)
        return tuple(shape)

    def read(self, dim: int, index: Sequence[int]) -> Tensor:
        if dim != self.dim:
            return torch.cat([part.read(dim, index) for part in self.parts], self.dim)
        owners = [(part, i) for part in self.parts for i in range(part.shape[dim])]
        groups = groupby((owners[i] for i in index), key=lambda owner: id(owner[0]))
        pieces = []
        for _, group in groups:
            own = list(group)
            pieces.append(own[0][0].read(dim, [i for _, i in own]))
        return torch.cat(pieces, dim)


def runs_of(index: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, end) of each stretch of neighbours in ascending indices."""
    if isinstance(index, range):
        yield index[0], index[-1] + 1
        return
    for _, group in groupby(enumerate(index), key=lambda pair: pair[1] - pair[0]):
        stretch = [i for _, i in group]
        yield stretch[0], stretch[-1] + 1


def open_files(files: Sequence[str | Path]) -> dict[str, Stored]:
    """The tensors of safetensors files by their names there.

    Raises:
        InputError: a file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, Stored] = {}
    for file in files:
        try:
            with ExitStack() as stack:
                handle = stack.enter_context(safe_open(file, framework="pt"))
                for key in handle.keys():  # noqa: SIM118  (it is no dict)
                    found[key] = Stored(handle, key, tuple(handle.get_slice(key).get_shape()))
                stack.pop_all()  # open as long as somebody reads
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file} is no readable safetensors file: {error}") from error
    return found


def fingerprint(files: Sequence[str | Path]) -> list[str]:
    """Of each file its size and a short name of samples of its bytes, the header's first: quick, alike for copies."""
    return [f"{Path(file).name} {Path(file).stat().st_size} {_sampled(Path(file))}" for file in files]


def _sampled(file: Path) -> str:
    digest, size = hashlib.sha256(), file.stat().st_size
    with file.open("rb") as stream:
        for sample in range(_SAMPLES):
            stream.seek(sample * max(0, size - _SAMPLE) // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()[:16]
