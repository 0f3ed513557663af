"""Models wrapped by PEFT: their adapters are compiled in, merged or not, and what cannot be is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

import lethe_compile as lethe
from lethe_compile.models.plain_decoder import PlainDecoder, plain
from lethe_compile.models.tiny import tiny

IDS = torch.randint(3, 97, (2, 13), generator=torch.Generator().manual_seed(0))
GREEDY = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
EVERYWHERE = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1}


def randomise(model: nn.Module) -> None:
    """Adapter weights far from the zeros that they begin as."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(kind in name for kind in ("lora_", "ia3_", "prompt_")):
                parameter.normal_(std=0.3).add_(1.0 if "ia3_" in name else 0.0)


def adapted(name: str = "llama", config: Any = None, **options: Any) -> Any:
    """A tiny model of two layers under PEFT, with random adapters."""
    config = config or LoraConfig(task_type="CAUSAL_LM", **EVERYWHERE)
    model = get_peft_model(tiny(name, **{"num_hidden_layers": 2, **options}), config).eval()
    randomise(model)
    return model


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    out: Tensor = model(input_ids=ids).logits
    return out


def expect_same(model: Any, fast: lethe.OptimizedModel) -> None:
    """Logits and greedy tokens of `model`, which must differ from those without its adapters."""
    torch.testing.assert_close(fast(IDS), logits(model), rtol=1e-4, atol=1e-4)
    expected = model.generate(input_ids=IDS, **GREEDY)
    assert torch.equal(fast.generate(IDS, **GREEDY), expected)
    assert torch.equal(fast.as_hf().generate(IDS, **GREEDY), expected)


@pytest.mark.parametrize(
    ("name", "task_type"),
    [
        ("llama", "CAUSAL_LM"),
        pytest.param("llama", None, marks=pytest.mark.slow),
        pytest.param("gemma2", "CAUSAL_LM", marks=pytest.mark.slow),
        ("gpt2", "CAUSAL_LM"),
    ],
)
def test_lora_is_part_of_the_graph(name: str, task_type: str | None) -> None:
    model = adapted(name, LoraConfig(task_type=task_type, fan_in_fan_out=name == "gpt2", **EVERYWHERE))
    assert type(model).__name__ == ("PeftModel" if task_type is None else "PeftModelForCausalLM")
    fast = lethe.optimize(model, policy="full")
    expect_same(model, fast)
    with model.disable_adapter():
        assert (logits(model) - fast(IDS)).abs().max() > 0.1, "the adapter must matter to prove anything"
    assert fast.hf_config is model.get_base_model().config
    if task_type:
        assert "lora_A" in " ".join(name for name, _ in fast.named_parameters())
        mine = {p.data_ptr() for p in fast.parameters()}
        assert mine <= {p.data_ptr() for p in model.parameters()}, "weights are shared, the adapter's too"


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(use_dora=True, task_type="CAUSAL_LM", **EVERYWHERE),
        LoraConfig(task_type="CAUSAL_LM", use_rslora=True, modules_to_save=["lm_head"], r=4, target_modules=["q_proj"]),
        IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ],
    ids=["dora", "modules_to_save", "ia3"],
)
def test_other_adapters_in_layers(config: Any) -> None:
    model = adapted(config=config)
    expect_same(model, lethe.optimize(model, policy="full"))


@pytest.mark.slow
def test_merged_adapters() -> None:
    expected = logits(adapted())
    merged = adapted()
    merged.merge_adapter()
    expect_same(merged, lethe.optimize(merged, policy="full"))
    unloaded = adapted().merge_and_unload()
    assert not isinstance(unloaded, PeftModel)
    fast = lethe.optimize(unloaded, policy="full")
    expect_same(unloaded, fast)
    torch.testing.assert_close(fast(IDS), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_an_adapter_added_by_transformers() -> None:
    model = tiny("llama")
    model.add_adapter(LoraConfig(**EVERYWHERE))
    model.eval()
    randomise(model)
    expect_same(model, lethe.optimize(model, policy="full"))
    model.disable_adapters()
    plain_logits = logits(model)
    torch.testing.assert_close(lethe.optimize(model, policy="full")(IDS), plain_logits, rtol=1e-4, atol=1e-4)


def two_adapters() -> Any:
    model = adapted()
    model.add_adapter("second", LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "up_proj"]))
    randomise(model)
    return model.eval()


@pytest.mark.parametrize("active", ["default", "second", ["default", "second"]])
@pytest.mark.slow
def test_the_adapters_that_are_active_are_compiled_in(active: str | list[str]) -> None:
    model = two_adapters()
    model.base_model.set_adapter(active)
    fast = lethe.optimize(model, policy="full")
    expect_same(model, fast)
    names = " ".join(str(node.target) for node in fast.graph_module.graph.nodes if node.op == "get_attr")
    assert ("default" in names) == ("default" in active) and ("second" in names) == ("second" in active)


@pytest.mark.slow
@pytest.mark.slow
def test_switching_adapters_later_changes_nothing() -> None:
    model = two_adapters()
    fast = lethe.optimize(model, policy="full")
    expected = fast(IDS)
    model.set_adapter("second")
    assert (logits(model) - expected).abs().max() > 0.1
    assert torch.equal(fast(IDS), expected)
    with model.disable_adapter():
        assert torch.equal(fast(IDS), expected)
        off = lethe.optimize(model, policy="full")
        torch.testing.assert_close(off(IDS), logits(model), rtol=1e-4, atol=1e-4)
    assert torch.equal(fast(IDS), expected)


def test_the_wrapped_model_is_left_as_it_was() -> None:
    model = adapted(num_hidden_layers=1)
    model.train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = {name: type(module) for name, module in model.named_modules()}
    lethe.optimize(model)
    assert model.training and {name: type(module) for name, module in model.named_modules()} == modules
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())


@pytest.mark.slow
def test_half_precision_models_with_full_precision_adapters() -> None:
    """PEFT keeps adapters in float32, whatever the model's dtype: both are in the graph."""
    model = adapted(dtype=torch.bfloat16)
    fast = lethe.optimize(model, policy="full")
    assert {p.dtype for p in fast.parameters()} == {torch.bfloat16, torch.float32}
    error = (fast(IDS).double() - logits(model).double()).norm() / logits(model).double().norm()
    assert fast(IDS).dtype == torch.bfloat16 and error < 2e-2


@pytest.mark.slow
def test_pruning_a_wrapped_model_is_pruning_the_merged_one() -> None:
    config = lethe.LetheConfig(sparse_ratio=1.5, decay=0.9, prune_threshold=20, prune_interval=5, protect_prompt=False)
    wrapped, merged = (lethe.optimize(m, config) for m in (adapted(), adapted().merge_and_unload()))
    out = wrapped.generate(IDS, **{**GREEDY, "max_new_tokens": 60})
    assert torch.equal(merged.generate(IDS, **{**GREEDY, "max_new_tokens": 60}), out)
    assert all(min(layer) > 0 for layer in wrapped.cache_stats().rounds)


def test_a_plain_module_under_peft() -> None:
    names = [name for name, module in plain().named_modules() if isinstance(module, nn.Linear)]
    model = get_peft_model(plain(), LoraConfig(r=4, target_modules=names)).eval()
    randomise(model)
    assert isinstance(model.get_base_model(), PlainDecoder)
    fast = lethe.optimize(model, policy="full")
    with torch.no_grad():
        torch.testing.assert_close(fast(IDS), model(IDS), rtol=1e-4, atol=1e-4)
        assert (model(IDS) - plain()(IDS)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "PROMPT_TUNING.*virtual tokens"),
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "PREFIX_TUNING.*virtual tokens"),
        (LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6], **EVERYWHERE), "activated LoRA"),
    ],
    ids=["prompt", "prefix", "alora"],
)
def test_what_depends_on_the_prompt_is_refused(config: Any, reason: str) -> None:
    model = get_peft_model(tiny("llama", num_hidden_layers=1), config)
    with pytest.raises(lethe.UnsupportedGraphError, match=f"the adapter 'default'.*{reason}"):
        lethe.optimize(model)


def test_broken_adapter_weights_are_named() -> None:
    model = adapted(num_hidden_layers=1)
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight[0, 0] = torch.nan
    with pytest.raises(lethe.InputError, match=r"q_proj\.lora_A\.default\.weight holds NaN"):
        lethe.optimize(model)
