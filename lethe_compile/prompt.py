"""Prompts as `generate` takes them: checked before any work, left-padded as transformers has them.

A row's tokens must be one run that reaches its right end. The decoder gets them right-padded, so that a row's first
token is at column 0 whatever the lengths of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lethe_compile.errors import InputError
from lethe_compile.sampling import token_ids

if TYPE_CHECKING:
    from transformers import GenerationConfig


@dataclass(frozen=True)
class Prompt:
    """A batch of R prompts, T columns wide."""

    ids: Tensor  # [R, T] int64, left-padded
    lengths: Tensor  # [R] int64, without the padding
    longest: int

    @property
    def rows(self) -> int:
        return self.ids.shape[0]

    def right_padded(self) -> Tensor:
        """The ids `[R, longest]` with each row's padding rotated to its right end."""
        width = self.ids.shape[1]
        columns = torch.arange(self.longest, device=self.ids.device)
        return self.ids.gather(1, (columns - self.lengths[:, None]) % width)


def read_prompt(
    ids: Tensor | None,
    attention_mask: Tensor | None,
    config: GenerationConfig,
    vocab_size: int,
    device: torch.device,
) -> Prompt:
    """The prompts of a call, `num_return_sequences` times each; without `ids`, one that is `bos_token_id` alone.

    Raises `InputError` naming the row, for ids `[rows, prompt]` and a mask of that shape which cannot be run.
    """
    if ids is None:
        if config.bos_token_id is None:
            raise InputError("there is no prompt: pass input_ids, or set bos_token_id to start from")
        ids = torch.full((1, 1), config.bos_token_id, device=device)
    ids = check_ids(ids, vocab_size, device)
    mask = _infer_mask(ids, config) if attention_mask is None else _check_mask(attention_mask, ids)
    _check_padding(mask, inferred=attention_mask is None)
    copies = 1 if config.num_return_sequences is None else config.num_return_sequences
    if not isinstance(copies, int) or copies < 1:
        raise InputError(f"num_return_sequences must be a positive int, not {copies!r}")
    ids, lengths = ids.repeat_interleave(copies, dim=0), mask.sum(dim=1).repeat_interleave(copies)
    return Prompt(ids, lengths, int(lengths.max()))


def check_ids(ids: Tensor, vocab_size: int, device: torch.device) -> Tensor:
    """Token ids ``[rows, prompt]`` as int64. Raises `InputError` for what no model with this vocabulary can read."""
    if not isinstance(ids, Tensor):
        raise InputError(f"input_ids must be a tensor [rows, prompt], not {type(ids).__name__}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise InputError(f"input_ids must hold int64 or int32 token ids, not {ids.dtype}")
    if ids.ndim != 2 or 0 in ids.shape:
        raise InputError(f"input_ids must be [rows, prompt] with at least one row and token, not {list(ids.shape)}")
    _check_device("input_ids", ids, device)
    outside = ((ids < 0) | (ids >= vocab_size)).nonzero()
    if len(outside):
        row, column = outside[0].tolist()
        raise InputError(
            f"input_ids[{row}, {column}] is {int(ids[row, column])}, outside the vocabulary of {vocab_size} "
            "ids: does the tokenizer belong to this model?"
        )
    return ids.long()


def _infer_mask(ids: Tensor, config: GenerationConfig) -> Tensor:
    """True on tokens: all but `pad_token_id`, unless that also ends sequences."""
    eos = token_ids(config.eos_token_id, ids.device)
    if config.pad_token_id is None or (eos is not None and bool((eos == config.pad_token_id).any())):
        return torch.ones_like(ids, dtype=torch.bool)
    return ids.ne(config.pad_token_id)


def _check_mask(mask: Tensor, ids: Tensor) -> Tensor:
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        shown = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(f"attention_mask must have the shape of input_ids, {list(ids.shape)}, not {shown}")
    _check_device("attention_mask", mask, ids.device)
    if ((mask != 0) & (mask != 1)).any():
        raise InputError("attention_mask must be 1 on tokens and 0 on padding, and holds other values")
    return mask.bool()


def _check_padding(mask: Tensor, inferred: bool) -> None:
    """Refuses rows whose tokens are not one run that reaches the right end."""
    source = (
        "the mask inferred from pad_token_id (pass attention_mask to overrule it)" if inferred else "attention_mask"
    )
    empty = (~mask).all(dim=1).nonzero()
    if len(empty):
        raise InputError(f"row {int(empty[0])}: {source} hides the whole prompt")
    ragged = (mask[:, :-1] & ~mask[:, 1:]).any(dim=1).nonzero()
    if len(ragged):
        raise InputError(
            f"row {int(ragged[0])}: {source} hides tokens after the first visible one, but prompts are padded on the "
            "left only: set the tokenizer's padding_side to 'left'"
        )


def right_pad(
    ids: Tensor, mask: Tensor | None, vocab_size: int, max_positions: int | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Of rows that are padded anywhere: their tokens [rows], and columns [rows, T] in an order that has these first.

    Raises:
        InputError: ids `[rows, T]`, or a mask, that the model cannot read.
    """
    ids = check_ids(ids, vocab_size, device)
    if max_positions is not None and ids.shape[1] > max_positions:
        raise InputError(f"{ids.shape[1]} tokens are more than the model's {max_positions} positions")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if real.shape != ids.shape:
        raise InputError(f"attention_mask must be {list(ids.shape)} as input_ids, not {list(real.shape)}")
    return real.sum(1), real.int().argsort(dim=1, descending=True, stable=True)


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    here, there = tensor.device, device
    if here.type != there.type or (None not in (here.index, there.index) and here.index != there.index):
        raise InputError(f"{name} is on {here} and the model on {there}: move it with .to({str(there)!r})")


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask of prompts that differ in length, int64 [rows, T], 0 on the padding."""
    width = max(map(len, prompts))
    ids, mask = torch.zeros(2, len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask
