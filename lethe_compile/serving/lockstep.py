"""How the engines of several ranks take the same steps: one turn after another, as rank 0 says.

Requests are submitted on rank 0. Before each step it tells the others what is new, and then all run the same loop on
the same jobs. What a loop decides by is alike on all ranks, or is made so here:

- the clock, consumers, seeds, logits processors, stop strings and cancellations are rank 0's alone: tokens and ends are
  its word, on the device for tokens, in the next turn for what only its host knows;
- memory is the least of all ranks, and a reserve counts if it was granted on all of them;
- what a round keeps follows from scores of all heads. Where each KV head keeps tokens of its own, ranks hold unlike
  numbers of tokens, and every decision by these is made together.

Messages are small, between hosts, over gloo: a rank that waits for the next turn costs nothing, and a GPU is not waited
for. Where one rank fails, all end: it leaves word in the store that the processes met at, which each of them watches.
"""

from __future__ import annotations

import json
import pickle
import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from lethe_compile.distributed import TIMEOUT, Ranks
from lethe_compile.errors import LetheError

HEARTBEAT = 30.0  # seconds between two turns of an engine that has nothing to do; far less than gloo's patience
_POLL = 0.5  # seconds between two looks for word of a failure
assert TIMEOUT.total_seconds() > 4 * HEARTBEAT


@dataclass(frozen=True)
class Arrival:
    """A new job, as ranks other than 0 know it: how its tokens are chosen is rank 0's alone."""

    order: int
    prompt: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True)
class Turn:
    """What rank 0 tells before a step.

    Attributes:
        arrivals: new jobs.
        ending: orders of jobs that end before the step: cancelled, or ended by what only rank 0 knows.
        goes_on: False for the last one.
    """

    arrivals: tuple[Arrival, ...] = ()
    ending: tuple[int, ...] = ()
    goes_on: bool = True


class Alone:
    """One rank: its own word is everyone's; see `Lockstep`."""

    leads, alike, size = True, True, 1
    patience: float | None = None

    def everywhere(self, holds: bool) -> bool:
        """Whether it holds on every rank."""
        return holds

    def agreed(self, holds: bool) -> bool:
        """Whether it holds on every rank, of what follows from the tokens that caches hold."""
        return holds

    def fewest(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """The least of all ranks' values, one by one."""
        return values

    def from_first(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Rank 0's values of small integer or bool tensors on the device, which is not waited for."""
        return tensors

    def turn(self, turn: Turn | None, state: Sequence[int]) -> Turn:
        """Rank 0's turn, on every rank; the others give None. `state` sums up what must be alike.

        Raises:
            LetheError: it is not.
        """
        assert turn is not None
        return turn

    def watch(self, tell: Callable[[BaseException], object]) -> None:
        """Call `tell` in a thread of its own once another rank has failed, until `close`."""

    def fail(self, error: BaseException) -> BaseException:
        """Tell the others that this rank has failed; returns what has ended the engine: this, or what came before."""
        return error

    def abort(self, why: str) -> None:
        """Another rank has failed: these work together no more."""

    def close(self) -> None:
        """Watch no more, when the last turn is over; waits for the others, whose store may be this process's."""


class Lockstep(Alone):
    """This rank among several; made on all of them at the same place. One thread at a time, but for `fail`.

    Args:
        per_head: whether KV heads keep tokens of their own.

    Attributes:
        leads: whether this is rank 0.
        alike: whether caches hold the same numbers of tokens on all ranks.
        patience: seconds after which rank 0 takes a turn though there is nothing to do, so that the others know of it.
    """

    def __init__(self, ranks: Ranks, per_head: bool) -> None:
        self.ranks, self.size, self.leads, self.alike = ranks, ranks.size, ranks.rank == 0, not per_head
        self.patience = HEARTBEAT
        self._group = ranks.host_group()
        self._store = dist.distributed_c10d._get_default_store()
        self._key = f"lethe/{self._group.group_name}/failed"
        self._done = threading.Event()

    # ------------------------------------------------------------------------------------------------- each step

    def turn(self, turn: Turn | None, state: Sequence[int]) -> Turn:
        check = zlib.crc32(np.asarray(state, np.int64).tobytes())
        text = b"" if turn is None or turn == Turn() else pickle.dumps(turn)
        head = torch.tensor([len(text), check])
        dist.broadcast(head, group=self._group, group_src=0)
        size, first = head.tolist()
        if first != check:
            raise LetheError(
                f"rank {self.ranks.rank} is not where rank 0 is; the ranks have diverged, which is a"
                " defect of the engine. Start the processes anew"
            )
        if not size:
            return Turn()
        body = torch.frombuffer(bytearray(text or size), dtype=torch.uint8)  # the text, or room for it
        dist.broadcast(body, group=self._group, group_src=0)
        told: Turn = pickle.loads(body.numpy().tobytes())
        return told

    def everywhere(self, holds: bool) -> bool:
        return bool(self.fewest(np.array([holds], np.int64))[0])

    def agreed(self, holds: bool) -> bool:
        return holds if self.alike else self.everywhere(holds)

    def fewest(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        told = torch.from_numpy(values.copy())
        dist.all_reduce(told, dist.ReduceOp.MIN, group=self._group)
        found: NDArray[np.int64] = told.numpy()
        return found

    def from_first(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.ranks.from_first(*tensors)

    # -------------------------------------------------------------------------------------------------- failures

    def watch(self, tell: Callable[[BaseException], object]) -> None:
        def look() -> None:
            while not self._done.wait(_POLL):
                error = self._word()
                if error is not None and not self._done.is_set():
                    tell(error)
                    return

        threading.Thread(target=look, name="lethe-ranks", daemon=True).start()

    def fail(self, error: BaseException) -> BaseException:
        what = f"{type(error).__name__}: {error}"
        if isinstance(error, dist.DistError) or "gloo" in str(error):  # whoever failed with a word has left it by now
            what = f"it has lost another rank, whose process has ended or does not answer ({what})"
            error = self._failed(self.ranks.rank, what, error)
        try:
            rank, text = json.loads(self._store.compare_set(self._key, "", json.dumps([self.ranks.rank, what])))
        except RuntimeError:  # the store went with the process that kept it: nobody is left to be told
            rank, text = self.ranks.rank, what
        self._done.set()
        self.ranks.abort(f"rank {rank} failed: {text}")
        return error if rank == self.ranks.rank else self._failed(rank, text, error)

    def abort(self, why: str) -> None:
        self.ranks.abort(why)

    def _word(self) -> BaseException | None:
        """Of another rank's failure, None while there is none."""
        try:
            if not self._store.check([self._key]):
                return None
            rank, text = json.loads(self._store.get(self._key))
        except RuntimeError as error:
            return self._failed(0, "the store where the processes met is gone, and its process with it", error)
        return None if rank == self.ranks.rank else self._failed(rank, text, None)

    def _failed(self, rank: int, text: str, cause: BaseException | None) -> LetheError:
        error = LetheError(f"rank {rank} failed: {text}")
        error.__cause__ = cause
        return error

    def close(self) -> None:
        self._done.set()
        if self.ranks.broken is None:
            self.everywhere(True)


def lockstep_of(ranks: Ranks | None, per_head: bool) -> Alone:
    """What keeps an engine of these `ranks` in step."""
    return Alone() if ranks is None else Lockstep(ranks, per_head)
