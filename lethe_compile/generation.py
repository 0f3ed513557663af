"""The decode loop: transformers' `generate`, arguments, shapes and tokens alike, over any `Decoder`.

A step chooses the next token of every row, asks the stopping criteria, and decodes it, all on the device. One copy a
step tells the host how many rows go on, whether their scores were sound, and the tokens for a streamer. A GPU does not
wait for the host to look: the next step is launched before, without an active row if it turns out that all have ended.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lethe_compile import sampling
from lethe_compile.errors import InputError, LetheError
from lethe_compile.prompt import Prompt, read_prompt
from lethe_compile.transfers import Fetched

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer
    from transformers.generation.utils import GenerateDecoderOnlyOutput


class Decoder(Protocol):
    """A language model with a cache, as the loop sees it: R rows, V = `vocab_size`, logits float32 `[R, V]`.

    A `generation_config` attribute, where there is one, gives the defaults of `generate`; `ranks`, where it is there
    and not None, the processes that run the model together (`distributed.Ranks`): tokens and ends are rank 0's.
    """

    vocab_size: int
    max_positions: int | None  # positions the model has, None without a limit

    @property
    def device(self) -> torch.device:
        """Where the model lies, and its inputs must be."""

    def begin(self, rows: int, prompt_lengths: Tensor, new_tokens: int) -> None:
        """Makes a fresh cache for a batch whose prompts have `prompt_lengths` `[R]` tokens.

        No row gets more than `new_tokens` new ones. An `InputError` says that nothing was begun, as when another
        generation holds the cache, or the batch does not fit.
        """

    def prefill(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Logits of each row's last prompt token, from right-padded ids `[R, T]` and `lengths` `[R]`."""

    def decode(self, tokens: Tensor, active: Tensor) -> Tensor:
        """Logits after one more token `[R]` a row; those of rows that are not `active` `[R]` may be anything.

        A row that is not active keeps its cache and position as they are. `active` is never true again once it was
        false. The next call may overwrite the logits.
        """

    def end(self) -> None:
        """Frees the cache. Called once for each `begin`, also for one that broke off, unless by `InputError`."""


def generate(
    decoder: Decoder,
    inputs: Tensor | None = None,
    *,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: Sequence[Any] | None = None,
    stopping_criteria: Sequence[Any] | None = None,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
    tokenizer: Any = None,
    streamer: BaseStreamer | None = None,
    seed: int | None = None,
    progress: bool = False,
    **options: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Continues each prompt, greedily or by sampling, as transformers' `generate` does.

    `inputs` (or `input_ids`) are int64 or int32 `[rows, prompt]`, left-padded where they differ in length;
    `attention_mask` `[rows, prompt]` is 0 on the padding. Without it the padding is what equals `pad_token_id`, unless
    that ends a sequence too. `options` are fields of `transformers.GenerationConfig` and override `generation_config`,
    which overrides the decoder's own. Processors, criteria and the streamer see the prompts left-padded, followed by
    the new tokens; `tokenizer` is needed for `stop_strings` only. With `seed`, sampling draws from a generator of
    this call, the tokens that `torch.manual_seed(seed)` would give; without, from torch's global one. `progress`
    shows tokens and tokens per second on stderr.

    Returns int64 `[rows * num_return_sequences, prompt + new]`, each row filled with `pad_token_id` after its end; with
    `return_dict_in_generate` a `GenerateDecoderOnlyOutput`, whose scores and logits mean nothing after a row's end.

    Raises `InputError` for prompts and options that cannot be run, before any work, and `LetheError` naming row and
    step when the model computes NaN.
    """
    from tqdm import tqdm

    if inputs is not None and input_ids is not None:
        raise InputError("inputs and input_ids are two names of the same argument: pass one")
    config = sampling.resolve_config(getattr(decoder, "generation_config", None), generation_config, options)
    given = input_ids if inputs is None else inputs
    prompt = read_prompt(given, attention_mask, config, decoder.vocab_size, decoder.device)
    eos = sampling.token_ids(config.eos_token_id, decoder.device)
    criteria = sampling.stopping_criteria(
        config, stopping_criteria, prompt.ids.shape[1], _room(decoder, prompt), eos, tokenizer
    )
    new_tokens = _check_length(decoder, prompt, criteria)
    processors = sampling.logits_processors(
        config, logits_processor, prompt.ids, new_tokens, eos, decoder.vocab_size, prefix_allowed_tokens_fn
    )
    pad = _pad_token(config, criteria, eos, prompt)
    rule = _Rule(processors, criteria, pad, bool(config.do_sample), _generator(decoder, seed))
    record = _Record(config)
    if streamer is not None:
        streamer.put(prompt.ids.cpu())
    with ExitStack() as stack, torch.no_grad():
        if streamer is not None:
            stack.callback(streamer.end)
        bar = stack.enter_context(tqdm(total=prompt.rows * new_tokens, unit=" tokens", disable=not progress))
        stack.enter_context(_cache(decoder, prompt, new_tokens))
        report = _Report(prompt.rows, decoder.device, streamer, bar.update)
        sequences = _run(decoder, prompt, new_tokens, rule, record, report)
    if not config.return_dict_in_generate:
        return sequences
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    fields: dict[str, Any] = {"sequences": sequences, "scores": record.scores, "logits": record.logits}
    return GenerateDecoderOnlyOutput(**fields)


@contextmanager
def _cache(decoder: Decoder, prompt: Prompt, new_tokens: int) -> Iterator[None]:
    """The decoder's cache, freed on every exit; a refused `begin` must not free that of the generation under way."""
    refused = False
    try:
        try:
            decoder.begin(prompt.rows, prompt.lengths, new_tokens)
        except InputError:
            refused = True
            raise
        yield
    finally:
        if not refused:
            decoder.end()


@dataclass(frozen=True)
class _Rule:
    """How logits become tokens, and when a row ends."""

    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    pad: Tensor | None  # what follows a row's end; None: no id ends a row, so all go on until the last one has ended
    sample: bool
    generator: torch.Generator | None

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The next token `[R]` of each row, and whether its scores `[R, V]` were sound `[R]`.

        They are not where one is NaN or all are -inf, nor, for sampling, where one is inf. The chosen value tells:
        `argmax` returns a NaN's index if there is one, and `softmax` makes the whole row NaN.
        """
        if not self.sample:
            tokens = scores.argmax(dim=-1)
            return tokens, scores.gather(1, tokens[:, None])[:, 0] > -torch.inf
        # torch.multinomial, token for token, without the check of its input that makes the host wait for a GPU.
        race = torch.empty_like(scores).exponential_(1.0, generator=self.generator)
        probabilities = scores.softmax(dim=-1)
        tokens = (probabilities / race).argmax(dim=-1)
        return tokens, probabilities.gather(1, tokens[:, None])[:, 0].isfinite()

    def may_differ(self) -> bool:
        """Whether two processes may end a row at different steps: by their clocks, or by code of others."""
        return not all(type(one).__name__ in _BY_TOKENS for one in self.criteria)

    def contiguous(self) -> bool:
        """Whether the ids must be: code of others may call `view` on them, as it can in transformers."""
        known = ("transformers.", "lethe_compile.")
        return not all(type(one).__module__.startswith(known) for one in [*self.processors, *self.criteria])


_BY_TOKENS = ("MaxLengthCriteria", "EosTokenCriteria", "StopStringCriteria")


class _Record:
    """What `return_dict_in_generate` keeps of each step: tensors `[R, V]`, or None where not asked for."""

    def __init__(self, config: GenerationConfig) -> None:
        keep = bool(config.return_dict_in_generate)
        self.scores: tuple[Tensor, ...] | None = () if keep and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if keep and config.output_logits else None

    @property
    def empty(self) -> bool:
        return self.scores is None and self.logits is None

    def add(self, scores: Tensor, logits: Tensor) -> None:
        self.scores = None if self.scores is None else (*self.scores, scores)
        self.logits = None if self.logits is None else (*self.logits, logits)


def _overlaps(device: torch.device) -> bool:
    """Whether launching a step before the last one's report is read gains anything."""
    return device.type == "cuda"


class _Report:
    """What the host learns of each step, once its copy has arrived, and tells the streamer and the progress bar."""

    def __init__(
        self, rows: int, device: torch.device, streamer: BaseStreamer | None, advance: Callable[[int], Any]
    ) -> None:
        self.overlap = _overlaps(device)
        self._streamer = streamer
        self._advance = advance  # hears how many tokens a step added
        self._step, self._left = 0, rows

    def send(self, shown: Tensor, unfinished: Tensor, broken: Tensor, logits: Tensor | None) -> None:
        """Starts the copy of a step: the tokens `shown`, whether rows are `unfinished` or `broken`, all `[R]`.

        `logits` `[R, V]` are what the processors got, and tell who broke the scores; None: there are no processors.
        """
        self._step += 1
        self._broken, self._logits = broken, logits
        self._copy = Fetched(torch.cat([shown, unfinished.sum()[None], broken.any()[None]]))

    def read(self) -> bool:
        """Waits for the step that was sent: whether any row goes on. Raises for broken scores."""
        host = torch.from_numpy(self._copy.wait())
        if host[-1]:
            raise _broken_scores(self._broken, self._logits, self._step)
        self._advance(self._left)
        if self._streamer is not None:
            self._streamer.put(host[:-2].clone())
        self._left = int(host[-2])
        return self._left > 0


def _run(decoder: Decoder, prompt: Prompt, new_tokens: int, rule: _Rule, record: _Record, report: _Report) -> Tensor:
    """The sequences `[R, T + new]`, new <= `new_tokens`."""
    rows, columns = prompt.ids.shape
    buffer = torch.cat([prompt.ids, prompt.ids.new_empty(rows, new_tokens)], dim=1)
    ids, contiguous = prompt.ids, rule.contiguous()
    ranks, foreign = getattr(decoder, "ranks", None), rule.may_differ()
    unfinished = active = torch.ones(rows, dtype=torch.bool, device=ids.device)
    logits = decoder.prefill(prompt.right_padded(), prompt.lengths)
    for end in range(columns + 1, columns + new_tokens + 1):
        scores, given = _scores(rule, record, ids, logits, active)
        tokens, sound = rule.choose(scores)
        if ranks is not None:
            tokens, sound = ranks.from_first(tokens, sound)
        shown = tokens if rule.pad is None else torch.where(unfinished, tokens, rule.pad)
        buffer[:, end - 1] = shown
        ids = buffer[:, :end].contiguous() if contiguous else buffer[:, :end]
        unfinished = unfinished & ~rule.criteria(ids, record.scores)
        if ranks is not None and foreign:
            (unfinished,) = ranks.from_first(unfinished)
        report.send(shown, unfinished, active & ~sound, given)
        # A finished row is fed its own choice: its padding need not be an id of the vocabulary.
        active = unfinished.any().repeat(rows) if rule.pad is None else unfinished
        last = end == columns + new_tokens
        ahead = report.overlap and not last
        try:
            if ahead:
                logits = decoder.decode(tokens, active)
        finally:  # whatever became of the next step, this one's tokens are made
            more = report.read()
        if last or not more:
            break
        if not ahead:
            logits = decoder.decode(tokens, active)
    return buffer[:, :end].contiguous()


def _scores(rule: _Rule, record: _Record, ids: Tensor, logits: Tensor, active: Tensor) -> tuple[Tensor, Tensor | None]:
    """The scores `[R, V]` to choose by, and the logits that the processors got, None where there are none."""
    logits = logits.float()
    if not rule.processors and record.empty:
        return logits, None
    logits = logits.masked_fill(~active[:, None], 0.0)  # a copy: processors may write into it, and records stay
    scores: Tensor = rule.processors(ids, logits)  # type: ignore[arg-type]  # transformers says LongTensor
    record.add(scores, logits)
    return scores, logits


def _broken_scores(broken: Tensor, logits: Tensor | None, step: int) -> LetheError:
    """The error of the first `broken` row `[R]`, from whose scores no token can be chosen; steps count from 1."""
    row = int(broken.nonzero()[0])
    if logits is not None and logits[row].isfinite().all():
        return InputError(f"row {row}, step {step}: the logits processors leave no token to choose; loosen them")
    return LetheError(
        f"row {row}, step {step}: the model's logits are not finite. Look for NaN in its weights, and for overflow if "
        "it runs in float16; remove_invalid_values=True goes on regardless"
    )


def _room(decoder: Decoder, prompt: Prompt) -> int | None:
    return None if decoder.max_positions is None else decoder.max_positions - prompt.longest


def _check_length(decoder: Decoder, prompt: Prompt, criteria: StoppingCriteriaList) -> int:
    """New tokens at most, for each row, by the criteria's `MaxLengthCriteria` (the caller's own may be among them)."""
    length, columns, room = criteria.max_length, prompt.ids.shape[1], _room(decoder, prompt)
    assert length is not None  # sampling.stopping_criteria always includes one
    wanted = max(length - columns, 1)
    if room is not None and wanted > room:
        raise InputError(
            f"a prompt of {prompt.longest} tokens and up to {wanted} new ones need {prompt.longest + wanted} "
            f"positions, and the model has {decoder.max_positions}: shorten the prompt or lower max_new_tokens"
        )
    if length <= columns:
        raise InputError(
            f"max_length={length} includes the prompt, which has {columns} tokens already: raise it, or set "
            "max_new_tokens instead"
        )
    return wanted


def _pad_token(
    config: GenerationConfig, criteria: StoppingCriteriaList, eos: Tensor | None, prompt: Prompt
) -> Tensor | None:
    if not any(hasattr(one, "eos_token_id") for one in criteria):
        return None
    if config.pad_token_id is not None:
        return torch.tensor(config.pad_token_id, device=prompt.ids.device)
    if eos is None:
        raise InputError("an EosTokenCriteria ends rows, but nothing says what follows: set pad_token_id")
    if prompt.rows > 1:
        warnings.warn(f"pad_token_id is not set: rows that end early are filled with {int(eos[0])}", stacklevel=3)
    return eos[0]


def _generator(decoder: Decoder, seed: int | None) -> torch.Generator | None:
    if seed is None:
        return None
    if not isinstance(seed, int):
        raise InputError(f"seed must be an int, not {seed!r}")
    return torch.Generator(decoder.device).manual_seed(seed)
