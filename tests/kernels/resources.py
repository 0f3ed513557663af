"""Compile a Triton kernel for Hopper without a GPU, and read from the binary what it takes."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SM_90 = GPUTarget("cuda", 90, 32)
_TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Resources:
    """Of one kernel: registers a thread, bytes of shared memory a block, bytes spilled a thread."""

    registers: int
    shared: int
    spilled: int


def resources(
    kernel: Any,
    arguments: Mapping[str, Any],
    tmp_path: Path,
    *,
    aligned: bool = True,
    multiples: Collection[str] = (),
    num_warps: int = 4,
    num_stages: int = 3,
    maxnreg: int | None = None,
) -> Resources:
    """Compile `kernel` for sm_90.

    Args:
        kernel: a `triton.jit` function; the process must not have set TRITON_INTERPRET.
        arguments: by parameter name: Triton's name of its type ("*fp32", "i32"), or a value if it is a constexpr.
        tmp_path: where the binary goes.
        aligned: pointers are multiples of 16 bytes, as those of tensors are.
        multiples: names of integers that are multiples of 16, as strides are, which Triton sees when it launches.
        num_warps, num_stages, maxnreg: as the launch gives them.
    """
    constant = {p.name for p in kernel.params if p.is_constexpr}
    names = [p.name for p in kernel.params]
    assert set(arguments) == set(names), f"arguments differ: {set(arguments) ^ set(names)}"
    signature = {name: "constexpr" if name in constant else arguments[name] for name in names}
    constants = {(names.index(name),): arguments[name] for name in names if name in constant}
    pointers = [at for at, name in enumerate(names) if str(signature[name]).startswith("*")]
    known = [names.index(name) for name in multiples] + (pointers if aligned else [])
    attributes = {(at,): [["tt.divisibility", 16]] for at in known}
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
    compiled = triton.compile(source, target=SM_90, options=options)
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    shown = subprocess.run(
        [_TOOL, "--dump-resource-usage", binary], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", shown)}
    return Resources(used["REG"], compiled.metadata.shared, used["STACK"] + used["LOCAL"])
