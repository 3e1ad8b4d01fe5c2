"""The convolutional VAE of latent diffusion (Rombach et al. 2021, arXiv:2112.10752).

image (b, 3, h, w) -> residual convolutions, halved at every level but the last -> Gaussian (b, c, h / f, w / f)
-> residual convolutions, doubled at every level but the last -> image. Attention in the middle of both, and after the
residual blocks of the levels that are named: KL-16 of MAR (Li et al. 2024, arXiv:2406.11838), f16 with 16 channels, has
it at the encoder's last level and not in the decoder. FlexTok's stage 0 is f8 without.
The network is diffusers' AutoencoderKL; published weights fit (smalti/published/klvae.py, flextok.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from smalti.tokenizers.vae import VAE


class KLVAE(VAE):
    """image_size: side in pixels, a multiple of f = 2^(levels − 1); the network takes any such size.

    latent_channels: c; FlexTok has VAEs of 4, 8 and 16. block_out_channels: width of each level, finest first.
    layers_per_block: residual blocks of a level (one more in the decoder). norm_num_groups: of every group norm.
    encoder_attention, decoder_attention: levels, 0 the finest, whose residual blocks are each followed by attention of
    one head. Published code names them by their side at 256 px: 16 is level 4. They do not depend on image_size.
    scaling_factor, sample_posterior: see `VAE`; published models give theirs.
    """

    def __init__(
        self,
        *,
        image_size: int,
        latent_channels: int = 16,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        encoder_attention: Sequence[int] = (),
        decoder_attention: Sequence[int] = (),
        scaling_factor: float | None = None,
        sample_posterior: bool = True,
    ) -> None:
        levels = len(block_out_channels)
        if levels < 1:
            raise ValueError("block_out_channels is empty; give the width of each level, finest first")
        for width in block_out_channels:
            if width < 1 or width % norm_num_groups:
                raise ValueError(
                    f"block_out_channels={list(block_out_channels)}: {width} is not a multiple of "
                    f"norm_num_groups={norm_num_groups}"
                )
        for name, attended in (("encoder_attention", encoder_attention), ("decoder_attention", decoder_attention)):
            for level in attended:
                if not 0 <= level < levels:
                    raise ValueError(f"{name}={list(attended)}: {level} is no level; they are 0 to {levels - 1}")
        super().__init__(
            image_size=image_size,
            factor=2 ** (levels - 1),
            channels=latent_channels,
            scaling_factor=scaling_factor,
            sample_posterior=sample_posterior,
        )
        self.autoencoder = AutoencoderKL(
            down_block_types=tuple(
                "AttnDownEncoderBlock2D" if level in encoder_attention else "DownEncoderBlock2D"
                for level in range(levels)
            ),
            up_block_types=tuple(
                "AttnUpDecoderBlock2D" if level in decoder_attention else "UpDecoderBlock2D"
                for level in reversed(range(levels))
            ),
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
        )

    @property
    def last_layer(self) -> Tensor:
        """The weight that makes the pixels, for adversarial terms that are weighed by gradients."""
        return self.autoencoder.decoder.conv_out.weight

    def moments(self, images: Tensor) -> Tensor:
        return self.autoencoder.encode(2 * images.to(self.last_layer.dtype) - 1).latent_dist.parameters

    def pixels(self, latents: Tensor) -> Tensor:
        return (self.autoencoder.decode(latents.to(self.last_layer.dtype)).sample + 1) / 2
