"""Trains the reasoner of `models/reasoner` from scratch on one device, and evaluates it free-running.

    PYTHONPATH=. python3 tools/train_reasoner.py --out runs/reasoner --seconds 285

Short traces first, then longer ones, then all lengths mixed. A stage ends early once its loss is low, so the time
goes where it is needed. The loss counts trace tokens only: a prompt is random. Writes the model (bf16 shards), the
tokenizer, and `results.json` to `--out`; a CPU run with tiny sizes takes seconds (see --help).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lethe_compile.models.reasoner.rollout import score
from lethe_compile.models.reasoner.sharpness import EntropyMeter, metered_attention
from lethe_compile.models.reasoner.task import FAMILIES, generate_problems, sequences
from lethe_compile.models.reasoner.vocabulary import BOS, EOS, PAD, WORDS

PROMPT_ROOM = 80  # tokens kept for the prompt within a sequence
SHORTEST_TRACE = 120
FIRST_STAGE, MIDDLE_STAGES = 0.3, 0.3  # at most these shares of the run, before all lengths are mixed
STAGE_DONE = 0.01  # nats per token
POOL_BATCHES = 48  # batches generated at once: the simulators are sequential in time, wide in problems


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for the model and results.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=400.0, help="time for training; the schedule follows it")
    parser.add_argument("--steps", type=int, default=1_000_000, help="stop after so many steps, if that is sooner")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 3072, 4096], metavar="L")
    parser.add_argument(
        "--fill", type=float, default=0.0, metavar="F",
        help="a length class L holds traces of at least F * L - 80 tokens, which saves padding but leaves gaps between "
        "the classes; 0: all that do not fit the next shorter class",
    )  # fmt: skip
    parser.add_argument("--init", type=Path, help="continue from the model in this directory, all lengths mixed")
    parser.add_argument("--batch-tokens", type=int, default=160_000)
    parser.add_argument(
        "--entropy", type=float, default=0.0, metavar="WEIGHT",
        help="weight of the mean attention entropy in the loss: sharpens a trained model (0.01, with --init)",
    )  # fmt: skip
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--warmup", type=int, default=150, metavar="STEPS")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--save-every", type=float, default=120.0, metavar="SECONDS")
    parser.add_argument("--log-every", type=int, default=50, metavar="STEPS")
    parser.add_argument("--eval-problems", type=int, default=600, help="per family; 0: none")
    parser.add_argument("--eval-buckets", type=int, nargs="+", default=[1000, 2000, 3000, 4000], metavar="EDGE")
    return parser.parse_args(argv)


def build_model(layers: int, width: int, longest: int) -> Any:
    """A randomly initialised Qwen3: heads of 64, a third as many KV heads, and QK-norm, which keeps attention sharp."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(WORDS), hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=max(1, width // 192), head_dim=64,
        max_position_embeddings=2 * longest, tie_word_embeddings=False, use_cache=True,
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def save(model: Any, out: Path) -> None:
    """Weights as bf16 shards under 16 MiB, with config and generation config; the live model stays fp32."""
    from transformers import GenerationConfig, Qwen3ForCausalLM

    stored = Qwen3ForCausalLM(model.config).bfloat16()
    stored.load_state_dict({name: tensor.detach().cpu().bfloat16() for name, tensor in model.state_dict().items()})
    stored.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=False)
    stored.save_pretrained(out, max_shard_size="12MB")


def save_tokenizer(out: Path, longest: int) -> None:
    """A word-level tokenizer split at white space, with <bos> in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
        clean_up_tokenization_spaces=False, model_max_length=2 * longest,
    )  # fmt: skip
    tokenizer.save_pretrained(out)


class Batches:
    """Endless batches of a length class, all families mixed, from pools of fresh problems."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.tokens, self.device, self.fill = options.batch_tokens, options.device, options.fill
        self.seed = 1_000_003 * (options.seed + 1)
        self.lengths = sorted(options.lengths)
        self.pools: dict[int, Iterator[tuple[Tensor, Tensor]]] = {}

    def _range(self, length: int) -> tuple[int, int]:
        """Fewest and most trace tokens of a length class."""
        shorter = [other for other in self.lengths if other < length]
        least = shorter[-1] - PROMPT_ROOM if shorter else SHORTEST_TRACE
        if self.fill:
            least = int(self.fill * length) - PROMPT_ROOM
        return least, length - PROMPT_ROOM

    def _pool(self, length: int, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        each = math.ceil(rows * POOL_BATCHES / len(FAMILIES))
        parts = []
        for family in FAMILIES:
            self.seed += 1
            low, high = self._range(length)
            fresh = generate_problems(family, each, seed=self.seed, min_tokens=low, max_tokens=high, device=self.device)
            parts.append(sequences(fresh, length))
        ids, mask = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        for chosen in torch.randperm(len(ids), device=ids.device)[: rows * POOL_BATCHES].split(rows):
            yield ids[chosen], ids[chosen].masked_fill(~mask[chosen], -100)

    def draw(self, length: int) -> tuple[Tensor, Tensor]:
        """Token ids and labels [rows, length]; labels are -100 outside of the traces."""
        rows = max(len(FAMILIES), self.tokens // length)
        batch = next(self.pools.get(length, iter(())), None)
        if batch is None:
            self.pools[length] = self._pool(length, rows)
            batch = next(self.pools[length])
        return batch


class Curriculum:
    """Length classes by stage: the shortest, then pairs of neighbours, then all."""

    def __init__(self, lengths: list[int], skip: bool = False) -> None:
        self.stages = [lengths[:1], *(lengths[i : i + 2] for i in range(len(lengths) - 1)), lengths]
        self.stage = len(self.stages) - 1 if skip else 0
        self.loss = math.inf  # of the last steps within the stage

    def choose(self, progress: float) -> int:
        """Length class for the next batch; longer ones are drawn more often."""
        middle = max(1, len(self.stages) - 2)
        cap = FIRST_STAGE + MIDDLE_STAGES * self.stage / middle
        if self.stage < len(self.stages) - 1 and (progress >= cap or self.loss < STAGE_DONE):
            self.stage, self.loss = self.stage + 1, math.inf
        lengths = self.stages[self.stage]
        weights = torch.arange(1.0, len(lengths) + 1) ** 0.5
        return lengths[int(torch.multinomial(weights, 1))]

    def observe(self, loss: float) -> None:
        """Takes in the loss of recent steps."""
        self.loss = loss


def rate_share(step: int, warmup: int, progress: float) -> float:
    """Learning rate as a share of its peak: linear warm-up, then a cosine down to 1%."""
    return min(1.0, (step + 1) / warmup) * (0.01 + 0.495 * (1 + math.cos(math.pi * min(1.0, progress))))


def build_optimizer(model: Any, options: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW; norms are not decayed."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98), fused=options.device.startswith("cuda"))


def train(model: Any, options: argparse.Namespace, meter: EntropyMeter | None) -> dict[str, float]:
    """Trains in place; returns steps, seconds, tokens and the last loss."""
    optimizer, batches = build_optimizer(model, options), Batches(options)
    curriculum = Curriculum(options.lengths, skip=options.init is not None)
    losses, mean, tokens, step, progress = torch.zeros(2, device=options.device), math.nan, 0, 0, 0.0
    start = saved = time.perf_counter()
    while progress < 1.0:
        ids, labels = batches.draw(curriculum.choose(progress))
        for group in optimizer.param_groups:
            group["lr"] = options.lr * rate_share(step, options.warmup, progress)
        losses += update(model, optimizer, ids, labels, meter, options.entropy)
        step, tokens = step + 1, tokens + ids.numel()
        progress = max((time.perf_counter() - start) / options.seconds, step / options.steps)
        if step % options.log_every == 0:
            (mean, entropy), seconds = (losses / options.log_every).tolist(), time.perf_counter() - start
            losses.zero_()
            curriculum.observe(mean)
            state = f"step {step} stage {curriculum.stage} loss {mean:.6f} entropy {entropy:.3f}"
            print(f"{seconds:6.1f} s  {state}  {tokens / seconds:,.0f} tokens/s", flush=True)
        if time.perf_counter() - saved > options.save_every:
            save(model, options.out)
            saved = time.perf_counter()
    return {"steps": step, "seconds": time.perf_counter() - start, "tokens": tokens, "loss": mean}


def update(
    model: Any, optimizer: torch.optim.Optimizer, ids: Tensor, labels: Tensor, meter: EntropyMeter | None, weight: float
) -> Tensor:
    """One optimizer step on ids [rows, length]; returns the mean loss per trace token and the entropy, detached."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    entropy = loss.new_zeros(()) if meter is None else meter.drain()
    (loss + weight * entropy).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.stack([loss, entropy]).detach()


def evaluate(out: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Scores the model as stored in `out`, loaded to fp32, on every family and length bucket."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).to(options.device).eval()
    rows = []
    for family in FAMILIES:
        start = time.perf_counter()
        for row in score(model, family, options.eval_buckets, options.eval_problems, seed=options.seed + 77):
            print(json.dumps(row), flush=True)
            rows.append(row)
        print(f"{family}: {time.perf_counter() - start:.0f} s", flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    """Trains, saves, evaluates."""
    from transformers import AutoModelForCausalLM

    options = arguments(argv)
    torch.manual_seed(options.seed)
    longest = max(options.lengths)
    model = build_model(options.layers, options.width, longest)
    if options.init is not None:
        model = AutoModelForCausalLM.from_pretrained(options.init, dtype=torch.float32)
    model.to(options.device).train()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(WORDS)} words", flush=True)
    if options.compile:  # one layer is compiled once, for every length
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    with metered_attention() if options.entropy else nullcontext() as meter:
        summary = train(model, options, meter)
    save(model, options.out)
    save_tokenizer(options.out, longest)
    results = evaluate(options.out, options) if options.eval_problems else []
    report = {"training": summary, "results": results}
    (options.out / "results.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
