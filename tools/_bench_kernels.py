"""Bandwidths, and decode attention kernels side by side: ours, torch's, FlexAttention, FlashInfer."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lethe_compile.config import LetheConfig
from lethe_compile.tools._bench_base import Bench, Row, Run, graphed, interleave, reason, release

OURS, OURS_BARE = "Lethe, with mass", "Lethe, no mass"
SDPA, FLEX, FLASHINFER = "torch flash SDPA", "FlexAttention", "FlashInfer FA2"
_CALLS = 8  # of the kernel in one captured graph: what a launch costs is shared, as among the layers of a step


@dataclass(frozen=True)
class Decode:
    """One token for each of `rows` sequences, each over `tokens` cached ones."""

    rows: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int = 128

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def kv_bytes(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Keys and values that every kernel must read."""
        return 2 * self.rows * self.tokens * self.kv_heads * self.head_dim * dtype.itemsize


SHAPES = (
    Decode(16, 8192, 32, 8),
    Decode(64, 4096, 32, 8),
    Decode(16, 32768, 32, 8),
    Decode(128, 1024, 32, 8),
    Decode(4, 32768, 32, 8),
    Decode(1, 131072, 32, 8),
    Decode(16, 8192, 64, 8),
    Decode(32, 8192, 28, 4),
    Decode(32, 8192, 16, 8),
)
"""All read 512 MiB or more, so that no cache can serve them: G = 4 as Llama 8B, then G = 8, 7 (Qwen2.5), 2 (Qwen3)."""
QUICK = (SHAPES[0], SHAPES[6])


def bandwidth(device: torch.device, size: int | None = None, repeats: int = 10) -> Row:
    """Bytes per second of a device copy (read plus written) and of one reading pass, over buffers of `size` bytes."""
    size = size or (4 << 30 if device.type == "cuda" else 256 << 20)
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    square = source.view(-1, 1 << 12)
    runs = {
        "copy": Run(partial(target.copy_, source)),
        "sum": Run(source.sum),
        "sum of rows": Run(partial(square.sum, dim=1)),
    }
    seconds = interleave(runs, repeats, device)
    del source, target, square, runs
    release()
    return {
        "copy": 2 * size / seconds["copy"],
        "read": size / min(seconds["sum"], seconds["sum of rows"]),
        "bytes": size,
    }


def run(bench: Bench, shapes: tuple[Decode, ...] | None = None) -> list[Row]:
    """Rows of every shape and contestant."""
    rows: list[Row] = []
    for shape in shapes or (QUICK if bench.options.quick else SHAPES):
        rows += _side_by_side(bench, shape)
        bench.keep(rows)
        release()
    return rows


Builder = Callable[[Decode, torch.device], Run]


def contestants(page_sizes: tuple[int, ...]) -> dict[tuple[str, int | None], Builder]:
    """How to build each contestant's `Run`; the key holds its name and page size, None for contiguous caches."""
    ours: dict[tuple[str, int | None], Builder] = {}
    for page in page_sizes:
        ours[OURS, page] = partial(_ours, page=page, mass=True)
        ours[OURS_BARE, page] = partial(_ours, page=page, mass=False)
    return {
        **ours,
        (SDPA, None): partial(_sdpa, folded=False),
        (f"{SDPA}, folded", None): partial(_sdpa, folded=True),
        (FLEX, None): _flex,
        (FLASHINFER, 16): partial(_flashinfer, page=16),
    }


def _side_by_side(bench: Bench, shape: Decode) -> list[Row]:
    facts = {**asdict(shape), "group": shape.group, "kv_bytes": shape.kv_bytes(_dtype(bench.device))}
    bench.say(f"kernels: {shape.rows} × {shape.tokens}, {shape.heads}/{shape.kv_heads} heads")
    runs: dict[str, Run] = {}
    rows: dict[str, Row] = {}
    for (name, page), build in contestants(bench.options.page_sizes).items():
        key = f"{name} {page}"
        row = bench.row({**facts, "contestant": name, "page": page}, partial(_build, build, shape, bench, runs, key))
        rows[key] = row
    try:
        seconds = interleave(runs, 10 * bench.options.repeats, bench.device)
    except Exception as error:  # one of them broke when it ran: which one, asynchronous errors do not tell
        for key in runs:
            rows[key]["error"] = reason(error)
        seconds = {}
    for key, value in seconds.items():
        rate = facts["kv_bytes"] / value
        rows[key] |= {"us": value * 1e6, "tb_per_s": rate / 1e12, "of_copy": rate / bench.bandwidth["copy"]}
    return _better_sdpa(list(rows.values()))


def _build(build: Builder, shape: Decode, bench: Bench, runs: dict[str, Run], key: str) -> Row:
    runs[key] = build(shape, bench.device)
    return {}


def _better_sdpa(rows: list[Row]) -> list[Row]:
    """Of the two ways to call torch's SDPA, the one that was faster on this shape, under one name."""
    pair = [row for row in rows if row["contestant"].startswith(SDPA)]
    best = min(pair, key=lambda row: row.get("us", float("inf")))
    best |= {"contestant": SDPA, "variant": "query group folded" if "folded" in best["contestant"] else "enable_gqa"}
    return [row for row in rows if row is best or row not in pair]


# ------------------------------------------------------------------------------------------------------- contestants


def _dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _normal(device: torch.device, *shape: int) -> Tensor:
    return torch.empty(*shape, dtype=_dtype(device), device=device).normal_()


def _ours(shape: Decode, device: torch.device, *, page: int, mass: bool) -> Run:
    """Our kernel on scattered pages; each call also appends a token, and lengths are set back before each replay."""
    kernel = "decode.triton" if device.type == "cuda" else "attention.reference"
    attention = importlib.import_module(f"lethe_compile.kernels.{kernel}").attention
    config = LetheConfig()
    rows, kv, dim = shape.rows, shape.kv_heads, shape.head_dim
    width = -(-(shape.tokens + _CALLS) // page)
    pages = rows * width
    length = torch.full((rows,), shape.tokens - _CALLS // 2, dtype=torch.int32, device=device)
    start = length.clone()
    table = torch.randperm(pages, device=device).int().view(rows, width)
    position = torch.empty(pages, page, dtype=torch.int32, device=device)
    position[table] = torch.arange(width * page, dtype=torch.int32, device=device).view(width, page)
    state = (
        _normal(device, pages, kv, page, dim),
        _normal(device, pages, kv, page, dim),
        position,
        torch.rand(pages, page, device=device),
        table,
        length,
        torch.full((rows, 1), shape.tokens + _CALLS, device=device),
        torch.ones(rows, dtype=torch.int32, device=device),
    )
    query = _normal(device, rows, shape.heads, 1, dim)
    key, value = _normal(device, rows, kv, 1, dim), _normal(device, rows, kv, 1, dim)
    decay, peak = (config.decay, config.score == "peak") if mass else (None, False)

    def reset() -> None:
        length.copy_(start)

    call = partial(attention, query, key, value, *state, scale=dim**-0.5, decay=decay, peak=peak)
    call()
    reset()
    return Run(graphed(call, _CALLS, device), prepare=reset, calls=_CALLS)


def _contiguous(shape: Decode, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    query = _normal(device, shape.rows, shape.heads, 1, shape.head_dim)
    kv = (shape.rows, shape.kv_heads, shape.tokens, shape.head_dim)
    return query, _normal(device, *kv), _normal(device, *kv)


def _sdpa(shape: Decode, device: torch.device, *, folded: bool) -> Run:
    """Torch's flash attention; `folded`, the query heads of a group are queries of its one KV head: the same sums."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query, key, value = _contiguous(shape, device)
    if folded:
        query = query.view(shape.rows, shape.kv_heads, shape.group, shape.head_dim)

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=not folded)

    call()
    return Run(graphed(call, _CALLS, device), calls=_CALLS)


def _flex(shape: Decode, device: torch.device) -> Run:
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()  # each shape is compiled for itself
    query, key, value = _contiguous(shape, device)
    compiled: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    call = partial(compiled, query, key, value, enable_gqa=shape.group > 1)
    with torch.no_grad():
        call()
        return Run(graphed(call, _CALLS, device), calls=_CALLS)


def _flashinfer(shape: Decode, device: torch.device, *, page: int) -> Run:
    """FlashInfer's batch decode on tensor cores over scattered pages; planned once, outside of the timed region.

    Its FA2 kernels, which split a long sequence among programs.
    """
    flashinfer: Any = importlib.import_module("flashinfer")
    rows, dim = shape.rows, shape.head_dim
    width = -(-shape.tokens // page)
    pages = rows * width
    query = _normal(device, rows, shape.heads, dim)
    cache = tuple(_normal(device, pages, shape.kv_heads, page, dim) for _ in range(2))
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True, backend="fa2")
    wrapper.plan(
        torch.arange(rows + 1, dtype=torch.int32, device=device) * width,
        torch.randperm(pages, device=device).int(),
        torch.full((rows,), (shape.tokens - 1) % page + 1, dtype=torch.int32, device=device),
        shape.heads,
        shape.kv_heads,
        dim,
        page,
        q_data_type=query.dtype,
        kv_data_type=query.dtype,
    )
    out = torch.empty_like(query)
    call = partial(wrapper.run, query, cache, out=out)
    call()
    return Run(graphed(call, _CALLS, device), calls=_CALLS)
