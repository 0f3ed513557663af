"""Small tensors between host and device, without either waiting for the other where that can be helped."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def sent(values: NDArray[Any], device: torch.device) -> Tensor:
    """Values of the host on the device, which is not waited for."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Fetched:
    """A tensor on its way to the host: made at once, and there when `wait` returns. Never written by others since."""

    def __init__(self, values: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._values = values
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(values.device))

    def wait(self) -> NDArray[np.int64]:
        """The values, integer or bool, as int64."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.long().numpy()
