"""Runs an AOTInductor artifact with Triton kernels inside: torch and NumPy are all it takes, no Triton, no ops of ours.

Caches are pages that the programs write in place: each row of each cache has as many, one behind the other, so one page
table serves all. A decode step is replayed as a CUDA graph, with the choice of the next token inside where that is the
most probable one: the host looks at several steps at once, while the device is at the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lethe_compile.artifact.loop import Chosen
from lethe_compile.artifact.manifest import CacheSpec, Manifest
from lethe_compile.artifact.sampling import Floats, Ints
from lethe_compile.artifact.torch_device import check_device
from lethe_compile.errors import InputError
from lethe_compile.transfers import Fetched

CHUNK = 16
"""Steps that the host looks at together; as many again are under way meanwhile."""
_SPARE = 4  # pages more than needed, or a quarter: what then fits keeps its tensors, and CUDA graphs

Program = Callable[..., Sequence[Tensor]]


class KernelRunner:
    """`artifact.Runner` over packages whose caches are pages.

    Args:
        manifest: of an artifact of kind "aoti", made on a CUDA device.
        programs: "step", "decode", and "prune" where there are rounds, as functions of tensors; the packages of the
            artifact by default.
        device: where they run; the artifact's own by default.

    Raises:
        ArtifactError: it was made for a device that is not here.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        programs: Mapping[str, Program] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.manifest = manifest
        self.device = device or check_device(manifest)
        self.programs = programs or load_packages(manifest, self.device)
        self.page, self.most_rows = int(manifest.model["page_size"]), int(manifest.model["most_rows"])
        self._dtype: torch.dtype = getattr(torch, manifest.model["dtype"])
        self.rows = -1
        self.begin(0)

    def begin(self, rows: int) -> None:
        if rows > self.most_rows:
            raise InputError(f"{rows} prompts at once are too many: the artifact takes {self.most_rows}")
        if rows != self.rows:
            self._make(rows)
        for name, tensor in self.caches.items():
            if name.startswith("length_"):
                tensor.zero_()  # in its place, where CUDA graphs look for it; what pages held is not looked at
        shape = (len(self.manifest.caches), rows)
        self.state = {
            one.name: self._full(shape, getattr(torch, one.dtype), np.nan if one.initial is None else one.initial)
            for one in self.manifest.state
        }

    def _make(self, rows: int) -> None:
        self.rows, self.row_pages = rows, 0
        self.caches: dict[str, Tensor] = {}
        for index, spec in enumerate(self.manifest.caches):
            for name, (shape, dtype) in self._pages_of(index, spec).items():
                self.caches[name] = self._full((0, *shape), dtype, 0)
            self.caches[f"length_{index}"] = self._full((rows,), torch.int32, 0)
        self._graph: _DecodeGraph | None = None

    @cached_property
    def recording(self) -> torch.cuda.Stream:
        """One for all graphs: cuBLAS sets a workspace aside for every stream that it meets, and keeps it."""
        return torch.cuda.Stream(self.device)

    @property
    def lengths(self) -> Ints:
        each = [self.caches[f"length_{index}"] for index in range(len(self.manifest.caches))]
        return np.asarray(torch.stack(each).cpu().numpy(), np.int64)

    def reserve(self, tokens: int) -> None:
        pages = -(-(int(self.lengths.max(initial=0)) + tokens) // self.page)
        if pages <= self.row_pages <= 2 * (pages + _SPARE):
            return
        pages += max(_SPARE, pages // 4)
        for name, tensor in self.caches.items():
            if not name.startswith("length_"):
                self.caches[name] = self._resized(tensor, pages)
        self.row_pages = pages
        table = torch.arange(self.rows * pages, dtype=torch.int32, device=self.device)
        self.table = table.view(self.rows, pages)
        self._graph = None

    def step(self, ids: Ints, positions: Ints, new_lengths: NDArray[np.int32], decay: float) -> Floats:
        if decay != (self.manifest.policy["decay"] or 1.0):
            self._undo_decay()
        given = [torch.from_numpy(np.ascontiguousarray(x)).to(self.device) for x in (ids, positions, new_lengths)]
        (logits,) = self.run("decode" if ids.shape[1] == 1 else "step", *given)
        return np.asarray(logits.cpu().numpy(), np.float32)

    def run(self, name: str, ids: Tensor, positions: Tensor, new_lengths: Tensor) -> Sequence[Tensor]:
        """A program; tensors ``[rows, T]`` twice, and ``[rows]``. Caches are written."""
        return self.programs[name](ids, positions, new_lengths, self.table, *self.caches.values())

    def _undo_decay(self) -> None:
        """A program fades scores at every call; a part of a prompt that is not the first must not."""
        for name, tensor in self.caches.items():
            if name.startswith("mass_"):
                tensor.div_(self.manifest.policy["decay"])

    def prune(self, active: NDArray[np.bool_], prompt_length: Ints, next_position: Ints) -> None:
        given = [torch.from_numpy(x).to(self.device) for x in (active, prompt_length, next_position)]
        shape = (self.rows, self.row_pages)
        caches = [x if name.startswith("length_") else x.unflatten(0, shape) for name, x in self.caches.items()]
        results = self.programs["prune"](*given, *self.state.values(), *caches)
        self.state = dict(zip(self.state, results, strict=False))
        for tensor, after in zip(self.caches.values(), results[len(self.state) :], strict=True):
            tensor.copy_(after.view_as(tensor))  # in its place, where CUDA graphs look for it

    def choose_ahead(
        self, tokens: Ints, next_position: Ints, active: NDArray[np.bool_], ends: Ints, steps: int
    ) -> Iterator[Chosen]:
        """As `loop.AheadRunner` says, `CHUNK` steps at a time."""
        if self._graph is None or not np.array_equal(self._graph.ends, ends):
            self._graph = None  # frees the memory that the next one takes
            self._graph = _DecodeGraph(self, ends)
        return self._graph.replay(tokens, next_position, active, steps)

    # ---------------------------------------------------------------------------------------------------------- pages

    def _pages_of(self, index: int, spec: CacheSpec) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        heads, page = spec.kv_heads, self.page
        kinds = {
            f"k_{index}": ((heads, page, spec.k_dim), self._dtype),
            f"v_{index}": ((heads, page, spec.v_dim), self._dtype),
            f"position_{index}": ((page,), torch.int32),
            f"mass_{index}": ((page,), torch.float32),
        }
        taken = self.manifest.programs["step"].inputs
        return {name: kind for name, kind in kinds.items() if name in taken}  # no values where keys hold them

    def _full(self, shape: Sequence[int], dtype: torch.dtype, value: float) -> Tensor:
        return torch.full(tuple(shape), value, dtype=dtype, device=self.device)

    def _resized(self, pages: Tensor, count: int) -> Tensor:
        resized = pages.new_zeros(self.rows, count, *pages.shape[1:])
        kept = min(count, self.row_pages)
        if kept:
            resized[:, :kept] = pages.unflatten(0, (self.rows, self.row_pages))[:, :kept]
        return resized.flatten(0, 1)


class _DecodeGraph:
    """A greedy decode step of the runner's tensors as they are now: captured once, replayed for every token.

    Little is done beside the program, since each small kernel costs as much as a hundredth of a step: which rows count
    the host concludes from the tokens.
    """

    def __init__(self, runner: KernelRunner, ends: Ints) -> None:
        rows, device = runner.rows, runner.device
        self.runner, self.ends = runner, ends
        self._end_tokens = torch.from_numpy(ends.copy()).to(device)
        self.next_position = torch.zeros(rows, dtype=torch.int64, device=device)
        self.active = torch.zeros(rows, dtype=torch.int32, device=device)
        self.record = torch.zeros(2, rows, dtype=torch.int64, device=device)  # a token, and its logit as bits
        self.tokens, self._logit = self.record[0], self.record[1].view(torch.float32)[:rows]
        self._graph = self._capture() if device.type == "cuda" else None

    def replay(self, tokens: Ints, next_position: Ints, active: NDArray[np.bool_], steps: int) -> Iterator[Chosen]:
        for static, given in ((self.tokens, tokens), (self.next_position, next_position), (self.active, active)):
            static.copy_(torch.from_numpy(given))
        under_way: Fetched | None = None
        for start in range(0, steps, CHUNK):
            follows = self._run(min(CHUNK, steps - start))
            if under_way is not None:
                chosen, active = self._chosen(under_way, active)
                yield chosen
            under_way = follows
        if under_way is not None:
            yield self._chosen(under_way, active)[0]

    def _run(self, steps: int) -> Fetched:
        """So many records, once they are there."""
        history = self.record.new_empty(steps, *self.record.shape)
        for index in range(steps):
            if self._graph is None:
                self._step()
            else:
                self._graph.replay()
            history[index].copy_(self.record)
        return Fetched(history)

    def _step(self) -> None:
        (logits,) = self.runner.run("decode", self.tokens[:, None], self.next_position[:, None], self.active)
        self.next_position += self.active
        torch.argmax(logits, dim=1, out=self.tokens)  # the place of a NaN if there is one
        torch.gather(logits, 1, self.tokens[:, None], out=self._logit[:, None])
        if len(self._end_tokens):
            self.active *= (self.tokens[:, None] != self._end_tokens).all(dim=1)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """The step as a CUDA graph; no row is active while it is made, so nothing is appended."""
        stream = self.runner.recording
        stream.wait_stream(torch.cuda.current_stream(self.runner.device))
        with torch.cuda.stream(stream):
            self._step()
        torch.cuda.current_stream(self.runner.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._step()
        return graph

    def _chosen(self, history: Fetched, active: NDArray[np.bool_]) -> tuple[Chosen, NDArray[np.bool_]]:
        """What the records say, where `active` rows fed the first step; and which rows are active after the last."""
        seen = history.wait()
        tokens, bits = seen[:, 0], np.ascontiguousarray(seen[:, 1])
        going = np.logical_and.accumulate(np.vstack([active[None], ~np.isin(tokens, self.ends)]), axis=0)
        sound = np.isfinite(bits.view(np.float32)[:, : tokens.shape[1]])
        return Chosen(tokens, going[:-1], sound), going[-1]


def load_packages(manifest: Manifest, device: torch.device) -> dict[str, Program]:
    """The compiled programs of an artifact, which share one copy of the weights on the device."""
    packages, weights = {}, load_weights(manifest, device)
    for name, program in manifest.programs.items():
        # Without locks and events of its own, a package can be captured.
        package = torch._inductor.aoti_load_package(str(manifest.path(program.file)), run_single_threaded=True)
        names = package.get_constant_fqns()
        if names:
            own = {one: weights[constant_name(name, one, weights)] for one in names}
            package.load_constants(own, check_full_update=True, user_managed=True)
        packages[name] = package
    # Packages use the tensors without holding them.
    return {name: _Holding(package, weights) for name, package in packages.items()}


class _Holding:
    def __init__(self, package: Any, weights: Mapping[str, Tensor]) -> None:
        self._package, self._weights = package, weights

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        results: Sequence[Tensor] = self._package(*inputs)
        return results


def load_weights(manifest: Manifest, device: torch.device) -> dict[str, Tensor]:
    """The tensors of an artifact's weights file, on the device."""
    from safetensors.torch import load_file

    weights: dict[str, Tensor] = load_file(manifest.path(WEIGHTS), device=str(device))
    return weights


WEIGHTS = "weights.safetensors"


def constant_name(program: str, name: str, known: Mapping[str, Any]) -> str:
    """What a program's constant is called in the weights file: constants of one program alone bear its name."""
    own = f"{program}:{name}"
    return own if own in known else name
