"""VQ-GAN as a tokenizer: sizes, tokens, refusals, and every kind of published file."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

import smalti
from smalti.errors import UserError
from smalti.objectives.discriminators import PatchGAN, StyleGANDiscriminator
from smalti.published.llamagen import convert
from smalti.published.llamagen_vq import to_published
from smalti.tokenizers.quantizers.vq import VectorQuantizer
from smalti.tokenizers.vqgan import VQGAN


def small(**options: Any) -> VQGAN:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(codebook_size=16, dim=4, distance="cosine", init="unit")
    sizes: dict[str, Any] = {"channels": 32, "channel_mult": [1, 1], "num_res_blocks": 1, "z_channels": 8}
    return VQGAN(**{"image_size": 8, "quantizer": quantizer, **sizes, **options}).eval()


@pytest.mark.parametrize(
    ("channel_mult", "parameters"), [((1, 1, 2, 2, 4), 71_883_403), ((1, 2, 2, 4), 70_109_835)], ids=["f16", "f8"]
)
def test_the_published_sizes(channel_mult: tuple[int, ...], parameters: int) -> None:
    # Counts of the published code: llamagen@ce98ec4, VQ-16 and VQ-8 with 16,384 codes of 8 channels.
    with torch.device("meta"):
        quantizer = VectorQuantizer(codebook_size=16_384, dim=8, distance="cosine", init="unit")
        model = VQGAN(image_size=256, quantizer=quantizer, channel_mult=channel_mult)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model.spec.length == (256 // 2 ** (len(channel_mult) - 1)) ** 2


def test_the_published_discriminators_have_the_published_sizes() -> None:
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in PatchGAN().parameters()) == 2_765_633
        stylegan = StyleGANDiscriminator(image_size=256)
    assert sum(parameter.numel() for parameter in stylegan.parameters()) == 36_500_225


def test_tokens_are_a_row_major_grid_and_indices_alone_decode() -> None:
    model, images = small(), torch.rand(3, 3, 8, 8)
    tokens = model.encode(images)
    assert tokens.indices is not None and tokens.indices.shape == (3, 16)
    decoded = model.decode(tokens)
    assert torch.equal(model.decode(model.tokens(tokens.indices)), decoded)
    assert decoded.shape == images.shape and 0 <= decoded.min() <= decoded.max() <= 1
    assert torch.equal(model.encode(images[1:2]).indices, tokens.indices[1:2])


def test_a_forward_trains_all_of_it() -> None:
    model = small().train()
    output = model(torch.rand(2, 3, 8, 8))
    assert output.reconstruction is not None
    (output.reconstruction.square().mean() + sum(output.quantized.losses.values())).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_codes_begin_with_length_one_and_uniform_ones_do_not() -> None:
    torch.testing.assert_close(small().quantizer.embedding.norm(dim=1), torch.ones(16))
    assert VectorQuantizer(codebook_size=16, dim=4, distance="cosine").embedding.abs().max() <= 1 / 16


def test_it_exports_and_loads(tmp_path: Path) -> None:
    model, images = small(decoder_channel_mult=[1, 2], dropout=0.1), torch.rand(1, 3, 8, 8)
    model.save_pretrained(tmp_path)
    loaded = smalti.load(tmp_path)
    assert torch.equal(loaded.encode(images).indices, model.encode(images).indices)
    assert loaded.fingerprint() == model.fingerprint()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_size": 9}, "image_size=9 is not a multiple of 2"),
        ({"channels": 24}, "24 channels cannot be normalised in 32 groups"),
        ({"decoder_channel_mult": [1]}, "decoder_channel_mult=[1] has 1 levels and channel_mult=[1, 1] 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as refusal:
        small(**options)
    assert words in str(refusal.value)


@pytest.mark.parametrize("kind", ["released", "training", "bare"])
def test_every_kind_of_published_file_is_read(kind: str, tmp_path: Path) -> None:
    model = small()
    weights = {**to_published(model), "quantize.codebook_used": torch.zeros(65_536)}
    others = {name: tensor + 1 for name, tensor in weights.items()}
    args = Namespace(vq_model="VQ-16", lr=1e-4)
    content: dict[str, Any] = {
        "released": {"model": weights},
        "training": {"model": others, "ema": weights, "optimizer": {}, "steps": 7, "args": args},
        "bare": weights,
    }[kind]
    torch.save(content, tmp_path / "vq.pt")
    converted = convert(tmp_path / "vq.pt")
    state = converted.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert converted.metadata["licence"] == "MIT" and converted.quantizer.cosine


def test_weights_that_do_not_fit_together_are_one_line_with_the_name(tmp_path: Path) -> None:
    torch.save({**to_published(small()), "decoder.conv_out.bias": torch.zeros(4)}, tmp_path / "vq.pt")
    with pytest.raises(UserError, match=r"decoder.conv_out.bias is \(4,\) in the file and \(3,\) in the model"):
        convert(tmp_path / "vq.pt")


def test_a_config_tells_what_weights_do_not(tmp_path: Path) -> None:
    torch.save({"model": to_published(small())}, tmp_path / "vq.pt")
    (tmp_path / "args.json").write_text('{"codebook_l2_norm": false, "commit_loss_beta": 0.5, "image_size": 12}')
    converted = convert(tmp_path / "vq.pt", tmp_path / "args.json")
    assert not converted.quantizer.cosine and converted.quantizer.commitment_weight == 0.5
    assert converted.spec.grid == (6, 6)


def test_a_released_file_says_what_is_known_of_it(tmp_path: Path) -> None:
    torch.save({"model": to_published(small())}, tmp_path / "vq_ds16_c2i.pt")
    assert "title" not in convert(tmp_path / "vq_ds16_c2i.pt").metadata  # two levels are not f16
    torch.save({"model": to_published(small(image_size=256, channel_mult=[1] * 5))}, tmp_path / "vq_ds16_c2i.pt")
    known = convert(tmp_path / "vq_ds16_c2i.pt").metadata
    assert known["title"] == "vq_ds16_c2i (published weights)" and 2.19 in known["results"].values()


def test_other_files_are_refused(tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"is neither a GPT nor a VQ-GAN of LlamaGen"):
        convert(tmp_path / "other.pt")
