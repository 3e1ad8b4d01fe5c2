"""What TiTok costs beside the bare transformers it is made of.

    python benchmarks/tokenizers.py [--pairs 5] [--threads 2] [--head codes|pixels]

One training step of TiTok-S-128 at 256 px (batch 4, fp32): forward through encoder, quantizer and decoder, loss,
backward; no optimizer, no Lightning, no data. The bare step: two timm `VisionTransformer`s of the same width, depth and
token counts (1 class token, 256 patches, 128 registers: 385 tokens each), forward from the same images, mean square of
their outputs, backward. The bare decoder embeds patches where ours embeds latents and mask tokens.

Steps alternate in one process; the ratio is that of the medians. Bytes are those of all distinct storages that autograd
keeps for backward, parameters left out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from smalti.tokenizers.quantizers.vq import VectorQuantizer
from smalti.tokenizers.titok import TiTok

BATCH, SIZE, PATCH, TOKENS, WIDTH, DEPTH, HEADS, PROXY_CODES = 4, 256, 16, 128, 512, 8, 8, 1024

Step = Callable[[], Tensor]


def titok_step(images: Tensor, head: str) -> tuple[nn.Module, Step]:
    """TiTok-S-128: stage 1 as published (head "codes"), or the one-stage form of the same size (head "pixels")."""
    tower = {"width": WIDTH, "depth": DEPTH, "heads": HEADS, "patch_size": PATCH}
    codes = head == "codes"
    model = TiTok(
        image_size=SIZE,
        num_latent_tokens=TOKENS,
        quantizer=VectorQuantizer(codebook_size=4096, dim=12, distance="cosine"),
        encoder=tower,
        decoder=tower,
        latent_layout="legacy" if codes else "corrected",
        head=head,
        proxy_codebook_size=PROXY_CODES if codes else None,
    )
    targets = torch.randint(PROXY_CODES, (BATCH, SIZE // PATCH, SIZE // PATCH))

    def step() -> Tensor:
        output = model(images)
        if codes:
            assert output.logits is not None
            loss = F.cross_entropy(output.logits, targets)
        else:
            assert output.reconstruction is not None
            loss = F.mse_loss(output.reconstruction, images)
        return loss + torch.stack(list(output.quantized.losses.values())).sum()

    return model, step


def bare_step(images: Tensor) -> tuple[nn.Module, Step]:
    towers = nn.ModuleList(
        VisionTransformer(
            img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, reg_tokens=TOKENS,
            num_classes=0, global_pool="",
        )
        for _ in range(2)
    )  # fmt: skip
    return towers, lambda: torch.stack([tower(images).square().mean() for tower in towers]).sum()


def seconds(model: nn.Module, step: Step) -> tuple[float, float]:
    """Of the wall clock and of this process's processors (which other programs on the machine disturb less)."""
    model.zero_grad(set_to_none=True)
    wall, cpu = time.perf_counter(), time.process_time()
    step().backward()
    return time.perf_counter() - wall, time.process_time() - cpu


def bytes_for_backward(model: nn.Module, step: Step) -> int:
    """Bytes of the distinct storages that one forward keeps for backward, parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    alive = []  # a storage that were freed could lend its address to the next

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(kept.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="measured pairs, after one that is not counted")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--head", choices=("codes", "pixels"), default="codes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    images = torch.rand(BATCH, 3, SIZE, SIZE)
    ours, bare = titok_step(images, options.head), bare_step(images)

    times: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
    for pair in range(options.pairs + 1):
        for which in (0, 1) if pair % 2 else (1, 0):
            taken = seconds(*(ours, bare)[which])
            if pair:
                times[which].append(taken)
    print(f"TiTok-S-128, {SIZE} px, batch {BATCH}, fp32, head {options.head}")
    print(f"torch {torch.__version__}, {options.threads} threads, medians of {options.pairs} pairs")
    for clock, name in enumerate(("wall clock", "CPU time")):
        mine, its = (statistics.median(pair[clock] for pair in taken) for taken in times)
        print(f"step, {name}: {mine:.3f} s, bare {its:.3f} s, ratio {mine / its:.3f} (at most 1.05)")
    kept, bare_kept = bytes_for_backward(*ours) / 1e6, bytes_for_backward(*bare) / 1e6
    print(f"kept for backward: {kept:.0f} MB, bare {bare_kept:.0f} MB, ratio {kept / bare_kept:.3f} (at most 1.10)")


if __name__ == "__main__":
    main()
