"""The contract of a training objective for tokenizers."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn

from smalti.tokenizers.base import Tokenizer, TokenizerOutput


class Objective(nn.Module):
    """Named, weighted loss terms; the loss is their sum. A term with weight 0 is not computed.

    Frozen networks inside (a teacher, perceptual features) keep `requires_grad=False` and evaluation mode; the
    parameters of `discriminator` are the only trainable ones.
    """

    discriminator: nn.Module | None  # absent where there is none; a default here would hide the submodule
    discriminator_start: int = 0  # the step of its first turn, where its own learning-rate schedule begins

    def meet(self, tokenizer: Tokenizer) -> list[str]:
        """Called once before training, with the tokenizer that this will train; gives lines to be said aloud.

        Raises UserError for a tokenizer that lacks what the terms need.
        """
        return []

    @abstractmethod
    def forward(
        self, output: TokenizerOutput, images: Tensor, step: int, last_layer: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The terms that train the tokenizer (the generator's turn, where there is a discriminator).

        images: (b, 3, h, w) in [0, 1]. step: optimizer updates made so far. last_layer: the decoder's last weight,
        for objectives that weigh the adversarial term by gradients. The discriminator's parameters get no gradient.
        """

    def discriminator_acts(self, step: int) -> bool:
        """Whether the discriminator takes a turn (and an optimizer step) at this step."""
        return False

    def discriminator_turn(self, output: TokenizerOutput, images: Tensor, step: int) -> dict[str, Tensor]:
        """The terms that train the discriminator, on the same reconstruction, detached."""
        raise NotImplementedError(f"{type(self).__name__} has no discriminator")

    def statistics(self) -> dict[str, Tensor]:
        """Detached 0-d figures of the last calls, for the log (raw adversarial logits, LeCam averages, …)."""
        return {}
