"""The contract of every generator: a condition to tokens, for the tokenizer whose `TokenSpec` it was built for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from smalti.errors import UserError
from smalti.model import Model
from smalti.tokenizers.quantizers.base import Draws
from smalti.tokenizers.spec import Tokens, TokenSpec


@dataclass(frozen=True)
class Condition:
    """What the pictures of a batch are to show; all None: nothing is asked for, as under the null condition.

    labels: (b,) int64 class numbers. features: (b, l, c) text features, mask: (b, l) bool, true where they are real.
    """

    labels: Tensor | None = None
    features: Tensor | None = None
    mask: Tensor | None = None

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return self._each(lambda part: part.to(device, non_blocking=True))

    def repeat(self, times: int) -> Self:
        """The same rows several times, one block behind the other: for the branches of guidance."""
        return self._each(lambda part: torch.cat([part] * times))

    @property
    def empty(self) -> bool:
        """Whether nothing is asked for."""
        return self.labels is None and self.features is None

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        parts = (self.labels, self.features, self.mask)
        return type(self)(*(None if part is None else change(part) for part in parts))


@dataclass(frozen=True)
class GeneratorOutput:
    """A training forward.

    terms: named, weighted losses, whose sum is the loss. statistics: further figures, without gradient.
    """

    terms: dict[str, Tensor]
    statistics: dict[str, Tensor] = field(default_factory=dict)

    @property
    def loss(self) -> Tensor:
        return torch.stack(list(self.terms.values())).sum()


class Generator(Model):
    """Tokens from conditions.

    spec: of the tokens that it models; the constructor argument `tokens` (a TokenSpec as a dict), which `train.py`
    fills from the tokenizer. `metadata["tokenizer"]` says which one that was: its path and fingerprint.
    num_classes: classes of the labels that it takes, None where it takes none. text_dim: channels of the text features
    that it takes instead, text_length: how many of them at most, None: any number; `metadata["text_encoder"]` then says
    which encoder made those that it learned from.
    """

    num_classes: int | None = None
    text_dim: int | None = None
    text_length: int | None = None

    def __init__(self, tokens: TokenSpec | Mapping[str, Any]) -> None:
        super().__init__()
        self.spec = tokens if isinstance(tokens, TokenSpec) else TokenSpec.from_dict(dict(tokens))
        self.accepts(self.spec)

    @classmethod
    @abstractmethod
    def accepts(cls, spec: TokenSpec) -> None:
        """Raises UserError, in one line with the way out, when this kind of generator cannot model such tokens."""

    @abstractmethod
    def forward(self, tokens: Tokens, condition: Condition, draws: Draws) -> GeneratorOutput:
        """tokens: of real images; `draws` as made by `draw`."""

    @abstractmethod
    def draw(self, batch_size: int, generator: torch.Generator, *, step: int) -> Draws:
        """The random numbers of one training forward; `step`: updates made so far, for what is annealed in training."""

    @abstractmethod
    def generate(
        self,
        condition: Condition,
        *,
        seeds: Tensor,
        length: int | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> Tokens:
        """One sequence for each of seeds (b,): sample i's draws depend on seeds[i] alone, not on its batch.

        length: tokens of a prefix, None for all; `sampling`: settings over the model's own. Inference mode.
        Raises ValueError for labels that the model does not know and for a length that its tokens do not have.
        """

    def check_condition(self, condition: Condition) -> None:
        """Raises ValueError for labels outside of −1 (none), 0…num_classes − 1."""
        labels = condition.labels
        if labels is None or not labels.numel():
            return
        if self.num_classes is None:
            raise ValueError("labels given, but this generator takes no classes")
        for label in (int(labels.min()), int(labels.max())):
            if not -1 <= label < self.num_classes:
                raise ValueError(f"label {label}: this generator knows 0 to {self.num_classes - 1}")

    @property
    def has_null(self) -> bool:
        """Whether it knows what no condition is, which guidance needs."""
        return True

    def check_guidance(self, guidance: float) -> None:
        """Raises ValueError for a scale other than 1 where there is no null condition."""
        if guidance != 1 and not self.has_null:
            raise ValueError(f"guidance={guidance}: this generator does not know what no condition is; use 1")

    def check_sampling(self) -> None:
        """Raises ValueError for settings in `sampling` that fit its class, but not this model."""

    def labels_of(self, condition: Condition, rows: int, device: torch.device) -> Tensor:
        """(rows,) int64 classes for generators that take nothing else, −1 for the null condition.

        Raises ValueError for another number of labels and for text features; on CPUs also for a label that there is
        not (elsewhere looking would make the host wait).
        """
        labels = condition.labels
        if condition.features is not None:
            raise ValueError("text features given, but this generator takes classes")
        if labels is None:
            return torch.full((rows,), -1, device=device)
        if len(labels) != rows:
            raise ValueError(f"{len(labels)} labels for {rows} sequences of tokens; give one for each")
        if labels.device.type == "cpu" and rows and int(labels.max()) >= (self.num_classes or 0):
            raise ValueError(f"label {int(labels.max())}: this generator knows {self.num_classes or 0} classes")
        return labels.to(device, non_blocking=True)

    def check_length(self, length: int | None) -> int:
        """How many tokens to generate; raises ValueError where `length` is none that the tokenizer decodes."""
        n = self.spec.length
        if length is None or length == n:
            return n
        if not self.spec.prefix_decodable:
            raise ValueError(f"length={length}: this tokenizer decodes all {n} tokens only")
        if not 1 <= length < n:
            raise ValueError(f"length={length}: use 1 to {n}")
        return length

    def card(self) -> tuple[str, str, list[str]]:
        what = f"Writes images of {self.spec.image_size} × {self.spec.image_size} pixels as {self.spec.words()}"
        condition = f"smalti.Condition({'' if self.num_classes is None else 'labels=torch.arange(4)'})"
        imported: list[str] = []
        if self.text_dim is not None:
            encoder = (self.metadata.get("text_encoder") or {}).get("path") or "ITS_TEXT_ENCODER"
            imported = ["from smalti.text import TextEncoder"]
            condition = f'TextEncoder("{encoder}").encode(["a red circle"] * 4)'
        lines = [
            "import smalti, torch",
            *imported,
            'generator, tokenizer = smalti.load("THIS_FOLDER"), smalti.load("ITS_TOKENIZER")',
            f"tokens = generator.generate({condition}, seeds=torch.arange(4))",
            "images = tokenizer.decode(tokens)  # (b, 3, h, w) in [0, 1]",
        ]
        return "image-generator", f"{what}.", lines


def refuse(kind: str, spec: TokenSpec, why: str, way_out: str) -> UserError:
    """The error of a generator that cannot model such tokens."""
    return UserError(f"{kind} cannot model {spec.words()}: {why}; {way_out}")


def accept_codes(kind: str, spec: TokenSpec) -> None:
    """Raises UserError unless a token is one code."""
    if spec.kind != "discrete":
        raise refuse(kind, spec, "it predicts indices of a codebook", "use a tokenizer with a vq or fsq quantizer")
    if spec.depth != 1:
        raise refuse(kind, spec, "it predicts one code a token", "use a tokenizer with depth 1")


def indices_of(tokens: Tokens, spec: TokenSpec) -> Tensor:
    """Indices (b, n); raises ValueError where a batch is not of the tokens that a generator was built for."""
    indices = tokens.indices
    if indices is None or indices.ndim != 2 or indices.shape[1] != spec.length:
        shape = None if indices is None else tuple(indices.shape)
        raise ValueError(f"tokens.indices of shape {shape}: this generator was built for (b, {spec.length})")
    return indices


def accept_latents(kind: str, spec: TokenSpec) -> None:
    """Raises UserError unless tokens are continuous."""
    if spec.kind != "continuous":
        raise refuse(
            kind, spec, "it models latents, not indices", "use a tokenizer with quantizer=kl, or generator=maskgit"
        )


def latents_of(tokens: Tokens, spec: TokenSpec) -> Tensor:
    """Latents (b, n, d); raises ValueError where a batch is not of the tokens that a generator was built for."""
    latents = tokens.latents
    if latents is None or tuple(latents.shape[1:]) != (spec.length, spec.dim):
        shape = None if latents is None else tuple(latents.shape)
        raise ValueError(
            f"tokens.latents of shape {shape}: this generator was built for (b, {spec.length}, {spec.dim})"
        )
    return latents
