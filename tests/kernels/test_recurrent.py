"""Stateful modules over ragged rows: each row as if alone, its state its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lethe_compile.errors import UnsupportedGraphError
from lethe_compile.kernels.recurrent.call import (
    CACHE,
    Arguments,
    Layout,
    Operand,
    Output,
    Place,
    StatefulCall,
    Unread,
    copied,
)
from lethe_compile.kernels.recurrent.reference import recurrent

nan = float("nan")


class Decaying(nn.Module):
    """``y_t = s_t + shift_t``, ``s_t = s_{t-1} / 2 + x_t``; s is 0 before the first token, and kept in a cache.

    A first token gets 1 more, so that a row which goes on from zeros is not a row which begins.
    """

    def forward(self, x: Tensor, *, shift: Tensor, cache: dict[str, Any]) -> tuple[Tensor, Tensor]:
        state = cache["layers"][1].get("state")
        out = []
        for token in x.unbind(1):
            state = token + 1 if state is None else state / 2 + token
            out.append(state + shift[:, len(out)].mT)
        cache["layers"][1]["state"] = state
        return torch.stack(out, 1), torch.stack(out, 1).sum((2, 3))


def call() -> StatefulCall:
    """The module on ``x [rows, T, 3, 2]`` and ``shift [1, T, 2, 3]``, in a cache of two layers."""
    template, structure = tree_flatten(((Operand(0),), {"shift": Operand(1), "cache": CACHE}))
    returned, result = tree_flatten((Operand(0), Operand(1)))
    return StatefulCall(
        name="toy",
        module=Decaying(),
        layouts=(Layout(0, 1), Layout(None, 1)),
        whole=Arguments(tuple(template), structure),
        step=Arguments(tuple(template), structure),
        outputs=(Output(0, (3, 2)), Output(1, ())),
        returned=Arguments(tuple(returned), result),
        dtype=torch.float64,
        places=(Place(False, ("layers", 1, "state"), (3, 2), torch.float64),),
        touched=(("layers", 1, "state"),),
        empty={"layers": [{}, {}]},
        after={"layers": [{"state": Unread("another layer's state")}, {"state": Unread("its own state")}]},
    )


def alone(x: Tensor, shift: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Packed outputs and state of one row ``[T, 3, 2]`` of `length` tokens."""
    cache: dict[str, Any] = {"layers": [{}, {}]}
    out, total = Decaying()(x[None, :length], shift=shift[:, :length], cache=cache)
    return torch.cat([out.flatten(2), total[..., None]], -1)[0], cache["layers"][1]["state"][0]


def inputs(rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, tokens, 3, 2, dtype=torch.float64), torch.randn(1, tokens, 2, 3, dtype=torch.float64)


def run(operands: tuple[Tensor, Tensor], state: Tensor, new: list[int], goes_on: bool) -> Tensor:
    return recurrent(operands, [state], torch.tensor(goes_on), torch.tensor(new, dtype=torch.int32), call())


@pytest.mark.parametrize("lengths", [[5, 5, 5, 5], [5, 2, 0, 2], [1, 0, 0, 3], [0, 0, 0, 0]])
def test_rows_begin_as_if_alone(lengths: list[int]) -> None:
    x, shift = inputs(4, 5)
    state = torch.full((4, 3, 2), nan, dtype=torch.float64)  # what was there before is nobody's business
    for row, length in enumerate(lengths):
        x[row, length:] = nan
    out = run((x, shift), state, lengths, goes_on=False)
    assert out.shape == (4, 5, 7)
    for row, length in enumerate(lengths):
        if length:
            expected, left = alone(x[row], shift, length)
            torch.testing.assert_close(out[row, :length], expected, rtol=0, atol=0)
            torch.testing.assert_close(state[row], left, rtol=0, atol=0)
        else:
            assert state[row].isnan().all()


@pytest.mark.parametrize("lengths", [[4, 4, 4], [4, 1, 0], [0, 2, 3]])
def test_rows_go_on_from_their_state(lengths: list[int]) -> None:
    x, shift = inputs(3, 6)
    state = torch.zeros(3, 3, 2, dtype=torch.float64)
    run((x[:, :2], shift[:, :2]), state, [2, 2, 2], goes_on=False)
    before = state.clone()
    later = x[:, 2:].clone()
    for row, length in enumerate(lengths):
        later[row, length:] = nan
    shift[:, 2:] = 0  # the toy counts the shifts of a call
    out = run((later, shift[:, 2:]), state, lengths, goes_on=True)
    for row, length in enumerate(lengths):
        expected, left = alone(x[row], shift, 2 + length)
        torch.testing.assert_close(out[row, :length], expected[2:], rtol=0, atol=0)
        torch.testing.assert_close(state[row], left if length else before[row], rtol=0, atol=0)


def test_what_is_packed_unpacks_to_what_the_module_returns() -> None:
    x, shift = inputs(2, 5)
    args, kwargs = call().whole.fill((x, shift), {"layers": [{}, {}]})
    returned = Decaying()(*args, **kwargs)
    unpacked = call().unpack(call().pack(returned))
    assert [torch.equal(*pair) for pair in zip(unpacked, returned, strict=True)] == [True, True]


def test_a_single_token_moves_active_rows_alone() -> None:
    (x, shift), state = inputs(3, 1), torch.randn(3, 3, 2, dtype=torch.float64)
    before = state.clone()
    out = run((x, shift), state, [1, 0, 1], goes_on=True)
    assert torch.equal(state[1], before[1])
    assert torch.equal(state[[0, 2]], before[[0, 2]] / 2 + x[[0, 2], 0])
    assert torch.equal(out[[0, 2], 0, :6], (state + shift[:, 0].mT)[[0, 2]].flatten(1))


def test_caches_are_copied_where_they_change() -> None:
    root = {"layers": [{"state": 1}, {"state": 2}], "config": [3]}
    own = copied(root, [("layers", 1, "state"), ("layers", 2, "state")])
    own["layers"][1]["state"] = 5
    assert root["layers"][1]["state"] == 2
    assert own["layers"][0] is root["layers"][0] and own["config"] is root["config"]


def test_what_is_unread_says_so() -> None:
    unread = Unread("argument 2")
    for read in (lambda: unread.shape, lambda: bool(unread)):
        with pytest.raises(UnsupportedGraphError, match="argument 2 was not expected to be read"):
            read()
    with pytest.raises(TypeError):
        torch.ones(2) * unread  # type: ignore[operator]
