"""Published TokenBridge files: sizes read off weights, a file made as theirs are, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import smalti
from smalti.config import compose
from smalti.errors import UserError
from smalti.generators.base import Condition
from smalti.generators.tokenbridge import TokenBridge
from smalti.published.export import export
from smalti.published.tokenbridge import build_generator, convert, infer, load_published, to_published
from smalti.tokenizers.quantizers.bridge import KL16_ORDER, gaussian_boundaries, gaussian_levels

TINY = {
    "img_size": 64, "encoder_embed_dim": 16, "encoder_depth": 1, "encoder_num_heads": 2, "decoder_embed_dim": 24,
    "decoder_depth": 2, "decoder_num_heads": 2, "channel_embed_dim": 16, "channel_depth": 1, "channel_heads": 2,
    "quant_levels": 8, "class_num": 6, "buffer_size": 3,
}  # fmt: skip
PUBLISHED = {  # parameters, with 64 levels: fact sheet, section 7.3
    (768, 12, 12, 768, 4): 218_024_704,
    (1024, 16, 16, 1024, 4): 486_889_472,
    (1280, 20, 16, 1024, 6): 910_040_576,
}


def tiny() -> TokenBridge:
    torch.manual_seed(0)
    model = build_generator(TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def published_file(folder: Path, model: TokenBridge, **other: Any) -> Path:
    """As the published training writes it: averaged weights, and live ones with buffers; here, the live ones are 0."""
    state = to_published(model)
    buffers = {"reconstruction_values": gaussian_levels(3, 3.0), "boundaries": gaussian_boundaries(3, 3.0)}
    live = {name: torch.zeros_like(tensor) for name, tensor in state.items()} | buffers
    live["channel_mask"] = torch.zeros(16, 16)
    content: dict[str, Any] = {"model": live, "model_ema": state, "epoch": 399, "optimizer": {}, **other}
    torch.save(content, folder / "checkpoint-last.pth")
    (folder / "config.json").write_text(json.dumps(TINY))
    return folder / "checkpoint-last.pth"


@pytest.mark.parametrize(("sizes", "parameters"), PUBLISHED.items())
def test_published_sizes_are_read_off_weights(sizes: tuple[int, ...], parameters: int) -> None:
    width, depth, heads, head_width, head_depth = sizes
    config = {f"{part}_{name}": value for part in ("encoder", "decoder")
              for name, value in (("embed_dim", width), ("depth", depth), ("num_heads", heads))}  # fmt: skip
    config |= {"channel_embed_dim": head_width, "channel_depth": head_depth, "channel_heads": 8}
    with torch.device("meta"):
        model = build_generator(config)
    state = to_published(model)
    assert sum(tensor.numel() for tensor in state.values()) == parameters
    found = infer(state)
    assert {key: found[key] for key in config} == config
    assert (found["img_size"], found["quant_levels"], found["class_num"], found["buffer_size"]) == (256, 64, 1000, 64)
    assert state["encoder_pos_embed_learned"].shape == (1, 64 + 256, width)
    assert state["token_embeddings.14.weight"].shape == state["channel_heads.15.weight"].shape == (64, head_width)


def test_a_published_file_becomes_a_model_that_writes_the_same_tokens(tmp_path: Path) -> None:
    model = tiny()
    file = published_file(tmp_path, model)
    words = ["source=tokenbridge", f"checkpoint={tmp_path}", f"config={tmp_path}/config.json", f"output={tmp_path}/out"]
    export(compose("export", words).config)
    loaded = smalti.load(tmp_path / "out")
    assert isinstance(loaded, TokenBridge) and loaded.sampling.shifted_start
    assert loaded.spec.order == KL16_ORDER and loaded.metadata["licence"] == "MIT"
    for ours, theirs in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    condition, seeds = Condition(torch.arange(3)), torch.arange(3)
    settings = {"iterations": 4, "shifted_start": True, "guidance": 2.0, "temperature": 0.9}
    one, two = (each.generate(condition, seeds=seeds, sampling=settings).indices for each in (model, loaded))
    assert torch.equal(one, two)
    live = convert(file, tmp_path / "config.json", weights="model")
    assert not any(parameter.any() for parameter in live.parameters())


def test_the_encoder_reads_channels_in_the_order_of_prediction() -> None:
    model = tiny()
    state = to_published(model)
    numbers = torch.randn(1, 1, 16)  # in the order of channels, as the published encoder reads them
    theirs = numbers @ state["z_proj.weight"].T
    torch.testing.assert_close(numbers[..., list(KL16_ORDER)] @ model.body.embed.weight.T, theirs)
    other = tiny()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    load_published(other, state)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if key != name}


def test_other_files_are_refused_in_one_line(tmp_path: Path) -> None:
    model, config = tiny(), tmp_path / "config.json"
    state = to_published(model)
    for changed, said in (
        (
            {"model_ema": {"layer.weight": torch.zeros(2)}},
            "is no TokenBridge generator: its names are layer",
        ),
        ({"model_ema": state}, "checkpoint has a width of 16, whose number of heads is not known"),
    ):
        file = published_file(tmp_path, model, **changed)
        with pytest.raises(UserError, match=said) as error:
            convert(file)
        assert "\n" not in str(error.value)
    levels = {**state, "reconstruction_values": 2 * gaussian_levels(3, 3.0)}
    file = published_file(tmp_path, model, model_ema=levels)
    with pytest.raises(UserError, match="reconstruction_values are not those of std_range=3; give config=FILE with it"):
        convert(file, config)
    file = published_file(tmp_path, model, model_ema=without(state, "channel_norm.bias"))
    with pytest.raises(UserError, match=r"channel_norm\.bias"):
        convert(file, config)
    for key, value, said in (
        ("vae_embed_dim", 8, "published TokenBridge has an order of 16 channels only"),
        ("quant_levels", 12, "quant_levels=12 is not a power of two"),
        ("patch_size", 2, "patch_size=2 is not known"),
    ):
        with pytest.raises(UserError, match=said):
            build_generator({**TINY, key: value})
