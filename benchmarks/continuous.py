"""Where MAR's sampling time goes, and what each part costs beside its bare modules.

    python benchmarks/continuous.py [--pairs 3] [--threads 2] [--clock processor] [--quick] [--only sample|anneal|train]

Sampling: MAR-B (208 M), fp32, batch 2 with guidance, hence 4 rows, 256 tokens in 16 iterations, 25 diffusion steps. The
encoder, the decoder and the head are timed where `generate` calls them; bare are timm's blocks of the same sizes on
tensors of the same shapes, all of whose rows they compute, and the head's network, called once for each step. The
published code spends about 21, 46 and 33 % in the three. With step annealing (25 to 5 steps) the head's share falls.

Training: forward, loss and backward of the same model on batch 2, against timm's
blocks and the head's network on the same shapes.

All take turns in one process; the ratio is that of the medians. --quick: a small model, one pair.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

# tokenizers.py beside this file must not stand for Hugging Face's package, which other libraries import.
sys.path.remove(str(Path(__file__).resolve().parent))

import torch
from timm.models.vision_transformer import Block
from torch import nn

from smalti.generators.base import Condition
from smalti.generators.decoding.schedules import tokens_per_iteration
from smalti.generators.mar import MAR, MaskedAutoencoder
from smalti.tokenizers.spec import Tokens

BATCH, STEPS, ITERATIONS = 2, 25, 16
PARTS = ("encoder", "decoder", "head")
clock = time.perf_counter


def mar(quick: bool) -> MAR:
    """MAR-B whose head has opinions (fresh ones say nothing)."""
    side = 8 if quick else 16
    spec = {"kind": "continuous", "length": side**2, "dim": 16, "image_size": 16 * side, "grid": [side, side]}
    sizes = {"width": 128, "depth": 2, "heads": 4, "head_width": 128, "head_depth": 2} if quick else {}
    sampling = {"iterations": ITERATIONS, "steps": STEPS, "guidance": 2.9, "max_timestep": 950}
    model = MAR(tokens=spec, num_classes=1000, sampling=sampling, **sizes)
    for parameter in model.head.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.01)
    return model


class Timed:
    """Seconds that `generate` spends in each part."""

    def __init__(self, model: MAR) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.total = 0.0
        for owner, name, part in ((model.body, "encode", 0), (model.body, "decode", 1), (model.head, "sample", 2)):
            setattr(owner, name, self.timing(getattr(owner, name), PARTS[part]))

    def timing(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*given: Any, **options: Any) -> Any:
            start = clock()
            try:
                return call(*given, **options)
            finally:
                self.seconds[part] += clock() - start

        return timed

    def of(self, call: Callable[[], object]) -> dict[str, float]:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        whole = seconds(call)
        return {**self.seconds, "all": whole}


class Bare:
    """The same work by timm's blocks, and by the head's network once a step."""

    def __init__(self, model: MAR) -> None:
        body = model.body
        assert isinstance(body, MaskedAutoencoder)
        width, depth, heads = (model.arguments[name] for name in ("width", "depth", "heads"))
        self.model, self.buffer, self.n, self.width = model, body.buffer, model.n, width
        self.encoder, self.decoder = (
            nn.Sequential(*[Block(width, heads, qkv_bias=True, proj_drop=0.1, attn_drop=0.1) for _ in range(depth)])
            for _ in range(2)
        )
        self.net: Any = model.head.net  # type: ignore[union-attr]

    @torch.inference_mode()
    def sample(self) -> dict[str, float]:
        for tower in (self.encoder, self.decoder):
            tower.eval()
        spent, known, rows = dict.fromkeys(PARTS, 0.0), 0, 2 * BATCH
        for count in tokens_per_iteration(self.n, ITERATIONS):
            seen = torch.randn(rows, self.buffer + known, self.width)
            everything = torch.randn(rows, self.buffer + self.n, self.width)
            z, x = torch.randn(rows * count, self.width), torch.randn(rows * count, self.model.channels)
            t = torch.zeros(rows * count)
            for part, call in (
                ("encoder", lambda seen=seen: self.encoder(seen)),
                ("decoder", lambda everything=everything: self.decoder(everything)),
                ("head", lambda x=x, t=t, z=z: [self.net(x, t, z) for _ in range(STEPS)]),
            ):
                spent[part] += seconds(call)
            known += count
        return {**spent, "all": sum(spent.values())}

    def train(self, known: int) -> None:
        """Forward and backward; the loss is a sum."""
        rows = self.model.loss_repeats * BATCH * (self.n - known)
        seen = self.encoder.train()(torch.randn(BATCH, self.buffer + known, self.width))
        everything = torch.cat([seen, torch.randn(BATCH, self.n - known, self.width)], 1)
        z = self.decoder.train()(everything)[:, self.buffer + known :]
        z = z.flatten(0, 1).repeat(self.model.loss_repeats, 1)
        x, t = torch.randn(rows, self.model.channels), torch.randint(1000, (rows,))
        self.net(x, t, z).square().mean().backward()


def seconds(call: Callable[[], object]) -> float:
    start = clock()
    call()
    return clock() - start


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def sampling(pairs: int, quick: bool) -> None:
    model = mar(quick).eval()
    timed, bare = Timed(model), Bare(model)
    condition, seeds = Condition(torch.arange(BATCH)), torch.arange(BATCH)
    rows = [(timed.of(lambda: model.generate(condition, seeds=seeds)), bare.sample()) for _ in range(pairs + 1)][1:]
    ours, theirs = (medians(list(column)) for column in zip(*rows, strict=True))
    print(f"sampling {ours['all']:.2f} s, of which {shares(ours)}; published: 21 %, 46 %, 33 %")
    for part in PARTS:
        ratio = f"ratio {ours[part] / theirs[part]:.3f} (at most 1.10)"
        print(f"  {part}: {ours[part]:.2f} s, bare {theirs[part]:.2f} s, {ratio}")
    rest = ours["all"] - sum(ours[part] for part in PARTS)
    print(f"  everything else (draws, guidance's bookkeeping): {100 * rest / ours['all']:.1f} %")


def annealing(pairs: int, quick: bool) -> None:
    model = mar(quick).eval()
    timed, condition, seeds = Timed(model), Condition(torch.arange(BATCH)), torch.arange(BATCH)
    settings = ({}, {"annealing": "linear", "last_steps": 5})
    rows = [
        tuple(timed.of(lambda s=s: model.generate(condition, seeds=seeds, sampling=s)) for s in settings)
        for _ in range(pairs + 1)
    ][1:]
    plain, annealed = (medians(list(column)) for column in zip(*rows, strict=True))
    print(f"no annealing: {plain['all']:.2f} s, of which {shares(plain)}")
    print(f"annealing, {STEPS} to 5 steps: {annealed['all']:.2f} s, of which {shares(annealed)}")


def training(pairs: int, quick: bool) -> None:
    model = mar(quick).train()
    bare, latents = Bare(model), Tokens.full(torch.randn(BATCH, model.spec.length, model.spec.dim))
    condition, rows = Condition(torch.arange(BATCH)), []
    for pair in range(pairs + 1):
        draws = model.draw(BATCH, torch.Generator().manual_seed(pair), step=0)
        ours = seconds(lambda draws=draws: model(latents, condition, draws).loss.backward())
        theirs = seconds(lambda draws=draws: bare.train(int(draws["lengths"])))
        rows.append({"ours": ours, "theirs": theirs})
    found = medians(rows[1:])
    ratio = found["ours"] / found["theirs"]
    print(f"training step {found['ours']:.2f} s, bare {found['theirs']:.2f} s, ratio {ratio:.3f} (at most 1.10)")


def shares(spent: dict[str, float]) -> str:
    parts = sum(spent[part] for part in PARTS)
    return ", ".join(f"{part} {100 * spent[part] / parts:.0f} %" for part in PARTS)


def main() -> None:
    global clock
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, help="measured pairs, after one that is not counted")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall", help="processor: of a shared machine")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=("sample", "anneal", "train"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", "sampled tokens")  # of a head that has learned nothing
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    print(f"fp32, torch {torch.__version__}, {options.threads} threads, {options.clock} clock, batch {BATCH}")
    for name, measure in (("sample", sampling), ("anneal", annealing), ("train", training)):
        if options.only in (None, name):
            torch.manual_seed(0)
            measure(1 if options.quick else options.pairs, options.quick)


if __name__ == "__main__":
    main()
