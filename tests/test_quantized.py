"""Half-precision checkpoints and 8-bit linear layers: the optimized model computes what transformers' model does."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import lethe_compile as lethe
from lethe_compile import verify
from lethe_compile.models.tiny import tiny

IDS = torch.randint(3, 97, (2, 21), generator=torch.Generator().manual_seed(0))
GREEDY = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
HALVES = [torch.bfloat16, torch.float16]


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    out: Tensor = model(input_ids=ids).logits
    return out


def distance(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to what is expected."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def loaded(name: str, folder: Path, dtype: torch.dtype, **options: Any) -> Any:
    """A tiny model saved in float32, and loaded as a user loads one."""
    tiny(name, num_hidden_layers=2).save_pretrained(folder)
    options = {"attn_implementation": "eager", **options}  # sdpa would drop gemma2's softcap
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def expect_teacher_forced(model: Any, fast: lethe.OptimizedModel, tolerance: float, sequences: Tensor) -> None:
    """Logits of every step of a generation are those of `model` on the same tokens; tokens, where it is sure of them.

    Rounding decides between near ties, and greedy texts part there: so the model reads the tokens that `fast` chose.
    """
    out = fast.generate(sequences, return_dict_in_generate=True, output_logits=True, **GREEDY)
    expected = logits(model, out.sequences)[:, sequences.shape[1] - 1 : -1]
    assert distance(torch.stack(out.logits, 1), expected) < tolerance
    best = expected.float().topk(2).values
    sure = best[..., 0] - best[..., 1] > 2 * tolerance * expected.float().abs().amax()
    new = out.sequences[:, sequences.shape[1] :]
    assert torch.equal(new[sure], expected.argmax(-1)[sure])
    assert sure.float().mean() > 0.2, "some tokens must be told apart to prove anything"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.slow
def test_a_half_precision_checkpoint(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = loaded(name, tmp_path, dtype)
    fast = lethe.optimize(model, policy="full")
    assert fast(IDS).dtype == dtype and fast.report().dtype == str(dtype).removeprefix("torch.")
    assert {p.dtype for p in fast.parameters()} == {dtype}
    assert distance(fast(IDS), logits(model)) < 2e-2
    expect_teacher_forced(model, fast, 2e-2, IDS)
    assert fast.as_hf().dtype == dtype


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_half_precision_model_prunes(dtype: torch.dtype, tmp_path: Path) -> None:
    config = lethe.LetheConfig(sparse_ratio=1.5, decay=0.9, prune_threshold=20, prune_interval=5, protect_prompt=False)
    fast = lethe.optimize(loaded("llama", tmp_path, dtype), config)
    options = {**GREEDY, "max_new_tokens": 60}
    out = fast.generate(IDS, **options)
    assert all(min(layer) > 0 for layer in fast.cache_stats().rounds)
    assert torch.equal(fast.as_hf().generate(IDS, **options), out)


# -------------------------------------------------------------------------------------------------------------- torchao

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="quantises with torchao, which is not installed"
)
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="quantises with bitsandbytes, which is not installed"
)


def torchao(name: str, dtype: torch.dtype, scheme: str = "Int8WeightOnlyConfig") -> Any:
    from torchao import quantization

    model = tiny(name, dtype=dtype, num_hidden_layers=2)
    quantization.quantize_(model, getattr(quantization, scheme)())
    return model


def stored(model: nn.Module) -> set[int]:
    """Addresses of the tensors that hold a model's parameters, also of those inside tensor subclasses."""
    parts = [getattr(p, "__tensor_flatten__", lambda: ([], None))()[0] for p in model.parameters()]
    tensors = [[getattr(p, name) for name in names] or [p] for p, names in zip(model.parameters(), parts, strict=True)]
    return {tensor.data_ptr() for group in tensors for tensor in group}


@needs_torchao
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.slow
def test_torchao_int8_weights(name: str, dtype: torch.dtype) -> None:
    model = torchao(name, dtype)
    fast = lethe.optimize(model, policy="full")
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    assert distance(fast(IDS), logits(model)) < tolerance
    assert distance(fast(IDS), logits(tiny(name, dtype=dtype, num_hidden_layers=2))) > 5e-3, "it must be quantised"
    expect_teacher_forced(model, fast, tolerance, IDS)
    if dtype == torch.float32:
        assert torch.equal(fast.generate(IDS, **GREEDY), model.generate(IDS, **GREEDY))
    used = {str(node.target): node.meta["val"] for node in fast.graph_module.graph.nodes if node.op == "get_attr"}
    assert sum(value.dtype == torch.int8 for value in used.values()) >= 14, "weights stay 8 bits wide in the graph"
    assert {p.data_ptr() for p in fast.parameters() if p.numel()} <= stored(model), "and are the model's own"


@pytest.mark.slow
@needs_torchao
@pytest.mark.parametrize(
    "scheme", ["Int8DynamicActivationInt8WeightConfig", "IntxWeightOnlyConfig", "Float8WeightOnlyConfig"]
)
def test_other_schemes_of_torchao(scheme: str) -> None:
    """With quantised activations a last bit can become a whole step: verification allows for that, and for no more."""
    model = torchao("llama", torch.float32, scheme)
    fast = lethe.optimize(model, policy="full")
    assert verify._quantises_activations(fast) == ("Activation" in scheme)
    assert distance(fast(IDS), logits(model)) < 1e-4


@needs_torchao
@pytest.mark.slow
def test_a_checkpoint_quantised_while_it_loads(tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig

    model = loaded("llama", tmp_path, torch.bfloat16, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    fast = lethe.optimize(model, policy="full")
    assert distance(fast(IDS), logits(model)) < 2e-2
    expect_teacher_forced(model, fast, 2e-2, IDS)


@needs_torchao
def test_a_quantised_model_is_left_as_it_was() -> None:
    model = torchao("llama", torch.float32)
    before = [(name, parameter) for name, parameter in model.named_parameters()]
    kinds, expected = [type(module) for module in model.modules()], logits(model)
    lethe.optimize(model, verified=False)
    after = list(model.named_parameters())
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(one is other for (_, one), (_, other) in zip(after, before, strict=True))
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(logits(model), expected)
    model.model.layers[1].mlp.forward = lambda x: 1 / 0
    with pytest.raises(lethe.UnsupportedGraphError, match="ZeroDivisionError"):
        lethe.optimize(model)
    assert [type(module) for module in model.modules()] == kinds, "also where the capture fails"


@needs_torchao
def test_broken_scales_are_named() -> None:
    model = torchao("llama", torch.float32)
    model.model.layers[1].mlp.up_proj.weight.scale[3] = torch.inf
    with pytest.raises(lethe.InputError, match=r"layers\.1\.mlp\.up_proj\.weight\.scale holds NaN or infinity"):
        lethe.optimize(model)


def lora(model: Any) -> Any:
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    return wrapped.eval()


@needs_torchao
@pytest.mark.slow
def test_an_adapter_over_quantised_weights() -> None:
    model = torchao("llama", torch.float32)
    expected = logits(model)
    wrapped = lora(model)
    fast = lethe.optimize(wrapped, policy="full")
    assert distance(fast(IDS), logits(wrapped)) < 1e-4
    assert distance(fast(IDS), expected) > 1e-2, "the adapter must matter"


# --------------------------------------------------------------------------------------------------------- bitsandbytes


def bitsandbytes(name: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    options = {"load_in_8bit": True, "llm_int8_threshold": 0.0, **options}
    config = BitsAndBytesConfig(**options)
    return loaded(name, folder, dtype, quantization_config=config, device_map={"": "cpu"})


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama", torch.float32), ("llama", torch.float16), ("gemma2", torch.bfloat16), ("gpt2", torch.float32)],
    ids=str,
)
@pytest.mark.slow
def test_bitsandbytes_int8_layers(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """GPT-2's layers have biases."""
    model = bitsandbytes(name, tmp_path, dtype)
    fast = lethe.optimize(model, policy="full")
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 4e-2}[dtype]  # of 24, 11 and 8 bits
    assert distance(fast(IDS), logits(model)) < tolerance
    assert distance(fast(IDS), logits(loaded(name, tmp_path, dtype))) > 5e-3, "it must be quantised"
    assert sum(p.dtype == torch.int8 for p in fast.parameters()) >= 8, "weights stay 8 bits wide in the graph"
    assert {type(m).__name__ for m in model.modules()} >= {"Linear8bitLt"}, "the model keeps its layers"
    if dtype == torch.float32:
        assert torch.equal(fast.generate(IDS, **GREEDY), model.generate(IDS, **GREEDY))


@needs_bitsandbytes
@pytest.mark.slow
def test_bitsandbytes_before_and_after_the_first_forward(tmp_path: Path) -> None:
    """It moves weights and scales from the parameter to a state when it first runs."""
    model = bitsandbytes("llama", tmp_path)
    early = lethe.optimize(model, policy="full", verified=False)
    expected = logits(model)
    late = lethe.optimize(model, policy="full")
    assert distance(early(IDS), expected) < 1e-4 and torch.equal(early(IDS), late(IDS))


@needs_bitsandbytes
def test_an_adapter_over_bitsandbytes(tmp_path: Path) -> None:
    model = bitsandbytes("llama", tmp_path)
    expected, wrapped = logits(model), lora(model)
    fast = lethe.optimize(wrapped, policy="full")
    assert distance(fast(IDS), logits(wrapped)) < 1e-4 and distance(fast(IDS), expected) > 1e-2


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"llm_int8_threshold": 6.0}, r"columns above 6\.0.*a token's logits then depend on its batch"),
        ({"load_in_8bit": False, "load_in_4bit": True}, "bitsandbytes' Linear4bit cannot be captured"),
        ({"llm_int8_has_fp16_weight": True}, "quantises its weights at every call"),
    ],
    ids=["outliers", "4bit", "fp16_weights"],
)
def test_what_bitsandbytes_cannot_be_captured_is_refused(options: Any, reason: str, tmp_path: Path) -> None:
    model = bitsandbytes("llama", tmp_path, **options)
    with pytest.raises(lethe.UnsupportedGraphError, match=reason) as refused:
        lethe.optimize(model)
    assert refused.value.where == "model.layers.0.self_attn.q_proj"


# -------------------------------------------------------------------------------------------------------- verification


@needs_torchao
@pytest.mark.parametrize(
    ("scheme", "factor", "found"),
    [
        ("Int8WeightOnlyConfig", 1.01, True),
        ("Int8DynamicActivationInt8WeightConfig", 1.01, False),
        ("Int8DynamicActivationInt8WeightConfig", 1.1, True),
    ],
)
def test_verification_is_strict_but_for_quantised_activations(scheme: str, factor: float, found: bool) -> None:
    """The final norm is off by a factor, as after a wrong rewrite; a twin of the model is what it should compute."""
    model, twin = torchao("llama", torch.float32, scheme), torchao("llama", torch.float32, scheme)
    fast = lethe.optimize(model, policy="full", verified=False)
    with torch.no_grad():
        model.model.norm.weight.mul_(factor)
    with pytest.raises(lethe.UnsupportedGraphError, match="off by") if found else contextlib.nullcontext():
        verify.verify(lambda inputs: logits(twin, inputs["input_ids"]), fast)
