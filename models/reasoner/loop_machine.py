"""Family `loop`: a short program over a few registers, run line by line until its counter meets the limit.

    prompt  <bos> loop n7 n31 e3 let k1 +3 k2 +5 init a 4 b 9 c 0 d 2 L1 a + b a L2 b k1 L3 a <3 d k2 end print d :
    trace   k1 3 k2 8  n7 n31 go  L1 a 4 + b 9 a 13  L2 b 9 k1 b 12  L3 a 13 no end  n8 n31 go  ...
            n31 n31 halt d 10 <eos>

Lines: `L1 a + b a` is a := a + b, `L2 b k1` is b := b + k1, and `L3 a <3 d k2` is d := d + k2 when a < 3, all modulo
16. Every e-th iteration opens with a check line that restates all registers. What a reader of the trace must keep:
the program and its thresholds (only in the prompt), the constants k (derived once, at the start of the trace, read in
every iteration), each register's newest value, and one register that is rarely written. Everything else is superseded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .drafts import ABSENT, CYCLE, Draft, randint
from .vocabulary import (
    BOS, CONSTANT, CONSTANTS, ID, INCREMENT, LINE, LINES, MODULUS, PERIOD, PERIODS, REGISTER, REGISTERS, THRESHOLD,
    THRESHOLDS, VALUE,
)  # fmt: skip

SHORTEST_ITERATION = 26  # tokens, without check lines
_BINARY, _ADD_CONSTANT, _GUARDED = 1, 2, 3  # kinds of lines; 0 is no line
Program = dict[str, Tensor]  # each [n], or [n, 6] when it describes the lines


def sample(n: int, generator: torch.Generator) -> Program:
    """Random programs: 4-6 registers, 2-4 constants, 4-6 lines of which each kind stands at least once."""

    def draw(high: int, *shape: int, low: int = 0) -> Tensor:
        return randint(high, (n, *shape), generator, low)

    registers, constants, lines = draw(7, low=4), draw(5, low=2), draw(7, low=4)
    width, wide = len(LINES), registers[:, None]
    active = torch.arange(width, device=generator.device) < lines[:, None]
    order = torch.rand(n, width, generator=generator, device=generator.device).masked_fill(~active, 2.0).argsort(1)
    kinds = torch.arange(1, 4, device=generator.device).expand(n, 3)
    kind = draw(4, width, low=1).scatter(1, order[:, :3], kinds) * active
    rare = draw(1 << 30) % registers  # written by guarded lines only
    common = (rare[:, None] + 1 + draw(1 << 30, width) % (wide - 1)) % wide
    left = torch.where(kind == _GUARDED, common, draw(1 << 30, width) % wide)
    in_place = (draw(2, width) == 1) & (left != rare[:, None])
    other = (rare[:, None] + 1 + draw(1 << 30, width) % (wide - 1)) % wide
    out = torch.where((kind == _BINARY) & in_place, left, other)
    out = torch.where((kind == _GUARDED) & (draw(4, width) > 0), rare[:, None], out)
    return {
        "registers": registers, "constants": constants, "kind": kind, "left": left, "out": out,
        "right": (left + 1 + draw(1 << 30, width) % (wide - 1)) % wide, "minus": draw(2, width),
        "constant": draw(1 << 30, width) % constants[:, None], "threshold": draw(len(THRESHOLDS) + 1, width, low=1),
        "initial": draw(MODULUS, len(REGISTERS)), "steps": draw(MODULUS, len(CONSTANTS), low=1),
        "period": draw(PERIODS[-1] + 1, low=PERIODS[0]), "phase": draw(CYCLE), "printed": draw(1 << 30) % registers,
    }  # fmt: skip


def execute(program: Program, iterations: int) -> dict[str, Tensor]:
    """Runs all programs: operands and results of each line [n, iterations, 6], registers before each [n, ..., 6]."""
    registers, constants = program["initial"], program["steps"].cumsum(1) % MODULUS
    names = ("left", "right", "old", "new", "fired")
    record: dict[str, list[Tensor]] = {name: [] for name in (*names, "registers")}
    for _ in range(iterations):
        record["registers"].append(registers)
        for line in range(len(LINES)):
            left, right, out, amount = (program[name][:, line, None] for name in ("left", "right", "out", "constant"))
            kind, minus = program["kind"][:, line, None], program["minus"][:, line, None]
            a, b, old = registers.gather(1, left), registers.gather(1, right), registers.gather(1, out)
            fired = (kind != _GUARDED) | (a < program["threshold"][:, line, None])
            new = torch.where(kind == _BINARY, a + b - 2 * b * minus, old + constants.gather(1, amount)) % MODULUS
            registers = registers.scatter(1, out, torch.where((kind > 0) & fired, new, old))
            for name, value in zip(names, (a, b, old, new, fired), strict=True):
                record[name].append(value)
    n = registers.shape[0]
    shaped = {name: torch.cat(record[name], 1).view(n, iterations, len(LINES)) for name in names}
    return shaped | {"registers": torch.stack(record["registers"], 1)}


def draft(n: int, generator: torch.Generator, max_tokens: int) -> Draft:
    """n simulated programs, each long enough to fill max_tokens."""
    program = sample(n, generator)
    iterations = max_tokens // SHORTEST_ITERATION + 2
    run = execute(program, iterations)
    used = _used(program["registers"], len(REGISTERS))
    printed = program["printed"][:, None, None].expand(n, iterations, 1)
    closing = torch.cat([REGISTER + printed, VALUE + run["registers"].gather(2, printed)], 2)
    headers = torch.ones(n, iterations, dtype=torch.bool, device=generator.device)
    units = _units(program, run, used)
    return Draft(_prompt(program, used), _preamble(program), units, headers, program["phase"], closing)


def _used(count: Tensor, width: int) -> Tensor:
    return torch.arange(width, device=count.device) < count[:, None]


def _named(first: int, values: Tensor, used: Tensor) -> Tensor:
    """Slots `name value` for each of the used ones: values [..., w] -> [..., 2w]."""
    names = torch.arange(first, first + values.shape[-1], device=values.device).expand_as(values)
    return torch.where(used[..., None], torch.stack([names, values], -1), ABSENT).flatten(-2)


def _prompt(program: Program, used: Tensor) -> Tensor:
    kind, n = program["kind"], used.shape[0]
    left, right, out = (REGISTER + program[name] for name in ("left", "right", "out"))
    sign, constant = ID["+"] + program["minus"], CONSTANT + program["constant"]
    gap = torch.full_like(kind, ABSENT)
    label = torch.arange(LINE, LINE + len(LINES), device=kind.device).expand_as(kind)
    layouts = (
        (gap, gap, gap, gap, gap),
        (label, left, sign, right, out),
        (label, out, constant, gap, gap),
        (label, left, THRESHOLD + program["threshold"], out, constant),
    )
    table = torch.stack([torch.stack(layout, 2) for layout in layouts])  # [kind, n, line, slot]
    lines = table.gather(0, kind[None, :, :, None].expand(1, -1, -1, 5))[0].flatten(1)

    def word(text: str) -> Tensor:
        return torch.full((n, 1), ID[text], device=kind.device)

    steps = _named(CONSTANT, INCREMENT + program["steps"], _used(program["constants"], len(CONSTANTS)))
    initial = _named(REGISTER, VALUE + program["initial"], used)
    head = [torch.full((n, 1), BOS, device=kind.device), word("loop"), word("n0"), word("n0")]
    period, printed = PERIOD + program["period"][:, None], REGISTER + program["printed"][:, None]
    body = [period, word("let"), steps, word("init"), initial, lines, word("end"), word("print"), printed, word(":")]
    return torch.cat(head + body, 1)


def _preamble(program: Program) -> Tensor:
    values = VALUE + program["steps"].cumsum(1) % MODULUS
    return _named(CONSTANT, values, _used(program["constants"], len(CONSTANTS)))


def _units(program: Program, run: dict[str, Tensor], used: Tensor) -> Tensor:
    """Slots of every iteration [n, iterations, 71]: counter, limit, go, check line, six lines of nine, end."""
    n, iterations, _ = run["registers"].shape
    shape = (n, iterations, len(LINES))
    kind, left, right, out, minus, constant = (
        program[name][:, None].expand(shape) for name in ("kind", "left", "right", "out", "minus", "constant")
    )
    a, b, old, new = (VALUE + run[name] for name in ("left", "right", "old", "new"))
    left, right, out, constant = REGISTER + left, REGISTER + right, REGISTER + out, CONSTANT + constant
    gap = torch.full_like(a, ABSENT)
    label = torch.arange(LINE, LINE + len(LINES), device=kind.device).expand(shape)
    verdict = torch.where(run["fired"], ID["yes"], ID["no"])
    guarded = [torch.where(run["fired"], slot, ABSENT) for slot in (out, old, constant, out, new)]
    layouts = (
        (gap,) * 9,
        (label, left, a, ID["+"] + minus, right, b, out, new, gap),
        (label, out, old, constant, out, new, gap, gap, gap),
        (label, left, a, verdict, *guarded),
    )
    lines = torch.full((*shape, 9), ABSENT, dtype=torch.int16, device=kind.device)
    for index, layout in enumerate(layouts):
        lines = torch.where((kind == index)[..., None], torch.stack(layout, -1).short(), lines)
    checks = _checks(program, run["registers"], used)
    header = torch.full((n, iterations, 3), ID["go"], dtype=torch.int16, device=kind.device)
    end = torch.full((n, iterations, 1), ID["end"], dtype=torch.int16, device=kind.device)
    return torch.cat([header, checks.short(), lines.flatten(2), end], 2)


def _checks(program: Program, registers: Tensor, used: Tensor) -> Tensor:
    """Slots `check a 4 b 9 ...` [n, iterations, 13] in iterations whose counter the period divides."""
    n, iterations, _ = registers.shape
    count = program["phase"][:, None] + torch.arange(iterations, device=used.device)
    due = (count % program["period"][:, None] == 0)[..., None]
    pairs = _named(REGISTER, VALUE + registers, used[:, None].expand_as(registers))
    mark = torch.full((n, iterations, 1), ID["check"], device=used.device)
    return torch.where(due, torch.cat([mark, pairs], 2), ABSENT)
