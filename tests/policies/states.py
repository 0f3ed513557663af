"""Random states of a round, and policies to show them to."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lethe_compile.config import LetheConfig
from lethe_compile.policies import RankedPolicy, make_policy
from lethe_compile.policies.base import RoundState

NAMES = ["streaming", "h2o", "tova", "snapkv", "pyramid", "morph", "rkv", "random"]
SMALL = {"sink_tokens": 2, "recent_ratio": 0.25, "prune_interval": 4}  # caps of 14 tokens or more
FLOOR = 14


def random_state(seed: int, *, layers: int = 3, rows: int = 4, longest: int = 48, windows: bool = False) -> RoundState:
    """Ragged rows, positions with gaps, peaked masses, some rows done, layers of unequal length."""
    rng = np.random.default_rng(seed)
    ahead = rng.integers(4, 2 * longest + 4, rows)  # next positions
    shape = (layers, rows, longest)
    position, mass = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
    length = np.zeros((layers, rows), np.int64)
    for layer, row in np.ndindex(layers, rows):
        n = int(rng.integers(1, min(longest, ahead[row]) + 1))
        others = rng.choice(ahead[row] - 1, n - 1, replace=False)  # the newest token is always there
        position[layer, row, :n] = np.sort(np.append(others, ahead[row] - 1))
        mass[layer, row, :n] = rng.random(n) ** 5
        length[layer, row] = n
    keys = rng.standard_normal((*shape, 2, 8)).astype(np.float32)
    keys[position < 0] = 0
    return RoundState(
        torch.from_numpy(mass),
        torch.from_numpy(position),
        torch.from_numpy(length),
        tuple(9 + 7 * layer if windows and layer % 2 else None for layer in range(layers)),
        torch.from_numpy(rng.integers(1, ahead + 1)),
        torch.from_numpy(ahead),
        torch.from_numpy(rng.random(rows) < 0.8),
        torch.from_numpy(keys).__getitem__,
    )


def made(name: str, options: dict[str, Any], layers: int, rows: int, **caps: Any) -> RankedPolicy:
    policy = make_policy(LetheConfig(policy=name, policy_options=options, **{**SMALL, **caps}))
    policy.begin(layers, rows, [64] * layers)
    assert isinstance(policy, RankedPolicy)
    return policy


def kept(policy: RankedPolicy, state: RoundState, limit: Tensor | None = None) -> Tensor:
    keep = policy.round(state, limit)
    return state.position >= 0 if keep is None else keep
