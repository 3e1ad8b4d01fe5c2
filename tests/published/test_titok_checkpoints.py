"""Published checkpoints from end to end: a hub folder in, tokens and pixels out; stage 1 and teacher into stage 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import smalti
from smalti.errors import UserError
from smalti.published.titok import (
    build_tokenizer,
    convert,
    load_published,
    our_name,
    published_name,
    to_published,
)
from smalti.registry import describe
from smalti.tokenizers.maskgit_vqgan import MaskGITVQGAN
from smalti.tokenizers.spec import Tokens
from smalti.tokenizers.titok import TiTok
from smalti.training.initialise import hand_over

hub = pytest.mark.family("titok-checkpoint")


def folder(case: Any) -> Path:
    path = case.path / "checkpoint"
    if not path.is_dir():
        pytest.skip("this case has no checkpoint folder")
    return path


def text(case: Any) -> dict[str, torch.Tensor]:
    return {"text": case.inputs["text_guidance"]} if "text_guidance" in case.inputs else {}


@hub
def test_a_hub_folder_gives_the_published_tokens_and_pixels(case: Any) -> None:
    model = convert(folder(case), size_overrides=case.size_overrides)
    tokens = model.encode(case.inputs["image"])
    case.compare("quantized", tokens.latents.mT[:, :, None])
    given = Tokens.full(case.outputs["quantized"][:, :, 0].mT)
    if tokens.indices is not None:
        case.compare_indices("indices", tokens.indices)
        given = Tokens.full(given.latents, case.outputs["indices"][:, 0])
    with torch.inference_mode():
        case.compare("decoded", model._decode(model.tokens_to_latents(given), text(case).get("text"))[1])
    published = case.outputs["pixels_uint8"].int()
    images = model.decode(given, **text(case))
    ours = (images * 255).byte().permute(0, 2, 3, 1).int()
    assert (ours - published).abs().max() <= 1  # truncation, within rounding of an integer
    assert model.spec.condition == ("text" if text(case) else "none")


@hub
def test_a_converted_checkpoint_exports_and_loads_with_equal_outputs(case: Any, tmp_path: Path) -> None:
    model = convert(folder(case), size_overrides=case.size_overrides)
    model.save_pretrained(tmp_path / "export")
    loaded = smalti.load(tmp_path / "export")
    tokens = model.encode(case.inputs["image"])
    assert torch.equal(loaded.encode(case.inputs["image"]).indices, tokens.indices)
    assert torch.equal(loaded.decode(tokens, **text(case)), model.decode(tokens, **text(case)))
    assert loaded.fingerprint() == model.fingerprint()
    assert loaded.metadata["licence"] == "Apache-2.0" and "bytedance/1d-tokenizer" in loaded.metadata["source"]


@hub
def test_a_bin_file_alone_gives_a_model_of_the_same_sizes(case: Any, tmp_path: Path) -> None:
    state = load_file(folder(case) / "model.safetensors")
    torch.save(state, tmp_path / "tokenizer.bin")
    alone = convert(tmp_path / "tokenizer.bin")
    model = convert(folder(case), size_overrides=case.size_overrides)
    assert alone.spec == model.spec
    ours, theirs = to_published(alone), to_published(model)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    cannot_be_seen = {"heads", "distance"}  # taken as in all published models
    assert visible(describe(alone), cannot_be_seen) == visible(describe(model), cannot_be_seen)


def visible(description: Any, left_out: set[str]) -> Any:
    """A model's description with some keys left out, at any depth."""
    if isinstance(description, dict):
        return {key: visible(value, left_out) for key, value in description.items() if key not in left_out}
    return description


@hub
def test_a_config_of_the_other_layout_is_refused(case: Any) -> None:
    legacy = case.config["model"]["vq_model"].get("is_legacy", True)
    model = {**case.config["model"]["vq_model"], "is_legacy": not legacy, "finetune_decoder": False}
    model.pop("text_context_length", None), model.pop("text_embed_dim", None)
    other = {**case.config, "model": {"vq_model": model}}
    with pytest.raises(UserError, match=f"is_legacy={str(not legacy).lower()} but the checkpoint has decoder"):
        load_published(build_tokenizer(other, case.size_overrides), load_file(folder(case) / "model.safetensors"))


@hub
def test_stage_1_and_its_teacher_become_the_published_stage_2(case: Any) -> None:
    if "origin" not in case.meta:
        pytest.skip("this case is no hand-over")
    stage2, stage1, teacher = hand_over_parts(case)
    assert hand_over(stage2, stage1, teacher) == []
    ours = to_published(stage2)
    assert ours.keys() == case.meta["origin"].keys()
    for name, origin in case.meta["origin"].items():
        assert torch.equal(ours[name], case.weights[origin]), f"{name} does not come from {origin}"
    trainable = {published_name(name) for name, parameter in stage2.named_parameters() if parameter.requires_grad}
    assert trainable == set(case.meta["trainable"])
    stage2.eval()
    tokens = stage2.encode(case.inputs["image"])
    case.compare_indices("indices", tokens.indices)
    with torch.inference_mode():
        case.compare("pixels", stage2(case.inputs["image"]).reconstruction)


def hand_over_parts(case: Any) -> tuple[TiTok, TiTok, MaskGITVQGAN]:
    """A fresh stage-2 model, and the stage-1 model and the teacher with the weights of the case."""
    stage2 = build_tokenizer(case.config, case.size_overrides)
    settings = {**case.config["model"]["vq_model"], "finetune_decoder": False}
    stage1 = build_tokenizer({**case.config, "model": {"vq_model": settings}}, case.size_overrides)
    load_published(stage1, case.weights_of("stage1"))
    codes, dim = case.weights["teacher.quantize.embedding.weight"].shape
    quantizer = {"num_embeddings": codes, "embedding_dim": dim}
    teacher = build_tokenizer({"vqgan": case.size_overrides["pixel_vqgan"], "quantizer": quantizer})
    # The case has the half of the teacher that stage 2 needs; its encoder stays fresh.
    state = case.weights_of("teacher")
    assert isinstance(stage2, TiTok) and isinstance(stage1, TiTok) and isinstance(teacher, MaskGITVQGAN)
    missing, unexpected = teacher.load_state_dict({our_name(name): x for name, x in state.items()}, strict=False)
    assert not unexpected and all(name.startswith("encoder.") for name in missing)
    return stage2, stage1, teacher
