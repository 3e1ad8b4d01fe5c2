"""Text encoders of transformers: their hidden states, whatever else is in a batch; what is refused."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from smalti.errors import UserError
from smalti.text import TextEncoder

CAPTIONS = ["a red circle left of a blue square", "a star", ""]


def test_features_are_the_encoders_hidden_states_in_float16(tiny_t5: Callable[..., Path]) -> None:
    from transformers import AutoTokenizer, T5EncoderModel

    encoder = TextEncoder(str(tiny_t5()))
    made = encoder.encode(CAPTIONS)
    assert made.features.dtype == torch.float16 and made.features.shape == (3, 9, encoder.dim)
    assert made.mask.sum(1).tolist() == [9, 3, 1], "each ends with a sign for the end"
    assert not made.features[~made.mask].any() and not made.features.requires_grad
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_t5()), T5EncoderModel.from_pretrained(tiny_t5())
    for caption, features, mask in zip(CAPTIONS, made.features, made.mask, strict=True):
        states = model(**tokenizer(caption, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(features[mask].float(), states, atol=2e-3, rtol=2e-3)


def test_features_do_not_depend_on_their_batch_nor_on_autocast(tiny_t5: Callable[..., Path]) -> None:
    encoder = TextEncoder(str(tiny_t5()))
    together = encoder.encode(CAPTIONS)
    with torch.autocast("cpu", torch.bfloat16):
        for row, caption in enumerate(CAPTIONS):
            alone = encoder.encode([caption]).features[0]
            torch.testing.assert_close(alone, together.features[row, : len(alone)], atol=1e-3, rtol=1e-3)


def test_long_captions_are_cut_off(tiny_t5: Callable[..., Path]) -> None:
    made = TextEncoder(str(tiny_t5()), length=4).encode(CAPTIONS)
    assert made.mask.sum(1).tolist() == [4, 3, 1]


def test_texts_without_a_word_have_no_features_where_nothing_marks_the_end(
    tmp_path: Path, tiny_t5: Callable[..., Path]
) -> None:
    from transformers import AutoTokenizer

    from tokenizers import processors

    shutil.copytree(tiny_t5(), tmp_path / "t5")
    tokenizer = AutoTokenizer.from_pretrained(tiny_t5())
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.save_pretrained(tmp_path / "t5")
    made = TextEncoder(str(tmp_path / "t5")).encode(["", ""])
    assert made.features.shape == (2, 1, 8) and not made.mask.any() and not made.features.any()


def test_a_fingerprint_tells_weights_and_vocabularies_apart(tmp_path: Path, tiny_t5: Callable[..., Path]) -> None:
    one = TextEncoder(str(tiny_t5()))
    assert one.describe() == {"path": str(tiny_t5()), "fingerprint": one.fingerprint, "dim": 8, "length": 120}
    assert TextEncoder(str(tiny_t5()), length=7).fingerprint == one.fingerprint
    assert TextEncoder(str(tiny_t5(seed=1))).fingerprint != one.fingerprint
    shutil.copytree(tiny_t5(), tmp_path / "t5")
    file = tmp_path / "t5" / "tokenizer.json"
    file.write_text(file.read_text().replace('"circle"', '"disc"'))
    assert TextEncoder(str(tmp_path / "t5")).fingerprint != one.fingerprint


def test_clips_text_model_is_one_within_its_limits(
    tmp_path: Path, tiny_t5: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**size, "vocab_size": 100, "max_position_embeddings": 7, "eos_token_id": 1, "bos_token_id": 0}
    vision = {**size, "image_size": 8, "patch_size": 4}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=4)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_t5()).save_pretrained(tmp_path)
    capfd.readouterr()
    encoder = TextEncoder(str(tmp_path), length=7)
    assert encoder.encode(CAPTIONS).features.shape == (3, 7, 8) and type(encoder.model).__name__ == "CLIPTextModel"
    assert capfd.readouterr() == ("", ""), "what is left alone of the file is not reported"
    with pytest.raises(UserError, match="reads 7 tokens at most, not 120; use text_length=7"):
        TextEncoder(str(tmp_path))


def test_what_is_no_text_encoder_is_refused_in_one_line(
    tmp_path: Path, tiny_t5: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer, GPT2Config

    for name in ("gpt2", "unpadded", "damaged", "lacking", "none"):
        shutil.copytree(tiny_t5(), tmp_path / name)
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    tokenizer = AutoTokenizer.from_pretrained(tiny_t5())
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "unpadded")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"no weights")
    weights = load_file(tmp_path / "lacking" / "model.safetensors")
    del weights["encoder.final_layer_norm.weight"]
    save_file(weights, tmp_path / "lacking" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "none" / "config.json").unlink()
    for name, said in (
        (
            "gpt2",
            "is no text encoder that is known here: it is a gpt2; give one such as text_encoder=google/flan-t5-xl",
        ),
        ("unpadded", "its tokenizer pads nothing"),
        ("damaged", "its weights cannot be loaded .*; download it again"),
        ("lacking", r"has no weights for encoder\.final_layer_norm\.weight; download it again"),
        ("none", "cannot be loaded .*; give the id of a repository of Hugging Face or its folder, such as"),
    ):
        with pytest.raises(UserError, match=said) as refused:
            TextEncoder(str(tmp_path / name))
        assert "\n" not in str(refused.value)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"needs transformers; pip install 'smalti\[text\]'"):
        TextEncoder(str(tiny_t5()))
