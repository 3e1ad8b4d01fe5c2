"""MaskGIT-VQGAN alone and as TiTok's teacher: the numbers of the published code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from einops import rearrange

from smalti.published.titok import build_tokenizer, infer, load_published, our_name, published_name, to_published
from smalti.tokenizers.maskgit_vqgan import MaskGITVQGAN
from smalti.tokenizers.spec import Tokens

pytestmark = pytest.mark.family("maskgit-vqgan")


@pytest.fixture
def model(case: Any) -> MaskGITVQGAN:
    config = {**case.config, "vqgan": {**case.config["vqgan"], "resolution": case.inputs["image"].shape[-1]}}
    model = build_tokenizer(config, case.size_overrides)
    assert isinstance(model, MaskGITVQGAN)
    load_published(model, case.weights)
    return model.eval()


@torch.inference_mode()
def test_codes_and_pictures_are_the_published_ones(case: Any, model: MaskGITVQGAN) -> None:
    images = case.inputs["image"]
    features = model.encoder(images)
    z = rearrange(features, "b d h w -> b (h w) d")
    codes = model.quantizer.lookup(model.quantizer.nearest(z))
    case.compare("features", features)
    case.compare("quantized", rearrange(codes, "b (h w) d -> b d h w", h=features.shape[2]))
    case.compare_indices("indices", model.quantizer.nearest(z))
    case.compare("decoded", model(images).reconstruction)


@torch.inference_mode()
def test_distances_are_the_published_ones(case: Any, model: MaskGITVQGAN) -> None:
    z = rearrange(model.encoder(case.inputs["image"]), "b d h w -> b (h w) d")
    shortened = model.quantizer._distances(
        z, model.quantizer.embedding
    )  # without |z|², which is the same for all codes
    distances = shortened + z.square().sum(-1, keepdim=True)
    case.compare("distances", distances.flatten(0, 1))
    case.compare("soft_code", (-distances / 0.7).softmax(-1))


@torch.inference_mode()
def test_codes_in_a_sequence_or_a_grid_look_up_the_published_entries(case: Any, model: MaskGITVQGAN) -> None:
    entries = model.quantizer.lookup(case.inputs["codes_2d"])
    side = case.outputs["entry_from_2d"].shape[2]
    case.compare("entry_from_2d", rearrange(entries, "b (h w) d -> b d h w", h=side))
    entries = rearrange(model.quantizer.lookup(case.inputs["codes_3d"]), "b h w d -> b d h w")
    case.compare("entry_from_3d", entries)
    case.compare("decoded_from_3d", model.decoder(entries))


def test_the_frozen_teacher_gives_the_published_codes_and_pictures(case: Any, model: MaskGITVQGAN) -> None:
    codes = model.encode(case.inputs["image"]).indices
    assert codes is not None
    case.compare_indices("teacher/codes", codes)
    published = case.outputs["teacher/codes"]
    case.compare("teacher/pixels", model.decode(Tokens.full(model.quantizer.lookup(published), published)))


def test_losses_and_gradients_are_the_published_ones(case: Any, model: MaskGITVQGAN) -> None:
    output = model(case.inputs["image"])
    loss = sum(output.quantized.losses.values())
    scalar = (output.reconstruction * case.inputs["probe"]).mean() + loss
    scalar.backward()
    case.compare("train/decoded", output.reconstruction)
    case.compare("train/quantizer_loss", loss)
    case.compare("train/scalar", scalar)
    parameters = dict(model.named_parameters())
    case.compare_gradients(lambda name: parameters[our_name(name)].grad)
    assert {published_name(name) for name in parameters} == set(case.names("grad_norm/"))


def test_names_translate_there_and_back(case: Any, model: MaskGITVQGAN) -> None:
    state = to_published(model)
    assert state.keys() == case.weights.keys()
    assert all(torch.equal(state[name], case.weights[name]) for name in state)


def test_sizes_are_read_off_the_weights_alone(case: Any, model: MaskGITVQGAN) -> None:
    config, sizes = infer(case.weights)
    config["vqgan"]["resolution"] = model.spec.image_size
    inferred = build_tokenizer(config, sizes)
    load_published(inferred, case.weights)
    assert torch.equal(inferred.encode(case.inputs["image"]).latents, model.encode(case.inputs["image"]).latents)
