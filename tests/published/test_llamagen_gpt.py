"""LlamaGen's GPTs: forward passes, gradients, sampling and sizes as the published code has them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from smalti.generators.base import Condition
from smalti.generators.gpt import GPT
from smalti.objectives.discriminators import PatchGAN, StyleGANDiscriminator
from smalti.published.llamagen import (
    SIZES,
    build_generator,
    load_published,
    sampling_from_published,
    to_published,
)
from smalti.published.llamagen_vq import build_tokenizer
from smalti.tokenizers.spec import Tokens


class Times(nn.Module):
    """Stands where dropout or drop path stood, with its drawn factor."""

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def model_of(case: Any) -> GPT:
    model = build_generator(case.config["model"])
    load_published(model, case.weights)
    return model


def condition_of(case: Any) -> Condition:
    """Labels, or features with the columns that the attention mask leaves to the last row."""
    if "labels" in case.inputs:
        return Condition(labels=case.inputs["labels"])
    features = case.inputs["caption"]
    given = case.inputs["emb_mask"] if "emb_mask" in case.inputs else case.inputs["mask"][:, 0, -1, : features.shape[1]]
    return Condition(features=features, mask=given.bool())


def put_draws(model: GPT, inputs: dict[str, Tensor]) -> None:
    """Supplied dropout masks and drop path flags in the places of the modules that draw them."""
    places = {"attn": "drop_path_1", "resid": "dropout_1", "ffn": "dropout_2"}
    for name, tensor in inputs.items():
        kind, _, place = name.partition("/")
        if kind == "dropout_mask" and place == "token":
            model.dropout = Times(tensor)  # type: ignore[assignment]
        elif kind == "dropout_mask":
            layer, part = place.split(".")
            setattr(model.blocks[int(layer.removeprefix("layer"))], places[part], Times(tensor))
        elif kind == "drop_path_keep":
            _, layer, part = place.split(".")
            block = model.blocks[int(layer.removeprefix("layer"))]
            which = "drop_path_1" if part == "attn" else "drop_path_2"
            setattr(block, which, Times(tensor[:, None, None] / (1 - getattr(block, which).rate)))


def watch(model: GPT) -> dict[str, Tensor]:
    """Activations by their published names, filled by the next forward."""
    seen: dict[str, Tensor] = {}
    modules = {"embed": model.dropout, "final_norm": model.norm}
    modules |= {f"layer{index}": block for index, block in enumerate(model.blocks)}
    for name, module in modules.items():
        module.register_forward_hook(lambda _, __, output, name=name: seen.__setitem__(f"hidden/{name}", output))
    return seen


@pytest.mark.family("llamagen-gpt", mode="train")
def test_training_passes_have_the_published_logits_loss_and_gradients(case: Any) -> None:
    model, inputs = model_of(case).train(), case.inputs
    put_draws(model, inputs)
    model.condition.requires_grad_(True)
    if isinstance(null := getattr(model.condition, "null", None), Tensor):
        null.requires_grad_()
    seen = watch(model)
    logits: list[Tensor] = []
    model.head.register_forward_hook(lambda _, __, output: logits.append(output))
    output = model(
        Tokens.full(None, inputs["targets"]),
        condition_of(case),
        {"drop": inputs.get("drop_uniform", torch.ones(len(inputs["idx"])))},
        weight=inputs.get("valid"),
    )
    output.loss.backward()
    case.compare("logits", logits[0])
    case.compare("loss", output.loss)
    for name in case.names("hidden/"):
        case.compare(f"hidden/{name}", seen[f"hidden/{name}"])
    gradients = to_published({name: tensor.grad for name, tensor in model.named_parameters()})
    case.compare_gradients(gradients.__getitem__)
    for name in case.names("grad_norm_buffer/"):
        case.compare(f"grad_norm_buffer/{name}", null.grad.norm())
    compare_table(case, model)


@pytest.mark.family("llamagen-gpt", mode="eval")
def test_evaluation_passes_have_the_published_logits_at_every_position(case: Any) -> None:
    model, inputs = model_of(case).eval(), case.inputs
    seen = watch(model)
    start, present = model.begin(condition_of(case), len(inputs["idx"]))
    hidden = model.trunk(torch.cat([start, model.embed(inputs["idx"], 0)], dim=1), 0, present)
    case.compare("logits", model.head(hidden))
    for name in case.names("hidden/"):
        case.compare(f"hidden/{name}", seen[f"hidden/{name}"])
    compare_table(case, model)


def compare_table(case: Any, model: GPT) -> None:
    assert model.rotary is not None
    case.compare("freqs_cis", torch.view_as_real(model.rotary.table(torch.device("cpu"))))


@pytest.mark.family("llamagen-sampling")
@torch.inference_mode()
def test_sampling_gives_the_published_distributions_and_tokens(case: Any) -> None:
    model, arguments, tokens = model_of(case).eval(), case.config["sampling"], case.outputs["tokens"]
    b, n = tokens.shape
    fields = sampling_from_published(arguments)
    settings = replace(model.sampling, **fields)
    scales = settings.scales(n)
    guided = any(scale != 1 for scale in scales)
    condition = condition_of(case)

    # Step by step along the published tokens, from the cache, and all at once.
    predict = model.predictor(condition, b, guided=guided)
    history = tokens.repeat(2 if guided else 1, 1)
    steps = [predict.begin(history[:, :0])] + [predict(history[:, i - 1 : i], i - 1) for i in range(1, n)]
    logits = torch.cat(steps, dim=1)
    case.compare("model_logits", logits)
    at_once = model.predictor(condition, b, guided=guided).begin(history[:, :-1])
    case.compare("uncached_model_logits", at_once)

    conditional, unconditional = logits.chunk(2) if guided else (logits, logits)
    mixed = unconditional + torch.tensor(scales)[:, None] * (conditional - unconditional)
    case.compare("guided_logits", mixed)
    temperature = max(arguments["temperature"], 1e-5)  # a greedy choice is made after the filters
    filtered = replace(settings, temperature=temperature).filters()(mixed)
    if "filtered_logits" in case.outputs:
        case.compare("filtered_logits", filtered)
    case.compare("probs", filtered.softmax(-1))

    uniform = case.inputs.get("uniforms", torch.full((b, n), 0.5)).double()
    made = model.sample(condition, uniform, **fields)
    assert torch.equal(made.indices, tokens)


@pytest.mark.family("llamagen-stats")
def test_published_gpts_have_the_published_parameters_and_multiplications(case: Any) -> None:
    for entry in case.config["gpt"]:
        name = entry["name"]
        config = {**SIZES[entry["gpt_model"]], **entry["kwargs"]}
        with torch.device("meta"):
            model = build_generator(config)
        sizes = {key: tensor.numel() for key, tensor in model.named_parameters()}
        parts = {"condition": "condition.", "embeddings": "token_embedding.", "layers": "blocks.", "head": "head."}
        counts = {part: sum(n for key, n in sizes.items() if key.startswith(start)) for part, start in parts.items()}
        counts["total"] = sum(sizes.values())
        counts["no_decay"] = sum(tensor.numel() for tensor in model.parameters() if tensor.ndim < 2)
        for part in case.names(f"params/{name}/"):
            assert counts[part] == int(case.outputs[f"params/{name}/{part}"]), f"{name} {part}"
        assert model.blocks[0].mlp.proj.in_features == int(case.outputs[f"hidden/{name}/ffn"])
        if entry["flops"]:
            published = int(case.outputs[f"flops_forward/{name}"])
            ours = multiplications(model, entry["kwargs"]["cls_token_num"])
            assert ours == pytest.approx(published, rel=case.meta["tolerance"]["flops_rtol"]), name


def multiplications(model: GPT, leading: int) -> int:
    """Of one training forward of one image, with the head everywhere (ours leaves out the condition)."""
    n, v, width = model.spec.length, model.spec.codebook_size, model.norm.weight.numel()
    assert v is not None
    if model.num_classes is None:
        condition = Condition(features=torch.zeros(1, leading, model.condition.null.shape[1], device="meta"))
    else:
        condition = Condition(labels=torch.zeros(1, dtype=torch.int64, device="meta"))
    with FlopCounterMode(display=False) as counter:
        model.logits(torch.zeros(1, n, dtype=torch.int64, device="meta"), condition)
    return counter.get_total_flops() + 2 * (leading - 1) * width * v


# Of the published `ModelArgs`, and by name.
VQ_DEFAULTS = {
    "codebook_l2_norm": True, "commit_loss_beta": 0.25, "entropy_loss_ratio": 0.0, "z_channels": 256, "dropout_p": 0.0,
}  # fmt: skip
VQ_LEVELS = {"VQ-16": [1, 1, 2, 2, 4], "VQ-8": [1, 2, 2, 4]}


@pytest.mark.family("llamagen-stats")
def test_published_tokenizers_have_the_published_parameters_and_multiplications(case: Any) -> None:
    for entry in case.config["vq"]:
        name, levels = entry["name"], VQ_LEVELS[entry["vq_model"]]
        config = {**VQ_DEFAULTS, "encoder_ch_mult": levels, "decoder_ch_mult": levels, **entry["kwargs"]}
        with torch.device("meta"):
            model = build_tokenizer(config, image_size=entry["flops"])
            images = torch.zeros(1, 3, entry["flops"], entry["flops"])
        for part, module in {
            "total": model, "encoder": model.encoder, "decoder": model.decoder, "codebook": model.quantizer,
        }.items():  # fmt: skip
            count = sum(parameter.numel() for parameter in module.parameters())
            assert count == int(case.outputs[f"params/{name}/{part}"]), f"{name} {part}"
        with FlopCounterMode(display=False) as encoding:
            latents = model.features(images)
        with FlopCounterMode(display=False) as decoding:
            model.pixels(latents)
        for what, counter in (("encode", encoding), ("decode", decoding)):
            published, tolerance = int(case.outputs[f"flops_{what}/{name}"]), case.meta["tolerance"]["flops_rtol"]
            assert counter.get_total_flops() == pytest.approx(published, rel=tolerance), f"{name} {what}"


@pytest.mark.family("llamagen-stats")
def test_published_discriminators_have_the_published_parameters(case: Any) -> None:
    for entry in case.config["disc"]:
        options = entry["kwargs"]
        model = (
            PatchGAN(channels=options["ndf"], num_layers=options["n_layers"])
            if entry["disc_type"] == "patchgan"
            else StyleGANDiscriminator(image_size=options["image_size"])
        )
        count = sum(parameter.numel() for parameter in model.parameters())
        assert count == int(case.outputs[f"params/{entry['name']}/total"]), entry["name"]
