"""What GPT costs beside a well-known library, its own matrix products, and its bare training step; MaskGIT likewise.

    python benchmarks/generators.py [--pairs 5] [--threads 2] [--quick] [--only sample|train]

Sampling: GPT-B, 256 tokens of 16,384 codes after a class, fp32, batch 4 with guidance, hence 8 rows. Against
transformers' `LlamaForCausalLM.generate` with the same dimensions, rows and tokens (its key-value cache, multinomial
sampling, no guidance), and against the products of the same tokens with the model's matrices alone.

Training: a step of GPT-B (256 tokens, batch 4) and of MaskGIT of TiTok-B-64 (177 M parameters, 64 tokens, batch 16)
under `GeneratorModule` and Lightning's Trainer (draws, forward, loss, backward, guard, clipping, AdamW; data in memory,
no logging) against forward, loss and backward of the same model alone; for GPT-B also against transformers' Llama.

All take turns in one process; the ratio is that of the medians. --quick: fewer tokens, smaller batches, one pair.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# tokenizers.py beside this file must not stand for Hugging Face's package, which other libraries import.
sys.path.remove(str(Path(__file__).resolve().parent))

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from smalti.generators.base import Condition, Generator
from smalti.generators.gpt import GPT
from smalti.generators.maskgit import MaskGIT
from smalti.tokenizers.spec import Tokens
from smalti.training.generator_module import GeneratorModule
from smalti.training.loop import build_trainer, fit
from smalti.training.optim import OptimConfig

CODES, CLASSES, WIDTH, DEPTH, HEADS, HIDDEN = 16384, 1000, 768, 12, 12, 2048


def gpt(tokens: int) -> GPT:
    spec = {"kind": "discrete", "length": tokens, "dim": 8, "image_size": 256, "codebook_size": CODES}
    model = GPT(tokens=spec, width=WIDTH, depth=DEPTH, heads=HEADS, num_classes=CLASSES, condition_rope="zero")
    nn.init.normal_(model.head.weight, std=0.02)
    return model


def maskgit() -> MaskGIT:
    spec = {"kind": "discrete", "length": 64, "dim": 12, "image_size": 256, "codebook_size": 4096}
    return MaskGIT(tokens=spec, num_classes=CLASSES, body="bert", width=WIDTH, depth=24, heads=16, mlp_width=4 * WIDTH)


def llama(tokens: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=CODES + CLASSES, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=DEPTH,
        num_attention_heads=HEADS, max_position_embeddings=tokens + 1, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def sampling(batch: int, tokens: int) -> dict[str, Callable[[], object]]:
    model, other = gpt(tokens).eval(), llama(tokens).eval()
    condition, seeds = Condition(torch.arange(batch)), torch.arange(batch)
    prompt = CODES + torch.arange(2 * batch)[:, None]
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    rows = {weight.shape[1]: torch.randn(2 * batch, weight.shape[1]) for weight in weights}

    @torch.inference_mode()
    def products() -> None:
        for _ in range(tokens):
            for weight in weights:
                F.linear(rows[weight.shape[1]], weight)

    @torch.inference_mode()
    def generate() -> Any:
        return other.generate(prompt, max_new_tokens=tokens, do_sample=True, top_k=0, use_cache=True)

    return {
        "smalti": lambda: model.generate(condition, seeds=seeds, sampling={"guidance": 2.0}),
        "transformers": generate,
        "products": products,
    }


def taking_turns(calls: dict[str, Callable[[], object]], pairs: int) -> dict[str, float]:
    """Median seconds of each; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for pair in range(pairs + 1):
        for name in calls if pair % 2 else reversed(calls):
            start = time.perf_counter()
            calls[name]()
            if pair:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


class Turns(pl.Callback):
    """Lets other calls run after each step, and takes the time of both; the first step is not counted."""

    def __init__(self, others: dict[str, Callable[[], object]]) -> None:
        self.others = others
        self.times: dict[str, list[float]] = {"step": [], **{name: [] for name in others}}
        self.started = time.perf_counter()

    def on_train_batch_start(self, *_: Any) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        taken = {"step": time.perf_counter() - self.started}
        for name, call in self.others.items():
            start = time.perf_counter()
            call()
            taken[name] = time.perf_counter() - start
        if trainer.global_step > 1:
            for name, seconds in taken.items():
                self.times[name].append(seconds)


def training(
    build: Callable[[], Generator], batch: int, pairs: int, other: LlamaForCausalLM | None
) -> dict[str, float]:
    """Median seconds of a step, of the bare model, and of the other one where it is given."""
    model, bare = build(), build()
    codes, tokens = bare.spec.codebook_size, bare.spec.length
    assert codes is not None
    indices, labels = torch.randint(codes, (batch, tokens)), torch.randint(CLASSES, (batch,))
    drawn = bare.draw(batch, torch.Generator().manual_seed(0), step=0)

    def step(parameters: Sequence[Tensor], loss: Callable[[], Tensor]) -> None:
        for parameter in parameters:
            parameter.grad = None
        loss().backward()

    def our_loss() -> Tensor:
        return bare(Tokens.full(None, indices), Condition(labels), drawn).loss

    calls: dict[str, Callable[[], object]] = {"bare": lambda: step(list(bare.parameters()), our_loss)}
    if other is not None:
        sequence = torch.cat([codes + labels[:, None], indices], dim=1)

        def their_loss() -> Tensor:
            return F.cross_entropy(other(sequence[:, :-1]).logits.flatten(0, 1), indices.flatten())

        calls["transformers"] = lambda: step(list(other.parameters()), their_loss)
    turns = Turns(calls)
    module = GeneratorModule(model, OptimConfig(schedule="constant", no_decay=()), max_steps=pairs + 1)
    batches = [{"indices": indices, "label": labels}] * (pairs + 1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(max_steps=pairs + 1, folder=Path(folder), callbacks=[turns], accelerator="cpu")
        fit(trainer, module, lambda start: DataLoader(batches[start:], batch_size=None))  # type: ignore[arg-type]
    return {name: statistics.median(taken) for name, taken in turns.times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="measured rounds, after one that is not counted")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=("sample", "train"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    tokens, batch, pairs = (32, 1, 1) if options.quick else (256, 4, options.pairs)
    print(f"GPT-B, {tokens} tokens, fp32, torch {torch.__version__}, {options.threads} threads, {pairs} rounds")
    if options.only != "train":
        taken = taking_turns(sampling(4, tokens), pairs)
        ours, theirs, products = taken["smalti"], taken["transformers"], taken["products"]
        print(f"sampling 4 with guidance: {ours:.2f} s, transformers {theirs:.2f} s, products alone {products:.2f} s")
        print(f"ratios: {ours / theirs:.3f} (at most 1.00), {ours / products:.3f} (at most 1.25)")
    if options.only != "sample":
        taken = training(lambda: gpt(tokens), batch, pairs, llama(tokens))
        ours, bare, theirs = taken["step"], taken["bare"], taken["transformers"]
        print(f"training step of GPT-B, batch {batch}: {ours:.2f} s, bare {bare:.2f} s, bare of Llama {theirs:.2f} s")
        print(f"ratios: step / bare {ours / bare:.3f} (at most 1.10), bare / Llama {bare / theirs:.3f}")
        taken = training(maskgit, 4 * batch, pairs, None)  # as many tokens
        ours, bare = taken["step"], taken["bare"]
        print(f"training step of MaskGIT, batch {4 * batch}: {ours:.2f} s, bare {bare:.2f} s")
        print(f"ratio: {ours / bare:.3f} (at most 1.10)")


if __name__ == "__main__":
    main()
