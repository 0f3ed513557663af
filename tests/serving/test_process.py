"""`lethe serve` as a process: what it prints, where it listens, how it ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import openai
import pytest

from lethe_compile.errors import InputError
from lethe_compile.tools import serve
from tests.serving.process import SECONDS, Service, served

PROMPT = "loop n3 n5 e3 let k1 +8 k2 +1"


def addresses(pids: set[int]) -> set[str]:
    """Hex addresses that sockets of these processes listen on, from /proc."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(link)
            except OSError:
                continue
            inodes.add(target.removeprefix("socket:[").rstrip("]"))
    rows = [line.split() for kind in ("tcp", "tcp6") for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


@pytest.mark.slow
def test_it_serves_on_loopback_and_drains() -> None:
    with served("--max-batch", "2", "--drain-timeout", "60") as service:
        client = service.client()
        assert [model.id for model in client.models.list()] == ["reasoner"]
        assert service.http(key=None).get("/v1/models").status_code == 401
        assert addresses({service.process.pid}) == {"0100007F"}

        stream = client.completions.create(
            model="reasoner", prompt=PROMPT, max_tokens=60, stream=True, extra_body={"ignore_eos": True}
        )
        events = iter(stream)
        text = next(events).choices[0].text
        service.process.send_signal(signal.SIGTERM)
        wait_for(lambda: service.http(key=None).get("/health").status_code == 503)
        with pytest.raises(openai.APIStatusError) as refused:
            client.completions.create(model="reasoner", prompt=PROMPT)
        assert refused.value.status_code == 503
        assert "retry-after" in refused.value.response.headers
        last = None
        for event in events:
            text, last = text + event.choices[0].text, event.choices[0].finish_reason
        assert last == "length"
        assert len(text.split()) == 60
        assert service.process.wait(SECONDS) == 0
        assert not any("Traceback" in line for line in service.log)


@pytest.mark.slow
def test_what_is_not_done_in_time_is_told_so() -> None:
    with served("--drain-timeout", "1") as service:
        stream = service.client().completions.create(
            model="reasoner", prompt=PROMPT, max_tokens=8000, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        service.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="closed before the text was complete"):
            list(stream)
        assert service.process.wait(SECONDS) == 0


def wait_for(condition: object) -> None:
    assert callable(condition)
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "nothing came of it"
        time.sleep(0.05)


def test_replicas_of_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.setenv(name, "2")
    with pytest.raises(InputError, match="--ray and without torchrun, or with torchrun and without --ray"):
        serve.main(["reasoner", "--ray"])


@pytest.mark.slow
def test_two_ranks_serve_and_drain() -> None:
    """torchrun sends SIGTERM to both, while rank 0 has a text to finish."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "tools/serve.py")
    with served("--max-batch", "4", program=torchrun) as service:
        client = service.client()
        options = {"model": "reasoner", "prompt": PROMPT, "extra_body": {"ignore_eos": True}}
        whole = client.completions.create(**options, max_tokens=200, temperature=0).choices[0].text
        again = client.completions.create(**options, max_tokens=200, temperature=0, stream=True)
        assert "".join(event.choices[0].text for event in again) == whole
        assert storm(service, 24, 6) == 24

        events = iter(client.completions.create(**options, max_tokens=200, temperature=0, stream=True))
        text = next(events).choices[0].text
        service.process.send_signal(signal.SIGTERM)
        wait_for(lambda: service.http(key=None).get("/health").status_code == 503)
        for event in events:
            text += event.choices[0].text
        assert text == whole
        service.process.wait(60)
        log = "".join(service.log)
        assert "lethe serve: error" not in log and log.count("loading reasoner") == 1
        assert log.count("finishing 1 calls") == 1


def test_an_address_that_is_taken_is_refused_before_the_model_is_loaded() -> None:
    from lethe_compile.serving.server import listen

    with listen("127.0.0.1", 0) as taken, pytest.raises(InputError, match="cannot listen on"):
        serve.main(["reasoner", "--port", str(taken.getsockname()[1])])


@pytest.mark.parametrize(
    "argv", [["--min-replicas", "3", "--max-replicas", "2"], ["--max-batch", "0"], ["--kv-memory", "much"]]
)
def test_bad_options_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        serve.main(["reasoner", *argv])
    assert argv[-2] in capsys.readouterr().err


@pytest.mark.slow
def test_several_hundred_requests() -> None:
    """Mixed lengths, streams and leavers; all end, and nothing is left."""
    with served("--max-batch", "16", "--max-queue", "400") as service:
        ended = storm(service, 300, 24)
        assert ended == 300
        wait_for(lambda: service.metrics()["lethe_engine_pages_used"] == 0)
        figures = service.metrics()
        assert figures["lethe_engine_running"] == figures["lethe_engine_queued"] == 0
        assert figures["lethe_engine_failed_total"] == 0


def storm(service: Service, calls: int, threads: int) -> int:
    """So many calls from so many threads; how many ended right: greedy texts of the same prompt are the same."""
    client, texts, lock = service.client(), dict[int, str](), threading.Lock()
    counter, right = iter(range(calls)), [0]

    def work() -> None:
        while True:
            with lock:
                index = next(counter, None)
            if index is None:
                return
            new = 3 + index % 5
            options = {"model": "reasoner", "prompt": f"{PROMPT} +{index % 4}", "max_tokens": new}
            if index % 2:
                text = client.completions.create(**options).choices[0].text
            else:
                text = "".join(event.choices[0].text for event in client.completions.create(**options, stream=True))
            with lock:
                known = texts.setdefault(index % 4 * 10 + new, text)
                right[0] += text == known and len(text.split()) == new

    workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(SECONDS)
    return right[0]
