"""A `lethe serve` process on loopback, for tests."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai

ROOT = Path(__file__).parents[2]
SECONDS = 300.0  # for what should take a few: the machine may be busy
KEY = "sesame"


class Service:
    """A process that serves the reasoner."""

    def __init__(self, *options: str, program: Sequence[str] = ("-m", "lethe_compile", "serve")) -> None:
        command = [sys.executable, *program, "reasoner", "--port", "0", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "LETHE_API_KEY": KEY}
        environment["PYTHONPATH"] = str(ROOT)  # this checkout, also for a script in tools/
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/v1", line)
        assert found, f"{line!r}\n{''.join(self.log)}"
        self.port = int(found[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)

    def client(self) -> openai.OpenAI:
        """OpenAI's own, without its retries."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=SECONDS)

    def http(self, key: str | None = KEY) -> httpx.Client:
        """For what OpenAI's client would not send."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=SECONDS)

    def metrics(self) -> dict[str, float]:
        """Of `/metrics`, summed over replicas and other labels."""
        sums: dict[str, float] = {}
        for line in self.http().get("/metrics").text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.partition(" ") if "{" not in line else _labelled(line)
                sums[name] = sums.get(name, 0.0) + float(value)
        return sums

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(SECONDS)


def _labelled(line: str) -> tuple[str, str, str]:
    name, _, rest = line.partition("{")
    return name, "", rest.rpartition("} ")[2]


@contextmanager
def served(*options: str, program: Sequence[str] = ("-m", "lethe_compile", "serve")) -> Iterator[Service]:
    """Such a process, ended afterwards whatever happened."""
    service = Service(*options, program=program)
    try:
        yield service
    finally:
        if service.process.poll() is None:
            service.process.terminate()
            try:
                service.process.wait(60)
            except subprocess.TimeoutExpired:
                service.process.kill()
                service.process.wait()
