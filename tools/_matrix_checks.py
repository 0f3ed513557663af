"""What one architecture must show: nothing pruned, the original's logits and tokens; pruned, those of the oracle."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lethe_compile.api import optimize
from lethe_compile.capture.softmaxes import attentions
from lethe_compile.config import LetheConfig
from lethe_compile.errors import UnsupportedGraphError
from lethe_compile.models.architectures import NO_CACHE, TIES, build
from lethe_compile.passes.program import Site
from lethe_compile.runtime import OptimizedModel
from lethe_compile.tools._replay import Evictions, replay

LENGTHS = (1, 5, 8, 17, 29)  # astride windows of 7 and chunks of 8
TOLERANCE = 1e-3  # relative, of logits
_PROMPT, _NEW, _PRUNED = 21, 14, 42  # tokens: prompt, generated without pruning, generated with it
_STEPPED = 12
_PRUNING = LetheConfig(
    sparse_ratio=1e9, decay=0.9, prune_threshold=16, prune_interval=4, max_tokens=20, page_size=4, recent_ratio=0.2
)


@dataclass
class Verdict:
    """A line of the matrix. `outcome` is "pass", "refused" (with its true reason), or "fail"."""

    architecture: str
    outcome: str = "pass"
    reason: str = ""
    layers: int = 0
    found_by: str = ""
    masks: str = ""
    features: str = ""
    seconds: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)  # relative, by check

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Failed(Exception):
    pass


def check(name: str, device: str = "cpu") -> Verdict:
    """Optimize the tiny `name` and run every check; never raises for what the model or the compiler does.

    On a GPU the graph runs node by node: compiled, it would show the same kernels, a minute later.
    """
    verdict, start = Verdict(name), time.perf_counter()
    try:
        _check(name, device, verdict)
    except UnsupportedGraphError as refusal:
        verdict.outcome, verdict.reason = "refused", refusal.reason
    except _Failed as failure:
        verdict.outcome, verdict.reason = "fail", str(failure)
    except Exception as error:  # whatever goes wrong with one architecture, the others have their turn
        verdict.outcome, verdict.reason = "fail", f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    verdict.seconds = round(time.perf_counter() - start, 1)
    return verdict


def _check(name: str, device: str, verdict: Verdict) -> None:
    model = build(name).to(device)
    fast = optimize(model, _PRUNING, backend="auto" if device == "cpu" else "eager")
    _describe(fast, verdict)
    run = _Original(model)
    with _FirstOfEquals() if name in TIES else nullcontext():
        _compare(name, model, run, fast, verdict)


def _compare(name: str, model: Any, run: _Original, fast: OptimizedModel, verdict: Verdict) -> None:
    expected = attentions(run, _ids(2, LENGTHS[-1]))
    if expected != len(fast.sites):
        raise _Failed(f"{len(fast.sites)} attentions located, and the model attends {expected} times")
    for rows in (1, 3):
        verdict.errors[f"logits of {rows}"] = _logits(run, fast, rows)
    verdict.errors["step by step"] = _stepwise(run, fast)
    with fast.unpruned():
        _tokens(model, name, fast)
    verdict.errors["oracle"] = _oracle(run, fast)
    for what, error in verdict.errors.items():
        if not error <= TOLERANCE:
            raise _Failed(f"{what}: logits are off by {error:.1e} (relative)")


class _FirstOfEquals(TorchDispatchMode):
    """Of equal values `topk` takes those that stand first; which it takes depends on how many others there are."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.topk.default:
            return func(*args, **(kwargs or {}))
        values, k, dim, largest = (*args, -1, True)[:4]
        ordered, index = values.sort(dim=dim, descending=largest, stable=True)
        return ordered.narrow(dim, 0, k), index.narrow(dim, 0, k)


class _Original:
    """The model as a function of ids alone, without a cache: ``[rows, T] -> [rows, T, vocab]``, both on the host."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        ids = ids.to(self.model.device)
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        try:
            out = self.model(ids, position_ids=positions, use_cache=False)
        except TypeError:  # a few take no positions, or have no cache
            out = self.model(ids)
        logits: Tensor = out.logits.cpu()
        return logits


def _ids(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 90, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def _ragged(rows: int, tokens: int) -> Tensor:
    """A mask of left padding; the first row has none."""
    return (torch.arange(tokens) >= torch.arange(rows)[:, None] * tokens // (rows + 1)).long()


def _error(have: Tensor, want: Tensor) -> float:
    difference = float((have.double() - want.double()).norm() / want.double().norm())
    return difference if difference == difference else float("inf")  # noqa: PLR0124  (NaN)


def _logits(run: _Original, fast: OptimizedModel, rows: int) -> float:
    """The largest error over lengths and rows; a padded row is compared with the row alone."""
    errors = []
    for length in LENGTHS:
        ids, mask = _ids(rows, length), _ragged(rows, length)
        logits = fast(ids.to(fast.device), attention_mask=mask.to(fast.device)).cpu()
        errors += [_error(logits[row, real], run(ids[row : row + 1, real])[0]) for row, real in enumerate(mask.bool())]
    return max(errors)


def _stepwise(run: _Original, fast: OptimizedModel) -> float:
    """A prefill of ragged prompts and the decode steps after it, against whole sequences."""
    prompts = torch.tensor([1, 6, 8])
    ids, device = _ids(3, int(prompts.max()) + _STEPPED), fast.device
    expected = torch.cat([run(ids[row : row + 1]) for row in range(3)])
    errors, every = [], torch.arange(3)
    active = torch.ones(3, dtype=torch.bool, device=device)
    with fast.unpruned():
        fast.begin(3, prompts.to(device))
        try:
            logits = fast.prefill(ids[:, : int(prompts.max())].to(device), prompts.to(device))
            for step in range(_STEPPED):
                errors.append(_error(logits.cpu(), expected[every, prompts + step - 1]))
                logits = fast.decode(ids[every, prompts + step].to(device), active)
        finally:
            fast.end()
    return max(errors)


def _tokens(model: Any, name: str, fast: OptimizedModel) -> None:
    """Greedy tokens of one prompt and of three ragged ones; where padding moves the original, each row's alone."""
    ids, mask = _ids(3, _PROMPT).to(fast.device), _ragged(3, _PROMPT).to(fast.device)
    options: dict[str, Any] = {"max_new_tokens": _NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    made = fast.generate(ids, attention_mask=mask, **options)[:, _PROMPT:].tolist()
    options["use_cache"] = name not in NO_CACHE
    padded = model.generate(ids, attention_mask=mask, **options)[:, _PROMPT:].tolist()
    for row, real in enumerate(mask.bool()):
        if made[row] == padded[row] and row:
            continue
        alone = ids[row : row + 1, real]
        want = model.generate(alone, attention_mask=torch.ones_like(alone), **options)[0, alone.shape[1] :].tolist()
        if made[row] != want:
            raise _Failed(f"greedy tokens differ from generate's in row {row}: {made[row]}, not {want}")
        if fast.generate(alone, **{**options, "use_cache": True})[0, alone.shape[1] :].tolist() != want:
            raise _Failed(f"greedy tokens of row {row} alone differ from generate's")


def _oracle(run: _Original, fast: OptimizedModel) -> float:
    """Generate with eviction, and replay every row on the original with what was evicted hidden."""
    evictions = Evictions()
    fast.on_round.append(evictions)
    ids, mask = _ids(3, _PROMPT, seed=1).to(fast.device), _ragged(3, _PROMPT).to(fast.device)
    options: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False}
    options |= {"max_new_tokens": _PRUNED, "eos_token_id": None, "pad_token_id": 0}
    out = fast.generate(ids, attention_mask=mask, **options)
    if min(map(min, fast.cache_stats().rounds)) < 2:
        raise _Failed("a layer or row was not pruned twice")
    logits = torch.stack(out.logits, dim=1).cpu()
    errors = []
    for row, prompt in enumerate(mask.sum(1).tolist()):
        sequence = out.sequences[row : row + 1, _PROMPT - prompt : -1]
        errors.append(_error(logits[row], replay(run, sequence, evictions, row)[prompt - 1 :]))
    return max(errors)


def _describe(fast: OptimizedModel, verdict: Verdict) -> None:
    sites = fast.sites
    verdict.layers = len(sites)
    verdict.found_by = _joined(site.found_by for site in sites)
    verdict.masks = _joined(_mask(site) for site in sites)
    verdict.features = _joined(feature for site in sites for feature in _features(site))


def _mask(site: Site) -> str:
    assert site.mask is not None
    return site.mask.kind if site.mask.window is None else f"{site.mask.kind} {site.mask.window}"


def _features(site: Site) -> Iterator[str]:
    if site.kv_heads == 1 < site.heads and not site.latent:
        yield "MQA"
    elif site.kv_heads < site.heads and not site.latent:
        yield "GQA"
    if site.latent:
        yield "latent cached"
    elif site.k_dim != site.v_dim:
        yield "v_dim ≠ k_dim"
    if site.softcap is not None:
        yield "softcap"
    if site.sinks:
        yield "sinks"
    if site.slopes is not None:
        yield "ALiBi"
    if site.content:
        yield "mask by content"


def _joined(words: Any) -> str:
    return ", ".join(dict.fromkeys(words))
