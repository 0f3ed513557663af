"""The compiler: graph passes, each in a file of its own, listed here once in the order in which they run."""

from __future__ import annotations

from lethe_compile.passes.base import Pass
from lethe_compile.passes.cache_latent import CacheLatent
from lethe_compile.passes.classify_masks import ClassifyMasks
from lethe_compile.passes.content_masks import ContentMasks
from lethe_compile.passes.fold_repeat_kv import FoldRepeatKV
from lethe_compile.passes.fuse_projections import FuseProjections
from lethe_compile.passes.insert_attention import InsertAttention
from lethe_compile.passes.insert_state import InsertState
from lethe_compile.passes.locate_attention import LocateAttention
from lethe_compile.passes.locate_cache import LocateCache
from lethe_compile.passes.normalize import Normalize
from lethe_compile.passes.rewrite_positions import RewritePositions
from lethe_compile.passes.tensor_parallel import TensorParallel


def pipeline(
    decay: float | None,
    peak: bool = False,
    *,
    per_head: bool = False,
    fuse: bool = False,
    own_cache: bool = False,
    latent: bool = True,
    parallel: TensorParallel | None = None,
) -> tuple[Pass, ...]:
    """Every pass from a captured graph to one that attends over the cache.

    `decay`, `peak` and `per_head` are those of `InsertAttention`.

    `own_cache` is for a decode step that carries a cache, `Program.step`. `fuse` adds what only pays where memory
    bandwidth is the limit: a GPU. `latent` lets layers cache what their keys and values are made of, as `CacheLatent`.
    `parallel` leaves this rank its share of the model.
    """
    first: tuple[Pass, ...] = (LocateCache(),) if own_cache else ()
    shares: tuple[Pass, ...] = () if parallel is None else (parallel,)
    fusions: tuple[Pass, ...] = (FuseProjections(),) if fuse else ()
    return (
        *first,
        Normalize(),
        LocateAttention(),
        FoldRepeatKV(),
        CacheLatent(latent),
        ContentMasks(),
        ClassifyMasks(),
        RewritePositions(),
        InsertState(),
        *shares,
        InsertAttention(decay, peak, per_head),
        *fusions,
    )
