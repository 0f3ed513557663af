"""Teacher forcing: its figures against generation itself, with its rounds, and its memory."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from torch import Tensor

import lethe_compile as lethe
from lethe_compile.comparison.forced import force
from lethe_compile.comparison.sides import reference
from lethe_compile.errors import LetheError
from lethe_compile.models.tiny import tiny
from lethe_compile.runtime import OptimizedModel

CONFIG = lethe.LetheConfig(max_tokens=20, prune_interval=5, page_size=4, protect_prompt=False, decay=0.9)
PROMPT, NEW = [5, 6, 7, 8, 9, 10, 11], 40


@pytest.fixture(scope="module")
def fast() -> OptimizedModel:
    return lethe.optimize(tiny("llama"), CONFIG, verified=False)


def generated(fast: OptimizedModel) -> tuple[list[int], Tensor]:
    """New tokens, and the logits [steps, vocab] that they were chosen by."""
    out = fast.generate(
        torch.tensor([PROMPT]), max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    return out.sequences[0, len(PROMPT) :].tolist(), torch.cat(out.logits)


def test_figures_are_those_of_generation(fast: OptimizedModel) -> None:
    tokens, pruned = generated(fast)
    assert fast.cache_stats().retained[0][0] < len(PROMPT) + NEW - 1, "rounds evicted something"
    with torch.no_grad():
        whole = tiny("llama")(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1]
    p, q = whole.double().log_softmax(-1), pruned.double().log_softmax(-1)
    kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    with reference(fast) as full:
        # A second row of another length ends earlier, and takes part in nothing afterwards.
        (one, two) = force(full, fast, [PROMPT, PROMPT[:3]], [tokens, tokens[:9]])
    np.testing.assert_allclose(one.kl_of_step, kl, rtol=1e-3, atol=1e-6)
    assert one.steps == NEW and two.steps == 9 == len(two.kl_of_step)
    assert one.kl == pytest.approx(float(kl.mean()), rel=1e-4) and one.kl_max == pytest.approx(
        float(kl.max()), rel=1e-4
    )
    assert one.kl_max_step == int(kl.argmax()) and one.kl > 1e-3, "the rounds can be seen"
    assert one.top1_of_step == tuple((p.argmax(-1) == q.argmax(-1)).tolist())
    taken = [-float(of.gather(1, torch.tensor(tokens)[:, None]).mean()) for of in (p, q)]
    assert one.nll == pytest.approx(taken, rel=1e-4)


def test_the_unpruned_graph_is_close_to_itself(fast: OptimizedModel) -> None:
    with fast.unpruned(), reference(fast) as full:
        (one,) = force(full, fast, [PROMPT], [list(range(3, 43))])
    assert one.kl_max < 1e-9 and one.top1 == 1.0


class Scripted:
    """A decoder that says given logits, and knows which of those it has said are still held."""

    vocab_size, max_positions, device = 5, None, torch.device("cpu")

    def __init__(self, logits: Tensor) -> None:  # [steps, V]
        self.logits, self.step, self.most = logits, 0, 0
        self.said: list[weakref.ref[Tensor]] = []
        self.ended = False

    def begin(self, rows: int, prompt_lengths: Tensor, new_tokens: int) -> None:
        self.rows = rows

    def prefill(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        return self._say()

    def decode(self, tokens: Tensor, active: Tensor) -> Tensor:
        self.step += 1
        return self._say()

    def end(self) -> None:
        self.ended = True

    def _say(self) -> Tensor:
        logits = self.logits[self.step].repeat(self.rows, 1)
        self.said.append(weakref.ref(logits))
        self.most = max(self.most, sum(ref() is not None for ref in self.said))
        return logits


def test_logits_of_a_long_text_are_not_held() -> None:
    decoders = [Scripted(torch.randn(200, 5)) for _ in range(2)]
    force(*decoders, [[1]], [[2] * 200])
    assert [one.most for one in decoders] == [2, 2], "those of a step, while the next is made"
    assert all(one.ended for one in decoders)


def test_tokens_without_a_chance() -> None:
    impossible = torch.tensor([[0.0, -torch.inf, 0.0, 0.0, 0.0]])
    (same,) = force(Scripted(impossible), Scripted(impossible), [[1]], [[0]])
    assert same.kl == 0.0
    (one,) = force(Scripted(torch.zeros(1, 5)), Scripted(impossible), [[1]], [[1]])
    assert one.kl == float("inf") and one.nll[1] == float("inf") and one.nll[0] == pytest.approx(np.log(5))


@pytest.mark.parametrize("broken", [0, 1])
def test_nan_is_named(broken: int) -> None:
    logits = [torch.zeros(3, 5), torch.zeros(3, 5)]
    logits[broken][2, 1] = torch.nan
    name = ("unpruned", "pruned")[broken]
    decoders = [Scripted(one) for one in logits]
    with pytest.raises(LetheError, match=f"row 0, step 2: the {name} graph's logits are not finite"):
        force(*decoders, [[1]], [[1, 2, 3]])
    assert all(one.ended for one in decoders)
