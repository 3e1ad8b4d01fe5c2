"""What FlexTok costs beside the bare transformers it is made of.

    python benchmarks/flextok.py [--pairs 5] [--threads 2] [--depth 4]

FlexTok of d12's width (768, 12 heads) and shapes (256 patches, 256 tokens), fp32, without a VAE; the depth is cut so
that a pair takes seconds. The bare modules are written here in plain torch: pre-norm attention with normalised queries
and keys and a SwiGLU, modulated from one vector an image and a group of tokens in the decoder, all 512 tokens in every
block, no mask. Three ratios, each of the medians of interleaved pairs:

training    forward and backward of the whole model (patches, registers, causal mask, FSQ, nested dropout, noise, time
            embedding, flow loss) against the bare encoder's and decoder's
lengths     the same step with mixed keep lengths against one with all tokens kept
decoding    25 guided Euler steps (adaptive projected guidance) against 25 bare decoder forwards of both branches
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.tokenizers.flextok import FlexTok
from smalti.tokenizers.quantizers.fsq import FSQ
from smalti.tokenizers.regularizers import NestedDropout

WIDTH, HEADS, SIDE, TOKENS, STEPS = 768, 12, 32, 256, 25  # SIDE: of latents, in patches of 2

Run = Callable[[], object]


class BareBlock(nn.Module):
    def __init__(self, groups: int = 0) -> None:
        super().__init__()
        hidden = 2 * (4 * WIDTH) // 3
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 2 * hidden, bias=False), nn.Linear(hidden, WIDTH, bias=False)
        self.groups = groups
        if groups:
            self.modulation = nn.Linear(WIDTH, groups * 6 * WIDTH)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is None:
            x = x + self.attend(norm(x))
            return x + self.feed(norm(x))
        b, n, _ = x.shape
        x = x.view(b, self.groups, n // self.groups, WIDTH)
        gate1, gate2, shift1, scale1, shift2, scale2 = (
            self.modulation(condition).view(-1, self.groups, 6, 1, WIDTH).unbind(2)
        )
        y = self.attend((norm(x) * (1 + scale1) + shift1).flatten(1, 2))
        x = x + gate1 * y.view_as(x)
        return (x + gate2 * self.feed(norm(x) * (1 + scale2) + shift2)).flatten(1, 2)

    def attend(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(norm(q), norm(k), v).transpose(1, 2).flatten(2))

    def feed(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


class Bare(nn.Module):
    """An encoder and a decoder that start from embedded tokens."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(BareBlock() for _ in range(depth))
        self.decoder = nn.ModuleList(BareBlock(groups=2) for _ in range(depth))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        encoded = x
        for block in self.encoder:
            encoded = block(encoded)
        return torch.stack([encoded.square().mean(), self.decode(x, condition).square().mean()]).sum()

    def decode(self, x: Tensor, condition: Tensor) -> Tensor:
        for block in self.decoder:
            x = block(x, condition)
        return x


def compare(title: str, ours: Run, reference: Run, pairs: int, limit: float) -> None:
    """Alternate the two, the first pair uncounted, and print the ratio of their medians."""
    wall: tuple[list[float], list[float]] = ([], [])
    cpu: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs + 1):
        for which in (0, 1) if pair % 2 else (1, 0):
            began, began_cpu = time.perf_counter(), time.process_time()
            (ours, reference)[which]()
            if pair:
                wall[which].append(time.perf_counter() - began)
                cpu[which].append(time.process_time() - began_cpu)
    for name, taken in (("wall clock", wall), ("CPU time", cpu)):
        mine, its = (statistics.median(times) for times in taken)
        print(
            f"{title}, {name}: {mine:.3f} s against {its:.3f} s, ratio {mine / its:.3f} (at most {limit})", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="measured pairs, after one that is not counted")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    b, trunk = options.batch, {"width": WIDTH, "depth": options.depth, "heads": HEADS}
    model = FlexTok(
        image_size=SIDE, vae=None, num_latent_tokens=TOKENS, quantizer=FSQ(levels=[8, 8, 8, 5, 5, 5]),
        encoder=trunk, decoder=trunk, regularizer=NestedDropout(mode="uniform"), init="unit",
    )  # fmt: skip
    bare = Bare(options.depth)
    images, embedded, condition = torch.rand(b, 3, SIDE, SIDE), torch.randn(b, 2 * TOKENS, WIDTH), torch.randn(b, WIDTH)
    mixed = model.draw(b, torch.Generator().manual_seed(0))
    mixed["lengths"] = torch.linspace(1, TOKENS - 1, b).long()
    full = {**mixed, "lengths": torch.full((b,), TOKENS)}

    def train(draws: dict[str, Tensor]) -> None:
        model.zero_grad(set_to_none=True)
        flow = model(images, draws).flow
        assert flow is not None
        F.mse_loss(flow.velocity, flow.target).backward()

    def train_bare() -> None:
        bare.zero_grad(set_to_none=True)
        bare(embedded, condition).backward()

    print(
        f"FlexTok of width {WIDTH}, depth {options.depth} + {options.depth}, batch {b}, fp32, torch {torch.__version__}"
    )
    print(f"{options.threads} threads, medians of {options.pairs} pairs")
    compare("training step", lambda: train(mixed), train_bare, options.pairs, 1.1)
    compare("mixed keep lengths", lambda: train(mixed), lambda: train(full), options.pairs, 1.05)
    model.eval()
    tokens, noise = model.encode(images), torch.randn(b, *model.latent_shape)
    twice, one = embedded.repeat(2, 1, 1), condition[:1]

    @torch.inference_mode()
    def decode() -> None:
        model.sample_latents(tokens, noise, steps=STEPS, guidance=7.5, apg=True)

    @torch.inference_mode()
    def decode_bare() -> None:
        for _ in range(STEPS):
            bare.decode(twice, one)

    compare(f"{STEPS} guided steps", decode, decode_bare, options.pairs, 1.05)


if __name__ == "__main__":
    main()
