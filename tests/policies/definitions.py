"""Each published policy's choice for one layer of one row, in NumPy and Python, straight from its definition.

Nothing of the project is used: what a token is worth, how many tokens a layer may hold, and the order in which they are
taken are all spelled out here once more, one row at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Row:
    """One layer of one row; arrays are in order of position."""

    layer: int
    layers: int
    mass: Array  # [n] float32
    position: Array  # [n]
    keys: Array  # [n, heads, dim]
    next_position: int
    prompt: int


def scores(name: str, row: Row, options: dict[str, Any]) -> list[float]:
    """What each token is worth to a policy."""
    if name in ("h2o", "tova", "morph"):
        return [float(mass) for mass in row.mass]
    if name == "streaming":
        return [float(position) for position in row.position]
    if name == "random":
        return [_draw(options.get("seed", 0), row, int(position)) for position in row.position]
    if name in ("snapkv", "pyramid"):
        return _snapkv(row, options.get("window", 32 if name == "snapkv" else 8), options)
    assert name == "rkv"
    return _rkv(row, options)


def recent(name: str, target: int, options: dict[str, Any], recent_ratio: float) -> int:
    """Newest tokens that stay whatever their score."""
    if name in ("streaming", "random"):
        count = math.floor(target * recent_ratio)
    elif name == "h2o":
        count = math.floor(target * options.get("recent", 0.5))
    elif name == "tova":
        count = 1
    else:
        window = {"snapkv": 32, "pyramid": 8, "morph": 32, "rkv": 8}[name]
        count = min(options.get("window", window), target // 2)
    return max(1, count)


def keep(value: Sequence[float], row: Row, target: int, newest: int, sinks: int, protect: bool) -> list[bool]:
    """At most `target` tokens: sinks, the newest, the prompt, the rest, best first and newer first among equals."""
    n = len(value)

    def place(slot: int) -> tuple[int, float, int]:
        position = row.position[slot]
        if position < sinks:
            tier = 0
        elif slot >= n - newest:
            return 1, -float(slot), -slot
        else:
            tier = 2 if protect and position < row.prompt else 3
        return tier, -value[slot], -slot

    taken = sorted(range(n), key=place)[:target]
    return [slot in taken for slot in range(n)]


def caps(name: str, layers: int, floor: int, budget: float, options: dict[str, Any]) -> list[int]:
    """How layers share a budget of tokens: the floor each, and the rest by their weights."""
    weights = _weights(name, layers, options)
    return [floor + math.floor((budget - layers * floor) * (weight / sum(weights))) for weight in weights]


def ceilings(name: str, layers: int, floor: int, most: int, options: dict[str, Any]) -> list[int]:
    """Caps of single layers where one of them may hold `most`."""
    weights = _weights(name, layers, options)
    return [floor + int((most - floor) * weight / max(weights)) for weight in weights]


def _weights(name: str, layers: int, options: dict[str, Any]) -> list[float]:
    if name != "pyramid":
        return [1.0] * layers
    last = 1 / options.get("steepness", 20.0)
    return [(2 - last) + (last - (2 - last)) * layer / max(1, layers - 1) for layer in range(layers)]


def _snapkv(row: Row, window: int, options: dict[str, Any]) -> list[float]:
    half, how = options.get("kernel", 7) // 2, options.get("pooling", "avg")
    observed = [position >= row.next_position - window for position in row.position]
    prefix = [np.float32(0) if o else np.float32(m) for o, m in zip(observed, row.mass, strict=True)]
    result = []
    for slot, own in enumerate(observed):
        around = [prefix[i] if 0 <= i < len(prefix) else np.float32(0) for i in range(slot - half, slot + half + 1)]
        if how == "max":
            value = max(around)
        else:
            value = np.float32(0)
            for one in around:
                value = np.float32(value + one)
            value = np.float32(value / np.float32(len(around)))
        result.append(float(row.mass[slot]) if own else float(value))
    return result


def _rkv(row: Row, options: dict[str, Any]) -> list[float]:
    weight, half, similar = options.get("importance", 0.1), options.get("kernel", 7) // 2, options.get("similar", 0.5)
    n, mass = len(row.mass), row.mass.astype(np.float64)
    most = np.array([mass[max(0, slot - half) : slot + half + 1].max() for slot in range(n)])
    importance = most / mass.sum()
    redundancy = np.zeros(n)
    for head in range(row.keys.shape[1]):
        unit = row.keys[:, head].astype(np.float64)
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        similarity = unit @ unit.T
        np.fill_diagonal(similarity, 0)
        for token in range(n):
            alike = np.flatnonzero(similarity[token] > similar)
            if alike.size:
                similarity[token, alike[-1]] = 0  # the newest that resembles it
        mean = similarity.sum(0) / n
        redundancy += np.exp(mean) / np.exp(mean).sum() / row.keys.shape[1]
    return [float(value) for value in weight * importance - (1 - weight) * redundancy]


def _draw(seed: int, row: Row, position: int) -> float:
    mixed = _splitmix((_splitmix((_splitmix(row.layer + (seed << 32)) + row.next_position) & MASK) + position) & MASK)
    return float(mixed >> 40)


def _splitmix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)
