"""What sampling costs on top of the network: MaskGIT and RAR at full size against their bare forwards.

    python benchmarks/masked.py [--pairs 5] [--threads 2] [--batch 4] [--quick]

MaskGIT of TiTok-B-64 (177 M, 8 steps) and RAR-B (259 M, 256 tokens), fp32, with guidance: both branches are one batch
of twice the size. Bare: the same forwards on fixed tokens, without random numbers, guidance, choice and masks. Both run
in one process by turns; the ratio is that of the medians. --quick: fewer steps and tokens, one pair.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

# tokenizers.py beside this file must not stand for Hugging Face's package, which other libraries import.
sys.path.remove(str(Path(__file__).resolve().parent))

import torch

from smalti.generators.base import Condition
from smalti.generators.maskgit import MaskGIT
from smalti.generators.rar import RAR

Pair = tuple[Callable[[], object], Callable[[], object]]  # sampling, and its bare forwards


def maskgit(batch: int, steps: int) -> Pair:
    spec = {"kind": "discrete", "length": 64, "dim": 12, "image_size": 256, "codebook_size": 4096}
    sizes = {"body": "bert", "width": 768, "depth": 24, "heads": 16, "mlp_width": 3072}
    model = MaskGIT(tokens=spec, num_classes=1000, sampling={"steps": steps, "guidance": 3.0}, **sizes).eval()
    condition, seeds = Condition(torch.arange(batch)), torch.arange(batch)
    indices, labels = torch.full((2 * batch, 64), 4096), torch.cat([torch.arange(batch), torch.full((batch,), -1)])

    @torch.inference_mode()
    def bare() -> None:
        for _ in range(steps):
            model.logits(indices, labels)

    return lambda: model.generate(condition, seeds=seeds), bare


def rar(batch: int, tokens: int) -> Pair:
    spec = {"kind": "discrete", "length": tokens, "dim": 256, "image_size": 256, "codebook_size": 1024}
    model = RAR(tokens=spec, num_classes=1000).eval()
    condition, seeds = Condition(torch.arange(batch)), torch.arange(batch)
    given = torch.zeros(2 * batch, 1, dtype=torch.int64)

    @torch.inference_mode()
    def bare() -> None:
        predict = model.predictor(condition, batch, guided=True)
        predict.begin(given[:, :0])
        for place in range(tokens - 1):
            predict(given, place)

    return lambda: model.generate(condition, seeds=seeds), bare


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="measured pairs, after one that is not counted")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps, tokens, pairs = (2, 16, 1) if options.quick else (8, 256, options.pairs)
    print(f"fp32, torch {torch.__version__}, {options.threads} threads, batch {options.batch} with guidance")
    for name, make, length in (("MaskGIT-B-64", maskgit, steps), ("RAR-B", rar, tokens)):
        torch.manual_seed(0)
        sampling, bare = make(options.batch, length)
        times = [(seconds(sampling), seconds(bare)) for _ in range(pairs + 1)][1:]
        ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
        unit = "steps" if make is maskgit else "tokens"
        print(
            f"{name}, {length} {unit}: sampling {ours:.2f} s, bare forwards {theirs:.2f} s, ratio {ours / theirs:.3f} "
            "(at most 1.10)"
        )


if __name__ == "__main__":
    main()
