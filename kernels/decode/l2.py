"""Room in a GPU's L2 cache for what is written to be read back at once."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch

_LIMIT_PERSISTING_L2 = 6  # CU_LIMIT_PERSISTING_L2_CACHE_SIZE
_MAX_PERSISTING_L2 = 108  # CU_DEVICE_ATTRIBUTE_MAX_PERSISTING_L2_CACHE_SIZE
_CUDA_SUCCESS = 0


@lru_cache
def set_aside(device: torch.device) -> int:
    """Let `device` keep up to half of its L2 for what is stored with the policy evict-last.

    Without room enough such stores go to memory and back, as keys and values stream by. The limit belongs to this
    process's context on the device; one that is higher already stays. Done once, and not while a CUDA graph is
    captured; the device is in use already. Returns the bytes set aside: fewer, or 0, where driver or device allow no
    more.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    most, now, handle = ctypes.c_int(), ctypes.c_size_t(), ctypes.c_int()
    with torch.cuda.device(device):
        asked = (
            driver.cuDeviceGet(ctypes.byref(handle), torch.cuda.current_device()),
            driver.cuDeviceGetAttribute(ctypes.byref(most), _MAX_PERSISTING_L2, handle),
            driver.cuCtxGetLimit(ctypes.byref(now), _LIMIT_PERSISTING_L2),
        )
        if asked != (_CUDA_SUCCESS,) * 3:
            return 0
        size = min(most.value, torch.cuda.get_device_properties(device).L2_cache_size // 2)
        if size > now.value and driver.cuCtxSetLimit(_LIMIT_PERSISTING_L2, ctypes.c_size_t(size)) == _CUDA_SUCCESS:
            return size
        return now.value
