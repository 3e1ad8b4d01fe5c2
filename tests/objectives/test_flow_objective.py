"""The flow objective: its terms, what it says of noise levels and lengths, and the representation loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from smalti.errors import UserError
from smalti.objectives.flow import FlowObjective
from smalti.objectives.repa import Representation, misalignment
from smalti.tokenizers.base import Flow, TokenizerOutput
from smalti.tokenizers.flextok import FlexTok
from smalti.tokenizers.quantizers.base import Quantized
from smalti.tokenizers.quantizers.fsq import FSQ
from smalti.tokenizers.regularizers import NestedDropout
from smalti.training.draws import generator

TINY = "vit_tiny_patch16_224"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def output(errors: list[float], sigma: list[float], lengths: list[int], **extra: Any) -> TokenizerOutput:
    """A flow whose images have these mean squared errors."""
    target = normal(len(errors), 2, 4, 4)
    velocity = target + torch.tensor(errors).sqrt()[:, None, None, None]
    flow = Flow(velocity, target, torch.tensor(sigma), torch.tensor(lengths), extra.pop("features", None))
    return TokenizerOutput(Quantized(normal(len(errors), 8, 3), None, **extra), flow=flow)


def images(b: int) -> Tensor:
    return torch.rand(b, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def flextok(**options: Any) -> FlexTok:
    tower = {"width": 8, "depth": 2, "heads": 2}
    sizes = {"num_latent_tokens": 4, "quantizer": FSQ(levels=[4, 4]), "encoder": tower, "decoder": tower}
    return FlexTok(image_size=32, vae=None, patch_size=8, regularizer=NestedDropout(), **{**sizes, **options})


def small_vit() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, dynamic_img_size=True, depth=1)


def test_the_flow_term_is_the_mean_over_images_and_quantizer_losses_are_weighed() -> None:
    terms = FlowObjective(quantizer_weight=0.5)(
        output([1.0, 4.0], [0.1, 0.9], [1, 8], losses={"a": torch.tensor(2.0), "b": torch.tensor(4.0)}), images(2), 0
    )
    assert {name: float(term) for name, term in terms.items()} == pytest.approx({"flow": 2.5, "quantizer": 3.0})
    assert list(FlowObjective(quantizer_weight=0)(output([1.0], [0.5], [8]), images(1), 0)) == ["flow"]


def test_statistics_tell_errors_by_noise_level_and_by_length() -> None:
    objective = FlowObjective()
    objective(output([1.0, 2.0, 4.0, 6.0], [0.1, 0.3, 0.5, 0.9], [1, 2, 4, 8]), images(4), 0)
    assert {name: float(value) for name, value in objective.statistics().items()} == pytest.approx(
        {
            "flow_clean": 1.5,
            "flow_middle": 4,
            "flow_noisy": 6,
            "flow_at_1": 1,
            "flow_at_2": 2,
            "flow_at_4": 4,
            "flow_at_8": 6,
        }
    )
    objective(output([3.0, 3.0], [1.0, 0.95], [3, 4]), images(2), 1)  # a running mean; 3 and 4 share a place
    after = {name: float(value) for name, value in objective.statistics().items()}
    assert after["flow_noisy"] == pytest.approx(6 - 0.05 * 3)
    assert after["flow_at_4"] == pytest.approx(4 - 0.05 * 1)
    assert after["flow_clean"] == pytest.approx(1.5)
    objective(output([9.0], [0.1], [0]), images(1), 2)  # no token: no length
    last = {name: float(value) for name, value in objective.statistics().items()}
    assert {name for name in last if last[name] != pytest.approx(after[name])} == {"flow_clean"}


def test_a_place_that_no_image_fell_into_shows_the_mean_of_all() -> None:
    objective = FlowObjective()
    objective(output([2.0, 4.0], [0.1, 0.1], [8, 8]), images(2), 0)
    figures = objective.statistics()
    assert len(figures) == 7 and all(float(value) == pytest.approx(3.0) for value in figures.values())


def test_statistics_survive_a_checkpoint() -> None:
    one, two = FlowObjective(), FlowObjective()
    one(output([1.0, 2.0], [0.1, 0.9], [1, 8]), images(2), 0)
    two.load_state_dict(one.state_dict())
    for objective in (one, two):
        objective(output([3.0], [0.5], [2]), images(1), 1)
    assert one.statistics() == two.statistics()


def test_misalignment_is_the_negative_mean_cosine() -> None:
    features, target = normal(3, 16, 5), normal(3, 4, 4, 5, seed=1)
    expected = -torch.stack(
        [F.cosine_similarity(f, t.flatten(0, 1)).mean() for f, t in zip(features, target, strict=True)]
    )
    torch.testing.assert_close(misalignment(features, target), expected)
    same = target.flatten(1, 2)
    torch.testing.assert_close(misalignment(2 * same, target), -torch.ones(3))


def test_features_are_resized_to_the_grid_of_the_target() -> None:
    coarse = normal(1, 1, 1, 5).expand(1, 2, 2, 5)
    torch.testing.assert_close(misalignment(coarse.flatten(1, 2), coarse[:, :1, :1].expand(1, 7, 7, 5)), -torch.ones(1))
    with pytest.raises(ValueError, match="15 features do not form a square"):
        misalignment(normal(1, 15, 5), normal(1, 4, 4, 5))


def test_a_representation_is_read_from_a_file_at_any_size(tmp_path: Path) -> None:
    network = timm.create_model(TINY, pretrained=False)
    save_file(network.state_dict(), tmp_path / "vit.safetensors")
    for size, side in ((32, 2), (48, 3)):
        representation = Representation(model=TINY, weights=str(tmp_path / "vit.safetensors"), size=size)
        features = representation(images(2))
        assert features.shape == (2, side, side, representation.dim) == (2, side, side, 192)
    assert not list(representation.parameters()) and not representation.state_dict()
    full = Representation(model=TINY, weights=str(tmp_path / "vit.safetensors"), size=224)
    normalised = (F.interpolate(images(2), 224, mode="bicubic", antialias=True).clamp(0, 1) - 0.5) / 0.5
    with torch.no_grad():
        expected = network.eval().forward_features(normalised)[:, 1:].unflatten(1, (14, 14))
    torch.testing.assert_close(full(images(2)), expected, atol=1e-4, rtol=1e-4)


def test_the_representation_term_trains_the_decoder_and_its_projection() -> None:
    representation = Representation(network=small_vit(), size=64)
    tokenizer, objective = flextok(repa={"layer": 0, "dim": 192}), FlowObjective(repa=representation, repa_weight=0.25)
    assert objective.meet(tokenizer) == []
    draws = tokenizer.draw(3, generator("test"))
    result = tokenizer(images(3), draws)
    terms = objective(result, images(3), 0)
    assert result.flow is not None and result.flow.features is not None
    raw = misalignment(result.flow.features, representation(images(3))).mean()
    torch.testing.assert_close(terms["repa"], 0.25 * raw)
    terms["repa"].backward()
    assert tokenizer.decoder.projection.layers[0].weight.grad.abs().sum() > 0
    assert not list(objective.parameters())


def test_without_weights_the_term_is_off_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smalti.objectives.repa.try_to_load_from_cache", lambda *_: None)
    objective = FlowObjective(repa=Representation())
    tokenizer = flextok(repa={"layer": 0, "dim": 1024})
    (note,) = objective.meet(tokenizer)
    assert "vit_large_patch14_dinov2" in note and "objective.repa.weights=download" in note and "\n" not in note
    assert not [name for name, _ in tokenizer.named_parameters() if "projection" in name]
    assert tokenizer.arguments["repa"] is None
    result = tokenizer(images(2), tokenizer.draw(2, generator("test")))
    assert result.flow is not None and result.flow.features is None
    assert list(objective(result, images(2), 0)) == ["flow"]


def test_what_does_not_fit_together_is_one_line(tmp_path: Path) -> None:
    representation = Representation(network=small_vit(), size=64)
    for options, message in (({}, "tokenizer.repa=null"), ({"repa": {"layer": 0, "dim": 7}}, "{dim: 7}")):
        with pytest.raises(UserError, match="features of 192 channels.*" + message):
            FlowObjective(repa=representation).meet(flextok(**options))
    with pytest.raises(UserError, match="needs a decoder that denoises"):
        FlowObjective()(TokenizerOutput(Quantized(normal(1, 2, 3), None)), images(1), 0)
    with pytest.raises(UserError, match="repa_weight=-1 is negative"):
        FlowObjective(repa_weight=-1)
    with pytest.raises(UserError, match="size=30 is not a multiple of 16"):
        Representation(network=small_vit(), size=30)
    with pytest.raises(UserError, match="did you mean"):
        Representation(model="vit_larg_patch14_dinov2")
    with pytest.raises(UserError, match="is not a file"):
        Representation(model=TINY, weights=str(tmp_path / "none"))
    save_file({"nothing": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="does not fit vit_tiny"):
        Representation(model=TINY, weights=str(tmp_path / "other.safetensors"))
