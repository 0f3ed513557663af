"""Launching kernels, and compiling them ahead instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lethe_compile.kernels.launch import compiling, launch

pytest.importorskip("triton", reason="Triton is for Linux only")


class Kernel:
    """Keeps what it was asked to do."""

    def __init__(self) -> None:
        self.done: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.done.append(("run", grid, args, options))

    def warmup(self, *args: Any, grid: tuple[int, ...], **options: Any) -> None:
        self.done.append(("compile", grid, args, options))


def test_inside_of_compiling_nothing_runs() -> None:
    kernel = Kernel()
    launch(kernel, (3,), 1, 2, num_warps=4)
    with compiling():
        launch(kernel, (3,), 1, 2, num_warps=4)
    launch(kernel, (5, 6), 7)
    same = ((3,), (1, 2), {"num_warps": 4})
    assert kernel.done == [("run", *same), ("compile", *same), ("run", (5, 6), (7,), {})]


def test_an_error_ends_compiling() -> None:
    kernel = Kernel()
    with pytest.raises(ZeroDivisionError), compiling():
        _ = 1 / 0
    launch(kernel, (1,))
    assert kernel.done == [("run", (1,), (), {})]
