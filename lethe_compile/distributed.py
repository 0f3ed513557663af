"""Several processes that run one model together: how they are joined, kept alike, and what they tell each other.

Every rank runs the same program on its share of the heads (`passes.tensor_parallel`). What the host decides must come
out alike on all: the inputs are compared before anything runs, tokens are rank 0's, and a round prunes by scores that
are reduced over the ranks. A rank that fails where others wait is told of within `TIMEOUT`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lethe_compile.capture.quantized import plain_tensors
from lethe_compile.errors import ConfigError, InputError, LetheError
from lethe_compile.passes.absent import is_absent

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

TIMEOUT = timedelta(minutes=10)
"""After so long without another rank's answer, torch.distributed raises on a CPU, and ends the process on a GPU."""


def started() -> bool:
    """Whether torchrun started this process among several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def leave() -> None:
    """Leave the processes that `init` joined, at the end of a program; nothing where there are none."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def init(size: int | None = None, *, timeout: timedelta = TIMEOUT) -> DeviceMesh:
    """Join the processes that torchrun started, and return their mesh, ``[size]``, of one dimension "tp".

    On a machine with GPUs each rank takes the one of its local rank, which becomes its current device, and they talk
    through NCCL; else through gloo. A process group that is there already is used as it is, timeouts included.

    Raises:
        InputError: not started by torchrun, with another number of processes than `size`, or with fewer GPUs.
    """
    from torch.distributed.device_mesh import init_device_mesh

    if not dist.is_available():
        raise InputError("this build of torch has no torch.distributed")
    if not dist.is_initialized() and not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ):
        raise InputError(
            "no other processes are known: start this program as torchrun --nproc-per-node N PROGRAM, which sets RANK,"
            " WORLD_SIZE and MASTER_ADDR"
        )
    known = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
    if size is not None and size != known:
        raise InputError(
            f"tp={size} does not fit the {known} processes that were started: torchrun --nproc-per-node {size}"
        )
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if not dist.is_initialized():
        device = None
        if kind == "cuda":
            local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
            if local >= torch.cuda.device_count():
                raise InputError(f"rank {local} of this machine has no GPU: there are {torch.cuda.device_count()}")
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        backend = "nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timeout, device_id=device)
    return init_device_mesh(kind, (known,), mesh_dim_names=("tp",))


def ranks_of(tp: DeviceMesh | int | None) -> Ranks | None:
    """The ranks of `optimize`'s argument `tp`; None for one rank alone.

    Raises:
        InputError: see `init`; or a mesh of several dimensions, or one that this process is no part of.
    """
    if tp is None:
        return None
    if isinstance(tp, bool) or (isinstance(tp, int) and tp < 1):
        raise InputError(f"tp={tp!r} is not allowed: must be a DeviceMesh, or a number of ranks >= 1")
    if isinstance(tp, int):
        if tp == 1:
            return None
        tp = init(tp)
    if tp.ndim != 1:
        raise InputError(f"tp is a mesh of {tp.ndim} dimensions, {tp.mesh_dim_names}: give one of them, as mesh['tp']")
    if tp.get_coordinate() is None:
        raise InputError("this process is no part of the mesh given as tp")
    return None if tp.size() == 1 else Ranks(tp)


class Ranks:
    """This process among those that run one model together, and what they say to each other.

    Attributes:
        rank, size: which one this is, of how many.
        broken: why they can no longer work together, as text; None while they can.
        group_name: of the process group, as functional collectives take it.
        device: where tensors must lie that are sent.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self._group = mesh.get_group()
        self.rank, self.size = mesh.get_local_rank(), mesh.size()
        self.group_name: str = self._group.group_name
        self.device = torch.device(mesh.device_type)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.broken: str | None = None
        self._host_group: dist.ProcessGroup | None = None

    # ------------------------------------------------------------------------------------------------ on the device

    def reduced(self, scores: Tensor, *, peak: bool) -> Tensor:
        """Scores of all heads from those of each rank's: their sum, or the highest where scores follow the peak."""
        total = scores.clone()
        dist.all_reduce(total, dist.ReduceOp.MAX if peak else dist.ReduceOp.SUM, group=self._group)
        return total

    def all_heads(self, keys: Tensor, parts: int) -> Tensor:
        """[R, N, kv_heads, D] keys of all heads, from each rank's own; `parts` ranks hold different ones."""
        if parts == 1:
            return keys
        keys = keys.contiguous()
        every = [torch.empty_like(keys) for _ in range(self.size)]
        dist.all_gather(every, keys, group=self._group)
        return torch.cat(every[:: self.size // parts], dim=2)

    def from_first(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Rank 0's values of small integer or bool tensors, in one message."""
        sent = torch.cat([tensor.reshape(-1).long() for tensor in tensors])
        dist.broadcast(sent, group=self._group, group_src=0)
        parts = sent.split([tensor.numel() for tensor in tensors])
        return tuple(part.view(t.shape).to(t.dtype) for part, t in zip(parts, tensors, strict=True))

    # -------------------------------------------------------------------------------------------------- on the host

    def least(self, value: int | None) -> int | None:
        """The least of all ranks' values, None counting as more than any."""
        most = torch.iinfo(torch.int64).max
        told = torch.tensor([most if value is None else value], device=self.device)
        dist.all_reduce(told, dist.ReduceOp.MIN, group=self._group)
        found = int(told)
        return None if found == most else found

    def everywhere(self, holds: bool) -> bool:
        """Whether it holds on every rank."""
        return self.least(int(holds)) == 1

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's value, anything that pickles.

        Raises:
            LetheError: they work together no more.
        """
        if self.broken is not None:
            raise LetheError(f"the ranks of this model are out of step, since {self.broken}: start the processes anew")
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self._group)
        return found

    def host_group(self) -> dist.ProcessGroup:
        """The same ranks over gloo, for small messages between hosts: no GPU waits, and none is waited for.

        Every rank asks for it at the same place; the first time makes it. It lasts as long as torch.distributed: torch
        would give another one its name, and with it its addresses.
        """
        if self._host_group is None:
            members = dist.get_process_group_ranks(self._group)
            part = len(members) < dist.get_world_size()
            self._host_group = dist.new_group(members, backend="gloo", timeout=TIMEOUT, use_local_synchronization=part)
        return self._host_group

    def abort(self, why: str) -> None:
        """These ranks work together no more; what waits for another on a GPU returns.

        Gloo offers no such thing: there, who waits does so until the other's process ends, or `TIMEOUT`.
        """
        self.broken = self.broken or why
        if self.device.type == "cuda":
            self._group.abort()

    def same(self, facts: Mapping[str, Any]) -> None:
        """Refuse to go on where ranks were given different things; `facts` by name, JSON-ready.

        Raises:
            ConfigError: on every rank alike: which differ, and between which ranks.
        """
        texts = {name: json.dumps(value, sort_keys=True, default=str) for name, value in facts.items()}
        everyone = self.gathered(texts)
        for rank, other in enumerate(everyone):
            for name in {**everyone[0], **other}:
                first, second = everyone[0].get(name), other.get(name)
                if first != second:
                    raise ConfigError(
                        f"the ranks of one model differ in {name}: rank 0 has {_short(first)}, rank {rank}"
                        f" {_short(second)}: give all of them the same"
                    )

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Where one rank fails inside, all do: it with its own error, the others with a `LetheError` that names it."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:  # told to the others first, then raised
            error = caught
        told = self.gathered(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, text in enumerate(told):
            if text is not None:
                raise LetheError(f"rank {rank} failed to {what}: {text}")


def _short(text: str | None) -> str:
    text = "none" if text is None else text
    return text if len(text) <= 120 else f"{text[:119]}…"


# --------------------------------------------------------------------------------------------------------- fingerprints


def digest(tensor: Tensor) -> str:
    """A short name of a tensor's shape, dtype and values, alike wherever they are the same."""
    values = tensor.detach().cpu().contiguous()
    raw = values.reshape(-1).view(torch.uint8).numpy().tobytes() if values.numel() else b""
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(raw).hexdigest()[:16]}"


def weights_of(model: nn.Module | torch.export.ExportedProgram) -> dict[str, str]:
    """Shape, dtype and a sum over the bits of every weight: quick, and not alike for others by chance.

    Of weights that are fetched by part there is no sum: `checkpoint.load_parts` compares the files that they lie in.
    """
    found = {}
    named = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in named:
        if is_absent(tensor):
            found[name] = f"{tensor.dtype} {list(tensor.shape)}, fetched by part"
            continue
        for part, plain in plain_tensors(name, tensor):
            found[part] = f"{plain.dtype} {list(plain.shape)} {_sum_of_bits(plain)}"
    return found


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _sum_of_bits(tensor: Tensor) -> int | str:
    flat = tensor.detach()
    if flat.dtype == torch.bool or flat.is_complex() or flat.itemsize not in _INTEGERS:
        return digest(flat)
    return int(flat.view(_INTEGERS[flat.itemsize]).sum(dtype=torch.int64)) if flat.numel() else 0
