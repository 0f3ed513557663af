"""An offline batch of any size on an engine: `Engine.run`."""

from __future__ import annotations

import itertools
import queue
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from lethe_compile.serving.request import Completion, Request
from lethe_compile.serving.sampling import SamplingParams

Enter = Callable[[Sequence[int] | Tensor, SamplingParams], Request]


def completions(
    enter: Enter,
    prompts: Iterator[Any],
    shared: SamplingParams,
    *,
    ahead: int,
    ordered: bool,
    progress: bool,
    total: int | None,
) -> Iterator[Completion]:
    """Results of `prompts`, of which some come with parameters of their own, the others `shared`.

    Args:
        enter: submits one, however many wait.
        ahead: most requests under way.
    """
    from tqdm import tqdm

    begun: dict[Request, None] = {}  # in order
    ended: queue.SimpleQueue[Request] = queue.SimpleQueue()
    bar = tqdm(total=total, unit=" requests", disable=not progress)

    def refill() -> None:
        for one in itertools.islice(prompts, ahead - len(begun)):
            ids, own = one if isinstance(one, tuple) and isinstance(one[-1], SamplingParams) else (one, shared)
            request = enter(ids, own)
            begun[request] = None
            request.add_done_callback(ended.put)

    try:
        refill()
        while begun:
            request = next(iter(begun)) if ordered else ended.get()
            result = request.result()
            del begun[request]
            bar.update()
            refill()
            yield result
    finally:
        for request in begun:
            request.cancel()
        bar.close()
