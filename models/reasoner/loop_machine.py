"""Family `loop`: a short program over a few registers, run line by line until its counter meets the limit.

    prompt  <bos> loop n7 n31 e3 let k1 +3 k2 +5 init a 4 b 9 c 0 d 2 L1 a + b a L2 b k2 L3 a <3 d +7 print d :
    trace   k1 3 k2 8  n7 n31 go  L1 a 4 + b 9 a 13  L2 b 9 k2 b 1  L3 a 13 d +7 no  print d 2  n8 n31 go  ...
            n31 n31 halt d 10 <eos>

Lines: `L1 a + b a` is a := a + b, `L2 b k2` is b := b + k2, and `L3 a <3 d +7` is d := d + 7 when a < 3, all modulo
16. The counter's iterations that e divides open with a check line that restates all registers. What a reader of the
trace must keep: the program with its thresholds (never restated), the constants k (derived once, at the start of the
trace, read in every iteration), each register's newest value, and one register that is rarely written and rarely
read. Everything else is superseded or said again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .drafts import ABSENT, CYCLE, Draft, named, randint, used
from .vocabulary import (
    BOS,
    CONSTANT,
    CONSTANTS,
    ID,
    INCREMENT,
    LINE,
    LINES,
    MODULUS,
    PERIOD,
    PERIODS,
    REGISTER,
    REGISTERS,
    THRESHOLD,
    THRESHOLDS,
    VALUE,
)

SHORTEST_ITERATION = 24  # tokens, without check lines
_BINARY, _ADD_CONSTANT, _GUARDED = 1, 2, 3  # kinds of lines; 0 is no line
Program = dict[str, Tensor]  # each [n], or [n, 5] when it describes the lines


def sample(n: int, generator: torch.Generator) -> Program:
    """Random programs: 4-6 registers, 2-4 constants, 3-5 lines of which each kind stands at least once."""

    def draw(high: int, *shape: int, low: int = 0) -> Tensor:
        return randint(high, (n, *shape), generator, low)

    registers, constants, lines = draw(7, low=4), draw(5, low=2), draw(6, low=3)
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
        "increment": draw(MODULUS, width, low=1),
        "initial": draw(MODULUS, len(REGISTERS)), "steps": draw(MODULUS, len(CONSTANTS), low=1),
        "period": draw(PERIODS[-1] + 1, low=PERIODS[0]), "phase": draw(CYCLE), "printed": draw(1 << 30) % registers,
    }  # fmt: skip


def execute(program: Program, iterations: int) -> dict[str, Tensor]:
    """Runs all programs: operands and results of each line [n, iterations, 5], registers before each [n, ..., 6]."""
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
            step = torch.where(kind == _GUARDED, program["increment"][:, line, None], constants.gather(1, amount))
            new = torch.where(kind == _BINARY, a + b - 2 * b * minus, old + step) % MODULUS
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
    run = execute(program, iterations + 1)
    present = used(program["registers"], len(REGISTERS))
    printed = program["printed"][:, None, None].expand(n, iterations + 1, 1)
    closing = torch.cat([REGISTER + printed, VALUE + run["registers"].gather(2, printed)], 2)
    headers = torch.ones(n, iterations, dtype=torch.bool, device=generator.device)
    units = _units(program, {name: values[:, :-1] for name, values in run.items()}, present, closing[:, 1:])
    closing = closing[:, :-1]
    return Draft(_prompt(program, present), _preamble(program), units, headers, program["phase"], closing)


def _prompt(program: Program, present: Tensor) -> Tensor:
    kind, n = program["kind"], present.shape[0]
    left, right, out = (REGISTER + program[name] for name in ("left", "right", "out"))
    sign, constant = ID["+"] + program["minus"], CONSTANT + program["constant"]
    gap = torch.full_like(kind, ABSENT)
    label = torch.arange(LINE, LINE + len(LINES), device=kind.device).expand_as(kind)
    layouts = (
        (gap, gap, gap, gap, gap),
        (label, left, sign, right, out),
        (label, out, constant, gap, gap),
        (label, left, THRESHOLD + program["threshold"], out, INCREMENT + program["increment"]),
    )
    table = torch.stack([torch.stack(layout, 2) for layout in layouts])  # [kind, n, line, slot]
    lines = table.gather(0, kind[None, :, :, None].expand(1, -1, -1, 5))[0].flatten(1)

    def word(text: str) -> Tensor:
        return torch.full((n, 1), ID[text], device=kind.device)

    steps = named(CONSTANT, INCREMENT + program["steps"], used(program["constants"], len(CONSTANTS)))
    initial = named(REGISTER, VALUE + program["initial"], present)
    head = [torch.full((n, 1), BOS, device=kind.device), word("loop"), word("n0"), word("n0")]
    period, printed = PERIOD + program["period"][:, None], REGISTER + program["printed"][:, None]
    body = [period, word("let"), steps, word("init"), initial, lines, word("print"), printed, word(":")]
    return torch.cat(head + body, 1)


def _preamble(program: Program) -> Tensor:
    values = VALUE + program["steps"].cumsum(1) % MODULUS
    return named(CONSTANT, values, used(program["constants"], len(CONSTANTS)))


def _units(program: Program, run: dict[str, Tensor], present: Tensor, closing: Tensor) -> Tensor:
    """Slots of every iteration [n, iterations, S]: counter, limit, go, check, five lines of ten, the print."""
    n, iterations, _ = run["registers"].shape
    shape = (n, iterations, len(LINES))
    names = ("kind", "left", "right", "out", "minus", "constant", "increment")
    kind, left, right, out, minus, constant, increment = (program[name][:, None].expand(shape) for name in names)
    a, b, old, new = (VALUE + run[name] for name in ("left", "right", "old", "new"))
    left, right, out, constant = REGISTER + left, REGISTER + right, REGISTER + out, CONSTANT + constant
    gap = torch.full_like(a, ABSENT)
    label = torch.arange(LINE, LINE + len(LINES), device=kind.device).expand(shape)
    verdict = torch.where(run["fired"], ID["yes"], ID["no"])
    guarded = [torch.where(run["fired"], slot, ABSENT) for slot in (out, old, out, new)]
    layouts = (
        (gap,) * 10,
        (label, left, a, ID["+"] + minus, right, b, out, new, gap, gap),
        (label, out, old, constant, out, new, gap, gap, gap, gap),
        (label, left, a, out, INCREMENT + increment, verdict, *guarded),
    )
    lines = torch.full((*shape, 10), ABSENT, dtype=torch.int16, device=kind.device)
    for index, layout in enumerate(layouts):
        lines = torch.where((kind == index)[..., None], torch.stack(layout, -1).short(), lines)
    checks = _checks(program, run["registers"], present)
    header = torch.full((n, iterations, 3), ID["go"], dtype=torch.int16, device=kind.device)
    shown = torch.full_like(closing, ID["print"])[..., :1]
    return torch.cat([header, checks.short(), lines.flatten(2), torch.cat([shown, closing], 2).short()], 2)


def _checks(program: Program, registers: Tensor, present: Tensor) -> Tensor:
    """Slots `check a 4 b 9 ...` [n, iterations, 13] in iterations whose counter the period divides."""
    n, iterations, _ = registers.shape
    count = program["phase"][:, None] + torch.arange(iterations, device=present.device)
    due = (count % program["period"][:, None] == 0)[..., None]
    pairs = named(REGISTER, VALUE + registers, present[:, None].expand_as(registers))
    mark = torch.full((n, iterations, 1), ID["check"], device=present.device)
    return torch.where(due, torch.cat([mark, pairs], 2), ABSENT)
