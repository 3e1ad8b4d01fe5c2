"""TokenBridge's levels, head, forward, gradients and every iteration of its sampling, as in the published code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from smalti.generators.base import Condition
from smalti.generators.mar import known_tokens
from smalti.generators.tokenbridge import SampleDraws, TokenBridge, TokenBridgeSampling
from smalti.published.tokenbridge import (
    build_generator,
    check_buffers,
    load_published,
    quantizer_of,
    sampling_of,
    to_published,
)
from smalti.tokenizers.quantizers.bridge import (
    KL16_ORDER,
    BridgeQuantizer,
    gaussian_boundaries,
    gaussian_levels,
)
from smalti.tokenizers.spec import Tokens

ORDER = list(KL16_ORDER)
BACK = torch.tensor(KL16_ORDER).argsort()  # from the order of prediction to that of channels


@pytest.mark.family("tokenbridge-quant")
def test_levels_and_indices_are_the_published_ones(case: Any) -> None:
    config, x = case.config, case.inputs["x"]
    options = {"dim": x.shape[-1], "low": config["quant_min"], "high": config["quant_max"]}
    options["std_range"] = std_range = config["std_range"]
    compared = set()
    for bits in config["bits"]:
        key, levels = f"b{bits}", gaussian_levels(bits, std_range)
        case.compare(f"{key}/boundaries", gaussian_boundaries(bits, std_range))
        case.compare(f"{key}/reconstruction_values", levels)
        if not (levels.diff() > 0).all():  # the published levels have gaps and repetitions: ours are refused
            with pytest.raises(ValueError, match=f"bits={bits}: .*have no level of their own; use at most"):
                BridgeQuantizer(bits=bits, **options)
            compared |= {name for name in case.outputs if name.startswith(f"{key}/")}
            continue
        quantizer = BridgeQuantizer(bits=bits, **options)
        made = quantizer(x)
        case.compare_indices(f"{key}/indices", made.indices, f"{key}/margin")
        case.compare(f"{key}/dequantised", quantizer.lookup(case.outputs[f"{key}/indices"]))
        clear = case.outputs[f"{key}/margin"] > 1e-5
        torch.testing.assert_close(made.latents[clear], case.outputs[f"{key}/dequantised"][clear], rtol=1e-5, atol=2e-6)
        again = quantizer(made.latents).indices
        assert torch.equal(again, made.indices)
        case.compare_indices(f"{key}/second_pass_indices", again, f"{key}/margin")
        case.compare(f"{key}/values_original_range", quantizer.values)
        case.compare(f"{key}/mse", (quantizer(x).latents - x).square().mean())
        assert case.outputs[f"{key}/ptq_equal"].bool().all()
        names = "boundaries reconstruction_values indices dequantised margin second_pass_indices values_original_range"
        compared |= {f"{key}/{name}" for name in [*names.split(), "mse", "ptq_equal"]}
    if "channel_order" in case.outputs:
        assert case.outputs["channel_order"].tolist() == ORDER
        assert torch.equal(case.outputs["inv_channel_order"], BACK)
        ordered = BridgeQuantizer(bits=config["bits"][0], order=KL16_ORDER, **options)
        clear = f"b{config['bits'][0]}/margin"
        case.outputs["margin"] = case.outputs[clear][..., ORDER]
        case.compare_indices("reordered_indices", ordered(x).indices)
        torch.testing.assert_close(ordered(x).latents, BridgeQuantizer(bits=config["bits"][0], **options)(x).latents)
        allowed = case.outputs["channel_mask"] == 0
        assert torch.equal(allowed, torch.ones_like(allowed).tril())  # what a causal head sees
        compared |= {"channel_order", "inv_channel_order", "reordered_indices", "channel_mask", "margin"}
    assert compared == set(case.outputs)


def model_of(case: Any) -> TokenBridge:
    model = build_generator(case.config["model"])
    check_buffers(case.weights, case.config["model"], case.path)
    load_published(model, case.weights)
    return model.train(case.config.get("mode") == "train")


@pytest.mark.family("tokenbridge-head")
def test_the_head_is_the_published_one(case: Any) -> None:
    model = model_of(case).train()
    head, mask, given = model.head, case.inputs["mask"].bool(), case.inputs["z"].requires_grad_()
    z, targets = given[mask], case.inputs["targets"][mask]
    case.compare("logits", head(z, targets))
    loss = head.loss(targets, z).mean()
    case.compare("loss", loss)
    loss.backward()
    compare_gradients(case, model, z=given.grad)

    z, u, temperature = case.inputs["z_sample"], case.inputs["u"].T, case.config["temperature"]
    with torch.inference_mode():
        for name, t in (("sampled", temperature), ("greedy", 0)):
            made = head.sample(z, u, temperature=t, shifted_start=True)
            case.compare_indices(name, made, f"{name}_margin")
        sampled = case.outputs["sampled"]
        along = head(z, sampled, shifted_start=True)
        case.compare("sampled_probs", (along / temperature).softmax(-1))
        case.compare("train_path_logits_of_sampled", head(z, sampled))
    compared = {"logits", "loss", "sampled", "sampled_probs", "sampled_margin", "greedy", "greedy_margin"}
    compared.add("train_path_logits_of_sampled")
    assert {name for name in case.outputs if not name.startswith("grad")} == compared


def compare_gradients(case: Any, model: TokenBridge, **inputs: Tensor | None) -> None:
    """Those that the case gives, of parameters and `inputs`; parameters without one there have none here."""
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    theirs = to_published(model, gradients)
    case.compare_gradients({**theirs, **inputs}.__getitem__)
    given = set(case.names("grad_norm/"))
    assert all(not tensor.any() for name, tensor in theirs.items() if name not in given)


def indices_of(case: Any, latents: Tensor) -> Tensor:
    """(b, n, q), in the order of prediction, of published latents (b, c, h, w)."""
    return quantizer_of(case.config["model"])(rearrange(latents, "b c h w -> b (h w) c")).indices


def draws_of(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first tokens of a published order are masked, the last ones of ours are predicted."""
    order = inputs["orders"].flip(1)
    known = known_tokens(order.shape[1], float(inputs["mask_rate"]))
    label = inputs.get("label_drop_u", torch.ones(len(order)))
    return {"order": order, "lengths": torch.tensor(known), "label": label}


@pytest.mark.family("tokenbridge-forward")
def test_the_forward_and_its_gradients_are_the_published_ones(case: Any) -> None:
    model, given = model_of(case), draws_of(case.inputs)
    indices = indices_of(case, case.inputs["latents"])
    case.outputs["margin"] = case.outputs.pop("indices_margin")
    case.compare_indices("indices", indices[..., BACK])
    indices = case.outputs["indices"][..., ORDER]
    case.compare("quantised", model.numbers(indices)[..., BACK])
    mask = case.outputs["mask"].bool()
    wanted = given["order"][:, int(given["lengths"]) :]
    assert torch.equal(torch.zeros_like(mask).scatter(1, wanted, True), mask)

    classes = model.classes_of(case.inputs["labels"].masked_fill(given["label"] < model.label_dropout, -1))
    known = (~mask).nonzero()[:, 1].view(len(mask), -1)
    case.compare("encoder_out", model.body.encode(model.numbers(indices), known, classes))
    z = model.body(model.numbers(indices), mask, classes)
    case.compare("z", z)
    targets = indices[mask]  # in raster order, images one after the other
    assert torch.equal(case.outputs["targets_reordered"], indices)
    case.compare("logits", model.head(z[mask], targets))

    output = model(Tokens.full(None, indices), Condition(case.inputs["labels"]), given)
    output.loss.backward()
    case.compare("loss", output.loss)
    compare_gradients(case, model)
    assert sorted(case.names("grad_norm/")) == sorted(to_published(model))
    compared = {"indices", "margin", "quantised", "mask", "encoder_out", "z", "targets_reordered", "logits", "loss"}
    assert {name for name in case.outputs if not name.startswith("grad")} == compared


@pytest.mark.family("tokenbridge-sampling")
def test_every_iteration_is_the_published_one(case: Any) -> None:
    model, order = model_of(case).eval(), case.inputs["orders"].flip(1)
    settings = TokenBridgeSampling(**sampling_of(case.config["sample"]))
    draws = SampleDraws(order, case.inputs["u"])
    labels = case.inputs.get("labels", torch.full((len(order),), -1))
    with torch.inference_mode():
        made = list(model.decode(labels, settings, draws))
    left, compared = model.spec.length, {"margin_modelling_order", "latents"}
    margin = case.outputs["margin_modelling_order"][..., BACK]
    assert (margin > 1e-5).all(), "an index that is not clear changes all that follow"
    for it, iteration in enumerate(made):
        left -= iteration.wanted.shape[1]
        chosen = torch.zeros_like(order, dtype=torch.bool).scatter(1, iteration.wanted, True)
        assert torch.equal(chosen, case.outputs[f"pred/{it}"].bool())
        assert int(case.outputs[f"mask_len/{it}"]) == max(left, 1)  # there, 1 also when none is left
        raster = iteration.wanted.argsort(1)[..., None].expand_as(iteration.z)
        case.compare(f"features/{it}", iteration.z.gather(1, raster).flatten(0, 1))
        assert torch.equal(iteration.indices[..., BACK], case.outputs[f"tokens_after/{it}"])
        compared |= {f"{name}/{it}" for name in ("mask_len", "pred", "features", "tokens_after")}
    latents = quantizer_of(case.config["model"]).lookup(made[-1].indices)
    case.compare("latents", rearrange(latents, "b (h w) c -> b c h w", h=model.spec.grid[0]))
    forgotten = set(case.outputs) - compared
    assert left == 0 and all(name.startswith("cfg_iter/") for name in forgotten), forgotten
