"""FlexTok's VAEs: posterior, scaled latents, KL, reconstructions."""

from __future__ import annotations

from typing import Any

import pytest
from einops import rearrange
from torch import Tensor

from smalti.tokenizers.klvae import KLVAE


def build(config: dict[str, Any]) -> KLVAE:
    """The model of a case's `vae` and of the base sizes that it made small."""
    vae, base = config["vae"], config["vae_base_cfg"]
    model = KLVAE(
        image_size=base["sample_size"],
        latent_channels=vae["latent_channels"],
        block_out_channels=base["block_out_channels"],
        layers_per_block=base["layers_per_block"],
        norm_num_groups=base["norm_num_groups"],
        scaling_factor=vae.get("scaling_factor") or base["scaling_factor"],
        sample_posterior=vae.get("sample_posterior", True),
    )
    return model.eval()


def tokens(grid: Tensor) -> Tensor:
    return rearrange(grid, "b c h w -> b (h w) c")


@pytest.mark.family("flextok-vae")
def test_the_published_vae_is_ours(case: Any) -> None:
    vae = build(case.config)
    vae.autoencoder.load_state_dict({name.removeprefix("vae."): value for name, value in case.weights.items()})
    case.compare("downsample_factor", vae.spec.image_size // vae.spec.grid[0])  # type: ignore[index]
    case.compare("latent_dim", vae.spec.dim)
    case.compare("scaling_factor", vae.scale.factor)

    def compare(name: str, end: str, value: Tensor) -> None:
        if name + end in case.outputs:
            case.compare(name + end, value)

    start = 0
    ends = ["", *(f"/{number}" for number in range(len(case.inputs)))]
    for end in (end for end in ends if f"image{end}" in case.inputs):
        image = case.inputs[f"image{end}"]
        moments = vae.moments((image + 1) / 2)
        h, b = moments.shape[2], len(image)

        def grid(values: Tensor, h: int = h) -> Tensor:
            return rearrange(values, "b (h w) c -> b c h w", h=h)

        mean, log_variance = vae.quantizer.posterior(tokens(moments))
        compare("mean", end, grid(mean))
        compare("logvar", end, grid(log_variance))
        compare("std", end, grid((0.5 * log_variance).exp()))
        compare("kl", end, vae.quantizer.divergence(tokens(moments)).sum(1))
        draws = None
        if vae.sample_posterior:
            eps = case.inputs[f"eps{end}"] if f"eps{end}" in case.inputs else case.inputs["eps"][start : start + b]
            draws = {"noise": tokens(eps)}
        quantized = vae.quantizer(tokens(moments), draws)
        compare("latents", end, grid(quantized.latents) * vae.scale.factor)
        compare("reconst", end, 2 * vae.pixels(grid(quantized.latents)) - 1)
        start += b
    if "latents_given" in case.inputs:
        case.compare("decoded_given", 2 * vae.pixels(case.inputs["latents_given"] / vae.scale.factor) - 1)
