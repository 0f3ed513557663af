"""`past_key_values` of an optimized model: the session that holds its paged cache, behind transformers' `Cache`."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.cache_utils import Cache

from lethe_compile.errors import InputError
from lethe_compile.prompt import check_ids, right_pad

if TYPE_CHECKING:
    from lethe_compile.past import Past
    from lethe_compile.runtime import OptimizedModel

_BEAMS = "beams would have to fork the pruned cache"
_ROLLBACK = "evicted tokens cannot come back"


class LetheCache(Cache):
    """One generation on the paged cache of an optimized model, from its prefill on.

    The keys and values stay in the model; this object says whose they are. It opens at its first forward. A model has
    one cache: whatever begins next, another session or `generate`, ends the one before, and so do an error, `reset`,
    and the end of this object's life. To go on with a session that ended is refused.

    Args:
        model: the optimized model.
        max_columns: most columns of the attention mask that it will reach, where that is known.
    """

    is_croppable = False
    _is_user_defined = False  # transformers sets it on a cache that the caller passed to `generate`

    def __init__(self, model: OptimizedModel, max_columns: int | None = None) -> None:
        super().__init__(layers=[])
        self._model, self._max_columns = model, max_columns
        self.ended_rows: Tensor | None = None  # [R] bool: rows that end by the loop's criteria, if it tells
        self._end: weakref.finalize[..., Any] | None = None
        self._clear()

    def _clear(self) -> None:
        self._mask = torch.zeros(
            0, 0, dtype=torch.bool
        )  # [R, columns]: which columns are tokens, as the caller sees it
        self._lengths = torch.zeros(0, dtype=torch.int64)  # [R] tokens appended
        self._retired = torch.zeros(0, dtype=torch.bool)  # [R] rows that were inactive once, and must stay so
        self._padded = False

    def __repr__(self) -> str:
        state = "open" if self.is_open else "empty" if not self.get_seq_length() else "ended"
        return f"LetheCache({state}, {self._mask.shape[0]} rows, {self.get_seq_length()} columns)"

    @property
    def is_open(self) -> bool:
        """Whether it holds the model's cache."""
        return self._end is not None and self._end.alive

    def append(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, whole: bool
    ) -> Tensor:
        """Append new tokens ``[R, T]``; logits float32 ``[R, T, vocab]``, of the first T tokens only if `whole`.

        `attention_mask` is ``[R, columns + T]``, 0 on padding; `position_ids` ``[R, T]``, where given, must be what the
        mask says. Without `whole`, the first call gives ``[R, 1, vocab]``: of each row's last token.

        Raises:
            InputError: what does not fit what was appended before, or to a session that ended.
        """
        columns = self.get_seq_length()
        if columns and not self.is_open:
            raise InputError(
                "this past_key_values belongs to a generation that ended when another began on the model (or by an "
                "error): it has one cache; begin again from the whole sequence, and pass use_cache=False for forwards "
                "beside a generation"
            )
        mask = self._full_mask(input_ids, attention_mask)
        try:
            if columns:
                logits = self._extend(input_ids, mask, position_ids)
            else:
                logits = self._prefill(input_ids, mask, position_ids, whole)
        except InputError:
            raise  # found before any work
        except BaseException:
            self.close()
            raise
        self._mask = mask
        return logits

    def adopt(self, past: Past, mask: Tensor) -> None:
        """Begin with what another cache holds; `mask` is ``[R, columns]``, 0 on padding, which must lie on the left."""
        self._model.adopt(past)
        self._hold()
        self._mask, self._padded = mask.bool(), not bool(mask.all())
        self._lengths, self._retired = past.lengths, torch.zeros_like(past.lengths, dtype=torch.bool)

    @property
    def mask(self) -> Tensor:
        """[R, columns] bool: which columns so far are tokens."""
        return self._mask

    @property
    def lengths(self) -> Tensor:
        """[R] int64: tokens so far, evicted ones included."""
        return self._lengths

    def _full_mask(self, ids: Tensor, given: Tensor | None) -> Tensor:
        columns = self.get_seq_length()
        rows, width = self._mask.shape[0], columns + ids.shape[-1]
        if columns and len(ids) != rows:
            raise InputError(f"input_ids has {len(ids)} rows, and past_key_values {rows}")
        if given is None:
            if self._padded:
                raise InputError(f"the prompt was padded: pass attention_mask with all {width} columns")
            return torch.ones(len(ids), width, dtype=torch.bool, device=ids.device)
        if not isinstance(given, Tensor) or given.shape != (len(ids), width):
            shown = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise InputError(
                f"attention_mask must be [{len(ids)}, {width}], the columns in past_key_values and the new ones, "
                f"not {shown}"
            )
        return given.to(ids.device).bool()

    # --------------------------------------------------------------------------------------------------------- prefill

    def _prefill(self, ids: Tensor, mask: Tensor, position_ids: Tensor | None, whole: bool) -> Tensor:
        model = self._model
        lengths, order = right_pad(ids, mask, model.vocab_size, model.max_positions, model.device)
        if bool((lengths == 0).any()):
            row = int((lengths == 0).nonzero()[0])
            raise InputError(f"row {row}: attention_mask hides all {ids.shape[1]} tokens of the first call")
        self._check({"position_ids must count each row's tokens from 0": _misplaced(position_ids, mask, 0 * lengths)})
        longest = int(lengths.max())
        order = order[:, :longest]
        new_tokens = None if self._max_columns is None else self._max_columns - ids.shape[1]
        model.begin(len(ids), lengths, new_tokens)
        self._hold()
        self._padded = not bool(mask.all())
        logits = model.prefill(ids.gather(1, order).long(), lengths, whole=whole)
        self._lengths, self._retired = lengths, torch.zeros_like(lengths, dtype=torch.bool)
        if not whole:
            return logits[:, None].clone()
        out = logits.new_zeros(*ids.shape, logits.shape[-1])
        return out.scatter_(1, order[:, :, None].expand_as(logits), logits)

    def _hold(self) -> None:
        """Make the model's generation this session's, to be ended by it, by its end of life, or by the next one."""
        model = self._model
        self._end = weakref.finalize(self, _end, model)
        self._end.atexit = False
        model.give_way = self._end

    # ------------------------------------------------------------------------------------------------------- extension

    def _extend(self, ids: Tensor, mask: Tensor, position_ids: Tensor | None) -> Tensor:
        """Further tokens, one decode step for each column, so that rounds come as they do in a generation."""
        new = mask[:, self.get_seq_length() :]
        if self.ended_rows is not None:
            new = new & ~self.ended_rows[:, None]
        ids = check_ids(ids.masked_fill(~new, 0), self._model.vocab_size, self._model.device)
        joined = torch.cat([~self._retired[:, None], new], dim=1)
        limit = self._model.max_positions
        self._check(
            {
                "attention_mask hides or shows other tokens than before: what was appended cannot be changed": (
                    mask[:, : self.get_seq_length()] != self._mask
                ),
                "attention_mask goes on with a row after padding: a row that ended cannot go on": (
                    joined[:, 1:] & ~joined[:, :-1]
                ),
                "position_ids must go on counting each row's tokens": _misplaced(position_ids, new, self._lengths),
                f"the model has {limit} positions, and the new tokens need more": (
                    (self._lengths + new.sum(1))[:, None] > (limit or torch.inf)
                ),
            }
        )
        logits = []
        for token, active in zip(ids.unbind(1), new.t().contiguous(), strict=True):
            # A copy, since the next step may overwrite them; those of rows that ended may be anything, NaN included.
            logits.append(self._model.decode(token, active).masked_fill(~active[:, None], 0.0))
            self._lengths = self._lengths + active
            self._retired = self._retired | ~active
        return torch.stack(logits, dim=1)

    def _check(self, wrong: dict[str, Tensor]) -> None:
        """Refuses where any of the conditions ``[R, …]`` holds, naming row and condition; waits for the device once."""
        found = torch.stack([condition.any(1) for condition in wrong.values()])  # [conditions, R]
        for reason, rows in zip(wrong, found.tolist(), strict=True):
            if True in rows:
                raise InputError(f"row {rows.index(True)}: {reason}")

    # ---------------------------------------------------------------------------------------- what transformers asks

    def close(self) -> None:
        """Give the model's cache back; what was appended cannot be continued."""
        if self._end is not None:
            self._end()

    def reset(self) -> None:
        """Close, and be as new: the next forward begins another sequence."""
        self.close()
        self._clear()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the attention mask so far, padding included; what is retained differs by layer and row."""
        return self._mask.shape[1]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1 if self._model.max_positions is None else self._model.max_positions

    def __len__(self) -> int:
        return len(self._model.sites)

    @property
    def batch_size(self) -> int:
        return self._mask.shape[0] or -1

    def update(self, *args: Any, **options: Any) -> NoReturn:
        raise InputError("past_key_values of an optimized model is written by its own forward only")

    def crop(self, *args: Any, **options: Any) -> NoReturn:
        raise InputError(f"past_key_values of an optimized model cannot be cropped: {_ROLLBACK}")

    def activate_past_recording(self) -> NoReturn:
        raise InputError(f"past_key_values of an optimized model cannot be rolled back: {_ROLLBACK}")

    def reorder_cache(self, beam_idx: Tensor) -> NoReturn:
        raise InputError(f"past_key_values of an optimized model cannot be reordered: {_BEAMS}")

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        raise InputError(f"past_key_values of an optimized model cannot be repeated: {_BEAMS}; repeat the prompts")

    def batch_select_indices(self, indices: Tensor) -> NoReturn:
        raise InputError(f"rows of an optimized model's past_key_values cannot be selected: {_BEAMS}")

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise InputError("past_key_values of an optimized model cannot be copied: it has one cache")

    def __copy__(self) -> NoReturn:
        self.__deepcopy__(None)


def _end(model: OptimizedModel) -> None:
    model.give_way = None
    model.end()


def _misplaced(position_ids: Tensor | None, new: Tensor, before: Tensor) -> Tensor:
    """Which new tokens ``[R, T]`` have other positions than the `before` ``[R]`` of their row and those among them."""
    if position_ids is None:
        return torch.zeros_like(new)
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, len(new)) or position_ids.shape[1] != new.shape[1]:
        raise InputError(f"position_ids must be {list(new.shape)} as input_ids, not {list(position_ids.shape)}")
    return (position_ids != before[:, None] + new.cumsum(1) - 1) & new


class EndedRows(StoppingCriteriaList):
    """The criteria of a transformers loop, which also tell the session which rows have ended.

    Such rows are then fed padding that no one reads. Where no criterion is an end-of-sequence id, the loop goes on with
    all rows until the last has ended, and so does the session.
    """

    def __init__(self, criteria: StoppingCriteriaList, session: LetheCache) -> None:
        super().__init__(criteria)
        self._session = session
        session.ended_rows = None

    def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
        done = super().__call__(input_ids, scores, **options)
        if any(hasattr(one, "eos_token_id") for one in self):
            before = self._session.ended_rows
            self._session.ended_rows = done if before is None else before | done
        return done
