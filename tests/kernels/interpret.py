"""Run a test file's Triton kernels through the interpreter, on a CPU.

Triton reads TRITON_INTERPRET when a kernel is defined, so that the tests need a process of their own. In a test file:

    @pytest.mark.interpreted
    def test_my_kernel() -> None: ...  # calls kernels on CPU tensors; small shapes, the interpreter is slow

    def test_through_the_interpreter() -> None:
        run_interpreted(__file__)  # one process for all marked tests of this file

Marked tests are not collected otherwise; `TRITON_INTERPRET=1 python -m pytest FILE -m interpreted` runs them by hand,
those that are marked slow as well.
The interpreter hides races between threads, and computes `tl.dot` of bfloat16 wrong.
"""

from __future__ import annotations

import os
import subprocess
import sys


def run_interpreted(file: str, timeout: float = 540) -> None:
    """Fails, with pytest's output, unless at least one test of `file` is marked `interpreted`, and all such pass."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_XDIST", "COV_"))}
    environment["TRITON_INTERPRET"] = "1"
    command = [
        sys.executable,
        "-m",
        "pytest",
        file,
        "-m",
        "interpreted and not slow",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}{done.stderr[-2000:]}"
