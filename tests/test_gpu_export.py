"""AOTInductor packages with Triton kernels inside, on a GPU: tokens and speed beside the model in the process.

    python -m pytest tests/test_gpu_export.py -m gpu       # asserts
    python tests/test_gpu_export.py llama reasoner wide    # prints a line of JSON for each

A fresh process runs the packages by itself: it can import neither Lethe Compile nor transformers nor Triton. Another
runs them by `lethe_compile.artifact`, as `lethe run` does, without transformers and Triton.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # where it is run as a script

import lethe_compile as lethe
from lethe_compile.artifact.manifest import total_bytes
from lethe_compile.errors import LetheError
from lethe_compile.exporters.toolchain import check_compiler
from lethe_compile.models import reasoner
from lethe_compile.models.tiny import tiny
from lethe_compile.prompt import left_padded
from lethe_compile.runtime import OptimizedModel

ALONE = """
import sys
sys.modules.update(dict.fromkeys(("lethe_compile", "transformers", "triton")))  # to import one of them fails
import json, math, time, torch
from pathlib import Path
from safetensors.torch import load_file

folder, given = Path(sys.argv[1]), json.loads(sys.argv[2])
manifest = json.loads((folder / "manifest.json").read_text())
weights = load_file(folder / "weights.safetensors", device="cuda")
programs = {}
for name, program in manifest["programs"].items():
    file = str(folder / program["file"])
    package = programs[name] = torch._inductor.aoti_load_package(file, run_single_threaded=True)
    own = {one: weights.get(f"{name}:{one}", weights.get(one)) for one in package.get_constant_fqns()}
    if own:
        package.load_constants(own, check_full_update=True, user_managed=True)
prompts, new, interval = given["prompts"], given["new"], manifest["policy"]["interval"]
rows, page, count = len(prompts), manifest["model"]["page_size"], len(manifest["caches"])
lengths = torch.tensor([len(prompt) for prompt in prompts], device="cuda")
longest = int(lengths.max())
pages = -(-(longest + new) // page)
kinds = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int64": torch.int64}
dtype = kinds[manifest["model"]["dtype"]]
table = torch.arange(rows * pages, dtype=torch.int32, device="cuda").view(rows, pages)
caches = {}
for index, spec in enumerate(manifest["caches"]):
    shapes = {"k": (spec["kv_heads"], page, spec["k_dim"]), "v": (spec["kv_heads"], page, spec["v_dim"])}
    for kind, shape in shapes.items():
        caches[f"{kind}_{index}"] = torch.zeros(rows * pages, *shape, dtype=dtype, device="cuda")
    caches[f"position_{index}"] = torch.zeros(rows * pages, page, dtype=torch.int32, device="cuda")
    caches[f"mass_{index}"] = torch.zeros(rows * pages, page, device="cuda")
    caches[f"length_{index}"] = torch.zeros(rows, dtype=torch.int32, device="cuda")
caches = {name: caches[name] for name in manifest["programs"]["step"]["inputs"] if name in caches}
ids = torch.zeros(rows, longest, dtype=torch.int64, device="cuda")
for row, prompt in enumerate(prompts):
    ids[row, : len(prompt)] = torch.tensor(prompt)
active = torch.ones(rows, dtype=torch.bool, device="cuda")
one = torch.ones(rows, dtype=torch.int32, device="cuda")
tokens, at = torch.zeros(rows, dtype=torch.int64, device="cuda"), torch.zeros(rows, dtype=torch.int64, device="cuda")

def step():
    (logits,) = programs["decode"](tokens[:, None], at[:, None], one, table, *caches.values())
    at.add_(1)
    tokens.copy_(logits.argmax(1))

def prune(state):
    paged = [x if name.startswith("length") else x.unflatten(0, (rows, pages)) for name, x in caches.items()]
    results = programs["prune"](active, lengths, at, *state.values(), *paged)
    for cache, after in zip(caches.values(), results[len(state):]):
        cache.copy_(after.view_as(cache))
    return dict(zip(state, results))

graph = None
for run in range(2):  # the first one warms up, and captures
    for cache in caches.values():
        cache.zero_()
    state = {one_["name"]: torch.full((count, rows), math.nan if one_["initial"] is None else one_["initial"],
                                      dtype=kinds[one_["dtype"]], device="cuda") for one_ in manifest["state"]}
    torch.cuda.synchronize()
    start = time.perf_counter()
    positions = torch.arange(longest, device="cuda").repeat(rows, 1)
    (logits,) = programs["step"](ids, positions, lengths.int(), table, *caches.values())
    at.copy_(lengths)
    if "prune" in programs:
        state = prune(state)
    tokens.copy_(logits.argmax(1))
    history = torch.zeros(new, rows, dtype=torch.int64, device="cuda")
    history[0] = tokens
    if graph is None:
        saved = [x.clone() for x in (tokens, at, *caches.values())]
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for x, before in zip((tokens, at, *caches.values()), saved):
            x.copy_(before)
    until = interval
    for index in range(1, new):
        if until == 0:
            until = interval
            if "prune" in programs:
                state = prune(state)
        until -= 1
        graph.replay()
        history[index] = tokens
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
held = torch.stack([caches[f"length_{index}"] for index in range(count)])
print(json.dumps({"tokens": history.T.tolist(), "seconds": seconds, "retained": held.tolist()}))
"""

BY_RUNNER = """
import sys
sys.modules.update(dict.fromkeys(("transformers", "triton")))
import json, time
from lethe_compile.artifact import generate, open_artifact
given = json.loads(sys.argv[2])
start = time.perf_counter()
runner = open_artifact(sys.argv[1])
loading = time.perf_counter() - start
for run in range(2):
    start = time.perf_counter()
    result = generate(runner, given["prompts"], max_new_tokens=given["new"], eos_token_id=[])
    seconds = time.perf_counter() - start
print(json.dumps({"tokens": result.new_ids, "seconds": seconds, "loading": loading, "retained": result.retained,
                  "rounds": result.rounds}))
"""


def prepare_compiler() -> None:
    """CUDA's headers, ``libcuda.so``, a shared libstdc++, where only pip's packages, the driver, torch bring them."""
    if "CUDA_HOME" not in os.environ and not Path("/usr/local/cuda/include/cuda.h").is_file():
        for site in map(Path, sys.path):
            for header in sorted(site.glob("nvidia/*/include/cuda.h")):
                os.environ.setdefault("CUDA_HOME", str(header.parents[1]))
    folders = [
        Path(one) for one in ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/local/cuda/lib64/stubs", "/lib64")
    ]
    if not any((folder / "libcuda.so").exists() for folder in folders):
        links = Path(tempfile.mkdtemp())
        for library in (folder / "libcuda.so.1" for folder in folders):
            if library.exists() and not (links / "libcuda.so").exists():
                (links / "libcuda.so").symlink_to(library)
        os.environ["LIBRARY_PATH"] = f"{links}:{os.environ.get('LIBRARY_PATH', '')}"
    try:
        check_compiler()
    except LetheError:
        _link_the_library_of_torch()
        check_compiler()


def _link_the_library_of_torch() -> None:
    """Have the compiler link the libstdc++ that torch has loaded, by its path."""
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libstdc++.so.6" in line}
    assert len(loaded) == 1, loaded
    compiler = Path(tempfile.mkdtemp()) / "g++"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *-shared*) set -- "$@" -x none {loaded.pop()};; esac\nexec g++ "$@"\n'
    )
    compiler.chmod(0o755)
    torch._inductor.config.cpp.cxx = (str(compiler),)


def often(**settings: Any) -> lethe.LetheConfig:
    values = {"prune_interval": 16, "prune_threshold": 24, "sparse_ratio": 1.3, "segments": 8, "protect_prompt": False}
    return lethe.LetheConfig(**{**values, "recent_ratio": 0.3, **settings})


def model_of(case: str) -> tuple[OptimizedModel, list[list[int]], int]:
    """A model on the GPU, prompts of unequal length, and how many tokens to write."""
    draw = torch.Generator().manual_seed(5)
    if case == "reasoner":
        problems = reasoner.problems(4, seed=5, min_tokens=1000, max_tokens=1200)
        fast = lethe.optimize(reasoner.load_model().cuda(), lethe.LetheConfig(prune_interval=16), verified=False)
        return fast, [problems.prompt(index) for index in range(4)], 500
    if case == "llama":
        fast = lethe.optimize(tiny("llama").cuda(), often(), verified=False)
        lengths = (17, 5, 11)
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=4, num_attention_heads=32,
            num_key_value_heads=8, head_dim=128, vocab_size=32000, max_position_embeddings=32768,
        )  # fmt: skip
        with torch.device("cuda"):
            torch.manual_seed(0)
            model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
        fast = lethe.optimize(model, lethe.LetheConfig(max_tokens=1024), verified=False)
        lengths = (900, 1000, 700, 1024) * 4
    prompts = [torch.randint(3, fast.vocab_size - 1, (length,), generator=draw).tolist() for length in lengths]
    return fast, prompts, 200 if case == "llama" else 512


def in_process(fast: OptimizedModel, prompts: list[list[int]], new: int) -> tuple[list[list[int]], float]:
    """New tokens of the compiled model, and the seconds of its second run."""
    inputs, options = _batch(prompts, new)
    width, seconds = inputs["input_ids"].shape[1], 0.0
    for _ in range(2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        out = fast.generate(**inputs, **options)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return out[:, width:].tolist(), seconds


def _batch(prompts: list[list[int]], new: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Left-padded prompts, and options of a greedy `generate`."""
    ids, mask = left_padded(prompts)
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return {"input_ids": ids.cuda(), "attention_mask": mask.cuda()}, options


def fresh(code: str, folder: Path, prompts: list[list[int]], new: int) -> dict[str, Any]:
    """What a fresh process makes of an artifact."""
    command = [sys.executable, "-c", code, str(folder), json.dumps({"prompts": prompts, "new": new})]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400, env=environment)
    assert ran.returncode == 0, ran.stderr[-6000:]
    result: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
    return result


def measured(case: str, folder: Path) -> dict[str, Any]:
    """Export one case, run it everywhere; what came of it."""
    torch.set_float32_matmul_precision("highest")
    prepare_compiler()
    fast, prompts, new = model_of(case)
    expected, _ = in_process(fast, prompts, new)
    retained = fast.cache_stats().retained
    start = time.perf_counter()
    manifest = lethe.export(fast, folder, format="aoti", progress=lambda text: print(text, file=sys.stderr))
    exporting = time.perf_counter() - start
    found, ours = [], []
    for code in (ALONE, BY_RUNNER):  # the card's clocks drift: ours is timed around each
        ours.append(in_process(fast, prompts, new)[1])
        found.append(fresh(code, folder, prompts, new))
        ours.append(in_process(fast, prompts, new)[1])
    alone, runner = found
    seconds, written = statistics.median(ours), len(prompts) * new
    first = [_first_difference(expected, one["tokens"]) for one in found]
    return {
        "case": case,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "rows": len(prompts),
        "tokens": new,
        "equal": {"alone": first[0] is None, "runner": first[1] is None, "first_difference": first},
        "ties": [_ties(fast, prompts, expected, one["tokens"]) for one in found],
        "retained_equal": runner["retained"] == retained,
        "rounds": runner["rounds"],
        "tok_s": {
            "in_process": written / seconds,
            "alone": written / alone["seconds"],
            "runner": written / runner["seconds"],
        },
        "ratio": {"alone": seconds / alone["seconds"], "runner": seconds / runner["seconds"]},
        "seconds": {"export": exporting, "load": runner["loading"]},
        "bytes": {"all": total_bytes(manifest), "weights": manifest.files["weights.safetensors"]["bytes"]},
        "parameters": manifest.model["parameters"],
    }


def _first_difference(expected: list[list[int]], got: list[list[int]]) -> int | None:
    """The first step at which a row differs."""
    steps = [
        next((at for at, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
        for one, other in zip(expected, got, strict=True)
    ]
    return min((step for step in steps if step is not None), default=None)


def _ties(
    fast: OptimizedModel, prompts: list[list[int]], expected: list[list[int]], got: list[list[int]]
) -> dict[str, float] | None:
    """By how much the model prefers its own token where a row first differs: the most of all rows and their median,
    beside the spread of the logits there. None where no row differs.
    """
    first = [_first_difference([one], [other]) for one, other in zip(expected, got, strict=True)]
    if first == [None] * len(first):
        return None
    inputs, options = _batch(prompts, 1 + max(at for at in first if at is not None))
    out: Any = fast.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    margins, spreads = [], []
    for row, at in enumerate(first):
        if at is not None:
            logits = out.logits[at][row].float()
            assert int(logits.argmax()) == expected[row][at], "the model repeats itself"
            margins.append(float(logits[expected[row][at]] - logits[got[row][at]]))
            spreads.append(float(logits.std()))
    return {"most": max(margins), "median": statistics.median(margins), "spread": statistics.median(spreads)}


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["llama", "reasoner"])
def test_packages_write_the_tokens_of_the_model(case: str, tmp_path: Path) -> None:
    result = measured(case, tmp_path / case)
    print(json.dumps(result))
    assert result["equal"]["alone"] and result["equal"]["runner"], result
    assert result["retained_equal"] and result["rounds"] >= 5
    assert result["bytes"]["weights"] < 1.05 * 4 * result["parameters"] + 65536, "weights are there once"


if __name__ == "__main__":
    for name in sys.argv[1:] or ["llama", "reasoner", "wide"]:
        with tempfile.TemporaryDirectory() as temporary:
            print(json.dumps(measured(name, Path(temporary) / name)), flush=True)
