"""A checkpoint that no rank loads as a whole: the tokens of one process, parts alone read, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lethe_compile as lethe
from lethe_compile import distributed
from lethe_compile.checkpoint import load_parts, read_parts
from lethe_compile.checkpoint.stored import Joined, Stacked, Stored, fingerprint, open_files, runs_of, whole
from lethe_compile.errors import ConfigError, InputError, LetheError, WholeOnlyError
from lethe_compile.models.tiny import tiny
from lethe_compile.passes.absent import absent, is_absent
from lethe_compile.passes.placement import Placement
from tests.ranks import run_ranks

CONFIG = lethe.LetheConfig(sparse_ratio=5.0, prune_threshold=16, prune_interval=4, page_size=4)
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 40}


def prompts() -> Tensor:
    return torch.randint(3, 97, (2, 23), generator=torch.Generator().manual_seed(3))


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """A tiny model in several files."""
    tiny(name, **overrides).to(dtype).save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def whole_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


class Reads:
    """How many numbers each tensor of the files gave at once at most, and in all."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.most, self.all = Counter[str](), Counter[str]()
        read = Stored.read

        def counting(stored: Stored, dim: int, index: Any) -> Tensor:
            part = read(stored, dim, index)
            self.most[stored.key] = max(self.most[stored.key], part.numel())
            self.all[stored.key] += part.numel()
            return part

        patch.setattr(Stored, "read", counting)


def by_parts(folders: list[Path]) -> dict[str, Any]:
    """What each of several checkpoints writes, and what was read of it."""
    mesh, found = distributed.init(), dict[str, Any]()
    for folder in folders:
        with pytest.MonkeyPatch.context() as patch:
            reads = Reads(patch)
            model, fetch = load_parts(folder, mesh)
            fast = lethe.optimize(model, CONFIG, tp=mesh, fetch=fetch)
        found[folder.name] = {
            "tokens": fast.generate(prompts(), **GREEDY).tolist(),
            "most": reads.most,
            "all": reads.all,
            "end": model.generation_config.eos_token_id,
            "bytes": sum({p.data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}.values()),
            "stacked": sum(p.nbytes for p in model.parameters() if p.dim() == 3),
        }
    return found


def together(folder: Path, other: Path) -> dict[str, Any]:
    found, mesh = by_parts([folder]), distributed.init()
    rank = mesh.get_local_rank()
    model, _ = load_parts(folder, mesh)
    for what, work in {
        "other": lambda: load_parts([folder, other][rank], mesh),
        "one fails": lambda: load_parts([folder, folder / "nowhere"][rank], mesh),
        "no fetch": lambda: lethe.optimize(model, CONFIG, tp=mesh),
        "alone": lambda: lethe.optimize(model, CONFIG),
    }.items():
        with pytest.raises(LetheError) as caught:
            work()
        found[what] = (type(caught.value), str(caught.value))
    return found


def check(folder: Path, found: dict[str, Any], split: tuple[str, ...], tied: bool) -> None:
    """Both ranks wrote what the whole model does, and neither read more than its half of the split weights."""
    fast = lethe.optimize(whole_model(folder), CONFIG, verified=False)
    assert found["tokens"] == fast.generate(prompts(), **GREEDY).tolist()
    shapes = {key: one.shape for key, one in open_files(sorted(folder.glob("*.safetensors"))).items()}
    for key, (rows, *columns) in shapes.items():
        if any(part in key for part in split):
            half = -(-rows // 2) * prod(columns)  # of 97 tokens one is computed twice
            proved = 2 * half if ".experts." in key else 0  # read as a whole once, by a proof
            assert found["most"][key] == max(half, proved) and found["all"][key] == half + proved, key
    assert ("lm_head.weight" in shapes) != tied
    assert found["bytes"] < (4 * 100 if found["stacked"] == 0 else found["stacked"] / 2), "stacks share one matrix"


SPLIT = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


@pytest.mark.slow
def test_two_processes_read_half_each(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path / "llama", num_hidden_layers=1)
    settings = folder / "generation_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token_id": 31}))
    other = shutil.copytree(folder, tmp_path / "other")
    file = sorted(other.glob("*.safetensors"))[0]
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    first, second = run_ranks(together, tmp_path, folder, other)
    for found in (first, second):
        assert not isinstance(found, Exception), found
        check(folder, found["llama"], SPLIT, tied=False)
        assert found["llama"]["end"] == 31
        assert found["other"][0] is ConfigError and "differ in the checkpoint" in found["other"][1]
        for what in ("no fetch", "alone"):
            assert found[what][0] is InputError and "is to be fetched by part" in found[what][1]
    assert first["one fails"][0] is LetheError and "rank 1 failed to read the checkpoint" in first["one fails"][1]
    assert second["one fails"][0] is InputError and "nowhere" in second["one fails"][1]


def by_another(folder: Path) -> str:
    mesh = distributed.init()
    with pytest.raises(InputError) as caught:
        lethe.optimize(load_parts(folder, mesh)[0], CONFIG, tp=mesh, fetch=load_parts(folder, mesh)[1])
    return str(caught.value)


@pytest.mark.slow
def test_the_fetch_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path / "llama", num_hidden_layers=1)
    assert all("is no weight of the model" in told for told in run_ranks(by_another, tmp_path, folder))


ARCHITECTURES = ("gemma2", "mixtral", "gpt2", "deepseek_v3", "gpt_oss", "phi3", "bloom", "qwen3_moe", "falcon")
TIED = ("gemma2", "gpt2", "bloom", "falcon")


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str, tmp_path: Path) -> None:
    """Experts in tensors of their own, fused weights, latents that are proved with their numbers."""
    folder = saved(name, tmp_path / name)
    for found in run_ranks(by_parts, tmp_path, [folder]):
        assert not isinstance(found, Exception), found
        check(folder, found[name], (".experts.",) if name in ("mixtral", "qwen3_moe") else (), tied=name in TIED)


# --------------------------------------------------------------------------------------------- in one process


def read(folder: Path, dtype: str = "auto") -> Any:
    from lethe_compile.checkpoint import _described

    return read_parts(*_described(str(folder)), dtype, torch.device("cpu"))


def test_weights_and_buffers_are_those_of_from_pretrained(tmp_path: Path) -> None:
    folder = saved("mixtral", tmp_path, torch.bfloat16)
    right, (model, fetch) = whole_model(folder), read(folder)
    buffers, expected = dict(model.named_buffers()), dict(right.named_buffers())
    assert buffers.keys() == expected.keys() and "model.rotary_emb.inv_freq" in buffers
    for name, buffer in expected.items():
        assert buffers[name].dtype == buffer.dtype and torch.equal(buffers[name], buffer)
    for name, weight in right.named_parameters():
        mine = model.get_parameter(name)
        assert mine.dtype == weight.dtype == torch.bfloat16
        for dim, size in enumerate(weight.shape):
            placement = Placement(dim, size, (tuple(range(0, size, 2)), tuple(range(size // 2, size))))
            for rank in (0, 1):
                part = fetch(name, mine, placement, rank)
                assert torch.equal(part, placement.cut(weight.detach(), rank))
                assert part.untyped_storage().nbytes() == part.nbytes, "no view of the file"
    assert read(folder, "float32")[0].get_parameter("lm_head.weight").dtype == torch.float32


def test_ties_are_those_of_from_pretrained(tmp_path: Path) -> None:
    """A checkpoint that holds a tied weight twice is tied if both are alike."""
    model = tiny("gemma2")
    for name, changed in (("alike", 0.0), ("other", 1.0)):
        state = {key: value.clone() for key, value in model.state_dict().items()}
        state["lm_head.weight"] += changed
        (tmp_path / name).mkdir()
        model.config.save_pretrained(tmp_path / name)
        save_file(state, tmp_path / name / "model.safetensors", {"format": "pt"})
        right, (mine, _) = whole_model(tmp_path / name), read(tmp_path / name)
        for one in (right, mine):
            assert (one.lm_head.weight is one.model.embed_tokens.weight) != bool(changed)


def rewritten(folder: Path, change: Any) -> Path:
    """The checkpoint in one file, with other tensors."""
    tensors = {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


KEY = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop(KEY), f"has no weight {KEY}"),
        (lambda t: t.update({KEY: t[KEY][:-1].clone()}), f"{KEY} is .* in the checkpoint, .* by its configuration"),
        (lambda t: t[KEY].fill_(float("nan")), f"{KEY} holds NaN"),
    ],
)
def test_broken_checkpoints_are_refused(change: Any, text: str, tmp_path: Path) -> None:
    folder = rewritten(saved("llama", tmp_path, num_hidden_layers=1), change)

    def read_and_fetch() -> None:
        model, fetch = read(folder)
        fetch(KEY, model.get_parameter(KEY), Placement.blocks(0, 64, 2), 1)

    with pytest.raises(InputError, match=text) as caught:
        read_and_fetch()
    assert not isinstance(caught.value, WholeOnlyError)


def test_what_cannot_be_read_by_part_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import core_model_loading

    folder = saved("mixtral", tmp_path / "mixtral")
    with monkeypatch.context() as patch:
        patch.setattr(core_model_loading, "Concatenate", type("Other", (), {}))
        with pytest.raises(WholeOnlyError, match=r"tensors to .*gate_up_proj, which takes them whole: .*Concatenate"):
            read(folder)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(WholeOnlyError, match="is quantised"):
        read(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(WholeOnlyError, match="holds an adapter"):
        read(folder)
    model = tiny("llama", num_hidden_layers=1)
    model.config.save_pretrained(tmp_path / "bin")
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    with pytest.raises(WholeOnlyError, match="has no safetensors weights"):
        read(tmp_path / "bin")
    rewritten(folder, lambda t: t.pop("model.layers.0.block_sparse_moe.experts.1.w3.weight"))
    for file in ("config.json", "adapter_config.json"):
        (folder / file).unlink()
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match="do not fit together"):
        read(folder)
    with pytest.raises(InputError, match="no model can be loaded from"):
        read(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"dtype=torch\.int8 is not allowed"):
        read(saved("llama", tmp_path / "llama", num_hidden_layers=1), "int8")
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(InputError, match=r"bad\.safetensors is no readable safetensors file"):
        open_files([tmp_path / "bad.safetensors"])


def test_parts_of_stored_tensors(tmp_path: Path) -> None:
    tensors = {name: torch.randn(5, 300, 4) for name in "abc"} | {"one": torch.tensor(3.0)}
    save_file(tensors, tmp_path / "t.safetensors")
    stored = open_files([tmp_path / "t.safetensors"])
    abc = [stored[name] for name in "abc"]
    stacked, joined = Stacked(tuple(abc), 1), Joined(tuple(abc), 1)
    assert whole(stored["one"]) == 3.0 and list(runs_of((1, 2, 5))) == [(1, 3), (5, 6)]
    sources = {stored["a"]: tensors["a"], stacked: torch.stack([tensors[n] for n in "abc"], 1)}
    for source, right in {**sources, joined: torch.cat([tensors[n] for n in "abc"], 1)}.items():
        assert source.shape == right.shape
        for dim, size in enumerate(right.shape):
            for index in (range(size), (size - 1,), tuple(range(0, size, 2)), tuple(range(size // 3, size))):
                assert torch.equal(source.read(dim, index), right.index_select(dim, torch.tensor(index)))
    before = fingerprint([tmp_path / "t.safetensors"])
    save_file({**tensors, "b": tensors["b"] + 1}, tmp_path / "t.safetensors")
    assert fingerprint([tmp_path / "t.safetensors"]) != before


@pytest.mark.parametrize("shape", [(3,), (1, 5), (4, 3), (1, 4, 3), (2, 4, 3), (5, 1, 3), (1, 2, 4, 3), (1, 1)])
def test_absent_weights_are_told_from_those_that_are_there(shape: tuple[int, ...]) -> None:
    weight = torch.nn.Parameter(absent(shape, torch.float32, "cpu", {}))
    assert weight.shape == shape and is_absent(weight) == (prod(shape) > 1)
    assert not is_absent(torch.nn.Parameter(torch.zeros(shape))) and not is_absent(weight.detach())
