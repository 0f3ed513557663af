"""AOTInductor packages on a CPU: loaded by torch alone, they write the model's own tokens."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lethe_compile.artifact import generate, open_artifact
from lethe_compile.artifact.manifest import load_manifest
from lethe_compile.models.tiny import tiny
from tests.exporters.onnx_case import check_equal, optimized

pytestmark = pytest.mark.slow

ALONE = """
import sys
sys.modules.update(dict.fromkeys(("lethe_compile", "transformers")))  # to import one of them fails
import json, torch
from pathlib import Path
folder = Path(sys.argv[1])
manifest = json.loads((folder / "manifest.json").read_text())
step = torch._inductor.aoti_load_package(str(folder / "step.pt2"))
prompt, new = json.loads(sys.argv[2]), int(sys.argv[3])
capacity, caches = len(prompt) + new, manifest["caches"]
state = []
for cache in caches:
    for dim in (cache["k_dim"], cache["v_dim"]):
        state.append(torch.zeros(1, cache["kv_heads"], capacity, dim))
slots = (len(caches), 1, capacity)
state += [torch.zeros(slots, dtype=torch.int32), torch.zeros(slots), torch.zeros(slots[:2], dtype=torch.int32)]
ids, start, tokens, decay = torch.tensor([prompt]), 0, [], torch.tensor([manifest["policy"]["decay"]])
for _ in range(new):
    positions = torch.arange(start, start + ids.shape[1])[None]
    lengths = torch.tensor([ids.shape[1]], dtype=torch.int32)
    logits, *state = step(ids, positions, lengths, decay, *state)
    start += ids.shape[1]
    ids = logits.argmax(-1, keepdim=True)
    tokens.append(int(ids))
print(tokens)
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aoti") / "llama"
    check_equal(optimized(tiny("llama")), folder, format="aoti")
    return folder


def test_a_process_without_us_runs_it(artifact: Path) -> None:
    prompt, new = [5, 6, 7, 8], 6
    command = [sys.executable, "-c", ALONE, str(artifact), str(prompt), str(new)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    whole = generate(open_artifact(artifact), [prompt], max_new_tokens=new, eos_token_id=[])
    assert ran.stdout.strip() == str(whole.new_ids[0])


def test_weights_are_written_once_and_outside_of_the_library(artifact: Path) -> None:
    parameters = load_manifest(artifact).model["parameters"]
    with zipfile.ZipFile(artifact / "step.pt2") as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        assert not any(name.endswith((".pkl", ".pt")) for name in sizes), "nothing in it is unpickled"
    blobs = [size for name, size in sizes.items() if name.endswith(".blob")]
    assert 4 * parameters <= sum(blobs) < 4.2 * parameters
