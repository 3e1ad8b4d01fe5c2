"""FlexTok's own generator: training passes, sampling and filters as the published code has them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from smalti.generators.base import Condition
from smalti.generators.decoding.choice import inverse_cdf
from smalti.generators.flextok_ar import FlexTokAR, FlexTokARSampling
from smalti.published.flextok_ar import build_generator, load_published, sampling_from_published, to_published
from smalti.tokenizers.spec import Tokens


def model_of(case: Any) -> FlexTokAR:
    table = case.inputs.get("text_table")
    model = build_generator(case.config, text_dim=None if table is None else table.shape[-1])
    load_published(model, case.weights)
    if table is not None:
        model.set_null_text(table[-1][case.inputs["text_mask"][-1].bool()])  # the last one is that of an empty text
    return model


def condition_of(case: Any) -> Condition:
    if "labels" in case.inputs:
        return Condition(labels=case.inputs["labels"])
    rows = case.inputs["text_ids"]
    return Condition(features=case.inputs["text_table"][rows], mask=case.inputs["text_mask"][rows].bool())


@pytest.mark.family("flextok-gpt", kind="train")
def test_training_passes_have_the_published_activations_loss_and_gradients(case: Any) -> None:
    model = model_of(case).train()
    seen: dict[str, Tensor] = {}
    for index, block in enumerate(model.blocks):
        name = f"block/{index}"
        block.register_forward_hook(lambda _, __, output, name=name: seen.__setitem__(name, output))
    model.blocks[0].register_forward_pre_hook(lambda _, given: seen.__setitem__("input_embeddings", given[0]))
    model.head.register_forward_hook(lambda _, __, output: seen.__setitem__("logits", output))
    if model.text_dim is not None:
        model.text.register_forward_hook(lambda _, __, output: seen.__setitem__("text_embeddings", output))
    output = model(Tokens.full(None, case.inputs["tokens"]), condition_of(case), {"drop": case.inputs["drop_draw"]})
    output.loss.backward()
    for name in ("input_embeddings", "logits", *(f"block/{name}" for name in case.names("block/"))):
        case.compare(name, seen[name])
    if "text_embeddings" in case.outputs:
        case.compare("text_embeddings", seen["text_embeddings"])
    case.compare("loss", output.loss)
    gradients = {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}
    case.compare_gradients(to_published(model, gradients).__getitem__)


@pytest.mark.family("flextok-gpt", kind="generate")
@torch.inference_mode()
def test_sampling_gives_the_published_distributions_and_tokens(case: Any) -> None:
    model, run = model_of(case).eval(), case.config["run"]
    fields = sampling_from_published(run["sampling"])
    if not run.get("protect_labels") and fields["guidance"] != 1 and model.text_dim is None:
        fields["null_class"] = "first"  # the published mistake
    ids, n, branches = case.outputs["ids"], run["num_keep_tokens"], run["sampling"].get("num_samples", 1)
    # Published branches part at the last token: here, sequences of their own with the same numbers until there.
    condition = condition_of(case)
    b = len(ids) // branches
    given = case.inputs.get("prefix", torch.empty(b, 0, dtype=torch.int64))
    k = given.shape[1]
    numbers = case.inputs["u"][: n - k].double()  # (steps, b, branches)
    uniform = torch.zeros(b, branches, n, dtype=torch.float64)
    uniform[:, :, k:] = numbers[..., :1].permute(1, 2, 0)
    uniform[:, :, -1] = numbers[-1]
    repeated = Condition(*(None if x is None else x.repeat_interleave(branches, 0) for x in parts(condition)))
    rows = given.repeat_interleave(branches, 0)
    made = model.sample(repeated, uniform.flatten(0, 1), given=rows, **fields)
    assert torch.equal(made.indices, ids[:, :n])

    # The distributions along the published tokens of the first branch.
    settings = replace(model.sampling, **fields)
    history = ids.view(b, branches, -1)[:, 0]
    guided = settings.guidance != 1
    predict = model.predictor(condition, b, guided=guided, sampling=settings)
    doubled = history.repeat(2 if guided else 1, 1)
    chances = []
    for step, i in enumerate(range(k, n)):
        logits = (predict.begin(doubled[:, :k]) if i == k else predict(doubled[:, i - 1 : i], i - 1))[:, -1]
        case.compare(f"last_logits/{step}", logits)
        conditional, unconditional = logits.chunk(2) if guided else (logits, logits)
        mixed = unconditional + settings.guidance * (conditional - unconditional)
        greedy = replace(settings, temperature=run["sampling"].get("temperature", 1.0))
        probabilities = greedy.filters()(mixed).softmax(-1)
        if f"probs/{step}" in case.outputs:
            case.compare(f"probs/{step}", probabilities)
        chances.append(probabilities)
    if settings.temperature == 0:  # chosen for sure here; there, by the probability before the choice
        chosen = torch.stack(chances, 1).gather(-1, history[:, k:n, None])[..., 0].log()
    else:
        chosen = made.log_probabilities
    case.compare("sequence_log_probs", chosen.sum(1, keepdim=True))


def parts(condition: Condition) -> tuple[Tensor | None, ...]:
    return condition.labels, condition.features, condition.mask


@pytest.mark.family("flextok-gpt", kind="sampler")
def test_filters_leave_the_published_distributions(case: Any) -> None:
    for index, setting in enumerate(case.config["run"]["settings"]):
        settings = sampling_from_published(setting)
        filters = FlexTokARSampling(**settings).filters()
        probabilities = filters(case.inputs["logits"]).softmax(-1)
        case.compare(f"probs/{index}", probabilities)
        chosen = inverse_cdf(probabilities[:, 0], case.inputs["u"].double())[:, None, None]
        assert torch.equal(chosen, case.outputs[f"tokens/{index}"])
        case.compare(f"token_probs/{index}", probabilities.gather(-1, chosen))
