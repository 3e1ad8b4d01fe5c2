"""RAR's network, orders, losses, gradients, initial values and sampling, as in the published code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_maskgit_models import compare_statistics
from torch import Tensor

from smalti.generators.base import Condition, GeneratorOutput
from smalti.generators.decoding.autoregressive import decode
from smalti.generators.rar import RAR
from smalti.published.rar import TABLES, build_generator, load_published, published_name, to_published
from smalti.tokenizers.spec import Tokens
from smalti.training.optim import split_by_decay


def model_of(case: Any) -> RAR:
    model = build_generator(case.config)
    load_published(model, case.weights)
    return model


@pytest.mark.family("rar", runner="forward")
@torch.inference_mode()
def test_logits_are_the_published_ones(case: Any) -> None:
    model, tokens, labels = model_of(case).eval(), case.inputs["tokens"], case.inputs["condition"]
    dropped = labels.masked_fill(case.inputs["label_drop_uniform"] < model.label_dropout, -1)
    raster = torch.arange(tokens.shape[1]).expand_as(tokens)
    assert torch.equal(row_of(model, torch.full_like(labels, -1)), case.outputs["none_condition_ids"])
    for labelling, given in (("keep", labels), ("drop", dropped)):
        assert torch.equal(row_of(model, given), case.outputs[f"condition_ids_{labelling}"])
        for name, order in (("raster", raster), ("orders", case.inputs["orders"])):
            sequence = tokens.gather(1, order)
            assert torch.equal(sequence, case.outputs[f"labels_{name}"])
            case.compare(f"logits_{name}_{labelling}", model.logits(sequence, given, order))
    prefix = case.outputs["logits_sampling_prefix"].shape[1] - 1
    case.compare("logits_sampling_prefix", model.logits(tokens[:, :prefix], labels))


def row_of(model: RAR, labels: Tensor) -> Tensor:
    """The rows of the published embedding that stand for labels."""
    assert model.num_classes is not None
    return model.v + 1 + labels.where(labels >= 0, model.num_classes)


@pytest.mark.family("rar", runner="loss")
def test_losses_and_gradients_are_the_published_ones(case: Any) -> None:
    model, order = model_of(case).train(), case.inputs["orders"]
    labels, drawn = case.inputs["condition"], case.inputs["label_drop_uniform"]
    output: GeneratorOutput = model(
        Tokens.full(None, case.inputs["tokens"]), Condition(labels), {"order": order, "label": drawn}
    )
    output.loss.backward()
    sequence = case.inputs["tokens"].gather(1, order)
    assert torch.equal(sequence, case.outputs["labels"])
    with torch.no_grad():
        case.compare("logits", model.logits(sequence, labels.masked_fill(drawn < model.label_dropout, -1), order))
    case.compare("loss", output.loss)
    case.compare("correct_tokens", output.statistics["accuracy"])
    gradients = to_published(model, {name: parameter.grad for name, parameter in model.named_parameters()})
    case.compare("total_grad_norm", torch.stack([gradient.norm() for gradient in gradients.values()]).norm())
    case.compare_gradients(gradients.__getitem__)
    assert sorted(case.names("grad_norm/")) == sorted(gradients)


@pytest.mark.family("rar-annealing")
def test_orders_are_random_as_often_as_published(case: Any) -> None:
    model = build_generator(case.config)
    ratios = [model.random_ratio(step) for step in case.inputs["global_step"].tolist()]
    case.compare("random_ratio", torch.tensor(ratios))


@pytest.mark.family("titok-schedules", kind="generator")
def test_the_order_schedule_beside_the_other_generators_is_the_published_one(case: Any) -> None:
    config = case.config["model"]["generator"]
    start, end = config["randomness_anneal_start"], config["randomness_anneal_end"]
    spec = {"kind": "discrete", "length": 4, "dim": 1, "image_size": 8, "codebook_size": 4}
    model = RAR(tokens=spec, width=8, depth=1, heads=1, mlp_width=8, anneal_start=start, anneal_end=end)
    ratios = [model.random_ratio(step) for step in case.inputs["rar_steps"].tolist()]
    case.compare("rar/random_ratio", torch.tensor(ratios, dtype=torch.float64))


@pytest.mark.family("rar-shapes")
def test_every_weight_of_a_published_size_has_its_place(case: Any) -> None:
    with torch.device("meta"):
        state = to_published(build_generator(case.config))
    assert {name: list(tensor.shape) for name, tensor in state.items()} == {
        name: case.outputs[f"shape/{name}"].tolist() for name in case.names("shape/")
    }
    assert sum(tensor.numel() for tensor in state.values()) == int(case.outputs["num_parameters"])


@pytest.mark.family("rar-decay-groups")
def test_decayed_parameters_are_the_published_ones(case: Any) -> None:
    with torch.device("meta"):
        model = build_generator(case.config)
    groups = enumerate(split_by_decay(model.named_parameters()))
    ours = {published_name(name): decayed for decayed, group in groups for name in group}
    assert ours == {name: int(case.outputs[f"decayed/{name}"]) for name in case.names("decayed/")}


@pytest.mark.family("rar-init")
def test_fresh_parameters_are_distributed_as_published(case: Any) -> None:
    torch.manual_seed(0)
    model = build_generator(case.config)
    state = to_published(model)
    # Rows that nothing reads are zero in ours; those that are read have the published statistics.
    used = {name: tensor[:, : model.spec.length + 2] for name, tensor in state.items() if name in TABLES}
    compare_statistics(case, {**state, **used})


@pytest.mark.family("rar-sampling")
@torch.inference_mode()
def test_samples_are_the_published_ones_with_and_without_a_cache(case: Any) -> None:
    model, labels = model_of(case).eval(), case.inputs["condition"]
    uniform, settings = case.inputs["multinomial_uniform"].T, model.sampling
    scales = settings.scales(uniform.shape[1])
    guided = any(scale != 1 for scale in scales)
    # There, the scales of the schedule are noted also where a scale of 0 switches guidance off.
    noted = replace(settings, guidance=case.config["model"]["generator"]["guidance_scale"])
    case.compare("cfg_scale", torch.tensor(noted.scales(uniform.shape[1])))
    cached = model.predictor(Condition(labels), len(labels), guided=guided)
    for name in ("cached", "uncached"):
        seen: list[Tensor] = []

        def filters(logits: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(settings.filters()(logits))
            return seen[-1]

        predictor = cached if name == "cached" else Uncached(model, cached.labels)
        made = decode(predictor, uniform, filters=filters, scales=scales).indices
        assert torch.equal(made, case.outputs[f"ids_{name}"])
        case.compare(f"logits_{name}", torch.stack(seen))
    assert torch.equal(model.sample(Condition(labels), uniform, temperature=0.0).indices, case.outputs["ids_greedy"])
    assert torch.equal(model.sample(Condition(labels), uniform).indices, case.outputs["ids_cached"])


class Uncached:
    """A predictor that reads all again."""

    def __init__(self, model: RAR, labels: Tensor) -> None:
        self.model, self.labels, self.before = model, labels, torch.empty(len(labels), 0, dtype=torch.int64)

    def begin(self, tokens: Tensor) -> Tensor:
        self.before = tokens
        return self.model.logits(tokens, self.labels)

    def __call__(self, tokens: Tensor, start: int) -> Tensor:
        self.before = torch.cat([self.before[:, :start], tokens], dim=1)
        return self.model.logits(self.before, self.labels)[:, start + 1 :]

    def keep(self, rows: int) -> None:
        self.labels, self.before = self.labels[:rows], self.before[:rows]
