"""FlexTok's FSQ: bound, rounding, indices, gradient, training noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from smalti.published.flextok import Module, read_quantizer
from smalti.tokenizers.quantizers.base import Draws, Quantized
from smalti.tokenizers.quantizers.fsq import FSQ


def draws(case: Any) -> Draws:
    """The injected draws. The published code draws gate and share once a call: the same for every sample."""
    given, b, found = case.inputs, len(case.inputs["z"]), {}
    if "drop_mask" in given:  # 1 = unrounded; as the uniform draws that say so
        found["drop"] = 1 - given["drop_mask"]
    if "apply_draw" in given:
        found["corrupt"] = given["apply_draw"].expand(b)
        found["corrupt_share"] = given["p_draw"].expand(b)
        found["corrupt_tokens"] = given["corrupt_draw"]
        found["corrupt_indices"] = given["random_indices"]
    return found


def published_sums(fsq: FSQ, values: Tensor) -> Tensor:
    """What the published code cuts to integers to get its indices, in float32."""
    half = fsq.levels // 2
    return ((values * half + half) * fsq.basis).sum(-1)


def compare_indices(case: Any, name: str, fsq: FSQ, quantized: Quantized, margin: Tensor | None = None) -> None:
    """Ours where the published sum is a whole number, and the published cut of ours everywhere."""
    theirs = case.outputs[name]
    clear = torch.ones_like(theirs).bool() if margin is None else margin.amin(-1) > 1e-5
    sums = published_sums(fsq, quantized.latents)
    assert torch.equal(sums.long()[clear], theirs.long()[clear]), f"{case} {name}"
    whole = clear & (sums == sums.round())
    assert quantized.indices is not None
    assert torch.equal(quantized.indices[whole], theirs.long()[whole]), f"{case} {name}"


@pytest.mark.family("flextok-fsq")
def test_values_indices_and_gradients_are_the_published_ones(case: Any) -> None:
    fsq = read_quantizer(Module("regularizer", case.config["regularizer"]))
    case.compare("codebook_size", fsq.codebook_size)
    case.compare("basis", fsq.basis)

    z = case.inputs["z"].requires_grad_()
    training = case.config["run"]["mode"] == "train"
    quantized = fsq(z, draws(case) if training else None)
    case.compare("bounded", fsq.bound(z))
    case.compare("quant", quantized.latents)
    compare_indices(case, "tokens", fsq, quantized, case.outputs["margin"])
    (gradient,) = torch.autograd.grad((quantized.latents * case.inputs["probe"]).sum(), z)
    case.compare("grad_z", gradient)

    if "roundtrip" in case.outputs:
        case.compare("roundtrip", fsq.lookup(case.outputs["tokens"].long()))
    if "indices" in case.inputs:
        values = fsq.lookup(case.inputs["indices"].long())
        case.compare("embedding", values)
        assert torch.equal(published_sums(fsq, values).long(), case.outputs["indices_back"].long())


@pytest.mark.family("flextok-fsq")
def test_lists_of_sequences_and_of_images_give_the_published_values(case: Any) -> None:
    fsq = read_quantizer(Module("regularizer", case.config["regularizer"]))
    for name in case.names("list_quant/"):
        z = case.inputs[f"list/{name}"]
        last = z if z.ndim == 3 else z.flatten(2).transpose(1, 2)  # images have their channels first
        quantized = fsq(last)
        values = quantized.latents if z.ndim == 3 else quantized.latents.transpose(1, 2).reshape(z.shape)
        case.compare(f"list_quant/{name}", values)
        case.compare(f"list_tokens/{name}", quantized.indices.reshape(case.outputs[f"list_tokens/{name}"].shape))
