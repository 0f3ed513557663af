"""What the compiler did, and what the cache holds: values that print as tables and dump as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import isnan
from typing import TYPE_CHECKING, Any

from lethe_compile.config import LetheConfig
from lethe_compile.kernels.recurrent.call import StatefulCall
from lethe_compile.passes.base import PassRecord
from lethe_compile.passes.program import Site
from lethe_compile.pool import Geometry
from lethe_compile.printing import Printable, bytes_text, ranges, styled, table_of

if TYPE_CHECKING:
    import torch
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

_NEVER = 1 << 62  # thresholds beyond are a policy's way to say never


@dataclass(frozen=True)
class LayerReport:
    """One attention layer: how it was found, its heads and features, and its cache."""

    layer: int
    name: str
    found_by: str
    heads: int
    kv_heads: int
    k_dim: int
    v_dim: int
    scale: float
    mask: str
    mask_proof: str  # what was evaluated to know that it is that mask
    window: int | None
    softcap: float | None
    sinks: bool
    content: bool  # the mask also depends on the content of the sequence
    pool: int
    cache_of: int  # the layer whose cache it attends to: itself, or an earlier one
    keep_sets: int  # sets of retained tokens of one sequence: 1, or one for each KV head
    cached: str  # "keys and values", or the "latent" that they are made of
    bytes_per_token: int
    bytes_otherwise: int | None  # of the other of these two, where the layer has both


@dataclass(frozen=True)
class StateReport:
    """One module that carries state of another kind: its path, and shape and dtype of each tensor, for one row."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    bytes_per_row: int


@dataclass(frozen=True)
class Report(Printable):
    """What `optimize` found, rewrote and refused."""

    passes: tuple[PassRecord, ...]
    layers: tuple[LayerReport, ...]
    states: tuple[StateReport, ...]
    config: LetheConfig
    backend: str
    backend_reason: str
    dtype: str
    device: str
    page_size: int

    @classmethod
    def of(
        cls,
        records: Sequence[PassRecord],
        sites: Sequence[Site],
        stateful: Sequence[StatefulCall],
        config: LetheConfig,
        dtype: torch.dtype,
        device: torch.device,
        backend: tuple[str, str],
        page_size: int,
    ) -> Report:
        """Gather the report from the passes' records and the sites they left."""
        owners = [site.layer for site in sites if not site.shares]
        layers = tuple(_layer(site, owners[site.cache], dtype) for site in sites)
        states = tuple(map(_state, stateful))
        return cls(tuple(records), layers, states, config, *backend, _short(dtype), str(device), page_size)

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one token over all layers."""
        return sum(layer.bytes_per_token for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: passes with their matches and refusals, layers, cache geometry, configuration."""
        cache = {"page_size": self.page_size, "bytes_per_token": self.bytes_per_token}
        return {
            "backend": self.backend,
            "backend_reason": self.backend_reason,
            "dtype": self.dtype,
            "device": self.device,
            "passes": [asdict(record) for record in self.passes],
            "layers": [asdict(layer) for layer in self.layers],
            "states": [asdict(state) for state in self.states],
            "cache": cache,
            "config": self.config.to_dict(),
        }

    def __rich__(self) -> RenderableType:
        from rich.console import Group

        kept = ", per head" if any(layer.keep_sets > 1 for layer in self.layers) else ""
        line = (
            f"{len(self.layers)} attention layers on {self.device}, {self.dtype}, backend {self.backend}"
            f" ({self.backend_reason}); {_policy_words(self.config)}{kept};"
            f" {self.bytes_per_token:,} KV bytes per token, pages of {self.page_size}"
        )
        states = self._state_lines()
        return Group(pass_table(self.passes), self._layer_table(), *self._proof_lines(), line, *states)

    def _state_lines(self) -> list[str]:
        """Modules with the same state on one line: what stays beside the KV cache, whole."""
        alike: dict[tuple[tuple[int, ...] | str, ...], list[StateReport]] = {}
        for state in self.states:
            alike.setdefault((*state.shapes, *state.dtypes), []).append(state)
        return [
            f"other state kept, not pruned: {len(states)} modules ({', '.join(state.name for state in states)}), each "
            + ", ".join(f"{list(shape)} {dtype}" for shape, dtype in zip(one.shapes, one.dtypes, strict=True))
            + f" a row, {bytes_text(one.bytes_per_row)}"
            for states in alike.values()
            for one in states[:1]
        ]

    def _proof_lines(self) -> list[Text]:
        """Masks of the same kind and proof on one line."""
        alike: dict[tuple[str, str], list[int]] = {}
        for layer in self.layers:
            alike.setdefault((_mask_words(layer), layer.mask_proof), []).append(layer.layer)
        return [
            styled("mask of layers ", (ranges(layers), "bold"), ": ", (mask, "green"), f", {proof}")
            for (mask, proof), layers in alike.items()
        ]

    def _layer_table(self) -> Table:
        table = table_of("attention", "layer", "name", "found by", "heads", "head_dim", "mask", "B/token")
        for layer in self.layers:
            dims = str(layer.k_dim) if layer.k_dim == layer.v_dim else f"{layer.k_dim}/{layer.v_dim}"
            heads = f"{layer.heads}/{layer.kv_heads}"  # query heads over KV heads
            shared = layer.cache_of != layer.layer
            size = f"layer {layer.cache_of}'s" if shared else f"{layer.bytes_per_token:,}{_instead_of(layer)}"
            table.add_row(str(layer.layer), layer.name, layer.found_by, heads, dims, _mask_words(layer), size)
        return table


def pass_table(records: Sequence[PassRecord]) -> Table:
    """What each pass matched and refused, and how many nodes the graph had after it."""
    table = table_of("passes", "pass", "nodes", "matches", "refusals")
    for record in records:
        refusals = "\n".join(f"{_at(n.layer)}{n.node}: {n.text}" for n in record.refusals)
        shown = styled((refusals, "yellow") if refusals else ("none", "dim"))
        table.add_row(record.name, str(record.nodes), str(len(record.matches) or "·"), shown)
    return table


@dataclass(frozen=True)
class CacheStats(Printable):
    """The cache of one generation. Nested lists are ``[layers][rows]``, `seen` is ``[rows]``.

    Layers are those with a cache of their own: others that attend to the same keys and values are no part of the count.

    Bytes are of the pages that hold keys and values; `bytes_freed` counts pages that rounds emptied, by layer and row.
    `sparsity` is Hoyer's measure of the scores when a round last looked, NaN where none has.

    Where KV heads keep tokens of their own, figures are means over the heads of a layer, bytes their sums, and `heads`
    are the tokens that each retained, ``[layers][rows][heads]``; else it is None.
    """

    seen: list[int]
    retained: list[list[float]]
    retained_mean: list[list[float]]
    rounds: list[list[float]]
    threshold: list[list[float]]
    sparsity: list[list[float]]
    bytes_held: list[list[int]]
    bytes_freed: list[list[int]]
    timeline: list[list[float]]  # [rounds][layers]: retained tokens after each round, mean over sequences under way
    bytes_peak: int
    bytes_mean: float
    pressed: int = 0  # rounds that pruned harder for lack of pages
    state_bytes: list[int] = field(default_factory=list)  # [stateful modules]: of all rows, beside the pages
    heads: list[list[list[int]]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; a threshold that is never reached and a sparsity never measured are null."""
        values = asdict(self)
        values["threshold"] = [[None if t >= _NEVER else t for t in row] for row in self.threshold]
        values["sparsity"] = [[None if isnan(s) else s for s in row] for row in self.sparsity]
        return values

    def __rich__(self) -> RenderableType:
        from rich.console import Group

        columns = ("layer", "retained", "of", "rounds", "threshold", "sparsity", "held", "freed")
        over = "sequences" if self.heads is None else "sequences and their KV heads, per head; bytes of all heads"
        table = table_of(f"cache, mean over {over}", *columns)
        seen = _mean(self.seen)
        for layer, retained in enumerate(self.retained):
            known = [s for s in self.sparsity[layer] if not isnan(s)]
            reached = [t for t in self.threshold[layer] if t < _NEVER]
            table.add_row(
                str(layer),
                f"{_mean(retained):,.0f}",
                f"{seen:,.0f}",
                f"{_mean(self.rounds[layer]):.1f}",
                f"{_mean(reached):,.0f}" if reached else "never",
                f"{_mean(known):.2f}" if known else "",
                bytes_text(_mean(self.bytes_held[layer])),
                bytes_text(_mean(self.bytes_freed[layer])),
            )
        pressed = f"; {self.pressed} rounds for lack of pages" if self.pressed else ""
        sizes = f"mean {bytes_text(self.bytes_mean)}, peak {bytes_text(self.bytes_peak)}"
        kept = f"; other state {bytes_text(sum(self.state_bytes))}" if self.state_bytes else ""
        return Group(table, f"all sequences: {sizes}{pressed}{kept}")


def _policy_words(config: LetheConfig) -> str:
    """The policy, its own settings, and its caps."""
    settings = [f"{name} {value}" for name, value in config.policy_options.items()]
    caps = (("max_tokens", config.max_tokens), ("budget", config.budget))
    settings += [f"{name} {value}" for name, value in caps if value is not None]
    return f"policy {config.policy}" + (f" ({', '.join(settings)})" if settings else "")


def _mask_words(layer: LayerReport) -> str:
    window = "" if layer.window is None else f" {layer.window}"
    softcap = "" if layer.softcap is None else f", softcap {layer.softcap:g}"
    content = ", by content" if layer.content else ""
    return f"{layer.mask}{window}{content}{softcap}{', sinks' if layer.sinks else ''}"


def _instead_of(layer: LayerReport) -> str:
    """What a layer that could cache its latent does, and what the other form would have taken."""
    if layer.bytes_otherwise is None:
        return ""
    other = "expanded" if layer.cached == "latent" else "latent"
    return f" {'latent' if layer.cached == 'latent' else 'expanded'}, {other} {layer.bytes_otherwise:,}"


def _layer(site: Site, cache_of: int, dtype: torch.dtype) -> LayerReport:
    assert site.mask is not None, "a site is only inserted once its mask is proved"
    size = 0 if site.shares else site.keep_sets * Geometry(*site.geometry).bytes_per_token(dtype)
    beside = site.kv_heads * site.columns  # what masks read is cached with either
    otherwise = None if site.alternative is None else (site.alternative + beside) * dtype.itemsize
    return LayerReport(
        layer=site.layer,
        name=site.name,
        found_by=site.found_by,
        heads=site.heads,
        kv_heads=site.kv_heads,
        k_dim=site.k_dim,
        v_dim=site.v_dim,
        scale=site.scale,
        mask=site.mask.kind,
        mask_proof=site.mask.evidence,
        window=site.mask.window,
        softcap=site.softcap,
        sinks=site.sinks,
        content=site.content,
        pool=site.cache_group,
        cache_of=cache_of,
        keep_sets=site.keep_sets,
        cached="latent" if site.latent else "keys and values",
        bytes_per_token=size,
        bytes_otherwise=otherwise,
    )


def _state(call: StatefulCall) -> StateReport:
    return StateReport(
        name=call.name,
        shapes=tuple(place.shape for place in call.places),
        dtypes=tuple(_short(place.dtype) for place in call.places),
        bytes_per_row=sum(place.bytes_per_row for place in call.places),
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _at(layer: int | None) -> str:
    return "" if layer is None else f"layer {layer}, "


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
