"""Family `walk`: a walker on a small graph whose nodes send it out by their two edges in turn, until N returns home.

    prompt  <bos> walk n7 n31 e2 let k1 +3 k2 +5 O0 B k1 O1 A k2 A0 ... state O1 A0 B0 C1 D1 E0 sum 9 :
    trace   k1 3 k2 8  n7 n31 go at O0 k1 B 12 B1 k2 D 4 D0 ... O 15 n8 n31 go check O0 A0 B1 C1 D0 E0 at O1 ...
            n31 n31 halt 6 <eos>

`O0 B k1` is the edge 0 of the origin: it leads to B and adds k1 to the sum, modulo 16. `C1` in the state, a check
line or a step says that C last used its edge 1, so the next visit leaves by edge 0. A step writes the edge, its
constant's name, the next node and the new sum. The constants' values stand only at the start of the trace, where they
are derived; a node's rotor stands only at its last visit or in the last check line, at every age.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .drafts import ABSENT, CYCLE, Draft, named, randint, used
from .vocabulary import (
    BOS,
    CONSTANT,
    CONSTANTS,
    EDGE,
    ID,
    INCREMENT,
    MODULUS,
    NODE,
    NODES,
    PERIOD,
    PERIODS,
    VALUE,
)

STEP = 4  # tokens: edge, constant, next node, sum
REWIRED = 5  # one chord in so many leads to a random node, so that some nodes are visited more than others
Walk = dict[str, Tensor]  # each [n], or [n, 8] by node, or [n, 8, 2] by node and edge


def sample(n: int, generator: torch.Generator) -> Walk:
    """Random strongly connected graphs of 5-8 nodes: a Hamiltonian cycle, and a chord from each node."""

    def draw(high: int, *shape: int, low: int = 0) -> Tensor:
        return randint(high, (n, *shape), generator, low)

    width = len(NODES)
    count, constants = draw(width + 1, low=5)[:, None], draw(5, low=2)
    index = torch.arange(width, device=generator.device).expand(n, width)
    shuffled = torch.rand(n, width, generator=generator, device=generator.device).masked_fill(index >= count, 2.0)
    order = shuffled.argsort(1)  # the cycle visits order[0], order[1], ..., order[count - 1]
    leap = 2 + draw(1 << 30, 1) % (count - 2)  # in places along the cycle, and neither 0 nor 1
    anywhere = 2 + draw(1 << 30, width) % (count - 2)
    leap = torch.where(draw(REWIRED, width) == 0, anywhere, leap)
    cycle = torch.zeros_like(order).scatter(1, order, order.gather(1, (index + 1) % count))
    chord = torch.zeros_like(order).scatter(1, order, order.gather(1, (index + leap) % count))
    swap = draw(2, width) == 1
    target = torch.stack([torch.where(swap, chord, cycle), torch.where(swap, cycle, chord)], 2)
    return {
        "count": count[:, 0], "target": target, "constant": draw(1 << 30, width, 2) % constants[:, None, None],
        "constants": constants, "steps": draw(MODULUS, len(CONSTANTS), low=1), "rotor": draw(2, width),
        "sum": draw(MODULUS), "period": draw(PERIODS[-1] + 1, low=PERIODS[0]), "phase": draw(CYCLE),
    }  # fmt: skip


def execute(walk: Walk, steps: int) -> dict[str, Tensor]:
    """Walks all graphs: node, edge, sum before and after, target [n, steps], and the rotors before [n, steps, 8]."""
    n, device = walk["sum"].shape[0], walk["sum"].device
    values = walk["steps"].cumsum(1)
    targets, constants = walk["target"].flatten(1), walk["constant"].flatten(1)
    weights = values.gather(1, constants)
    node, rotor, total = torch.zeros(n, 1, dtype=torch.long, device=device), walk["rotor"], walk["sum"][:, None]
    names = ("node", "edge", "before", "after", "target")
    record: dict[str, list[Tensor]] = {name: [] for name in (*names, "rotor")}
    for _ in range(steps):
        record["rotor"].append(rotor)
        side = 1 - rotor.gather(1, node)
        edge = 2 * node + side
        target, after = targets.gather(1, edge), (total + weights.gather(1, edge)) % MODULUS
        for name, value in zip(names, (node, edge, total, after, target), strict=True):
            record[name].append(value)
        node, rotor, total = target, rotor.scatter(1, node, side), after
    return {name: torch.cat(record[name], 1) for name in names} | {"rotor": torch.stack(record["rotor"], 1)}


def draft(n: int, generator: torch.Generator, max_tokens: int) -> Draft:
    """n simulated walks, each long enough to fill max_tokens."""
    walk = sample(n, generator)
    run = execute(walk, max_tokens // STEP + 2)
    home = run["node"] == 0
    preamble = named(CONSTANT, VALUE + walk["steps"].cumsum(1) % MODULUS, used(walk["constants"], len(CONSTANTS)))
    closing = VALUE + run["before"][..., None]
    return Draft(_prompt(walk), preamble, _units(walk, run, home), home, walk["phase"], closing)


def _prompt(walk: Walk) -> Tensor:
    n, device = walk["sum"].shape[0], walk["sum"].device
    index = torch.arange(len(NODES), device=device)
    present = used(walk["count"], len(NODES))
    edge = (EDGE + 2 * index[:, None] + torch.arange(2, device=device)).expand_as(walk["target"])
    table = torch.stack([edge, NODE + walk["target"], CONSTANT + walk["constant"]], 3)
    table = torch.where(present[:, :, None, None], table, ABSENT).flatten(1)
    state = torch.where(present, EDGE + 2 * index + walk["rotor"], ABSENT)

    def word(text: str) -> Tensor:
        return torch.full((n, 1), ID[text], device=device)

    steps = named(CONSTANT, INCREMENT + walk["steps"], used(walk["constants"], len(CONSTANTS)))
    head = [torch.full((n, 1), BOS, device=device), word("walk"), word("n0"), word("n0")]
    body = [PERIOD + walk["period"][:, None], word("let"), steps, table, word("state"), state]
    return torch.cat([*head, *body, word("sum"), VALUE + walk["sum"][:, None], word(":")], 1)


def _units(walk: Walk, run: dict[str, Tensor], home: Tensor) -> Tensor:
    """Slots of every step [n, steps, 17]: counter, limit, go, check line, `at` when at home; edge, k, node, sum."""
    index = torch.arange(len(NODES), device=home.device)
    lap = home.cumsum(1) - 1 + walk["phase"][:, None]
    due = home & (lap % walk["period"][:, None] == 0)
    listed = due[..., None] & (index < walk["count"][:, None])[:, None]
    states = torch.where(listed, EDGE + 2 * index + run["rotor"], ABSENT).short()
    go, at = (torch.where(home, ID[text], ABSENT).short()[..., None] for text in ("go", "at"))
    check = torch.where(due, ID["check"], ABSENT).short()[..., None]
    constant = CONSTANT + walk["constant"].flatten(1).gather(1, run["edge"])
    step = torch.stack([EDGE + run["edge"], constant, NODE + run["target"], VALUE + run["after"]], 2).short()
    return torch.cat([go, go, go, check, states, at, step], 2)
