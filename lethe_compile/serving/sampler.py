"""Chooses the next token of every row at once, each by its own parameters and from its own draws.

Temperature, top-k, top-p and min-p of all rows are one computation on the device; rows with any other of transformers'
logits processors are computed one by one. Either gives the tokens that `generate` gives of the row alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lethe_compile.serving.job import Job

_VECTORISED = {"TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper"}


def vectorised(job: Job) -> bool:
    """Whether all that turns the row's logits into scores can be computed with other rows."""
    return (
        all(
            type(one).__name__ in _VECTORISED and type(one).__module__.startswith("transformers.")
            for one in job.terms.processors
        )
        and not job.terms.custom
    )


@dataclass(frozen=True)
class Warp:
    """Parameters of R rows that draw, each [R, 1] on the device, or None where no row uses it."""

    rows: Tensor  # [R] int64
    generators: list[torch.Generator]
    temperature: Tensor | None
    top_k: Tensor | None  # int64; the vocabulary's size where a row has none
    most: int  # of top_k
    off: Tensor | None  # [R, 1] bool: rows without top-k
    below: Tensor | None  # 1 - top_p
    min_p: Tensor | None

    @classmethod
    def of(cls, places: Sequence[int], jobs: Sequence[Job], vocab_size: int, device: torch.device) -> Warp:
        configs = [job.terms.config for job in jobs]

        def column(values: Sequence[float | None], neutral: float) -> Tensor | None:
            filled = [neutral if value is None else value for value in values]
            if all(value == neutral for value in filled):
                return None
            return torch.tensor(filled, device=device, dtype=torch.float32)[:, None]

        ks = [min(config.top_k, vocab_size) if config.top_k else vocab_size for config in configs]
        some = [k for k in ks if k < vocab_size]
        most = max(some, default=0)
        return cls(
            rows=torch.tensor(places, device=device),
            generators=[_generator(job, device) for job in jobs],
            temperature=column([config.temperature for config in configs], 1.0),
            top_k=torch.tensor([min(k, most) for k in ks], device=device)[:, None] if some else None,
            most=most,
            off=torch.tensor([k >= vocab_size for k in ks], device=device)[:, None] if some else None,
            below=column([None if config.top_p in (None, 1.0) else 1 - config.top_p for config in configs], -1.0),
            min_p=column([config.min_p for config in configs], 0.0),
        )

    def scores(self, logits: Tensor) -> Tensor:
        """[R, V] of logits [R, V], as transformers' warpers make them in this order."""
        scores, least = logits, float("-inf")
        if self.temperature is not None:  # on a GPU, torch divides by a number by multiplying with its inverse
            scores = scores * (1 / self.temperature) if scores.is_cuda else scores / self.temperature
        if self.top_k is not None and self.off is not None:
            edge = scores.topk(self.most).values.gather(1, self.top_k - 1)
            scores = scores.masked_fill((scores < edge) & ~self.off, least)
        if self.below is not None:
            ordered, order = scores.sort(dim=-1)
            gone = ordered.softmax(dim=-1).cumsum(dim=-1) <= self.below
            gone[:, -1:] = False
            scores = scores.masked_fill(torch.empty_like(gone).scatter_(1, order, gone), least)
        if self.min_p is not None:
            probability = scores.softmax(dim=-1)
            scores = scores.masked_fill(probability < self.min_p * probability.amax(1, keepdim=True), least)
        return scores


@dataclass
class Sampler:
    """Remembers the rows' parameters on the device for as long as the same requests draw."""

    vocab_size: int
    device: torch.device
    _drawn: Sequence[tuple[int, Job]] = ()  # of which `_warp` is
    _warp: Warp | None = None
    failed: list[tuple[Job, Exception]] = field(default_factory=list)  # whose own processors raised

    def choose(self, logits: Tensor, jobs: Sequence[Job | None]) -> tuple[Tensor, Tensor]:
        """The next token [B] of each row of logits [B, V], and whether its scores were sound [B]; see `generate`.

        `jobs` are of the first rows, None where a row takes no part.
        """
        tokens = logits.argmax(dim=-1)
        sound = logits.gather(1, tokens[:, None])[:, 0] > -torch.inf
        at = [(row, job) for row, job in enumerate(jobs) if job is not None and not job.forcing and not _plain(job)]
        drawn = [(row, job) for row, job in at if vectorised(job)]
        if drawn:
            warp = self._parameters(drawn)
            self._draw(warp, logits, tokens, sound)
        for row, job in at:
            if not vectorised(job) and job.verdict is None:
                self._alone(row, job, logits, tokens, sound)
        forced = [(row, job.forced[job.chosen]) for row, job in enumerate(jobs) if job is not None and job.forcing]
        if forced:
            where, what = torch.tensor(forced, device=self.device).T
            tokens[where], sound[where] = what, True
        return tokens, sound

    def _parameters(self, drawn: Sequence[tuple[int, Job]]) -> Warp:
        places, jobs = zip(*drawn, strict=True)
        if drawn != self._drawn or self._warp is None:
            self._warp, self._drawn = Warp.of(places, jobs, self.vocab_size, self.device), list(drawn)
        return self._warp

    def _draw(self, warp: Warp, logits: Tensor, tokens: Tensor, sound: Tensor) -> None:
        probability = warp.scores(logits.index_select(0, warp.rows)).softmax(dim=-1)
        race = torch.empty_like(probability)
        for row, generator in enumerate(warp.generators):
            race[row].exponential_(1.0, generator=generator)
        chosen = (probability / race).argmax(dim=-1)
        tokens.index_copy_(0, warp.rows, chosen)
        sound.index_copy_(0, warp.rows, probability.gather(1, chosen[:, None])[:, 0].isfinite())

    def _alone(self, row: int, job: Job, logits: Tensor, tokens: Tensor, sound: Tensor) -> None:
        assert job.ids is not None
        try:
            scores = job.processors(job.ids[:, : len(job.source) + job.chosen], logits[row : row + 1].clone())
        except Exception as error:  # code of the request's own: it fails, and nobody else
            self.failed.append((job, error))
            return
        if not job.terms.sample:
            token = scores.argmax(dim=-1)
            good = scores.gather(1, token[:, None])[:, 0] > -torch.inf
        else:
            race = torch.empty_like(scores).exponential_(1.0, generator=_generator(job, self.device))
            probability = scores.softmax(dim=-1)
            token = (probability / race).argmax(dim=-1)
            good = probability.gather(1, token[:, None])[:, 0].isfinite()
        tokens[row], sound[row] = token[0], good[0]


def _plain(job: Job) -> bool:
    """Greedy, by the model's own logits."""
    return not job.terms.sample and not len(job.terms.processors)


def _generator(job: Job, device: torch.device) -> torch.Generator:
    if job.generator is None:
        job.generator = torch.Generator(device).manual_seed(job.seed)
    return job.generator
