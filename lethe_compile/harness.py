"""An optimized model for lm-evaluation-harness: all its tasks, with a cache that is pruned while they run.

    import lm_eval
    from lethe_compile.harness import LetheLM

    lm_eval.simple_evaluate(LetheLM(fast, tokenizer, batch_size=16), tasks=["gsm8k"])

`lm_eval` has it as the model "lethe" too, once this module is imported: ``model_args`` are ``pretrained``, the fields
of `LetheConfig`, and `batch_size`, `max_length`, `device`, `dtype`. https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from lethe_compile.api import optimize
from lethe_compile.config import LetheConfig
from lethe_compile.errors import InputError
from lethe_compile.prompt import left_padded
from lethe_compile.runtime import OptimizedModel
from lethe_compile.sampling import token_ids

try:
    from lm_eval import utils
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise InputError(
        f"lethe_compile.harness needs lm-evaluation-harness ({error}): pip install 'lethe-compile[harness]'"
    ) from error

_MAX_NEW_TOKENS, _MAX_LENGTH = 256, 4096  # where neither the task, nor the model says


@register_model("lethe")
class LetheLM(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """`generate_until`, `loglikelihood` and `loglikelihood_rolling` by one `OptimizedModel`.

    A log-likelihood is that of a generation which is made to write the continuation: the context is one prefill, then
    each token is a decode step, with rounds as they come. So what is pruned costs here what it costs in a generation.

    Args:
        fast: what `optimize` returned; its config says how to prune.
        tokenizer: a transformers tokenizer.
        batch_size: rows at a time.
        max_length: tokens of context and continuation; by default the model's positions. Longer contexts lose their
            beginning, as in the harness's own models.
    """

    def __init__(
        self, fast: OptimizedModel, tokenizer: Any, *, batch_size: int = 1, max_length: int | None = None
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size} is not allowed: must be at least 1")
        self.fast, self.tokenizer, self.batch_size = fast, tokenizer, batch_size
        self.max_length = max_length or fast.max_positions or _MAX_LENGTH
        ids = token_ids(getattr(fast.generation_config, "eos_token_id", None), torch.device("cpu"))
        known = [tokenizer.eos_token_id] if ids is None else ids.tolist()
        self._end = [one for one in known if one is not None]

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> LetheLM:
        """What `lm_eval --model lethe` calls: loads ``pretrained`` and optimizes it."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        given = {**arg_dict, **{key: value for key, value in (additional_config or {}).items() if value is not None}}
        name = given.pop("pretrained", None)
        if name is None:
            raise InputError("model_args must name the model: pretrained=DIRECTORY_OR_HUB_ID")
        settings = {field.name: given[field.name] for field in fields(LetheConfig) if field.name in given}
        device = given.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=given.get("dtype", "auto"))
        tokenizer = AutoTokenizer.from_pretrained(given.get("tokenizer") or name)
        fast = optimize(model.to(device).eval(), LetheConfig.from_dict(settings))
        batch = given.get("batch_size") or 1
        return cls(fast, tokenizer, batch_size=int(batch), max_length=given.get("max_length"))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> LetheLM:
        return cls.create_from_arg_obj(utils.simple_parse_args_string(arg_string), additional_config)

    # ------------------------------------------------------------------------------------------------------- tokens

    @property
    def eot_token_id(self) -> int:
        if not self._end:
            raise InputError("neither the model's generation config nor its tokenizer names an end-of-sequence id")
        return int(self._end[0])

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids; special tokens as the tokenizer adds them, but no second one where the text brings its own."""
        first = getattr(self.tokenizer, "bos_token", None)
        if add_special_tokens is None:
            add_special_tokens = not (first and string.startswith(first))
        ids: list[int] = self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]
        return ids

    # --------------------------------------------------------------------------------------------------- likelihoods

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """For each (text, context ids, continuation ids), its log-likelihood and whether it is the greedy choice."""
        pairs = [self._fit(context or [self.prefix_token_id], target) for _, context, target in requests]
        results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        with self._bar(len(pairs), disable_tqdm, "log-likelihoods") as bar:
            for batch in self._batches([len(context) + len(target) for context, target in pairs]):
                for index, result in zip(batch, self._score([pairs[index] for index in batch]), strict=True):
                    results[index] = result
                bar.update(len(batch))
        return results

    def _fit(self, context: list[int], target: list[int]) -> tuple[list[int], list[int]]:
        """The end of a context that leaves room for the target, at least one token."""
        if len(target) >= self.max_length:
            raise InputError(
                f"a continuation of {len(target)} tokens leaves no room for a context in {self.max_length}"
            )
        return context[-(self.max_length - len(target)) :], target

    @torch.no_grad()
    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        device, rows = self.fast.device, len(pairs)
        context, lengths = _right_padded([one for one, _ in pairs], device)
        target, counts = _right_padded([one for _, one in pairs], device)
        total = torch.zeros(rows, dtype=torch.float64, device=device)
        greedy = torch.ones(rows, dtype=torch.bool, device=device)
        self.fast.begin(rows, lengths, target.shape[1])
        try:
            logits = self.fast.prefill(context, lengths)
            for step in range(target.shape[1]):
                asked, token = step < counts, target[:, step]  # [rows]
                chance = logits.float().log_softmax(-1).gather(1, token[:, None])[:, 0]
                total += torch.where(asked, chance.double(), 0.0)
                greedy &= ~asked | (logits.argmax(-1) == token)
                if step + 1 < target.shape[1]:
                    logits = self.fast.decode(token, step + 1 < counts)
        finally:
            self.fast.end()
        return list(zip(total.tolist(), greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows of `max_length` where it is longer."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            pieces = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length - 1, 1)
            for context, target in map(utils.make_disjoint_window, pieces):
                windows.append((None, context, target))
                owners.append(number)
        sums = [0.0] * len(requests)
        for number, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            sums[number] += value
        return sums

    # ---------------------------------------------------------------------------------------------------- generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations, cut before the first of their stop strings. Requests of the same options share batches."""
        texts = [""] * len(requests)
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        with self._bar(len(requests), disable_tqdm, "generations") as bar:
            for members in groups.values():
                options = dict(requests[members[0]].args[1])
                for batch in self._batches([len(prompts[index]) for index in members]):
                    chosen = [members[place] for place in batch]
                    written = self._generate([prompts[index] for index in chosen], dict(options))
                    for index, text in zip(chosen, written, strict=True):
                        texts[index] = text
                    bar.update(len(batch))
        return texts

    def _generate(self, prompts: Sequence[list[int]], options: dict[str, Any]) -> list[str]:
        stops = options.pop("until", None) or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        new = int(options.pop("max_gen_toks", options.pop("max_new_tokens", _MAX_NEW_TOKENS)))
        if new >= self.max_length:
            raise InputError(f"max_gen_toks={new} leaves no room for a prompt in {self.max_length} tokens")
        if not options.get("do_sample", options.get("temperature", 0.0) > 0):
            options = {key: v for key, v in options.items() if key not in ("temperature", "top_p", "top_k")}
            options["do_sample"] = False
        ids, mask = left_padded([prompt[-(self.max_length - new) :] for prompt in prompts])
        if stops:
            options["stopping_criteria"] = [_StopTexts(self.tokenizer, stops, ids.shape[1])]
        out = self.fast.generate(
            ids.to(self.fast.device),
            attention_mask=mask.to(self.fast.device),
            max_new_tokens=new,
            eos_token_id=self._end or None,
            pad_token_id=self._end[0] if self._end else 0,
            **options,
        )
        return [self._text(row, stops) for row in out[:, ids.shape[1] :].tolist()]

    def _text(self, tokens: list[int], stops: Sequence[str]) -> str:
        end = next((place for place, token in enumerate(tokens) if token in self._end), len(tokens))
        text: str = self.tokenizer.decode(tokens[:end], skip_special_tokens=True)
        for stop in stops:
            text = text.partition(stop)[0] if stop else text
        return text

    # ------------------------------------------------------------------------------------------------------- batches

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices in batches of like length, long ones first."""
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        for first in range(0, len(order), self.batch_size):
            yield order[first : first + self.batch_size]

    def _bar(self, total: int, off: bool, words: str) -> Any:
        from tqdm import tqdm

        return tqdm(total=total, disable=off or self.rank != 0, desc=words)


class _StopTexts:
    """Ends a row once one of `stops` stands in the text of its new tokens.

    Read as text at every step, as the harness's own models do: transformers' criterion, which stays on the device, does
    not know every tokenizer.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], columns: int) -> None:
        self._tokenizer, self._stops, self._columns = tokenizer, stops, columns
        self._tokens = 1 + max(len(tokenizer(stop, add_special_tokens=False)["input_ids"]) for stop in stops)
        self._done: list[bool] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        last = input_ids[:, max(self._columns, input_ids.shape[1] - 2 * self._tokens) :].tolist()
        done = self._done or [False] * len(last)
        self._done = [ended or self._stopped(row) for ended, row in zip(done, last, strict=True)]
        return torch.tensor(self._done, device=input_ids.device)

    def _stopped(self, tokens: list[int]) -> bool:
        text = self._tokenizer.decode(tokens, skip_special_tokens=False)
        return any(stop in text for stop in self._stops)


def _right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [rows, T] int64, zeros behind, and lengths [rows]."""
    lengths = torch.tensor([len(row) for row in rows], device=device)
    ids = torch.zeros(len(rows), max(1, int(lengths.max())), dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
    return ids.to(device), lengths
