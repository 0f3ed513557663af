"""How many bytes the KV cache may take: `optimize`'s `kv_memory`, and what a device has left."""

from __future__ import annotations

import os

import torch

from lethe_compile.errors import ConfigError


def check_kv_memory(value: int | float | None) -> None:
    """Raises `ConfigError` unless `value` is None, a positive int of bytes, or a float in (0, 1], a fraction."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        allowed = False
    else:
        allowed = value > 0 if isinstance(value, int) else 0 < value <= 1
    if not allowed:
        raise ConfigError(
            f"kv_memory={value!r} is not allowed: must be None, an integer of bytes >= 1, or a float in (0, 1], the"
            " fraction of free memory to use"
        )


def available_bytes(device: torch.device) -> int:
    """Memory of the device that nothing uses: on a GPU also what torch keeps for later; on a CPU unused RAM."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def allowance(kv_memory: int | float | None, device: torch.device, held: int, last: int | None) -> int | None:
    """Bytes the cache may take, None for no limit but the device's.

    A fraction is of what is free now, the `held` bytes of the cache's own pools included. The `last` allowance stays
    while there is room for it, since another size means other tensors, and captured CUDA graphs are bound to theirs.
    """
    if not isinstance(kv_memory, float):
        return kv_memory
    free = available_bytes(device) + held
    return last if last is not None and last <= free else int(kv_memory * free)
