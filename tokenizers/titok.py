"""TiTok: an image as a short sequence of tokens without a grid (Yu et al. 2024, arXiv:2406.07550).

image (b, 3, h, w) in [0, 1], not normalised -> [class, patches, latent tokens] -> ViT -> latents (b, n, d) -> codes
-> [class, masks, latents] -> ViT -> pixels, or logits over the codes of a MaskGIT-VQGAN.

Stage 1 (head "codes") learns to predict the codes of a frozen MaskGIT-VQGAN, stage 2 (head "soft_codes") keeps the
encoder and tunes the decoder through the VQGAN's to pixels; the later one-stage models (head "pixels") need neither.
TA-TiTok (Kim et al. 2025, arXiv:2501.07730) appends text states to the decoder's sequence (`text`).
One-D-Piece (Miwa et al. 2025, arXiv:2501.10064) cuts the latents' tail at random in training (`regularizer`), so that
any prefix of them makes a picture.

Published weights and their names: smalti/published/titok.py, smalti/published/onedpiece.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from smalti.layers.init import init_fan_in_, init_vit_
from smalti.layers.positions import table
from smalti.layers.transformer import Transformer
from smalti.tokenizers.base import Tokenizer, TokenizerOutput
from smalti.tokenizers.maskgit_vqgan import MaskGITVQGAN, PixelDecoder
from smalti.tokenizers.quantizers.base import Draws, Quantized, Quantizer
from smalti.tokenizers.quantizers.kl import GaussianQuantizer
from smalti.tokenizers.regularizers import Regularizer, kept_mask
from smalti.tokenizers.spec import Tokens, TokenSpec


@dataclass(frozen=True)
class Tower:
    """Sizes of a vision transformer. Published: small 512/8/8, base 768/12/12, large 1024/24/16, patches of 16."""

    width: int
    depth: int
    heads: int
    patch_size: int

    @classmethod
    def read(cls, name: str, sizes: Mapping[str, int], image_size: int) -> Tower:
        """Sizes from plain values; raises ValueError naming the argument that is wrong."""
        known = [field.name for field in fields(cls)]
        if sorted(sizes) != sorted(known):
            raise ValueError(f"{name}={dict(sizes)} must have exactly the keys {', '.join(known)}")
        for key, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}.{key}={value} is not positive")
        tower = cls(**sizes)
        if tower.width % tower.heads:
            raise ValueError(f"{name}.width={tower.width} is not a multiple of {name}.heads={tower.heads}")
        patch = tower.patch_size
        if image_size % patch:
            below = max(image_size // patch, 1) * patch
            raise ValueError(
                f"image_size={image_size} is not a multiple of {name}.patch_size={patch}; "
                f"use {below} or {below + patch}"
            )
        return tower


class TiTok(Tokenizer):
    """An image of image_size² pixels as num_latent_tokens tokens.

    encoder, decoder: {width, depth, heads, patch_size} each.
    latent_layout: how latents are read off the encoder. "corrected": token i from latent position i. "legacy": the
    (n, width) memory read as (width, n), which scrambles positions and channels; l32, b64 and s128 depend on it.
    head: "pixels"; "codes" (logits over proxy_codebook_size codes of a MaskGIT-VQGAN, no pixels); "soft_codes" (their
    expectation under the logits, through pixel_decoder {dim, channels, channel_mult, num_res_blocks, shortcut}).
    text: {width, length} of the text states that the decoder reads (TA-TiTok), all of them, padding included.
    init: "published": weights of 0.02, tables of width^−½ in each tower. "fan_in", for small models in short trainings:
    weights of fan_in^−½, tables of 0.5, and patches that start blind to mid-grey, so that contrast and not brightness
    fills them. "unit": the same, with patches of about unit scale and a picture that starts as mid-grey, so that there
    is nothing to unlearn first.
    freeze_encoder: keep encoder, latent tokens and codebook as they are (stage 2).
    regularizer: draws how many leading latents the decoder reads in training; null: all, and prefixes do not decode.
    """

    def __init__(
        self,
        *,
        image_size: int,
        num_latent_tokens: int,
        quantizer: Quantizer,
        encoder: Mapping[str, int],
        decoder: Mapping[str, int],
        latent_layout: str = "corrected",
        head: str = "pixels",
        proxy_codebook_size: int | None = None,
        pixel_decoder: Mapping[str, Any] | None = None,
        text: Mapping[str, int] | None = None,
        init: str = "published",
        freeze_encoder: bool = False,
        regularizer: Regularizer | None = None,
    ) -> None:
        super().__init__()
        if num_latent_tokens < 1:
            raise ValueError(f"num_latent_tokens={num_latent_tokens} is not positive")
        if latent_layout not in ("corrected", "legacy"):
            raise ValueError(f"latent_layout={latent_layout!r} is not known; use 'corrected' or 'legacy'")
        if init not in ("published", "fan_in", "unit"):
            raise ValueError(f"init={init!r} is not known; use 'published', 'fan_in' or 'unit'")
        if head not in ("pixels", "codes", "soft_codes"):
            raise ValueError(f"head={head!r} is not known; use 'pixels', 'codes' or 'soft_codes'")
        if (head == "pixels") != (proxy_codebook_size is None):
            raise ValueError(
                f"proxy_codebook_size={proxy_codebook_size} with head={head}: give it for proxy codes only"
            )
        if (head == "soft_codes") != (pixel_decoder is not None):
            raise ValueError(f"pixel_decoder={pixel_decoder} with head={head}: give it for head=soft_codes only")
        if regularizer is not None:
            regularizer.check(num_latent_tokens)
        enc = Tower.read("encoder", encoder, image_size)
        dec = Tower.read("decoder", decoder, image_size)

        self.head, self.freeze_encoder, self.regularizer = head, freeze_encoder, regularizer
        std, decoder_std = (tower.width**-0.5 if init == "published" else 0.5 for tower in (enc, dec))
        self.latent_tokens = table(num_latent_tokens, enc.width, std)
        self.encoder = Encoder(enc, image_size, num_latent_tokens, quantizer.input_dim, latent_layout, std)
        self.quantizer = quantizer
        self.decoder = Decoder(
            dec, image_size, num_latent_tokens, quantizer.dim, proxy_codebook_size, text, decoder_std
        )
        if init != "published":
            init_fan_in_(self.encoder)
            init_fan_in_(self.decoder)
            with torch.no_grad():
                if init == "unit":
                    self.encoder.patch_embed.weight *= 4  # pixels lie about a quarter away from mid-grey
                    self.decoder.start_grey_()
                assert self.encoder.patch_embed.bias is not None
                self.encoder.patch_embed.bias -= 0.5 * self.encoder.patch_embed.weight.sum(dim=(1, 2, 3))
        else:
            init_vit_(self.encoder)
            if text is None:  # published: a decoder that reads text keeps torch's own start
                init_vit_(self.decoder)
        if pixel_decoder is not None:
            assert proxy_codebook_size is not None
            self.pixel_decoder = PixelDecoder(**pixel_decoder)
            bound = 1 / proxy_codebook_size
            codes = torch.empty(proxy_codebook_size, pixel_decoder["dim"]).uniform_(-bound, bound)
            self.proxy_embedding = nn.Parameter(codes)
        if freeze_encoder:
            for module in (self.encoder, self.quantizer):
                module.requires_grad_(False)
            self.latent_tokens.requires_grad_(False)
        self._teacher: tuple[MaskGITVQGAN, ...] = ()  # in a tuple: not a part of this model, nor of its weights
        self.spec = TokenSpec(
            kind="continuous" if quantizer.codebook_size is None else "discrete",
            length=num_latent_tokens,
            dim=quantizer.dim,
            image_size=image_size,
            codebook_size=quantizer.codebook_size,
            depth=quantizer.depth,
            prefix_decodable=regularizer is not None,
            condition="none" if text is None else "text",
        )

    @property
    def last_layer(self) -> Tensor:
        """The last weight before the output, for adversarial terms that are weighed by gradients."""
        if self.head == "soft_codes":
            return self.pixel_decoder.conv_out.weight
        last = self.decoder.conv_out if self.head == "pixels" else self.decoder.ffn[2]
        assert isinstance(last.weight, Tensor)
        return last.weight

    @torch.inference_mode()
    def encode(self, images: Tensor, *, draws: Draws | None = None) -> Tokens:
        """images: (b, 3, image_size, image_size) float in [0, 1].

        A VAE gives the mean of its posterior; with `draws` (as made by `draw`) a sample, as the published code does;
        times the quantizer's scale.
        """
        self.check_images(images)
        return self.scaled(self._quantize(images, draws))

    @property
    def has_posterior(self) -> bool:
        return isinstance(self.quantizer, GaussianQuantizer)

    @torch.inference_mode()
    def moments_of(self, images: Tensor) -> Tensor:
        if not self.has_posterior:
            return super().moments_of(images)
        self.check_images(images)
        return self._features(images)

    @torch.inference_mode()
    def decode(self, tokens: Tokens, *, seed: int = 0, text: Tensor | None = None) -> Tensor:
        """Images (b, 3, h, w) in [0, 1]. Indices are looked up where there are any. Draws nothing: no `seed` used.

        Of a prefix (tokens.lengths < n) only the kept tokens are read, for models with a regularizer.
        text: (b, length, width) states, for models whose spec says condition "text". A stage-1 model gives the picture
        that its teacher makes of the most probable codes; raises ValueError without `attach_teacher`.
        """
        logits, pixels = self._decode(self.tokens_to_latents(tokens), text, self.kept(tokens))
        if pixels is None:
            if not self._teacher:
                raise ValueError(
                    "head=codes gives codes of a MaskGIT-VQGAN, no pixels: call attach_teacher(vqgan) with that model"
                )
            assert logits is not None
            codes = rearrange(logits.argmax(1), "b h w -> b (h w)")
            teacher = self._teacher[0]
            return teacher.decode(Tokens.full(teacher.quantizer.lookup(codes), codes))
        return pixels.clamp(0, 1)

    def forward(self, images: Tensor, draws: Draws | None = None, *, text: Tensor | None = None) -> TokenizerOutput:
        """`logits` for heads over proxy codes, `reconstruction` for heads that make pixels; both in stage 2.

        draws["lengths"] (b,), best on the CPU: how many latents of each image the decoder reads. The quantizer's losses
        see all of them.
        """
        self.check_images(images)
        quantized = self._quantize(images, draws)
        logits, pixels = self._decode(quantized.latents, text, (draws or {}).get("lengths"))
        return TokenizerOutput(quantized, reconstruction=pixels, logits=logits)

    def draw(self, batch_size: int, generator: torch.Generator) -> Draws:
        draws = self.quantizer.draw(batch_size, self.spec.length, generator)
        if self.regularizer is not None:
            draws |= self.regularizer.draw(batch_size, self.spec.length, generator)
        return draws

    def train(self, mode: bool = True) -> TiTok:
        super().train(mode)
        if self.freeze_encoder:
            self.encoder.eval()
            self.quantizer.eval()
        return self

    def attach_teacher(self, vqgan: MaskGITVQGAN) -> None:
        """Let a stage-1 model decode through the VQGAN whose codes it predicts, which stays outside of its weights.

        Raises ValueError when the VQGAN's codes are not those of this model.
        """
        mine = (self.decoder.proxy_codebook_size, (self.decoder.grid, self.decoder.grid))
        theirs = (vqgan.spec.codebook_size, vqgan.spec.grid)
        if mine != theirs:
            raise ValueError(f"the teacher has (codes, grid) = {theirs}, this model predicts {mine}")
        self._teacher = (vqgan,)

    def _quantize(self, images: Tensor, draws: Draws | None) -> Quantized:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_encoder):
            quantized = self.quantizer(self._features(images), draws)
        if self.freeze_encoder:  # nothing left to train: no loss terms
            return Quantized(quantized.latents, quantized.indices, {}, quantized.statistics)
        return quantized

    def _features(self, images: Tensor) -> Tensor:
        """What is quantised, (b, n, d), of a Gaussian bottleneck 2·d."""
        return self.encoder(images.to(self.latent_tokens.dtype), self.latent_tokens)

    def _decode(
        self, latents: Tensor, text: Tensor | None, lengths: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Latents (b, n, d) to logits (b, v, h, w) and pixels (b, 3, h, w), as far as the head gives them."""
        out = self.decoder(latents.to(self.latent_tokens.dtype), text, lengths)
        if self.head == "pixels":
            return None, out
        if self.head == "codes":
            return out, None
        # The expectation over all codes, never the most probable one: in training and afterwards.
        expected = torch.einsum("b v h w, v d -> b d h w", out.softmax(1), self.proxy_embedding)
        pixels = self.pixel_decoder(expected)
        if pixels.shape[-1] != self.spec.image_size:
            raise ValueError(
                f"pixel_decoder.channel_mult has {len(self.pixel_decoder.up)} levels: {self.decoder.grid} codes a side "
                f"make {pixels.shape[-1]} pixels, not image_size={self.spec.image_size}; fit decoder.patch_size to it"
            )
        return out, pixels


class Encoder(nn.Module):
    """[class, patches, latent tokens] through the tower; the latent tokens come out, projected to (b, n, d)."""

    def __init__(self, size: Tower, image_size: int, n: int, d: int, layout: str, std: float) -> None:
        super().__init__()
        self.n, self.layout = n, layout
        self.patch_embed = nn.Conv2d(3, size.width, size.patch_size, stride=size.patch_size)
        self.class_embedding = table(1, size.width, std)
        self.positional_embedding = table((image_size // size.patch_size) ** 2 + 1, size.width, std)
        self.latent_token_positional_embedding = table(n, size.width, std)
        self.ln_pre = nn.LayerNorm(size.width)
        self.transformer = Transformer(size.width, size.depth, size.heads)
        self.ln_post = nn.LayerNorm(size.width)
        self.conv_out = nn.Linear(size.width, d)

    def forward(self, images: Tensor, latent_tokens: Tensor) -> Tensor:
        """images: (b, 3, h, w), latent_tokens: (n, width). Returns latents (b, n, d)."""
        b = len(images)
        class_position, positions = self.positional_embedding[:1], self.positional_embedding[1:]
        patches = rearrange(self.patch_embed(images), "b d h w -> b (h w) d") + positions
        first = (self.class_embedding + class_position).expand(b, -1, -1)
        last = (latent_tokens + self.latent_token_positional_embedding).expand(b, -1, -1)
        x = self.transformer(self.ln_pre(torch.cat([first, patches, last], dim=1)), keep=slice(-self.n, None))
        x = self.ln_post(x)
        if self.layout == "legacy":
            # The published code reads the memory of (n, width) as (width, n): every token mixes positions.
            x = x.reshape(b, x.shape[2], self.n).transpose(1, 2)
        return self.conv_out(x)


class Decoder(nn.Module):
    """[class, a mask token a patch, latents, text] through the tower; the masks come out as pixels or as logits."""

    def __init__(
        self,
        size: Tower,
        image_size: int,
        n: int,
        d: int,
        proxy_codebook_size: int | None,
        text: Mapping[str, int] | None,
        std: float,
    ) -> None:
        super().__init__()
        width = size.width
        self.grid, self.patch_size = image_size // size.patch_size, size.patch_size
        self.proxy_codebook_size = proxy_codebook_size
        self.decoder_embed = nn.Linear(d, width)
        self.class_embedding = table(1, width, std)
        self.mask_token = nn.Parameter(std * torch.randn(1, 1, width))
        self.positional_embedding = table(self.grid**2 + 1, width, std)
        self.latent_token_positional_embedding = table(n, width, std)
        if text is not None:
            self.text_proj = nn.Linear(text["width"], width)
            self.text_positional_embedding = table(text["length"], width, std)
        self.reads_text = text is not None
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, size.depth, size.heads)
        self.ln_post = nn.LayerNorm(width)
        if proxy_codebook_size is None:
            self.ffn = nn.Sequential(nn.Linear(width, size.patch_size**2 * 3))
            self.conv_out = nn.Conv2d(3, 3, 3, padding=1)
        else:
            self.ffn = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, proxy_codebook_size))

    def forward(self, latents: Tensor, text: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """latents: (b, n, d), text: (b, l, width of the states). Returns (b, 3, h, w) or logits (b, v, h, w).

        lengths: (b,) latents to read of each image, None for all. Those that no image keeps are cut off, as published;
        what is left beyond an image's own length is no key of any attention, which gives the same numbers.
        """
        b = len(latents)
        shortest, longest = _extent(lengths, latents.shape[1])
        latents = latents[:, :longest]
        class_position, positions = self.positional_embedding[:1], self.positional_embedding[1:]
        sequence = [
            (self.class_embedding + class_position).expand(b, -1, -1),
            (self.mask_token + positions).expand(b, -1, -1),
            self.decoder_embed(latents) + self.latent_token_positional_embedding[:longest],
        ]
        if self.reads_text:
            sequence.append(self.text_proj(self._checked(text).to(latents)) + self.text_positional_embedding)
        elif text is not None:
            raise ValueError("text was given to a decoder that reads none (its spec says condition='none')")
        mask = None
        if lengths is not None and shortest < longest:
            seen = [part.new_ones(b, part.shape[1], dtype=torch.bool) for part in sequence]
            seen[2] = kept_mask(lengths, longest, latents.device)
            mask = torch.cat(seen, dim=1)
        x = torch.cat(sequence, dim=1)
        x = self.transformer(self.ln_pre(x), keep=slice(1, 1 + self.grid**2), mask=mask)
        x = self.ffn(self.ln_post(x))
        if self.proxy_codebook_size is not None:
            return rearrange(x, "b (h w) v -> b v h w", h=self.grid)
        p = self.patch_size
        return self.conv_out(rearrange(x, "b (h w) (p1 p2 c) -> b c (h p1) (w p2)", h=self.grid, p1=p, p2=p))

    @torch.no_grad()
    def start_grey_(self) -> None:
        """Start with mid-grey pictures, or with all proxy codes alike, whatever the latents are."""
        last = self.ffn[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        if self.proxy_codebook_size is None:
            assert self.conv_out.bias is not None
            self.conv_out.bias.fill_(0.5)

    def _checked(self, text: Tensor | None) -> Tensor:
        expected = (*self.text_positional_embedding.shape[:1], self.text_proj.in_features)
        if text is None:
            raise ValueError(f"text is missing: this decoder reads states of shape (b, {expected[0]}, {expected[1]})")
        if text.shape[1:] != expected:
            raise ValueError(f"text of shape {tuple(text.shape)}: expected (b, {expected[0]}, {expected[1]})")
        return text


def _extent(lengths: Tensor | None, n: int) -> tuple[int, int]:
    """The shortest and the longest keep length of a batch, n where nothing is dropped."""
    if lengths is None or not len(lengths):
        return n, n
    shortest, longest = (int(length) for length in lengths.aminmax())
    if not 1 <= shortest <= longest <= n:
        raise ValueError(f"keep lengths from {shortest} to {longest}: expected 1 to {n}")
    return shortest, longest
