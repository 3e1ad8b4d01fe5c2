"""Terms on pixels: what each is, what is left out, what stays frozen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from smalti.errors import UserError
from smalti.objectives.adversarial import Adversarial, PatchDiscriminator
from smalti.objectives.pixels import PixelObjective
from smalti.tokenizers.base import TokenizerOutput
from smalti.tokenizers.quantizers.base import Quantized


class NeverRun(nn.Module):
    def forward(self, *images: Tensor) -> Tensor:
        raise AssertionError("a network of weight 0 was run")


class Blank(nn.Module):
    """A perceptual stand-in with a layer that behaves otherwise in training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.dropout = nn.Conv2d(3, 4, 3), nn.Dropout(0.5)

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        return self.dropout((self.conv(images) - self.conv(reconstruction)).square()).mean(dim=(1, 2, 3))


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def output_of(reconstruction: Tensor | None, **losses: float) -> TokenizerOutput:
    terms = {name: torch.tensor(value) for name, value in losses.items()}
    return TokenizerOutput(Quantized(torch.zeros(1, 1, 1), None, terms), reconstruction)


@pytest.mark.parametrize(("reconstruction", "expected"), [("l1", 0.2), ("l2", 0.04)])
def test_reconstruction_is_the_mean_over_all_elements(images, reconstruction, expected):
    objective = PixelObjective(reconstruction=reconstruction, reconstruction_weight=3.0)
    terms = objective(output_of(images + 0.2), images, step=0)
    assert terms["reconstruction"].item() == pytest.approx(3 * expected, rel=1e-5)


def test_logvar_divides_the_reconstruction_and_is_no_parameter(images):
    objective = PixelObjective(logvar_init=0.4)
    terms = objective(output_of(images + 0.2), images, step=0)
    assert terms["reconstruction"].item() == pytest.approx(0.04 / torch.tensor(0.4).exp().item(), rel=1e-5)
    assert not list(objective.parameters()) and objective.state_dict()["logvar"].item() == pytest.approx(0.4)


def test_the_quantizer_term_is_the_weighted_sum_of_its_losses(images):
    terms = PixelObjective(quantizer_weight=0.5)(output_of(images, commitment=0.2, codebook=0.6), images, step=0)
    assert terms["quantizer"].item() == pytest.approx(0.4)


def test_terms_of_weight_zero_are_absent_and_their_networks_are_not_run(images):
    objective = PixelObjective(
        reconstruction_weight=0,
        perceptual=NeverRun(),
        perceptual_weight=0,
        quantizer_weight=0,
        adversarial=Adversarial(discriminator=NeverRun(), weight=0),
    )
    assert objective(output_of(images, commitment=0.2), images, step=10) == {}


def test_a_tokenizer_without_quantizer_losses_has_no_quantizer_term(images):
    assert set(PixelObjective()(output_of(images), images, step=0)) == {"reconstruction"}


def test_the_perceptual_network_is_frozen_and_stays_in_evaluation_mode(images):
    objective = PixelObjective(perceptual=Blank(), perceptual_weight=0.3).train()
    assert not objective.perceptual.dropout.training
    assert not any(parameter.requires_grad for parameter in objective.parameters())
    shifted = images.flip(-1)
    terms = [objective(output_of(shifted), images, step=0)["perceptual"] for _ in range(2)]
    assert torch.equal(*terms)
    assert terms[0].item() == pytest.approx(0.3 * objective.perceptual(images, shifted).mean().item())


def test_the_discriminator_is_the_only_trainable_part(images):
    objective = PixelObjective(
        perceptual=Blank(),
        adversarial=Adversarial(discriminator=PatchDiscriminator(hidden_channels=32, num_stages=1)),
        logvar_init=0.0,
    )
    trainable = {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
    assert trainable == {f"adversarial.discriminator.{name}" for name, _ in objective.discriminator.named_parameters()}


def test_without_a_discriminator_nobody_takes_its_turn(images):
    objective = PixelObjective()
    assert objective.discriminator is None and not objective.discriminator_acts(10**9) and objective.statistics() == {}
    with pytest.raises(NotImplementedError):
        objective.discriminator_turn(output_of(images), images, step=0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"reconstruction": "l1_"}, ["objective.reconstruction='l1_'", "l1, l2", "did you mean 'l1'?"]),
        ({"perceptual_weight": -1}, ["objective.perceptual_weight=-1", "use 0"]),
        (
            {
                "reconstruction_weight": 0,
                "adversarial": Adversarial(discriminator=NeverRun(), adaptive_weight_max=1e4),
            },
            ["objective.adversarial.adaptive_weight_max", "null"],
        ),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_the_key(arguments, words):
    with pytest.raises(UserError) as error:
        PixelObjective(**arguments)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)


def test_a_tokenizer_of_proxy_codes_is_refused_in_one_line(images):
    with pytest.raises(UserError, match="ProxyCodeObjective"):
        PixelObjective()(output_of(None), images, step=0)
