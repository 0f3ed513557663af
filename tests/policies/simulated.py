"""Rounds and decodes without a model: layers of given scores, and a cache of lists that a policy prunes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lethe_compile.config import LetheConfig
from lethe_compile.policies import Policy, make_policy
from lethe_compile.policies.base import RoundState


@dataclass(frozen=True)
class Layer:
    """One layer of a `RoundState`: R rows, N slots."""

    window: int | None
    mass: Tensor  # [R, N]
    position: Tensor  # [R, N]
    length: Tensor  # [R]
    prompt_length: Tensor  # [R], as those that follow: the same for all layers of a round
    next_position: Tensor
    active: Tensor


@dataclass(frozen=True)
class Selection:
    """What stays of one layer, as its own shape tells."""

    keep: Tensor  # [R, N] bool
    pruned: Tensor  # [R] bool: rows that lose at least one token


def stack(layers: Sequence[Layer]) -> RoundState:
    """The layers as one round, padded to the widest."""
    width = max(each.mass.shape[1] for each in layers)
    pad = [(0, width - each.mass.shape[1]) for each in layers]
    return RoundState(
        torch.stack([F.pad(each.mass, p) for each, p in zip(layers, pad, strict=True)]),
        torch.stack([F.pad(each.position, p, value=-1) for each, p in zip(layers, pad, strict=True)]),
        torch.stack([each.length for each in layers]),
        tuple(each.window for each in layers),
        layers[0].prompt_length,
        layers[0].next_position,
        layers[0].active,
        lambda index: keys_of(layers[index], width),
    )


def keys_of(one: Layer, width: int) -> Tensor:
    """[R, N, 2, 8] random keys, told by position; 0 where there is no token."""
    table = torch.randn(4096, 2, 8, generator=torch.Generator().manual_seed(7))
    position = F.pad(one.position, (0, width - one.position.shape[1]), value=-1)
    return table[position.clamp(min=0).long()].masked_fill((position < 0)[:, :, None, None], 0)


def hold_round(policy: Policy, layers: Sequence[Layer], limit: Tensor | None = None) -> list[Selection | None]:
    """A round; what each layer keeps, None where it loses nothing."""
    state = stack(layers)
    before = [tensor.clone() for tensor in vars(state).values() if isinstance(tensor, Tensor)]
    keep = policy.round(state, limit)
    after = [tensor for tensor in vars(state).values() if isinstance(tensor, Tensor)]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True)), "a policy must not write into its state"
    if keep is None:
        return [None] * len(layers)
    assert keep.shape == state.mass.shape and keep.dtype == torch.bool
    assert not (keep & (state.position < 0)).any()
    pruned = keep.sum(2) < state.length
    return [
        Selection(keep[i][:, : each.mass.shape[1]], pruned[i]) if pruned[i].any() else None
        for i, each in enumerate(layers)
    ]


def layer(
    mass: Sequence[Sequence[float]],
    *,
    prompt: int = 0,
    window: int | None = None,
    active: Sequence[bool] | None = None,
) -> Layer:
    """A layer whose rows hold the positions 0..n-1 with the given scores."""
    length = torch.tensor([len(row) for row in mass])
    width = int(length.max())
    position = torch.arange(width, dtype=torch.int32).expand(len(mass), width)
    position = position.masked_fill(position >= length.unsqueeze(1), -1)
    return Layer(
        window=window,
        mass=torch.tensor([list(row) + [0.0] * (width - len(row)) for row in mass]),
        position=position,
        length=length,
        prompt_length=torch.full((len(mass),), prompt),
        next_position=length.clone(),
        active=torch.ones(len(mass), dtype=torch.bool) if active is None else torch.tensor(active),
    )


def begun(config: LetheConfig, layers: int, rows: int) -> Policy:
    policy = make_policy(config)
    policy.begin(layers, rows)
    return policy


def chosen(selection: Selection | None) -> Selection:
    assert selection is not None
    return selection


class Decode:
    """A cache of lists that decodes step by step and lets a policy prune it; every token gets a random score."""

    def __init__(
        self,
        policy: Policy,
        prompts: Sequence[int],
        windows: Sequence[int | None],
        *,
        seed: int = 0,
        power: float = 6.0,
    ) -> None:
        self.policy, self.windows, self.power = policy, windows, power
        self.generator = torch.Generator().manual_seed(seed)
        self.prompts, self.next = torch.tensor(prompts), torch.tensor(prompts)
        self.active = torch.ones(len(prompts), dtype=torch.bool)
        self.positions = [[list(range(n)) for n in prompts] for _ in windows]
        self.masses = [[self.scores(n) for n in prompts] for _ in windows]
        policy.begin(len(windows), len(prompts), [64] * len(windows))

    def scores(self, n: int) -> list[float]:
        return (torch.rand(n, generator=self.generator) ** self.power).tolist()  # higher power, steeper scores

    def state(self, index: int) -> Layer:
        rows = self.positions[index]
        length = torch.tensor([len(row) for row in rows])
        width = int(length.max())
        pad = [width - len(row) for row in rows]
        position = torch.tensor([row + [-1] * p for row, p in zip(rows, pad, strict=True)], dtype=torch.int32)
        mass = torch.tensor([row + [0.0] * p for row, p in zip(self.masses[index], pad, strict=True)])
        return Layer(self.windows[index], mass, position, length, self.prompts, self.next.clone(), self.active.clone())

    def round(self, limit: Tensor | None = None) -> tuple[list[Layer], list[Selection | None]]:
        states = [self.state(i) for i in range(len(self.windows))]
        selections = hold_round(self.policy, states, limit)
        for i, selection in enumerate(selections):
            if selection is None:
                continue
            lost = ~selection.keep & (states[i].position >= 0)
            assert torch.equal(selection.pruned, lost.any(1))
            for r, keep in enumerate(selection.keep.tolist()):
                n = len(self.positions[i][r])
                self.positions[i][r] = [p for p, k in zip(self.positions[i][r], keep[:n], strict=True) if k]
                self.masses[i][r] = [m for m, k in zip(self.masses[i][r], keep[:n], strict=True) if k]
        return states, selections

    def step(self) -> None:
        for i in range(len(self.windows)):
            for r in self.active.nonzero().flatten().tolist():
                self.positions[i][r].append(int(self.next[r]))
                old = [*self.masses[i][r], 0.0]
                self.masses[i][r] = [0.9 * m + s for m, s in zip(old, self.scores(len(old)), strict=True)]
        self.next[self.active] += 1

    def lengths(self) -> Tensor:
        return torch.tensor([[len(row) for row in rows] for rows in self.positions])  # [L, R]

    def run(self, rounds: int) -> Iterator[Tensor]:
        """Lengths after every step of `rounds` rounds, the first of which follows the prefill."""
        for _ in range(rounds):
            self.round()
            for _ in range(self.policy.config.interval):
                self.step()
                yield self.lengths()
