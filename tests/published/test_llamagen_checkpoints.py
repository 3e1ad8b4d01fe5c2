"""LlamaGen's and FlexTok's generators as files: every kind that there is, told apart, and refused where it must be."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn

import smalti
from smalti.errors import UserError
from smalti.generators.flextok_ar import FlexTokAR
from smalti.generators.gpt import GPT
from smalti.published import flextok_ar, llamagen
from smalti.tokenizers.vqgan import VQGAN

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-B is small here."""
    small = {"GPT-B": {"n_layer": 2, "n_head": 3, "dim": 24}}
    monkeypatch.setattr(llamagen, "SIZES", {**llamagen.SIZES, **small})


def published(text: bool = False, size: str = "GPT-B", **config: Any) -> tuple[GPT, dict[str, Tensor]]:
    """A model and its weights as LlamaGen writes them."""
    given = {"vocab_size": 16, "num_classes": 4, "block_size": 256, **llamagen.SIZES[size], **config}
    if text:
        given |= {"model_type": "t2i", "cls_token_num": 5, "caption_dim": 6}
    model = llamagen.build_generator(given).eval()
    nn.init.normal_(model.head.weight)
    return model, {name: tensor.clone() for name, tensor in llamagen.to_published(model.state_dict()).items()}


def same(model: Any, other: GPT) -> None:
    assert isinstance(model, GPT) and model.arguments | {"sampling": None} == other.arguments | {"sampling": None}
    for (name, mine), (_, theirs) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("kind", ["model", "bare", "module", "state_dict", "compiled", "folder", "caches", "bf16"])
def test_every_kind_of_file_gives_the_model(kind: str, tmp_path: Path) -> None:
    model, state = published()
    file = tmp_path / "c2i_B_256.pt"
    if kind == "bare" or kind == "folder":
        content: dict[str, Any] = state
    elif kind == "compiled":
        content = {"model": {f"_orig_mod.{name}": tensor for name, tensor in state.items()}}
    elif kind == "caches":
        stray = {"freqs_cis": torch.zeros(257, 4, 2), "layers.1.attention.kv_cache.k_cache": torch.zeros(2)}
        content = {"model": {**state, **stray}}
    elif kind == "bf16":
        state = {name: tensor.bfloat16() for name, tensor in state.items()}
        llamagen.load_published(model, {name: tensor.float() for name, tensor in state.items()})
        content = {"model": state}
    else:
        content = {kind: state}
    if kind == "folder":
        (tmp_path / "0300000").mkdir()
        file = tmp_path / "0300000"
        torch.save(content, file / "consolidated.pth")
        (tmp_path / "config.yaml").write_text("block_size: 256\n")
        same(llamagen.convert(file, tmp_path / "config.yaml"), model)
        return
    torch.save(content, file)
    same(llamagen.convert(file), model)


def test_a_checkpoint_of_the_published_training_tells_its_own_settings(tmp_path: Path) -> None:
    model, state = published(block_size=64, resid_dropout_p=0.2, ffn_dropout_p=0.2, token_dropout_p=0.3)
    args = argparse.Namespace(
        gpt_model="GPT-B", gpt_type="c2i", image_size=128, downsample_size=16, dropout_p=0.2, token_dropout_p=0.3,
        drop_path_rate=0.0,
    )  # fmt: skip
    live = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    torch.save({"model": state, "ema": live, "steps": 7, "optimizer": {}, "args": args}, tmp_path / "0000007.pt")
    same(llamagen.convert(tmp_path / "0000007.pt"), model)


def test_a_model_by_text_is_one(tmp_path: Path) -> None:
    model, state = published(text=True)
    torch.save({"model": state}, tmp_path / "t2i_B_stage1_256.pt")
    converted = llamagen.convert(tmp_path / "t2i_B_stage1_256.pt")
    same(converted, model)
    assert isinstance(converted, GPT) and (converted.sampling.guidance, converted.sampling.top_k) == (7.5, 1000)


def test_names_that_the_sizes_bear_out_bring_their_published_figures(tmp_path: Path) -> None:
    _, state = published()
    for name in ("c2i_B_256.pt", "c2i_L_256.pt"):
        torch.save({"model": state}, tmp_path / name)
    known, doubted = (llamagen.convert(tmp_path / name) for name in ("c2i_B_256.pt", "c2i_L_256.pt"))
    assert list(known.metadata["results"].values()) == [5.46] and known.metadata["licence"] == "MIT"
    assert isinstance(known, GPT) and known.sampling.guidance == 2.0
    assert "results" not in doubted.metadata and "title" not in doubted.metadata


def test_the_tokenizers_of_the_same_code_are_told_apart(tmp_path: Path) -> None:
    from smalti.published import llamagen_vq

    levels = {"encoder_ch_mult": [1, 2], "decoder_ch_mult": [1, 2], "z_channels": 32, "dropout_p": 0.0}
    config = {
        "codebook_size": 16, "codebook_embed_dim": 8, "codebook_l2_norm": True, "commit_loss_beta": 0.25,
        "entropy_loss_ratio": 0.0, **levels,
    }  # fmt: skip
    model = llamagen_vq.build_tokenizer(config, {"ch": 32, "num_groups": 32, "num_res_blocks": 1})
    state = {name: tensor.clone() for name, tensor in llamagen_vq.to_published(model).items()}
    torch.save({"model": {**state, "quantize.codebook_used": torch.zeros(8)}}, tmp_path / "vq.pt")
    assert isinstance(llamagen.convert(tmp_path / "vq.pt"), VQGAN)


def test_the_command_exports_what_smalti_loads(tmp_path: Path) -> None:
    _, state = published()
    torch.save({"model": state, "args": argparse.Namespace(gpt_model="GPT-B", n_head=3)}, tmp_path / "c2i_B_256.pt")
    made = subprocess.run(
        [
            sys.executable,
            "export.py",
            "source=llamagen",
            f"checkpoint={tmp_path / 'c2i_B_256.pt'}",
            f"output={tmp_path / 'export'}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    loaded = smalti.load(tmp_path / "export")
    tokens = loaded.generate(smalti.Condition(labels=torch.arange(2)), seeds=torch.arange(2), length=None)  # type: ignore[operator]
    assert tokens.indices.shape == (2, 256)


class Payload:
    pass


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        (
            lambda state: {"model": state, "args": Payload()},
            "c2i_B_256.pt",
            "it holds pickled objects, which are",
        ),
        (lambda state: {"model": state}, "mine.pt", "does not tell its image size; give config=FILE with block_size"),
        (lambda state: {"steps": 3}, "c2i_B_256.pt", "is no dictionary of tensors"),
        (
            lambda state: {name: tensor for name, tensor in state.items() if name != "norm.weight"},
            "c2i_B_256.pt",
            r"norm.weight is missing in the file and \(24,\) in the model",
        ),
        (
            lambda state: {name: tensor for name, tensor in state.items() if not name.startswith("tok_")},
            "c2i_B_256.pt",
            "is neither a GPT nor a VQ-GAN of LlamaGen: it has no 'tok_embeddings.weight'",
        ),
    ],
)
def test_files_that_are_none_are_refused_in_one_line(change: Any, name: str, message: str, tmp_path: Path) -> None:
    _, state = published()
    torch.save(change(state), tmp_path / name)
    with pytest.raises(UserError, match=message) as refusal:
        llamagen.convert(tmp_path / name)
    assert "\n" not in str(refusal.value)


def test_a_size_of_ones_own_needs_its_number_of_heads(tmp_path: Path) -> None:
    model, state = published(n_layer=3)
    torch.save({"model": state}, tmp_path / "c2i_B_256.pt")
    with pytest.raises(UserError, match=r"3 layers of width 24, which is no .* config=FILE with n_head"):
        llamagen.convert(tmp_path / "c2i_B_256.pt")
    (tmp_path / "own.json").write_text(json.dumps({"n_head": 3}))
    same(llamagen.convert(tmp_path / "c2i_B_256.pt", tmp_path / "own.json"), model)


# FlexTok's

NORM = {"_target_": "l3m.model.layers.normalization.LPLayerNorm", "_partial_": True, "elementwise_bias": False}
FLEXTOK_AR = {
    "model": {
        "meta_model": {
            "preprocessor": {
                "token_grid_size": [8, 1], "codebook_size": 40, "embed_dim": 32, "pos_embed_type": "absolute",
                "num_classes": 7, "cond_dropout_prob": 0.1,
            },
            "trunk": {
                "attn_target": {"_target_": "x.EfficientAttention", "num_heads": 2, "is_causal": True, "qk_norm": NORM},
                "embed_dim": 32, "num_blocks": 2, "use_bias": False, "post_trunk_norm": True, "norm_layer": NORM,
                "ffn_target": {"_target_": "l3m.model.layers.ffn.SwiGLUFFN", "multiple_of": 16},
            },
            "head": {"use_bias": False},
        }
    }
}  # fmt: skip


def test_a_folder_of_flextoks_generator_gives_the_model(tmp_path: Path) -> None:
    model = flextok_ar.build_generator(FLEXTOK_AR)
    state = {name: tensor.clone() for name, tensor in flextok_ar.to_published(model, model.state_dict()).items()}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"has no config.yaml beside it; give config=FILE"):
        flextok_ar.convert(tmp_path)
    OmegaConf.save(OmegaConf.create(FLEXTOK_AR), tmp_path / "config.yaml")
    converted = flextok_ar.convert(tmp_path)
    assert isinstance(converted, FlexTokAR) and converted.sampling.guidance == 1.5
    assert converted.spec.prefix_decodable and converted.spec.grid is None
    for name, tensor in model.state_dict().items():
        assert torch.equal(converted.state_dict()[name], tensor), name
