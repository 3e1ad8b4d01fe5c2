"""TiTok in every published form: the numbers of the published code from its configuration and its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from smalti.published.titok import build_tokenizer, load_published, our_name, published_name, to_published
from smalti.tokenizers.spec import Tokens
from smalti.tokenizers.titok import TiTok


@pytest.fixture
def model(case: Any) -> TiTok:
    model = build_tokenizer(case.config, case.size_overrides)
    assert isinstance(model, TiTok)
    load_published(model, case.weights)
    return model.eval()


def grid(x: Tensor) -> Tensor:
    """Tokens (b, n, d) as the published (b, d, 1, n)."""
    return x.mT[:, :, None]


def tokens(x: Tensor) -> Tensor:
    """The published (b, d, 1, n) as tokens (b, n, d)."""
    return x[:, :, 0].mT


def gradients(model: TiTok, case: Any) -> Callable[[str], Tensor]:
    """Gradients by published name, in the shape that the case has."""
    ours = dict(model.named_parameters())

    def gradient(name: str) -> Tensor:
        value = ours[our_name(name)].grad
        assert value is not None, f"{name} has no gradient"
        full = case.outputs.get(f"grad/{name}")
        return value if full is None else value.reshape(full.shape)

    return gradient


@pytest.mark.family("titok-vq")
def test_codes_are_the_published_ones(case: Any, model: TiTok) -> None:
    images = case.inputs["image"]
    with torch.inference_mode():
        latents = model.encoder(images, model.latent_tokens)
        quantized = model.quantizer(latents)
        output = model(images)
    case.compare("latents", grid(latents))
    case.compare_indices("indices", quantized.indices)
    case.compare_indices("indices", model.encode(images).indices)
    case.compare("quantized", grid(quantized.latents))
    case.compare("quantizer/commitment_loss", quantized.losses["commitment"])
    case.compare("quantizer/codebook_loss", quantized.losses["codebook"])
    case.compare("quantizer/quantizer_loss", sum(quantized.losses.values()))
    for name in ("commitment", "codebook"):  # none where the encoder is frozen
        case.compare(f"encode/{name}_loss", output.quantized.losses.get(name, 0.0))
    case.compare("encode/quantizer_loss", sum(output.quantized.losses.values()))
    case.compare("soft_code_entry", model.quantizer.mix(case.inputs["soft_code"]))


@pytest.mark.family("titok-vq")
def test_pictures_and_proxy_codes_are_the_published_ones(case: Any, model: TiTok) -> None:
    with torch.inference_mode():
        output = model(case.inputs["image"])
        indices = case.outputs["indices"][:, 0]
        logits, pixels = model._decode(model.quantizer.lookup(indices), None)
    if "proxy_logits" in case.outputs:
        case.compare("proxy_logits", output.logits)
    if "pixels" in case.outputs:
        case.compare("pixels", output.reconstruction)
    case.compare("decoded_from_indices", logits if pixels is None else pixels)
    if pixels is not None:
        assert torch.equal(model.decode(Tokens.full(output.quantized.latents, indices)), pixels.clamp(0, 1))


@pytest.mark.family("titok-vq")
def test_losses_and_gradients_are_the_published_ones(case: Any, model: TiTok) -> None:
    model.train()
    output = model(case.inputs["image"])
    decoded = output.logits if output.reconstruction is None else output.reconstruction
    loss = sum(output.quantized.losses.values())
    scalar = (decoded * case.inputs["probe"]).mean() + loss
    scalar.backward()
    case.compare("train/decoded", decoded)
    case.compare("train/quantizer_loss", loss)
    for name in ("commitment", "codebook"):
        case.compare(f"train/{name}_loss", output.quantized.losses.get(name, 0.0))
    case.compare("train/scalar", scalar)
    case.compare_gradients(gradients(model, case))
    published = {published_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert published == set(case.names("grad_norm/"))


@pytest.mark.family("titok-vae")
def test_the_posterior_is_the_published_one(case: Any, model: TiTok) -> None:
    images, quantizer = case.inputs["image"], model.quantizer
    noise = {"noise": tokens(case.inputs["noise"])}
    with torch.inference_mode():
        moments = model.encoder(images, model.latent_tokens)
        mean, log_variance = quantizer.posterior(moments)
        output = model(images, noise)
    case.compare("moments", grid(moments))
    case.compare("mean", grid(mean))
    case.compare("logvar", grid(log_variance))
    case.compare("std", grid((0.5 * log_variance).exp()))
    case.compare("var", grid(log_variance.exp()))
    case.compare("kl", quantizer.divergence(moments))
    case.compare("sample", grid(output.quantized.latents))
    case.compare("sample", grid(model.encode(images, draws=noise).latents))
    assert torch.equal(model.encode(images).latents, mean)
    extreme = tokens(case.inputs["extreme_moments"])
    case.compare("extreme/logvar", grid(quantizer.posterior(extreme)[1]))
    case.compare("extreme/std", grid((0.5 * quantizer.posterior(extreme)[1]).exp()))
    case.compare("extreme/kl", quantizer.divergence(extreme))


@pytest.mark.family("titok-vae")
def test_pictures_of_samples_and_means_are_the_published_ones(case: Any, model: TiTok) -> None:
    for name, latents in (("pixels", case.outputs["sample"]), ("pixels_from_mode", case.outputs["mean"])):
        with torch.inference_mode():
            logits, pixels = model._decode(tokens(latents), None)
        case.compare(name, logits if pixels is None else pixels)
        if pixels is not None:
            assert torch.equal(model.decode(Tokens.full(tokens(latents))), pixels.clamp(0, 1))


@pytest.mark.family("titok-vae")
def test_vae_losses_and_gradients_are_the_published_ones(case: Any, model: TiTok) -> None:
    model.train()
    output = model(case.inputs["image"], {"noise": tokens(case.inputs["noise"])})
    decoded = output.logits if output.reconstruction is None else output.reconstruction
    kl = output.quantized.statistics["kl"] if model.freeze_encoder else output.quantized.losses["kl"]
    scalar = (decoded * case.inputs["probe"]).mean() + 0.01 * kl
    scalar.backward()
    case.compare("train/decoded", decoded)
    case.compare("train/scalar", scalar)
    case.compare_gradients(gradients(model, case))
    published = {published_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert published == set(case.names("grad_norm/"))


@pytest.mark.family("titok-vq", "titok-vae")
def test_names_translate_there_and_back(case: Any, model: TiTok) -> None:
    state = to_published(model)
    assert state.keys() == case.weights.keys()
    assert all(torch.equal(state[name], case.weights[name]) for name in state)


DRAWS = 8  # ours are pooled over several constructions, so that only the published draw scatters


@pytest.mark.family("titok-init")
def test_fresh_parameters_have_the_published_statistics(case: Any) -> None:
    torch.manual_seed(0)
    problems = []
    for name, expected in case.table.items():
        config = expected.get("config", case.config[name])
        states = [to_published(build_tokenizer(config, case.size_overrides)) for _ in range(DRAWS)]
        published = expected["parameters"].keys() - {"quantize.embed_prob"}  # usage, kept by clustering in training
        assert states[0].keys() == published, name
        for parameter in sorted(published):
            values = torch.stack([state[parameter] for state in states])
            problem = differs(values, expected["parameters"][parameter])
            if problem:
                problems.append(f"{name} {parameter}: {problem}")
    assert not problems, "\n".join(problems)


def differs(values: Tensor, theirs: dict[str, Any]) -> str | None:
    """What sets our draws (stacked) apart from one published draw, if anything does beyond chance (4 sigma)."""
    count = values[0].numel()
    if list(values.shape[1:]) != theirs["shape"]:
        return f"shape {list(values.shape[1:])}, published {theirs['shape']}"
    mean, std, most = (float(x) for x in (values.mean(), values.std(), values.abs().max()))
    if theirs["std"] == 0:
        return None if (std, mean) == (0, theirs["mean"]) else f"constant {theirs['mean']} there, std {std} here"
    if abs(mean - theirs["mean"]) > 4 * std * (1 / count + 1 / values.numel()) ** 0.5:
        return f"mean {mean}, published {theirs['mean']}"
    if count >= 64 and abs(std / theirs["std"] - 1) > 4 / (2 * count) ** 0.5 + 4 / (2 * values.numel()) ** 0.5:
        return f"std {std}, published {theirs['std']}"
    if count >= 512 and (most / std < 1.8) != (theirs["absmax"] / theirs["std"] < 1.8):
        return f"absmax / std {most / std}, published {theirs['absmax'] / theirs['std']}"
    return None
