"""A tokenizer of continuous tokens made discrete, on images; the program behind `export.py bridge=…`.

    python export.py bridge=KL_EXPORT output=DIR                     6 bits a channel, measured on the embedded shapes
    python export.py bridge=KL_EXPORT output=DIR data.path=IMAGES bits=8

`train.py` does the same before it trains a generator of such tokens, where tokenizer_path names a continuous tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smalti.data.module import DataModule
from smalti.errors import UserError
from smalti.exports import absolute
from smalti.headway import Headway
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.quantizers.bridge import BridgeQuantizer
from smalti.tokenizers.spec import TokenSpec
from smalti.tokenizers.tokenbridge import BridgedTokenizer, bridge, bridged_spec, check_continuous
from smalti.training.draws import generator


@dataclass(frozen=True)
class Bridging:
    """bits, fit, order: of `tokenbridge.bridge`. images: training images that levels and order are measured on,
    None: all."""

    bits: int = 6
    fit: bool = True
    order: str | Sequence[int] = "data"
    images: int | None = 1024

    def __post_init__(self) -> None:
        if self.order != "data" and (isinstance(self.order, str) or not all(type(n) is int for n in self.order)):
            raise UserError(f"order={self.order} is unknown; use data, or a list of all channels such as [1,0,2]")

    def spec(self, spec: TokenSpec, key: str) -> TokenSpec:
        """Of the bridged tokenizer of such tokens. Raises UserError for tokens that are discrete or settings that do
        not fit; key: what names the tokenizer in messages."""
        try:
            check_continuous(spec)
            order = None if isinstance(self.order, str) else self.order
            return bridged_spec(spec, BridgeQuantizer(dim=spec.dim, bits=self.bits, order=order))
        except ValueError as error:
            raise UserError(f"{key}: {error}") from error

    def __call__(
        self, tokenizer: Tokenizer, path: str, data: DataModule, device: torch.device, *, seed: int = 0
    ) -> BridgedTokenizer:
        """The discrete tokenizer, with its origin in `metadata`, on the CPU. path: where the continuous one lies. seed:
        of samples of a posterior."""
        loader = data.reference_loader(images=self.images)
        count = len(data.train) if self.images is None else min(self.images, len(data.train))
        headway = Headway(count, "images measured")

        def batches() -> Iterator[dict[str, Any]]:
            for batch in loader:
                yield {name: part.to(device) for name, part in batch.items() if isinstance(part, Tensor)}
                headway.add(len(batch["label"]))

        latents = some_latents(tokenizer.to(device).eval(), batches(), seed=seed)
        made = bridge(tokenizer, latents, bits=self.bits, fit=self.fit, order=self.order).cpu()
        known = tokenizer.metadata
        made.metadata = {
            **{key: known[key] for key in ("licence", "training_data", "preprocessing") if key in known},
            "title": f"{known.get('title') or type(tokenizer).__name__}, bridged: {self.bits} bits a channel",
            "source": f"{absolute(path)}, channels rounded to {2**self.bits} levels",
            "bridged_from": {"path": absolute(path), "fingerprint": tokenizer.fingerprint()},
            "measured_on": {"images": count, **{key: data.describe()[key] for key in ("name", "fingerprint")}},
            **made.metadata,
        }
        return made


@torch.no_grad()
def some_latents(tokenizer: Tokenizer, batches: Iterable[Mapping[str, Tensor]], *, seed: int = 0) -> Iterator[Tensor]:
    """Latents (b, n, d) float32, scaled, of each batch of images or of a continuous tokenizer's token shards.

    Where there is a posterior they are samples of it, since generators learn samples.
    """
    for number, batch in enumerate(batches):
        moments, encoded = batch.get("moments"), batch.get("latents")
        if (image := batch.get("image")) is not None:
            images = image if image.is_floating_point() else image.float() / 255
            if tokenizer.has_posterior:
                moments = tokenizer.moments_of(images)
            else:
                encoded = tokenizer.encode(images).latents
        if moments is not None:
            shape = (*moments.shape[:-1], tokenizer.spec.dim)
            noise = torch.randn(shape, generator=generator("bridge", seed, number))
            encoded = tokenizer.sample(moments, noise.to(moments.device)).latents
        assert encoded is not None
        yield encoded.float()


def bridging_of(settings: Mapping[str, Any]) -> Bridging:
    """From keys of a config."""
    return Bridging(**{name: settings[name] for name in ("bits", "fit", "order", "images")})
