"""Verify semantics, not patterns: the rewritten graph must compute what the model computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lethe_compile.errors import LetheError, UnsupportedGraphError
from lethe_compile.passes.program import ancestors
from lethe_compile.runtime import OptimizedModel

_LONGEST = 512  # tokens to verify with at most
_DECODED = 3
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 4e-2, torch.bfloat16: 1.5e-1}
_QUANTISED = 5e-2  # where activations are rounded to 8 bits, a last bit that differs can become a whole step


def verify(original: Callable[[Mapping[str, Tensor]], Tensor], fast: OptimizedModel) -> None:
    """Compare logits on random sequences: short, and long enough to leave every sliding window; whole and step by step.

    The graph runs node by node for this: what the passes did is in question, and nothing has to be compiled for it.

    `original` computes the unchanged model's logits from inputs by role.

    Raises:
        UnsupportedGraphError: they differ by more than rounding explains.
        LetheError: the model itself computes NaN.
    """
    windows = [site.mask.window for site in fast.sites if site.mask and site.mask.window]
    limit = min(_LONGEST, fast.max_positions or _LONGEST)
    lengths = sorted({min(limit, 7), min(limit, max([2 * w + 5 for w in windows], default=19))})
    generator = torch.Generator().manual_seed(0)
    least = rounding(fast)
    samples = [_tokens(fast.vocab_size, length, generator).to(fast.device) for length in lengths]
    with fast.interpreted():
        if fast.device.type == "cuda":
            _compile_kernels(fast, samples)
        for ids in samples:
            _verify_sample(original, fast, ids, least)


def verify_steps(fast: OptimizedModel) -> None:
    """What can be told without the original model: `verify`, with the rewritten graph's own logits in its place.

    That they are finite, and that decode steps continue whole sequences; not that they are the model's.

    Raises:
        UnsupportedGraphError, LetheError: see `verify`.
    """
    verify(lambda inputs: fast(inputs["input_ids"]), fast)


def _compile_kernels(fast: OptimizedModel, samples: list[Tensor]) -> None:
    """Compile on all cores what the samples need, or each kernel would wait for the one before."""
    from lethe_compile.kernels.launch import compiling

    with compiling():
        for ids in samples:
            fast(ids)
            if ids.shape[1] > _DECODED:
                _stepwise(fast, ids)


def rounding(fast: OptimizedModel) -> float:
    """The relative error that the model's own arithmetic explains, beside that of its dtype."""
    return _QUANTISED if _quantises_activations(fast) else 0.0


def _quantises_activations(fast: OptimizedModel) -> bool:
    """Whether anything that follows from the token ids is stored in 8 bits, as dynamic quantisation does."""
    for node in fast.graph_module.graph.nodes:
        value = node.meta.get("val")
        results = value if isinstance(value, (list, tuple)) else [value]
        small = any(isinstance(v, Tensor) and v.itemsize == 1 and v.dtype != torch.bool for v in results)
        if small and any(source.target == "input_ids" for source in ancestors(node)):
            return True
    return False


def _verify_sample(
    original: Callable[[Mapping[str, Tensor]], Tensor], fast: OptimizedModel, ids: Tensor, least: float
) -> None:
    length = ids.shape[1]
    positions = torch.arange(length, device=ids.device).repeat(2, 1)
    with torch.no_grad():
        inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": torch.ones_like(ids)}
        expected = original(inputs)
    if not bool(torch.isfinite(expected).all()):
        raise LetheError(f"the model's own logits are not finite on {length} random tokens: check its weights")
    hint = "please report this model; it is left as it was"
    compare(fast(ids), expected, f"{length} tokens at once", hint, least)
    if length > _DECODED:
        what = f"{length} tokens, {_DECODED} of them step by step"
        hint = "does anything but attention mix tokens: a convolution, a recurrence, a mean over them?"
        compare(_stepwise(fast, ids), expected[:, -_DECODED - 1 :], what, hint, least)


def _tokens(vocabulary: int, length: int, generator: torch.Generator) -> Tensor:
    """Random tokens ``[2, length]``, none twice in a row if there are enough: what ranks tokens ranks equal ones by
    chance."""
    if vocabulary < length:
        return torch.randint(vocabulary, (2, length), generator=generator)
    return torch.stack([torch.randperm(vocabulary, generator=generator)[:length] for _ in range(2)])


def _stepwise(fast: OptimizedModel, ids: Tensor) -> Tensor:
    """Logits [rows, 1 + decoded, vocab] of a prefill and the decode steps that follow it, nothing evicted."""
    rows, length = ids.shape
    start = length - _DECODED
    active = torch.ones(rows, dtype=torch.bool, device=ids.device)
    prompt = torch.full((rows,), start, device=ids.device)
    with fast.unpruned():
        fast.begin(rows, prompt)
        try:
            logits = [fast.prefill(ids[:, :start], prompt)]
            # A decode step may reuse the memory of the one before.
            logits += [fast.decode(ids[:, column], active).clone() for column in range(start, length)]
        finally:
            fast.end()
    return torch.stack(logits, dim=1)


def compare(actual: Tensor, expected: Tensor, what: str, hint: str, least: float) -> None:
    """Refuses relative errors above the dtype's tolerance, which is `least` at least."""
    error = float((actual.double() - expected.double()).norm() / expected.double().norm())
    if not error <= max(least, _TOLERANCE.get(expected.dtype, 1e-3)):  # also when it is NaN
        raise UnsupportedGraphError(
            f"the rewritten graph computes something else on {what}: its logits are off by {error:.1e} (relative)",
            hint=hint,
        )
