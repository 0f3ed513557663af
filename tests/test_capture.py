"""What `optimize` takes: every kind of model, the original left as it was; and what it refuses, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
from transformers.modeling_utils import AttentionInterface
from transformers.models.auto.configuration_auto import AutoConfig

import lethe_compile as lethe
from lethe_compile.capture import capture
from lethe_compile.errors import InputError, UnsupportedGraphError
from lethe_compile.models.architectures import build
from lethe_compile.models.plain_decoder import PlainDecoder, plain
from lethe_compile.models.tiny import tiny

DYNAMIC = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
BERT = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


class Positioned(nn.Module):
    """A small decoder with positions as an input, under whatever names `forward` is given by a subclass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.table = nn.Embedding(97, 32), nn.Embedding(64, 32)
        self.qkv, self.head = nn.Linear(32, 96), nn.Linear(32, 97)

    def run(self, ids: Tensor, positions: Tensor, padding: Tensor | None = None) -> Tensor:
        x = self.embedding(ids) + self.table(positions)
        query, key, value = self.qkv(x).view(ids.shape[0], ids.shape[1], 12, 8).transpose(1, 2).chunk(3, dim=1)
        if padding is None:
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
            allowed = causal & padding[:, None, None, :].bool()
            attended = F.scaled_dot_product_attention(query, key, value, allowed)
        logits: Tensor = self.head(x + attended.transpose(1, 2).flatten(2))
        return logits

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.run(tokens, positions)


class Strange(Positioned):
    """Names that say nothing, an order of its own, a mask, and more than logits returned."""

    def forward(self, where: Tensor, what: Tensor, which: Tensor, verbose: bool = False) -> Any:
        return {"loss": None, "scores": self.run(what, where, which), "verbose": verbose}


def positions_of(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1]).expand_as(ids).contiguous()


IDS = torch.randint(97, (2, 13), generator=torch.Generator().manual_seed(0))


def expect(model: Any, example: Any = None) -> lethe.OptimizedModel:
    """Optimize with verification, which compares whole sequences and decode steps with the original."""
    fast = lethe.optimize(model, policy="full", example_inputs=example)
    assert fast(IDS).shape == (2, 13, 97)
    return fast


def test_a_module_of_tokens() -> None:
    model = plain()
    torch.testing.assert_close(expect(model)(IDS), model(IDS), rtol=1e-4, atol=1e-4)


def test_a_module_of_tokens_and_positions() -> None:
    model = Positioned()
    fast = expect(model)
    shifted = positions_of(IDS) + 7
    torch.testing.assert_close(fast(IDS, shifted), model(IDS, shifted), rtol=1e-4, atol=1e-4)
    assert fast.max_positions == 64


def test_an_unknown_signature_is_told_by_its_examples() -> None:
    model, ids = Strange(), torch.ones(2, 9, dtype=torch.int64)
    example = {"what": ids, "where": positions_of(ids), "which": torch.ones(2, 9, dtype=torch.bool)}
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    expected = model(positions_of(IDS), IDS, mask)["scores"]
    torch.testing.assert_close(expect(model, example)(IDS)[0], expected[0], rtol=1e-4, atol=1e-4)


def test_positional_examples_follow_the_signature() -> None:
    class Renamed(Positioned):
        def forward(self, sentence: Tensor, place: Tensor) -> Tensor:
            return self.run(sentence, place)

    model, ids = Renamed(), torch.ones(2, 9, dtype=torch.int64)
    fast = expect(model, (ids, positions_of(ids)))
    torch.testing.assert_close(fast(IDS), model(IDS, positions_of(IDS)), rtol=1e-4, atol=1e-4)


def test_an_fx_graph_module() -> None:
    model = fx.symbolic_trace(Positioned())
    torch.testing.assert_close(expect(model)(IDS), model(IDS, positions_of(IDS)), rtol=1e-4, atol=1e-4)


def test_an_exported_program() -> None:
    model = plain()
    program = torch.export.export(model, (torch.ones(2, 9, dtype=torch.int64),), dynamic_shapes=(DYNAMIC,))
    torch.testing.assert_close(expect(program)(IDS), model(IDS), rtol=1e-4, atol=1e-4)


def test_an_exported_program_with_inputs_by_position_and_by_name() -> None:
    model = Positioned()
    ids = torch.ones(2, 9, dtype=torch.int64)
    program = torch.export.export(
        model, (ids,), {"positions": positions_of(ids)}, dynamic_shapes={"tokens": DYNAMIC, "positions": DYNAMIC}
    )
    torch.testing.assert_close(expect(program)(IDS), model(IDS, positions_of(IDS)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [pytest.param("mistral", marks=pytest.mark.slow), "gpt2"])
def test_a_hugging_face_model_exported_by_the_user(name: str) -> None:
    model = tiny(name)
    model.set_attn_implementation("sdpa")
    ids = torch.ones(2, 9, dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions_of(ids)}
    shapes: dict[str, Any] = {**dict.fromkeys(inputs, DYNAMIC), "use_cache": None}
    program = torch.export.export(model, (), {**inputs, "use_cache": False}, dynamic_shapes=shapes, strict=False)
    fast = expect(program)
    assert {site.found_by for site in fast.sites} == {"sdpa"}
    assert [site.mask.window for site in fast.sites if site.mask] == [7 if name == "mistral" else None] * 3
    with torch.no_grad():
        torch.testing.assert_close(fast(IDS), model(IDS).logits, rtol=1e-4, atol=1e-4)


def registered() -> dict[str, Any]:
    return dict(AttentionInterface._global_mapping)


def test_the_original_is_unchanged_and_its_weights_are_shared() -> None:
    model = tiny("llama", attention_dropout=0.5, num_hidden_layers=1)
    model.set_attn_implementation("sdpa")
    model.train()
    model.model.norm.eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training = {name: module.training for name, module in model.named_modules()}
    functions = registered()
    fast = expect(model)
    assert {name: module.training for name, module in model.named_modules()} == training
    assert model.config._attn_implementation == "sdpa" and registered() == functions
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    pointers = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in fast.graph_module.parameters()} == pointers
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
        torch.testing.assert_close(fast(IDS), model.eval()(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_failed_capture_restores_the_model_too() -> None:
    model = tiny("llama", num_hidden_layers=1)
    model.set_attn_implementation("sdpa")
    model.train()
    model.model.layers[0].self_attn.forward = lambda **options: 1 / 0
    functions = registered()
    with pytest.raises(UnsupportedGraphError, match="ZeroDivisionError"):
        capture(model)
    assert model.training and model.config._attn_implementation == "sdpa" and registered() == functions


def test_dropout_in_training_is_no_part_of_the_graph() -> None:
    class Dropping(PlainDecoder):
        def forward(self, tokens: Tensor) -> Tensor:
            return F.dropout(super().forward(tokens), 0.5, self.training)

    torch.manual_seed(0)
    model = Dropping().train()
    fast = lethe.optimize(model)
    assert model.training
    torch.testing.assert_close(fast(IDS), model.eval()(IDS), rtol=1e-4, atol=1e-4)


def masked_language_model() -> nn.Module:
    return AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **BERT), attn_implementation="eager").eval()


def encoder() -> nn.Module:
    return AutoModel.from_config(AutoConfig.for_model("bert", **BERT)).eval()


def encoder_decoder() -> nn.Module:
    sizes = {"d_model": 32, "d_ff": 32, "d_kv": 8, "num_heads": 4, "num_layers": 1, "vocab_size": 97}
    return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **sizes)).eval()


def recurrent() -> nn.Module:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.gru, self.head = (
                nn.Embedding(97, 16),
                nn.GRU(16, 16, batch_first=True),
                nn.Linear(16, 97),
            )

        def forward(self, tokens: Tensor) -> Any:
            return self.head(self.gru(self.embedding(tokens))[0])

    return Recurrent().eval()


def hidden_state_space() -> nn.Module:
    sizes = {"vocab_size": 97, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 1}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes)).eval()


def last_logits() -> nn.Module:
    class Last(PlainDecoder):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens)[:, [-1], :]

    return Last().eval()


class Averaged(PlainDecoder):
    """Each token is joined by the mean of all."""

    def __init__(self) -> None:
        super().__init__()
        self.eval()

    def forward(self, tokens: Tensor) -> Tensor:
        logits = super().forward(tokens)
        return logits + logits.mean(1, keepdim=True)


def unknown_input() -> nn.Module:
    class Tempered(PlainDecoder):
        def forward(self, tokens: Tensor, temperature: Tensor) -> Tensor:
            return super().forward(tokens) / temperature[..., None]

    return Tempered().eval()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (masked_language_model, r"the model is not causal: later tokens .*its attention is not causal: a query sees"),
        (partial(build, "cpmant"), r"the model is not causal: later tokens .*cannot be exported"),
        (Averaged, r"the model is not causal: later tokens .*computes something else"),
        (partial(build, "xlm"), r"XLMWithLMHeadModel 10 tokens where the text has 9, and predicts in the place of one"),
        (encoder, "BertModel gives no logits"),
        (encoder_decoder, "T5ForConditionalGeneration is an encoder-decoder"),
        (recurrent, "no attention was found|cannot be exported"),
        (hidden_state_space, "no KV cache to prune"),
        (last_logits, r"returns no logits .batch, tokens, vocabulary., but"),
    ],
)
def test_what_is_no_decoder_is_refused(make: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(UnsupportedGraphError, match=reason):
        lethe.optimize(make())


def test_what_cannot_be_exported_names_the_models_line() -> None:
    class Branching(PlainDecoder):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens) * (2 if tokens.sum() > 7 else 1)

    with pytest.raises(UnsupportedGraphError, match="cannot be exported: GuardOnDataDependent") as refused:
        capture(Branching().eval())
    assert "test_capture.py" in str(refused.value.where) and "if tokens.sum() > 7" in str(refused.value.where)


def test_an_input_without_a_role_is_refused() -> None:
    ids = torch.ones(2, 9, dtype=torch.int64)
    with pytest.raises(UnsupportedGraphError, match="'temperature' has no known role"):
        lethe.optimize(unknown_input(), example_inputs=(ids, torch.full((2, 9), 0.5)))


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        ((torch.ones(1, 9, dtype=torch.int64),), r"batch >= 2, tokens >= 2\], not a tensor \[1, 9\]"),
        ((torch.ones(9, dtype=torch.int64),), r"not a tensor \[9\]"),
        ({"tokens": "abc"}, "not str"),
        ((IDS, IDS), "2 example inputs for a model that takes 1"),
    ],
)
def test_unusable_examples_are_refused(example: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        capture(plain(), example)


def test_a_frozen_sequence_is_refused() -> None:
    program = torch.export.export(plain(), (torch.ones(2, 9, dtype=torch.int64),))
    with pytest.raises(
        UnsupportedGraphError, match=r"fixed shape \[2, 9\]; batch and tokens must be dynamic"
    ) as refused:
        lethe.optimize(program)
    assert refused.value.hint is not None and "dynamic_shapes" in refused.value.hint


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(InputError, match=r"must be a module or an ExportedProgram, not str"):
        lethe.optimize("gpt2")  # type: ignore[arg-type]


def test_broken_weights_are_refused() -> None:
    model = plain()
    with torch.no_grad():
        model.head.weight[3, 3] = torch.nan
    with pytest.raises(InputError, match=r"head.weight holds NaN"):
        lethe.optimize(model)
    with pytest.raises(InputError, match=r"has no weights: embedding.weight is on the meta device"):
        lethe.optimize(PlainDecoder().to("meta"))
    model = plain()
    model.norm.to("meta")
    with pytest.raises(InputError, match=r"several devices \(embedding.weight on cpu, norm.weight on meta\)"):
        lethe.optimize(model)


def inputs_of(ids: Tensor) -> Mapping[str, Tensor]:
    return {"input_ids": ids, "position_ids": positions_of(ids), "attention_mask": torch.ones_like(ids)}


def test_the_original_is_kept_to_verify_against() -> None:
    model = tiny("gemma2", num_hidden_layers=2)
    model.set_attn_implementation("sdpa")  # which would drop the softcap
    expected = tiny("gemma2", num_hidden_layers=2)(IDS).logits
    torch.testing.assert_close(capture(model).original(inputs_of(IDS)), expected, rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == "sdpa"
