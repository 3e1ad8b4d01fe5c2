"""The adversarial term by its definitions: who gets gradients, when, how much, and what moves."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.errors import UserError
from smalti.objectives.adversarial import LOSSES, Adversarial, Blur, LeCam, PatchDiscriminator, adaptive_weight
from smalti.objectives.discriminators import PatchGAN, StyleGANDiscriminator
from smalti.objectives.pixels import PixelObjective
from smalti.tokenizers.base import TokenizerOutput
from smalti.tokenizers.quantizers.base import Quantized


class MeanDiscriminator(nn.Module):
    """One logit an image, w · its mean, so that every expected number can be written down."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, images: Tensor) -> Tensor:
        return self.weight * images.mean(dim=(1, 2, 3))


def flat(*values: float) -> Tensor:
    """Images of one grey each."""
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).clone()


def output_of(reconstruction: Tensor) -> TokenizerOutput:
    return TokenizerOutput(Quantized(torch.zeros(1, 1, 1), None), reconstruction)


def small(**arguments) -> Adversarial:
    return Adversarial(discriminator=PatchDiscriminator(hidden_channels=32, num_stages=1), **arguments)


def test_the_published_discriminator_has_the_published_size():
    # 1.91 M: fact sheet of bytedance/1d-tokenizer@942a96f
    assert sum(parameter.numel() for parameter in PatchDiscriminator().parameters()) == 1_909_889


@pytest.mark.parametrize("size", [16, 19, 33])
@pytest.mark.parametrize("taps", [3, 4, 5])
def test_blur_is_a_depthwise_convolution_with_the_same_gradient(size, taps):
    torch.manual_seed(0)
    blur = Blur(taps).double()
    image = torch.rand(2, 3, size, size, dtype=torch.float64, requires_grad=True)
    pad = 2 if size % 2 == 0 else 3
    padded = F.pad(image, [pad // 2, pad - pad // 2] * 2)
    plain = F.conv2d(padded, blur.kernel.expand(3, 1, -1, -1), stride=2, groups=3)
    ours = blur(image)
    assert torch.equal(ours, plain)
    cotangent = torch.rand_like(ours)
    (expected,) = torch.autograd.grad(plain, image, cotangent)
    (found,) = torch.autograd.grad(ours, image, cotangent)
    torch.testing.assert_close(found, expected)


def test_backward_of_the_discriminator_keeps_no_input_of_a_blur():
    # 63 MiB against 167 MiB an image with plain convolutions and activations out of place (published sizes, 256 px)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    discriminator = PatchDiscriminator()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        discriminator(torch.rand(1, 3, 64, 64))
    weights = {parameter.untyped_storage().data_ptr() for parameter in discriminator.parameters()}
    activations = sum(size for address, size in kept.items() if address not in weights)
    assert activations < 6 * 2**20


# Real logits (1, 3), fake logits (−2, 0.5); each expected number by hand from the formula in docs/objectives.md.
@pytest.mark.parametrize(
    ("loss", "generator", "discriminator"),
    [
        ("hinge", 0.75, 0.5 * (0 + 0.75)),
        ("vanilla", 0.75, 0.5 * (0.180924 + 0.550502)),
        ("non_saturating", (2.126928 + 0.474077) / 2, 0.5 * (0.180924 + 0.550502)),
        ("wasserstein", 0.75, -0.75 - 2.0),
    ],
)
def test_losses_are_their_formulas(loss, generator, discriminator):
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-2.0, 0.5])
    assert LOSSES[loss].generator(fake).item() == pytest.approx(generator, abs=1e-5)
    assert LOSSES[loss].discriminator(real, fake).item() == pytest.approx(discriminator, abs=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_rewards_separating_and_fooling(loss):
    apart, together = torch.tensor([2.0]), torch.tensor([0.0])
    assert LOSSES[loss].discriminator(apart, -apart) < LOSSES[loss].discriminator(together, together)
    assert LOSSES[loss].generator(apart) < LOSSES[loss].generator(-apart)


def test_before_the_start_the_discriminator_is_not_run_and_the_term_is_zero():
    adversarial = small(start=10, weight=0.1)
    adversarial.discriminator.forward = lambda images: pytest.fail("it was run")  # type: ignore[method-assign]
    objective = PixelObjective(adversarial=adversarial)
    terms = objective(output_of(torch.rand(1, 3, 16, 16, requires_grad=True)), torch.rand(1, 3, 16, 16), step=9)
    assert terms["adversarial"].item() == 0 and not terms["adversarial"].requires_grad


def test_an_idle_discriminator_runs_and_steps_before_its_start_with_gradients_of_zero():
    objective = PixelObjective(adversarial=small(start=10, before_start="idle"))
    assert objective.discriminator_acts(step=0) and objective.discriminator_start == 0
    reconstruction = torch.rand(1, 3, 16, 16, requires_grad=True)
    terms = objective(output_of(reconstruction), torch.rand(1, 3, 16, 16), step=9)
    assert terms["adversarial"].item() == 0 and objective.statistics()["generator_loss"].item() != 0
    turn = objective.discriminator_turn(output_of(reconstruction), torch.rand(1, 3, 16, 16), step=9)
    turn["discriminator"].backward()
    assert all(parameter.grad.abs().max() == 0 for parameter in objective.discriminator.parameters())


def test_losses_of_the_two_turns_may_differ():
    adversarial = small(loss="hinge", generator_loss="non_saturating")
    logits = torch.tensor([-2.0, 0.5])
    assert adversarial.loss.generator(logits) == LOSSES["non_saturating"].generator(logits)
    assert adversarial.loss.discriminator(logits, logits) == LOSSES["hinge"].discriminator(logits, logits)


def test_swapped_cross_entropy_is_torchs_with_swapped_arguments():
    real, fake = torch.tensor([1.0, 3.0], requires_grad=True), torch.tensor([-2.0, 0.5], requires_grad=True)
    loss = small(loss="non_saturating", swapped_bce=True).loss
    swapped = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(loss.generator(fake), swapped(torch.ones(2), fake))
    expected = 0.5 * (swapped(torch.ones(2), real) + swapped(torch.zeros(2), fake))
    torch.testing.assert_close(loss.discriminator(real, fake), expected)


def test_the_signed_range_is_that_of_the_reconstruction_and_the_discriminator():
    seen: list[Tensor] = []
    discriminator = MeanDiscriminator()
    discriminator.register_forward_hook(lambda module, inputs, result: seen.append(inputs[0].detach()))
    objective = PixelObjective(pixel_range="signed", adversarial=Adversarial(discriminator=discriminator))
    terms = objective(output_of(flat(0.25)), flat(0.75), step=0)
    assert terms["reconstruction"].item() == pytest.approx(4 * 0.25)
    objective.discriminator_turn(output_of(flat(0.25)), flat(0.75), step=0)
    assert [image.mean().item() for image in seen] == [-0.5, 0.5, -0.5]


def test_the_discriminator_acts_from_its_start_on():
    objective = PixelObjective(adversarial=small(start=10))
    assert [objective.discriminator_acts(step) for step in (0, 9, 10, 11)] == [False, False, True, True]
    assert objective.discriminator_start == 10


@pytest.mark.parametrize("switched_off", [{"weight": 0.0}, {"factor": 0.0}])
def test_a_discriminator_without_weight_never_acts(switched_off):
    assert not PixelObjective(adversarial=small(**switched_off)).discriminator_acts(step=10**6)


def test_the_generator_turn_leaves_the_discriminator_without_gradient_and_as_it_was():
    adversarial = small()
    first = next(adversarial.discriminator.parameters())
    first.requires_grad_(False)  # whatever was frozen stays frozen
    before = [parameter.requires_grad for parameter in adversarial.parameters()]
    reconstruction = torch.rand(2, 3, 16, 16, requires_grad=True)
    terms = PixelObjective(adversarial=adversarial)(output_of(reconstruction), torch.rand(2, 3, 16, 16), step=0)
    assert [parameter.requires_grad for parameter in adversarial.parameters()] == before
    sum(terms.values()).backward()
    assert reconstruction.grad is not None and all(parameter.grad is None for parameter in adversarial.parameters())


def test_the_discriminator_turn_gives_the_tokenizer_no_gradient():
    objective = PixelObjective(adversarial=small(lecam=LeCam()))
    reconstruction = torch.rand(2, 3, 16, 16, requires_grad=True)
    terms = objective.discriminator_turn(output_of(reconstruction), torch.rand(2, 3, 16, 16), step=0)
    sum(terms.values()).backward()
    assert reconstruction.grad is None
    assert all(parameter.grad is not None for parameter in objective.discriminator.parameters())


def test_terms_scale_with_weight_and_factor():
    adversarial = Adversarial(discriminator=MeanDiscriminator(), weight=0.5, factor=0.8)
    objective = PixelObjective(adversarial=adversarial)
    term = objective(output_of(flat(0.2, 0.6)), flat(0.0, 1.0), step=0)["adversarial"]
    assert term.item() == pytest.approx(0.5 * 0.8 * -0.4)
    discriminator = objective.discriminator_turn(output_of(flat(0.2, 0.6)), flat(0.0, 1.0), step=0)["discriminator"]
    assert discriminator.item() == pytest.approx(0.8 * 0.5 * (0.5 + 1.4))


def test_lecam_is_its_formula_and_moves_its_averages_after_using_them():
    objective = PixelObjective(
        adversarial=Adversarial(discriminator=MeanDiscriminator(), lecam=LeCam(weight=2, decay=0.9))
    )
    turn = (output_of(flat(0.2, 0.4)), flat(0.5, 0.9), 0)  # D(x̂) = 0.3, D(x) = 0.7
    first = objective.discriminator_turn(*turn)["lecam"]
    assert first.item() == pytest.approx(2 * 0.7**2)  # both averages were 0
    averages = objective.statistics()
    assert (averages["lecam_real"].item(), averages["lecam_fake"].item()) == pytest.approx((0.07, 0.03))
    second = objective.discriminator_turn(*turn)["lecam"]
    assert second.item() == pytest.approx(2 * (0.7 - 0.03) ** 2)  # relu(0.07 − 0.3) = 0


def test_lecam_averages_stay_in_generator_turns_and_are_in_the_state_dict():
    objective = PixelObjective(adversarial=Adversarial(discriminator=MeanDiscriminator(), lecam=LeCam(decay=0.5)))
    objective(output_of(flat(0.2)), flat(0.5), step=0)
    assert objective.adversarial.lecam.real_mean.item() == 0
    objective.discriminator_turn(output_of(flat(0.2)), flat(0.5), step=0)
    assert objective.state_dict()["adversarial.lecam.real_mean"].item() == pytest.approx(0.25)


def test_lecam_of_weight_zero_is_left_out():
    objective = PixelObjective(adversarial=small(lecam=LeCam(weight=0.0)))
    terms = objective.discriminator_turn(output_of(torch.rand(1, 3, 16, 16)), torch.rand(1, 3, 16, 16), step=0)
    assert set(terms) == {"discriminator"} and not any("lecam" in name for name in objective.state_dict())


def averages_of_a_rank(rank: int, port: int, results: Any) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    averages = []
    for across_ranks in (False, True):
        lecam = LeCam(decay=0.5, across_ranks=across_ranks)
        lecam(torch.full((2, 1), float(rank)), torch.full((2, 1), 4.0 * rank))
        averages += [lecam.real_mean.item(), lecam.fake_mean.item()]
    results.put((rank, averages))
    torch.distributed.destroy_process_group()


def test_lecam_averages_are_kept_per_rank_or_over_all():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=averages_of_a_rank, args=(rank, port, results)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = dict(results.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(timeout=60)
    # means are 0 and 0 on rank 0, 1 and 4 on rank 1; an average moves half way
    assert found == {0: [0.0, 0.0, 0.25, 1.0], 1: [0.5, 2.0, 0.25, 1.0]}


def test_the_adaptive_weight_is_the_ratio_of_gradient_norms():
    torch.manual_seed(0)
    last_layer, features = nn.Parameter(torch.randn(3, 4)), torch.randn(4)
    rest, adversarial = ((last_layer @ features) ** 2).mean(), (last_layer @ features).sum() * 0.01
    (of_rest,) = torch.autograd.grad(rest, last_layer, retain_graph=True)
    (of_adversarial,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    expected = of_rest.norm() / (of_adversarial.norm() + 1e-4)
    found = adaptive_weight(rest, adversarial, last_layer, maximum=1e4)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6) and not found.requires_grad
    assert adaptive_weight(rest, adversarial, last_layer, maximum=1.5).item() == 1.5  # the clamp


def test_with_the_adaptive_weight_both_terms_pull_equally_at_the_last_layer():
    last_layer = nn.Parameter(torch.tensor(0.6))
    reconstruction = last_layer * flat(0.3, 0.9)
    adversarial = Adversarial(discriminator=MeanDiscriminator(5.0), weight=1.0, adaptive_weight_max=1e4)
    objective = PixelObjective(reconstruction="l1", adversarial=adversarial)
    terms = objective(output_of(reconstruction), flat(0.8, 1.0), step=0, last_layer=last_layer)
    pulls = [torch.autograd.grad(terms[n], last_layer, retain_graph=True)[0] for n in ("reconstruction", "adversarial")]
    # d mean|x̂ − x| / dW = −0.6; d(−5 · mean x̂)/dW = −3: a weight of 0.2, but for the 1e-4
    assert objective.statistics()["adversarial_weight"].item() == pytest.approx(0.6 / 3.0001)
    assert pulls[0].item() == pytest.approx(pulls[1].item(), rel=1e-4)


def test_without_gradients_the_adaptive_weight_is_zero():
    last_layer = nn.Parameter(torch.tensor(0.6))
    objective = PixelObjective(adversarial=Adversarial(discriminator=MeanDiscriminator(), adaptive_weight_max=1e4))
    with torch.no_grad():
        terms = objective(output_of(last_layer * flat(0.3)), flat(0.8), step=0, last_layer=last_layer)
    assert terms["adversarial"].item() == 0


def test_logits_do_not_depend_on_autocast():
    objective = PixelObjective(adversarial=small(lecam=LeCam()))
    images, reconstruction = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)
    plain = objective.discriminator_turn(output_of(reconstruction), images, step=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = objective.discriminator_turn(output_of(reconstruction), images, step=0)
        generator = objective(output_of(reconstruction.bfloat16()), images, step=0)
    assert torch.equal(plain["discriminator"], inside["discriminator"])
    assert all(term.dtype == torch.float32 for term in generator.values())


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: small(loss="hing"), ["objective.adversarial.loss='hing'", "did you mean 'hinge'?"]),
        (lambda: small(loss="non-saturating"), ["did you mean 'non_saturating'?"]),
        (lambda: small(weight=-0.1), ["objective.adversarial.weight=-0.1", "use 0 or more"]),
        (lambda: small(start=-1), ["objective.adversarial.start=-1"]),
        (lambda: small(adaptive_weight_max=0), ["objective.adversarial.adaptive_weight_max=0"]),
        (lambda: LeCam(decay=1.0), ["objective.adversarial.lecam.decay=1.0", "0.999"]),
        (lambda: LeCam(weight=-1), ["objective.adversarial.lecam.weight=-1"]),
        (lambda: PatchDiscriminator(hidden_channels=48), ["hidden_channels=48", "use 32 or 64"]),
        (lambda: PatchDiscriminator(num_stages=0), ["num_stages=0"]),
        (lambda: PatchDiscriminator(blur=2), ["blur=2", "3, 4, 5"]),
        (lambda: small(generator_loss="linear"), ["objective.adversarial.generator_loss='linear'", "hinge"]),
        (lambda: small(before_start="idel"), ["before_start='idel'", "did you mean 'idle'?"]),
        (lambda: small(swapped_bce=True), ["swapped_bce=true", "loss=non_saturating only"]),
        (lambda: PatchGAN(num_layers=0), ["objective.adversarial.discriminator.num_layers=0"]),
        (lambda: StyleGANDiscriminator(image_size=48), ["image_size=48 is not a power of two", "use 32"]),
        (lambda: StyleGANDiscriminator(image_size=16, channels=[8]), ["channels=[8]: 3 widths"]),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_the_key(build, words):
    with pytest.raises(UserError) as error:
        build()
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)


def test_an_adaptive_weight_needs_a_last_layer():
    objective = PixelObjective(adversarial=small(adaptive_weight_max=1e4))
    with pytest.raises(UserError, match=r"objective\.adversarial\.adaptive_weight_max"):
        objective(output_of(torch.rand(1, 3, 16, 16, requires_grad=True)), torch.rand(1, 3, 16, 16), step=0)
