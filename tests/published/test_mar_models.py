"""MAR's forward, losses, gradients, schedules and every iteration of its sampling, as in the published code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from smalti.generators.base import Condition
from smalti.generators.decoding.guidance import scales_by_tokens
from smalti.generators.decoding.schedules import tokens_per_iteration
from smalti.generators.heads.base import Noise
from smalti.generators.heads.diffusion import DiffusionHead
from smalti.generators.mar import MAR, MARSampling, SampleDraws, known_tokens
from smalti.published.mar import build_generator, load_published, sampling_of, to_published
from smalti.tokenizers.spec import Tokens


def model_of(case: Any) -> MAR:
    model = build_generator(case.config["model"])
    load_published(model, case.weights)
    return model.train(case.config.get("mode") == "train")


def tokens_of(latents: Tensor) -> Tensor:
    """A tokenizer's (b, h · w, c) of published latents (b, c, h, w)."""
    return rearrange(latents, "b c h w -> b (h w) c")


def draws_of(inputs: dict[str, Tensor], repeats: int) -> dict[str, Tensor]:
    """Of the published numbers, those of masked tokens: the first ones of an order there, the last ones of ours."""
    order = inputs["orders"].flip(1)
    b, n = order.shape
    known = known_tokens(n, float(inputs["mask_rate"]))
    rows = torch.arange(repeats * b * n).view(repeats, b, n)
    rows = rows.gather(2, order[:, known:].expand(repeats, -1, -1)).flatten()
    return {
        "order": order,
        "lengths": torch.tensor(known),
        "label": inputs.get("label_drop_u", torch.ones(b)),
        "t": inputs["t"][rows],
        "noise": inputs["noise"][rows],
        "rows": rows,  # in the published order
    }


def record_losses(model: MAR) -> list[tuple[Tensor, Tensor]]:
    """Squared errors and bits of every row, of each forward that follows."""
    head = model.head
    assert isinstance(head, DiffusionHead)
    seen: list[tuple[Tensor, Tensor]] = []
    losses_of = head.losses

    def losses(*given: Any) -> tuple[Tensor, Tensor]:
        seen.append(losses_of(*given))
        return seen[-1]

    head.losses = losses  # type: ignore[method-assign]
    return seen


@pytest.mark.family("mar-forward")
def test_the_forward_and_its_gradients_are_the_published_ones(case: Any) -> None:
    model, latents = model_of(case), tokens_of(case.inputs["latents"])
    given = draws_of(case.inputs, model.loss_repeats)
    patches, mask = model.patchify(latents), case.outputs["mask"].bool()
    case.compare("tokens", patches)
    assert torch.equal(model.unpatchify(patches), latents)
    wanted = given["order"][:, int(given["lengths"]) :]
    assert torch.equal(torch.zeros_like(mask).scatter(1, wanted, True), mask)
    case.compare("class_embedding", model.classes_of(case.inputs["labels"]))

    labels = case.inputs["labels"].masked_fill(given["label"] < model.label_dropout, -1)
    classes = model.classes_of(labels)
    case.compare("encoder_out", model.body.encode(patches, (~mask).nonzero()[:, 1].view(len(mask), -1), classes))
    case.compare("z", model.body(patches, mask, classes))

    seen = record_losses(model)
    output = model(Tokens.full(latents), Condition(case.inputs["labels"]), given)
    output.loss.backward()
    case.compare("loss", output.loss)
    mse, vb = seen[0]
    for name, ours in (("mse", mse), ("vb", vb), ("loss", mse + vb)):
        everything = case.outputs[f"per_row/{name}"].clone()  # where the published code computes in vain
        everything[given["rows"]] = ours.detach()
        case.compare(f"per_row/{name}", everything)
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    case.compare_gradients(to_published(model, gradients).__getitem__)
    assert sorted(case.names("grad_norm/")) == sorted(to_published(model))


class GivenDraws(SampleDraws):
    """The published numbers, which belong to places, and of which each is used once."""

    def __init__(self, case: Any) -> None:
        self.order = case.inputs["orders"].flip(1)
        self.numbers = torch.cat([case.inputs["noise_init"][None], case.inputs["noise_steps"]])

    def noise(self, iteration: int, wanted: Tensor, steps: int) -> Noise:
        places = wanted[..., None].expand(-1, -1, self.numbers.shape[-1])
        return lambda k: self.numbers[k].gather(1, places).flatten(0, 1)


@pytest.mark.family("mar-sampling")
def test_every_iteration_is_the_published_one(case: Any) -> None:
    model, draws = model_of(case), GivenDraws(case)
    settings = MARSampling(**{**vars(model.sampling), **sampling_of(case.config["sample"])})
    labels = case.inputs.get("labels", torch.full((len(draws.order),), -1))
    with torch.inference_mode():
        made = list(model.decode(labels, settings, draws))
    left = model.n
    compared = {"latents"}
    for it, iteration in enumerate(made):
        b, count = iteration.wanted.shape
        left -= count
        chosen = torch.zeros(b, model.n, dtype=torch.bool).scatter(1, iteration.wanted, True)
        assert torch.equal(chosen, case.outputs[f"pred/{it}"].bool())
        assert int(case.outputs[f"mask_len/{it}"]) == max(left, 1)  # there, 1 also when none is left
        case.compare(f"cfg_iter/{it}", torch.tensor(iteration.scale))
        case.compare(f"tokens_after/{it}", iteration.tokens)
        if f"z/{it}" in case.outputs:  # of all places there
            branches = len(case.outputs[f"z/{it}"]) // b
            everything = case.outputs[f"z/{it}"].clone()
            everything[chosen.repeat(branches, 1)] = iteration.z[
                torch.arange(branches * b)[:, None], iteration.wanted.argsort(1).repeat(branches, 1)
            ].flatten(0, 1)
            case.compare(f"z/{it}", everything)
        compared |= {f"{name}/{it}" for name in ("mask_len", "pred", "cfg_iter", "tokens_after", "z")}
    case.compare("latents", rearrange(model.unpatchify(made[-1].tokens), "b (h w) c -> b c h w", h=model.spec.grid[0]))
    assert left == 0 and set(case.outputs) <= compared


@pytest.mark.family("mar-schedule")
def test_tokens_and_scales_of_iterations_are_the_published_ones(case: Any) -> None:
    compared = set()
    for size, iterations, guidance, schedule in case.config["grid"]:
        n = (size // 16) ** 2
        counts = tokens_per_iteration(n, iterations)
        left = [n - sum(counts[: s + 1]) for s in range(iterations)]
        (key,) = {
            name.rsplit("/", 1)[0]
            for name in case.outputs
            if name.startswith(f"L{n}-K{iterations}-cfg{guidance}-{schedule}/")
        }
        assert case.outputs[f"{key}/count"].tolist() == counts
        assert case.outputs[f"{key}/mask_len"].tolist() == [max(count, 1) for count in left]
        case.compare(f"{key}/scale", torch.tensor(scales_by_tokens(guidance, counts, schedule)))
        compared |= {f"{key}/{name}" for name in ("count", "mask_len", "scale")}
    assert compared == set(case.outputs)
