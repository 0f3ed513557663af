"""What every test gets: fixed seeds, one thread a process, no network, and no GPU test without a GPU."""

from __future__ import annotations

import os

# Read at import by torch, transformers and the processes that tests start: set before any of them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import random

import hypothesis
import numpy as np
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("lethe", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("lethe")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random numbers for a test whichever tests run before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU, and torch sees none")
