"""Launching Triton kernels, and compiling many of them at once before they are needed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

_only_compile: ContextVar[bool] = ContextVar("only_compile", default=False)
_traced: ContextVar[bool] = ContextVar("traced", default=False)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)`; inside of `compiling`, compile what that would run, and run nothing.

    Inside of `traceable` a tracer sees the kernel. It knows no `maxnreg`, which then is what ptxas chooses.
    """
    if _only_compile.get():
        kernel.warmup(*args, grid=grid, **options)
    elif _traced.get() and hasattr(kernel, "params"):  # those of the interpreter have none, and cannot be traced
        options.pop("maxnreg", None)
        torch.library.wrap_triton(kernel)[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


@contextmanager
def traceable() -> Iterator[None]:
    """Inside this context launches become nodes of the graph that torch traces; without a tracer they run."""
    token = _traced.set(True)
    try:
        yield
    finally:
        _traced.reset(token)


@contextmanager
def compiling() -> Iterator[None]:
    """Inside this context ops compile their kernels side by side, on all cores, instead of running them.

    They change no state, and their results are memory as it was found. When the context ends all kernels are there.
    """
    from triton import AsyncCompileMode

    token = _only_compile.set(True)
    try:
        with ThreadPoolExecutor(os.cpu_count()) as threads, AsyncCompileMode(threads):
            yield
    finally:
        _only_compile.reset(token)
