"""Runs a pt2 artifact: torch and the ops of Lethe Compile."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import lethe_compile.kernels.ops  # noqa: F401  (registers the operators that the programs call)
from lethe_compile.artifact.manifest import CacheSpec, Manifest
from lethe_compile.artifact.sampling import Floats, Ints
from lethe_compile.artifact.torch_device import check_device
from lethe_compile.errors import ArtifactError

_POOL = ("k_pages", "v_pages", "slot_position", "slot_mass")


class Pt2Runner:
    """`artifact.Runner` over loaded programs of torch.

    Steps run over pages, of which each row of each cache has the same number, one after the other. Rounds run over
    contiguous caches: pages are gathered for them, and dealt out anew behind them.

    Raises:
        ArtifactError: it was made for a device that is not there, or holds pickled objects.
    """

    def __init__(self, manifest: Manifest, *, threads: int | None = None) -> None:
        self.manifest, self.device = manifest, check_device(manifest)
        if threads is not None:
            torch.set_num_threads(threads)
        self._programs = {}
        for name, program in manifest.programs.items():
            path = manifest.path(program.file)
            refuse_pickles(path)
            self._programs[name] = torch.export.load(path).module(check_guards=False)
        self._dtype: torch.dtype = getattr(torch, manifest.model["dtype"])
        self._page = int(manifest.model["page_size"])
        self._pools = [list(caches) for caches in _by_geometry(manifest.caches).values()]
        self.begin(0)

    def begin(self, rows: int) -> None:
        count = len(self.manifest.caches)
        self._rows = rows
        self._length = torch.zeros(count, rows, dtype=torch.int32, device=self.device)
        self._deal([self._empty(index) for index in range(count)], 0)
        self._state = {
            one.name: torch.full(
                (count, rows),
                float("nan") if one.initial is None else one.initial,
                dtype=getattr(torch, one.dtype),
                device=self.device,
            )
            for one in self.manifest.state
        }

    @property
    def lengths(self) -> Ints:
        return np.asarray(self._length.cpu().numpy(), np.int64)

    def reserve(self, tokens: int) -> None:
        pages = -(-(int(self._length.max()) + tokens) // self._page) if self._rows else 0
        if pages != self._row_pages:
            self._deal([self._gather(index) for index in range(len(self.manifest.caches))], pages)

    @torch.no_grad()
    def step(self, ids: Ints, positions: Ints, new_lengths: NDArray[np.int32], decay: float) -> Floats:
        if decay != (self.manifest.policy["decay"] or 1.0):
            self._undo_decay()
        given = {"input_ids": ids, "positions": positions, "new_lengths": new_lengths}
        known = {name: torch.from_numpy(np.ascontiguousarray(x)).to(self.device) for name, x in given.items()}
        known |= {**self._tensors, "page_table": self._table, "length": self._length}
        logits: Tensor = self._programs["step"](*(known[name] for name in self.manifest.programs["step"].inputs))
        return np.asarray(logits.cpu().numpy(), np.float32)

    def _undo_decay(self) -> None:
        """The op fades scores at every call; a part of a prompt that is not the first must not."""
        for name, tensor in self._tensors.items():
            if name.startswith("slot_mass"):
                tensor.div_(self.manifest.policy["decay"])

    @torch.no_grad()
    def prune(self, active: NDArray[np.bool_], prompt_length: Ints, next_position: Ints) -> None:
        given = {"active": active, "prompt_length": prompt_length, "next_position": next_position}
        known: dict[str, Tensor] = {name: torch.from_numpy(x).to(self.device) for name, x in given.items()}
        known |= self._state
        slots = [self._gather(index) for index in range(len(self.manifest.caches))]
        for index, (k, v, _, _) in enumerate(slots):
            known |= {f"k_{index}": k, f"v_{index}": v}
        known |= {"position": torch.stack([s[2] for s in slots]), "mass": torch.stack([s[3] for s in slots])}
        program = self.manifest.programs["prune"]
        results = self._programs["prune"](*({**known, "length": self._length}[name] for name in program.inputs))
        after: dict[str, Tensor] = dict(zip(program.outputs, results, strict=True))
        self._state = {name: after[f"{name}_after"] for name in self._state}
        self._length = after["length_after"]
        position, mass = after["position_after"], after["mass_after"]
        dealt = [
            (after[f"k_{index}_after"], after[f"v_{index}_after"], position[index], mass[index])
            for index in range(len(slots))
        ]
        self._deal(dealt, self._row_pages)

    # ---------------------------------------------------------------------------------------------------------- pages

    def _empty(self, index: int) -> tuple[Tensor, ...]:
        """A cache without capacity: keys, values, positions, masses."""
        spec = self.manifest.caches[index]
        options: Any = {"device": self.device}
        return (
            torch.zeros(self._rows, spec.kv_heads, 0, spec.k_dim, dtype=self._dtype, **options),
            torch.zeros(self._rows, spec.kv_heads, 0, spec.v_dim, dtype=self._dtype, **options),
            torch.zeros(self._rows, 0, dtype=torch.int32, **options),
            torch.zeros(self._rows, 0, **options),
        )

    def _deal(self, caches: Sequence[tuple[Tensor, ...]], pages: int) -> None:
        """Put contiguous caches into `pages` pages a row, cutting them or filling up with zeros."""
        self._row_pages, capacity = pages, pages * self._page
        self._tensors: dict[str, Tensor] = {}
        self._table = torch.zeros(len(caches), self._rows, max(1, pages), dtype=torch.int32, device=self.device)
        for group, members in enumerate(self._pools):
            for at, name in enumerate(_POOL):
                parts = torch.stack([_fit(caches[index][at], capacity) for index in members])
                paged = parts.unflatten(-2 if at < 2 else -1, (pages, self._page))
                if at < 2:  # [members, rows, heads, pages, page, dim], stored by head
                    by_head = paged.permute(2, 0, 1, 3, 4, 5).flatten(1, 3).contiguous()
                    self._tensors[f"{name}_{group}"] = by_head.transpose(0, 1)
                else:
                    self._tensors[f"{name}_{group}"] = paged.flatten(0, 2).contiguous()
            first = torch.arange(len(members) * self._rows * pages, dtype=torch.int32, device=self.device)
            if pages:
                self._table[members] = first.view(len(members), self._rows, pages)

    def _gather(self, index: int) -> tuple[Tensor, ...]:
        """A cache as contiguous tensors."""
        group = next(g for g, members in enumerate(self._pools) if index in members)
        members = self._pools[group]
        at = members.index(index)
        found = []
        for number, name in enumerate(_POOL):
            pages = self._tensors[f"{name}_{group}"]
            own = pages.unflatten(0, (len(members), self._rows, self._row_pages))[at]  # [rows, pages, …, page, …]
            found.append(own.transpose(1, 2).flatten(2, 3).contiguous() if number < 2 else own.flatten(1))
        return tuple(found)


def refuse_pickles(path: Path) -> None:
    """Raise `ArtifactError` for a program of `torch.export.save` that would have pickled objects loaded.

    torch takes tensors of other classes, constants that are objects, and example inputs out of pickles, which may run
    any code. None of that is in what `lethe export` writes, apart from examples that hold nothing.
    """
    message = f"{path} holds pickled objects, which may run any code: it is not loaded"
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            folder = PurePosixPath(name).parent.name
            if folder in ("weights", "constants") and name.endswith("_config.json"):
                entries = json.loads(archive.read(name))["config"].values()
                tensors = all(str(one["path_name"]).startswith(("weight_", "tensor_")) for one in entries)
                if not tensors or any(one["use_pickle"] for one in entries):
                    raise ArtifactError(message)
            elif folder == "sample_inputs" and archive.getinfo(name).file_size:
                try:
                    torch.load(io.BytesIO(archive.read(name)), weights_only=True)
                except pickle.UnpicklingError as error:
                    raise ArtifactError(message) from error


def _by_geometry(caches: tuple[CacheSpec, ...]) -> dict[tuple[int, int, int], list[int]]:
    """Caches that share pages, in the order of the program's pools."""
    pools: dict[tuple[int, int, int], list[int]] = {}
    for index, spec in enumerate(caches):
        pools.setdefault((spec.kv_heads, spec.k_dim, spec.v_dim), []).append(index)
    return pools


def _fit(tensor: Tensor, capacity: int) -> Tensor:
    """`tensor` [rows, heads, capacity, dim] or [rows, capacity], cut or filled up with zeros."""
    dim = 2 if tensor.dim() == 4 else 1
    if tensor.shape[dim] >= capacity:
        return tensor.narrow(dim, 0, capacity)
    shape = list(tensor.shape)
    shape[dim] = capacity - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)
