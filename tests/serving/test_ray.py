"""Replicas on Ray: a request outlives its replica."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from lethe_compile.errors import EngineBusyError, EngineClosedError, InputError
from lethe_compile.serving import RequestStats, SamplingParams
from lethe_compile.serving.ray_app import _joined, _RayStream
from lethe_compile.serving.ray_settings import RaySettings
from lethe_compile.serving.source import Chunk
from tests.serving.process import Service, served
from tests.serving.test_process import PROMPT, addresses, storm, wait_for

END = Chunk(finish_reason="length", stats=RequestStats())
LOST = ActorDiedError()


class Response:
    """Of a run that gives these items; raises those that are errors of Ray's."""

    def __init__(self, items: Sequence[Any]) -> None:
        self._items, self.cancelled = iter(items), False

    async def __anext__(self) -> Any:
        item = next(self._items)
        if isinstance(item, Exception) and not isinstance(item, (InputError, EngineClosedError)):
            raise item
        return item

    def cancel(self) -> None:
        self.cancelled = True


class Runs:
    """A source whose runs are given beforehand."""

    closing = False

    def __init__(self, *runs: Sequence[Any]) -> None:
        self._runs, self.retries = iter(runs), 0
        self.asked: list[tuple[list[int], int | None]] = []

    def run(self, ids: Sequence[int], params: SamplingParams) -> Response:
        self.asked.append((list(ids), params.max_new_tokens))
        return Response(next(self._runs))


def tokens(*runs: Sequence[Any]) -> tuple[list[int], Runs]:
    """What a reader of a request gets over these runs."""
    source = Runs(*runs)

    async def read() -> list[int]:
        stream = _RayStream(source, [1, 2], SamplingParams(max_new_tokens=9, seed=0))  # type: ignore[arg-type]
        await stream.start()
        return [token async for chunk in stream for token in chunk.tokens]

    return asyncio.run(read()), source


def test_a_lost_replica_is_not_seen() -> None:
    first = [None, Chunk((5, 6)), Chunk((7,)), LOST]
    second = [None, Chunk((5,)), Chunk((6, 7, 8)), Chunk((9,)), END]
    got, source = tokens(first, second)
    assert got == [5, 6, 7, 8, 9]
    assert source.asked == [([1, 2], 9)] * 2
    assert source.retries == 1


def test_lost_again_and_before_it_was_accepted() -> None:
    got, source = tokens([LOST], [None, Chunk((5, 6)), LOST], [None, Chunk((5,)), LOST], [None, Chunk((5, 6, 7)), END])
    assert got == [5, 6, 7]
    assert source.retries == 3


def test_a_run_that_chooses_otherwise_is_left_and_the_text_goes_on() -> None:
    first, second = [None, Chunk((5, 6)), LOST], [None, Chunk((5,)), Chunk((4, 7)), END]
    third = [None, Chunk((7,)), LOST]
    got, source = tokens(first, second, third, [None, Chunk((7, 8)), END])
    assert got == [5, 6, 7, 8]
    assert source.asked == [([1, 2], 9), ([1, 2], 9), ([1, 2, 5, 6], 7), ([1, 2, 5, 6], 7)]


def test_log_probabilities_are_those_of_their_tokens() -> None:
    source = Runs([None, Chunk((5,), ("five",)), LOST], [None, Chunk((5, 6), ("5", "six")), END])  # type: ignore[arg-type]

    async def read() -> list[Any]:
        stream = _RayStream(source, [1], SamplingParams(max_new_tokens=2))  # type: ignore[arg-type]
        await stream.start()
        return [figure async for chunk in stream for figure in chunk.logprobs]

    assert asyncio.run(read()) == ["five", "six"]


def test_what_another_replica_cannot_better_is_told() -> None:
    with pytest.raises(InputError, match="too long"):
        tokens([InputError("too long")])
    with pytest.raises(EngineBusyError):
        tokens([BackPressureError(num_queued_requests=3, max_queued_requests=2)])


def test_tries_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lethe_compile.serving.ray_app._TRIES", 2)
    with pytest.raises(EngineClosedError, match="2 replicas were lost"):
        tokens([LOST], [EngineClosedError("down")])


def test_chunks_are_joined_while_the_reader_is_busy() -> None:
    async def parts() -> AsyncIterator[Chunk]:
        for token in range(100):
            yield Chunk((token,))
        yield END

    async def read() -> list[Chunk]:
        got = []
        async for chunk in _joined(parts()):
            got.append(chunk)
            await asyncio.sleep(0.001)
        return got

    chunks = asyncio.run(read())
    assert [token for chunk in chunks for token in chunk.tokens] == list(range(100))
    assert len(chunks) < 50
    assert chunks[-1].finish_reason == "length"


def test_autoscaling_is_passed_through() -> None:
    options = RaySettings(min_replicas=1, max_replicas=4, target_requests=6).deployment_options()
    assert options["autoscaling_config"] == {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 6}
    assert RaySettings(min_replicas=2, max_replicas=2).deployment_options()["num_replicas"] == 2


def descendants(pid: int) -> set[int]:
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
        except OSError:
            continue
        found = re.search(r"^PPid:\s*(\d+)", text, re.MULTILINE)
        if found:
            children.setdefault(int(found[1]), []).append(int(status.parent.name))
    family, left = set[int](), [pid]
    while left:
        one = left.pop()
        family.add(one)
        left += children.get(one, [])
    return family


def replicas(service: Service) -> list[int]:
    """Processes of replicas."""
    family = descendants(service.process.pid)
    return [pid for pid in family if b"ServeReplica" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_replica_killed_under_load_loses_nothing() -> None:
    options = ("--ray", "--min-replicas", "2", "--replica-cpus", "0.5", "--max-batch", "8", "--max-queue", "200")
    with served(*options) as service:
        wait_for(lambda: len(replicas(service)) == 2)
        family = descendants(service.process.pid)
        assert addresses(family) <= {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}

        killed = threading.Timer(4.0, lambda: os.kill(replicas(service)[0], signal.SIGKILL))
        alone = service.client().completions.create(model="reasoner", prompt=PROMPT, max_tokens=150)
        streamed: list[str] = []

        def stream() -> None:
            events = service.client().completions.create(model="reasoner", prompt=PROMPT, max_tokens=150, stream=True)
            streamed.append("".join(event.choices[0].text for event in events))

        long = [threading.Thread(target=stream, daemon=True) for _ in range(4)]
        for thread in long:
            thread.start()
        killed.start()
        assert storm(service, 200, 16) == 200
        for thread in long:
            thread.join(300)
        assert streamed == [alone.choices[0].text] * 4
        assert service.metrics()["lethe_retries_total"] >= 1
        wait_for(lambda: len(replicas(service)) == 2)
        wait_for(lambda: service.metrics()["lethe_engine_max_batch"] == 16)
        assert storm(service, 20, 4) == 20
        assert service.stop() == 0
