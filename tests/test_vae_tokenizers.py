"""The VAEs that generative decoders stand on: their contract as tokenizers, the scale of their latents, training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

import smalti
from smalti.objectives.adversarial import Adversarial, PatchDiscriminator
from smalti.objectives.pixels import PixelObjective
from smalti.tokenizers.klvae import KLVAE
from smalti.tokenizers.patch_vae import PatchVAE
from smalti.tokenizers.vae import VAE, LatentScale
from smalti.training.draws import generator
from smalti.training.loop import build_trainer, fit
from smalti.training.optim import OptimConfig
from smalti.training.tokenizer_module import TokenizerModule


def build(kind: str, **options: Any) -> VAE:
    torch.manual_seed(0)
    if kind == "klvae":
        sizes: dict[str, Any] = {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4}
        return KLVAE(image_size=16, latent_channels=4, **{**sizes, **options})
    return PatchVAE(**{"image_size": 16, "latent_channels": 4, "patch_size": 4, "width": 8, "depth": 1, **options})


@pytest.fixture(params=["klvae", "patch_vae"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def pictures(b: int = 3, side: int = 16) -> Tensor:
    """Smooth ones: four random colours, blended."""
    corners = torch.rand(b, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    return F.interpolate(corners, size=(side, side), mode="bilinear")


def train(vae: VAE, folder: Path, steps: int = 2, **objective: Any) -> TokenizerModule:
    module = TokenizerModule(vae, PixelObjective(**objective), OptimConfig(lr=3e-3), max_steps=steps)
    trainer = build_trainer(max_steps=steps, folder=folder, callbacks=[], accelerator="cpu")
    fit(trainer, module, lambda start: DataLoader([{"image": pictures()}] * (steps - start), batch_size=None))  # type: ignore[arg-type]
    return module


def test_tokens_are_a_row_major_grid_of_latents_without_indices(kind: str) -> None:
    vae = build(kind).eval()
    tokens = vae.encode(pictures())
    h, w = vae.spec.grid or (0, 0)
    assert vae.spec.kind == "continuous" and tokens.indices is None
    assert tokens.latents.shape == (3, h * w, 4)
    assert torch.equal(vae.encode(pictures()).latents, tokens.latents)
    images = vae.decode(tokens)
    assert images.shape == (3, 3, 16, 16) and images.min() >= 0 and images.max() <= 1
    for row in range(3):  # nothing passes between images
        torch.testing.assert_close(vae.encode(pictures()[row : row + 1]).latents[0], tokens.latents[row])


def test_draws_sample_the_posterior_unless_it_shall_not(kind: str) -> None:
    for samples in (True, False):
        vae = build(kind, sample_posterior=samples).eval()
        draws = vae.draw(3, generator("test"))
        same = torch.equal(vae.encode(pictures(), draws=draws).latents, vae.encode(pictures()).latents)
        assert same != samples


def test_training_measures_the_scale_that_brings_latents_to_unit_variance(kind: str, tmp_path: Path) -> None:
    vae = build(kind)
    assert vae.scale.factor == 1
    train(vae, tmp_path)
    assert float(vae.scale.batches) == 2
    assert vae.scale.factor != 1
    before = vae.scale.factor
    with torch.no_grad():
        vae(pictures())
    vae.encode(pictures())
    vae.eval()(pictures())
    assert vae.scale.factor == before


def test_measured_latents_have_unit_variance_and_follow_those_that_drift() -> None:
    scale, generator = LatentScale(None), torch.Generator().manual_seed(0)
    for step in range(1000):
        scale.measure((5 if step < 200 else 3) * torch.randn(8, 16, 4, generator=generator))
        if step == 199:
            assert float(scale.factor) == pytest.approx(1 / 5, rel=0.02)
    assert float(scale.factor) == pytest.approx(1 / 3, rel=0.02)
    assert LatentScale(0.18).factor == 0.18 and not list(LatentScale(0.18).buffers())


def test_decoding_undoes_the_scale(kind: str, tmp_path: Path) -> None:
    module = train(build(kind), tmp_path)
    vae = module.ema.model
    reconstruction = vae(pictures()).reconstruction.clamp(0, 1)
    torch.testing.assert_close(vae.decode(vae.encode(pictures())), reconstruction)


def test_two_steps_train_every_parameter_and_the_export_loads(kind: str, tmp_path: Path) -> None:
    vae = build(kind)
    before = {name: parameter.detach().clone() for name, parameter in vae.named_parameters()}
    train(vae, tmp_path / "run", quantizer_weight=1e-6)
    still = [name for name, parameter in vae.named_parameters() if torch.equal(parameter, before[name])]
    assert not still
    vae.eval().save_pretrained(tmp_path / "export")
    loaded = smalti.load(tmp_path / "export")
    assert type(loaded) is type(vae) and loaded.fingerprint() == vae.fingerprint()
    assert torch.equal(loaded.encode(pictures()).latents, vae.encode(pictures()).latents)


def test_it_trains_against_a_discriminator_weighed_by_gradients(kind: str, tmp_path: Path) -> None:
    discriminator = PatchDiscriminator(hidden_channels=32, num_stages=1)
    adversarial = Adversarial(discriminator=discriminator, start=0, lecam=None, adaptive_weight_max=1e4)
    module = train(build(kind), tmp_path, adversarial=adversarial)
    assert float(module.objective.statistics()["adversarial_weight"]) > 0


def test_a_short_training_of_the_patch_vae_keeps_what_fits_into_its_channels(tmp_path: Path) -> None:
    vae = build("patch_vae", width=16)
    train(vae, tmp_path, steps=200, quantizer_weight=1e-6)
    error = (vae.eval().decode(vae.encode(pictures())) - pictures()).square().mean()
    assert error < 0.5 * pictures().var()  # smooth pictures need fewer numbers than they have pixels


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 18}, "image_size=18 is not a multiple of 4"),
        ({"latent_channels": 0}, "latent_channels=0"),
        ({"patch_size": 0}, "patch_size=0"),
    ],
)
def test_the_patch_vae_refuses_what_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("patch_vae", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 17}, "image_size=17 is not a multiple of 2; use 16 or 18"),
        ({"block_out_channels": []}, "block_out_channels is empty"),
        ({"block_out_channels": [8, 10]}, "10 is not a multiple of norm_num_groups=4"),
        ({"scaling_factor": 0.0}, "scaling_factor=0.0 is not positive"),
    ],
)
def test_the_kl_vae_refuses_what_cannot_be(options: dict[str, Any], message: str) -> None:
    sizes = {"image_size": 16, "block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4}
    with pytest.raises(ValueError, match=message):
        KLVAE(**{**sizes, **options})
