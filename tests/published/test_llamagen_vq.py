"""LlamaGen's VQ-GAN: networks, quantizer, losses and gradients of the published code (family llamagen-vq)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from smalti.published.llamagen_vq import (
    build_tokenizer,
    infer,
    load_published,
    our_name,
    published_name,
    to_published,
)
from smalti.tokenizers.vqgan import VQGAN

pytestmark = pytest.mark.family("llamagen-vq")

RING = 65_536  # recent codes of which the published training tells the usage; it begins as zeros


@pytest.fixture
def model(case: Any) -> VQGAN:
    factor = 2 ** (len(case.config["model"]["encoder_ch_mult"]) - 1)
    model = build_tokenizer(case.config["model"], case.config.get("patched"), image_size=factor)
    load_published(model, case.weights)
    return model.train(case.config["run"]["mode"] == "train")


def test_networks_quantizer_losses_and_gradients_are_the_published_ones(case: Any, model: VQGAN) -> None:
    """Images of the cases need not be square: the parts of `forward` are called one by one."""
    images = (case.inputs["image"] + 1) / 2
    features = model.features(images)
    case.compare("encoder_out", model.encoder(images * 2 - 1))
    case.compare("pre_quant", features)
    quantized = model.quantizer(rearrange(features, "b d h w -> b (h w) d"))
    case.compare_indices("indices", quantized.indices)
    latents = rearrange(quantized.latents, "b (h w) d -> b d h w", h=features.shape[2])
    latents.retain_grad()
    case.compare("quant", latents)
    reconstruction = model.pixels(latents) * 2 - 1
    case.compare("reconstruction", reconstruction)
    if not model.training:
        return

    losses = quantized.losses
    entropy = losses.get("entropy", torch.zeros(()))
    case.compare("vq_loss", losses["codebook"])
    case.compare("commit_loss", losses["commitment"])
    case.compare("entropy_loss", entropy)
    loss = F.mse_loss(reconstruction, case.inputs["image"]) + sum(losses.values())
    case.compare("loss", loss)
    loss.backward()
    case.compare("grad/quant", latents.grad)
    parameters = dict(model.named_parameters())
    gradients = {published_name(name): parameter.grad for name, parameter in parameters.items()}
    for name in case.names("grad_norm/"):
        case.compare(f"grad_norm/{name}", gradients[name].norm())
    for name in case.names("grad/"):
        if name != "quant":
            case.compare(f"grad/{name}", gradients[name])
    assert gradients.keys() == set(case.names("grad_norm/"))


def test_usage_of_the_published_ring_follows_from_our_indices(case: Any, model: VQGAN) -> None:
    """Ours has no ring: usage counts codes that were chosen, without the published code 0 that nobody chose."""
    if not (model.training and case.config["model"]["codebook_show_usage"]):
        return
    images = (case.inputs["image"] + 1) / 2
    indices = model.quantizer(rearrange(model.features(images), "b d h w -> b (h w) d")).indices.flatten()
    ring = torch.zeros(RING, dtype=torch.int64)
    ring[-len(indices) :] = indices
    case.compare("codebook_used_tail", ring[-len(case.outputs["codebook_used_tail"]) :])
    case.compare("codebook_usage", len(ring.unique()) / model.quantizer.codebook_size)


@torch.inference_mode()
def test_codes_decode_to_the_published_entries_and_pictures(case: Any, model: VQGAN) -> None:
    h = case.outputs["codebook_entry"].shape[2]
    entries = model.quantizer.lookup(case.inputs["codes"])
    grid = rearrange(entries, "b (h w) d -> b d h w", h=h)
    case.compare("codebook_entry", grid)
    case.compare("codebook_entry_channel_last", rearrange(entries, "b (h w) d -> b h w d", h=h))
    case.compare("decode_code", model.pixels(grid) * 2 - 1)


def test_names_translate_there_and_back(case: Any, model: VQGAN) -> None:
    state = to_published(model)
    assert state.keys() == case.weights.keys() - {"quantize.codebook_used"}
    assert all(torch.equal(state[name], case.weights[name]) for name in state)
    assert all(published_name(our_name(name)) == name for name in state)


def test_sizes_are_read_off_the_weights_alone(case: Any, model: VQGAN) -> None:
    config, fixed = infer(case.weights)
    told = {"codebook_size", "codebook_embed_dim", "encoder_ch_mult", "decoder_ch_mult", "z_channels"}
    assert {name: config[name] for name in told} == {name: case.config["model"][name] for name in told}
    patched = case.config.get("patched") or {}
    assert (fixed["ch"], fixed["num_res_blocks"]) == (patched.get("ch", 128), patched.get("num_res_blocks", 2))
