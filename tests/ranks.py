"""Runs a function in several processes that talk through gloo, or through NCCL where each has a GPU."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def run_ranks(work: Callable[..., Any], directory: Path, *args: Any, size: int = 2) -> list[Any]:
    """What ``work(*args)`` returns on each of `size` ranks, or raises, as an exception in its place.

    `work` must be importable; it finds the environment that torchrun would have set.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(["tests.oracle", "transformers"])  # imported once for all ranks
    start = "spawn" if torch.cuda.is_available() else "forkserver"
    mp.start_processes(_child, (size, port, directory, work, args), nprocs=size, start_method=start)  # type: ignore[no-untyped-call]
    return [pickle.loads((directory / f"{rank}.pickle").read_bytes()) for rank in range(size)]


def _child(rank: int, size: int, port: int, directory: Path, work: Callable[..., Any], args: Any) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    result: Any
    try:
        result = work(*args)
    except Exception as error:  # the test looks at it; where it came from does not pickle
        traceback.print_exc()
        result = error
    (directory / f"{rank}.pickle").write_bytes(pickle.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
