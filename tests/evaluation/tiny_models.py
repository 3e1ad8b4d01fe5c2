"""Tokenizers small enough to be measured in a second."""

import torch

from smalti.tokenizers.maskgit_vqgan import MaskGITVQGAN
from smalti.tokenizers.quantizers.vq import VectorQuantizer
from smalti.tokenizers.titok import TiTok

SIDE = 32


def tiny_titok(**other) -> TiTok:
    torch.manual_seed(0)
    tower = {"width": 32, "depth": 1, "heads": 2, "patch_size": 8}
    arguments = {
        "image_size": SIDE,
        "num_latent_tokens": 16,
        "quantizer": VectorQuantizer(codebook_size=64, dim=4),
        "encoder": tower,
        "decoder": tower,
        "init": "fan_in",
    }
    return TiTok(**{**arguments, **other})


def tiny_vqgan(**other) -> MaskGITVQGAN:
    """4 × 4 codes of 32: those that `tiny_titok(head="codes", proxy_codebook_size=32)` predicts."""
    torch.manual_seed(1)
    arguments = {
        "image_size": SIDE,
        "quantizer": VectorQuantizer(codebook_size=32, dim=8),
        "channels": 32,
        "channel_mult": (1, 1, 1, 1),
        "num_res_blocks": 1,
    }
    return MaskGITVQGAN(**{**arguments, **other})
