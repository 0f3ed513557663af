"""Every architecture passes all checks, or is refused with its true reason; a dozen of them in every run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lethe_compile.capture.softmaxes import AttentionHook, attentions
from lethe_compile.errors import InputError
from lethe_compile.models.architectures import ARCHITECTURES
from lethe_compile.models.tiny import tiny
from lethe_compile.tools import _matrix, _matrix_checks, inspect_graph
from lethe_compile.tools._matrix_checks import Verdict, check
from lethe_compile.tools._replay import Evictions, replay

ALWAYS = ("bloom", "gptj", "gemma3n_text", "gpt_oss", "deepseek_v3", "llama4_text", "qwen3_next")
# Refused, and why, as a part of the reason: everything else must pass.
REFUSED: dict[str, str] = {
    **dict.fromkeys(("big_bird", "megatron-bert", "rembert", "roformer"), "not causal: a query sees later keys"),
    **dict.fromkeys(("cpmant", "prophetnet", "xlnet"), "the model is not causal"),
    "deepseek_v4": "queries meet",
    "blt": "does not run with its own cache",
    "xlm": "predicts in the place of one that it adds",
}


ON_GPU = (  # what the other GPU tests lack: biases, chunks, sinks, masks by content, states, MLA, maps of maps
    *("bloom", "llama4_text", "gpt_oss", "deepseek_v32", "glm_moe_dsa", "doge", "qwen3_next", "jamba", "deepseek_v3"),
    *("diffllama", "gptj", "lfm2", "electra", "zamba2"),
)


def assert_verdict(name: str, device: str = "cpu") -> None:
    verdict = check(name, device)
    if name in REFUSED:
        assert verdict.outcome == "refused" and REFUSED[name] in verdict.reason, verdict
    else:
        assert verdict.outcome == "pass", verdict


@pytest.mark.parametrize("name", ALWAYS)
def test_architecture(name: str) -> None:
    assert_verdict(name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_architecture_on_a_gpu(name: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # TF32 would drown what is compared
    try:
        assert_verdict(name, "cuda")
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.matrix
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in ALWAYS])
def test_every_architecture(name: str) -> None:
    assert_verdict(name)


def test_the_replay_hides_what_was_evicted() -> None:
    """From the query on that misses it, in its layer and row alone."""
    model = tiny("llama")

    def run(ids: Tensor) -> Tensor:
        logits: Tensor = model(ids).logits
        return logits

    ids, evictions = torch.randint(3, 90, (1, 17)), Evictions()
    assert attentions(run, ids) == 3
    with torch.no_grad():
        plain = run(ids)[0]
    assert torch.equal(replay(run, ids, evictions, 0), plain)
    evictions.first[1, 0, 0] = {4: 9}
    hidden = replay(run, ids, evictions, 0)
    assert torch.equal(hidden[:9], plain[:9]) and (hidden[9:] - plain[9:]).abs().amax(1).min() > 1e-4
    assert torch.equal(replay(run, ids, evictions, 1), plain)


def test_a_softmax_of_other_sizes_is_no_attention() -> None:
    with AttentionHook(5) as hook:
        torch.zeros(2, 5, 7).softmax(-1), torch.zeros(5, 5).softmax(-1), torch.zeros(1, 2, 3, 4).softmax(-1)
        assert hook.count == 0
        torch.zeros(1, 5, 6).softmax(-1), torch.zeros(1, 2, 5, 5).softmax(-1)
        assert hook.count == 2


def test_what_ranks_keys_is_edited_for_the_softmax_that_follows() -> None:
    scores, edited = torch.arange(50.0).view(1, 2, 5, 5), []

    def hide_the_last(index: int, scores: Tensor) -> Tensor:
        edited.append(index)
        return torch.cat([scores[..., :4], torch.full_like(scores[..., 4:], float("-inf"))], dim=-1)

    with AttentionHook(5, hide_the_last):
        assert scores.topk(1).indices.unique().item() == 3
        scores.softmax(-1)
        blocks = torch.nn.functional.pad(scores, (0, 1), value=99.0).unflatten(-1, (3, 2))
        assert torch.equal(blocks.amax(-1)[..., 1], scores[..., 3])
        assert scores[0].topk(1, dim=-1).indices.unique().item() == 3
        scores[0, 0, :, :4].topk(1), scores.unflatten(0, (1, 1)).amax(-1)
    assert edited == [0, 0, 1, 1]


def test_checks_that_fail_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that computes something else than the original fails, whatever the compiler says of it."""
    build = _matrix_checks.build
    monkeypatch.setattr(_matrix_checks, "attentions", lambda run, ids: 7)
    assert "attends 7 times" in check("llama").reason
    monkeypatch.undo()

    class Other(_matrix_checks._Original):
        def __call__(self, ids: Tensor) -> Tensor:
            return super().__call__(ids) * 1.01

    monkeypatch.setattr(_matrix_checks, "_Original", Other)
    verdict = check("llama")
    assert verdict.outcome == "fail" and "logits are off by" in verdict.reason
    monkeypatch.undo()
    monkeypatch.setattr(_matrix_checks, "build", lambda name: build("roformer"))
    refused = check("llama")
    assert refused.outcome == "refused" and "not causal" in refused.reason


def test_the_matrix_as_table_json_and_markdown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts = {
        "llama": Verdict("llama", layers=3, found_by="interface", masks="causal", features="GQA", seconds=2.0),
        "gpt2": Verdict("gpt2", "refused", "its | reason", seconds=1.0),
    }
    monkeypatch.setattr(_matrix, "check", lambda name, device: verdicts[name])
    files = tmp_path / "m.json", tmp_path / "m.md"
    arguments = ["--matrix", "llama", "gpt2", "--json", str(files[0]), "--markdown", str(files[1])]
    assert inspect_graph.main(arguments) == 0
    assert "1 of 2 pass, 1 refused, 0 failed" in capsys.readouterr().out
    written = json.loads(files[0].read_text())
    assert (
        written["verdicts"][1]["reason"] == "its | reason"
        and written["torch"].split("+")[0] == torch.__version__.split("+")[0]
    )
    assert "| gpt2 |  |  |  |  | refused: its   reason | 1 |" in files[1].read_text()
    verdicts["gpt2"].outcome = "fail"
    assert inspect_graph.main(["--matrix", "gpt2"]) == 1
    with pytest.raises(InputError, match="no architecture is called nothing"):
        inspect_graph.main(["--matrix", "nothing"])
    with pytest.raises(InputError, match="name one model, not 2"):
        inspect_graph.main(["llama", "gpt2"])
