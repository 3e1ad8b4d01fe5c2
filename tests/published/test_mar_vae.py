"""KL-16 of MAR: attention where it has it, posterior, scale, pictures; checkpoints in its names and in diffusers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor

import smalti
from smalti.errors import UserError
from smalti.evaluation.adm import sample_to_uint8
from smalti.published import klvae
from smalti.published.klvae import build_tokenizer, convert, from_ldm
from smalti.tokenizers.klvae import KLVAE


def tokens(grid: Tensor) -> Tensor:
    return rearrange(grid, "b c h w -> b (h w) c")


def like(values: Tensor, grid: Tensor) -> Tensor:
    return rearrange(values, "b (h w) c -> b c h w", h=grid.shape[2])


def published(case: Any) -> KLVAE:
    """The model of a case with its weights; of one half, where the case has only that."""
    vae = build_tokenizer(case.config["vae"])
    part, own, given = case.config["part"], vae.autoencoder.state_dict(), from_ldm(case.weights)
    halves = {"encoder": ("encoder.", "quant_conv."), "decoder": ("decoder.", "post_quant_conv."), "both": ("",)}
    assert given.keys() == {name for name in own if name.startswith(halves[part])}
    vae.autoencoder.load_state_dict({**own, **given})
    return vae.eval()


@pytest.mark.family("mar-kl16")
@torch.inference_mode()
def test_kl16_encodes_and_decodes_as_published(case: Any) -> None:
    vae = published(case)
    if case.config["part"] != "decoder":
        images = (case.inputs["images"] + 1) / 2
        moments = vae.moments(images)
        noise = case.inputs["posterior_noise"]
        sample = vae.quantizer(tokens(moments), {"noise": tokens(noise)}).latents
        mean, log_variance = vae.quantizer.posterior(tokens(moments))
        case.compare("encoder_out", vae.autoencoder.encoder(2 * images - 1))
        case.compare("moments", moments)
        case.compare("moments_flip", vae.moments(images.flip(-1)))
        case.compare("logvar", like(log_variance, moments))
        case.compare("sample", like(sample, moments))
        case.compare("kl", vae.quantizer.divergence(tokens(moments)).sum(1))
        normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
        case.compare("nll_of_sample", -normal.log_prob(sample).sum((1, 2)))
        if images.shape[-1] == vae.spec.image_size:
            assert torch.equal(vae.moments_of(images), tokens(moments))
        case.compare("scaled_latents", like(vae.sample(tokens(moments), tokens(noise)).latents, moments))
    if case.config["part"] != "encoder":
        given = case.inputs["latents"] if "latents" in case.inputs else case.outputs["scaled_latents"]
        latents = given / vae.scale.factor
        case.compare("post_quant", vae.autoencoder.post_quant_conv(latents))
        pixels = vae.pixels(latents)
        case.compare("reconstruction", 2 * pixels - 1)
        theirs = case.outputs["image_uint8"].int()
        theirs = theirs if theirs.shape[-1] == 3 else rearrange(theirs, "b c h w -> b h w c")
        assert (sample_to_uint8(pixels).int() - theirs).abs().max() <= 1


def test_published_sizes_have_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        vae = build_tokenizer({"embed_dim": 16, "ch_mult": [1, 1, 2, 2, 4]})
    network = vae.autoencoder
    assert sum(parameter.numel() for parameter in vae.parameters()) == 66_456_019
    assert [round(sum(p.numel() for p in part.parameters()) / 1e6, 2) for part in (network.encoder, network.decoder)] \
        == [28.27, 38.19]  # fmt: skip
    assert {key: vae.arguments[key] for key in klvae.KL16} == klvae.KL16 and vae.scale.factor == 0.2325
    assert (vae.spec.length, vae.spec.dim, vae.spec.image_size) == (256, 16, 256)


def tiny(**options: Any) -> KLVAE:
    torch.manual_seed(0)
    sizes = {"block_out_channels": [32, 32, 64], "layers_per_block": 1, "latent_channels": 3}
    return KLVAE(
        **{"image_size": 256, "encoder_attention": [1, 2], "decoder_attention": [2], **sizes, **options}
    ).eval()


def to_ldm(vae: KLVAE) -> dict[str, Tensor]:
    """Weights in latent diffusion's names: those whose translation gives ours."""
    levels, state = len(vae.arguments["block_out_channels"]), {}
    parts = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm"}
    for name, tensor in vae.autoencoder.state_dict().items():
        words = name.split(".")
        if words[1] in ("down_blocks", "up_blocks"):
            down = words[1] == "down_blocks"
            level = int(words[2]) if down else levels - 1 - int(words[2])
            kind = {"resnets": "block", "attentions": "attn"}.get(words[3])
            inner = [kind, words[4]] if kind else ["downsample" if down else "upsample"]
            words[1:5] = ["down" if down else "up", str(level), *inner]
        elif words[1] == "mid_block":
            words[1:4] = ["mid", f"block_{int(words[3]) + 1}" if words[2] == "resnets" else "attn_1"]
        joined = ".".join(words).replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        if "attn" in joined:
            for ours, theirs in parts.items():
                joined = joined.replace(f".{ours}.", f".{theirs}.")
            tensor = tensor[..., None, None] if tensor.ndim == 2 else tensor
        state[joined] = tensor
    return state


@pytest.mark.parametrize("root", ["model", "state_dict", None])
def test_a_checkpoint_in_latent_diffusions_names_converts_exports_and_loads(tmp_path: Path, root: str | None) -> None:
    vae = tiny()
    state = {**to_ldm(vae), "loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(4, 3, 4, 4)}
    torch.save(state if root is None else {root: state}, tmp_path / "vae.ckpt")
    converted = convert(tmp_path / "vae.ckpt")
    for key in ("block_out_channels", "layers_per_block", "latent_channels", "encoder_attention", "decoder_attention"):
        assert converted.arguments[key] == vae.arguments[key]
    assert not converted.scale.known, "nobody knows the scale of another checkpoint's latents"
    images = torch.rand(2, 3, 256, 256)
    assert torch.equal(converted.moments_of(images), vae.moments_of(images))
    converted.save_pretrained(tmp_path / "export")
    loaded = smalti.load(tmp_path / "export")
    assert isinstance(loaded, KLVAE) and loaded.fingerprint() == converted.fingerprint()
    assert torch.equal(loaded.encode(images).latents, converted.encode(images).latents)


def test_a_config_tells_what_the_weights_do_not(tmp_path: Path) -> None:
    torch.save({"model": to_ldm(tiny())}, tmp_path / "vae.ckpt")
    (tmp_path / "mine.json").write_text(json.dumps({"scaling_factor": 0.5, "image_size": 64}))
    converted = convert(tmp_path / "vae.ckpt", tmp_path / "mine.json")
    assert converted.scale.factor == 0.5 and converted.spec.length == 16 * 16
    (tmp_path / "config.yaml").write_text("model: {params: {embed_dim: 3, ddconfig: {resolution: 128}}}")
    assert convert(tmp_path / "vae.ckpt").spec.image_size == 128  # of latent diffusion's own training
    (tmp_path / "mine.json").write_text(json.dumps({"scale_factor": 0.5}))
    with pytest.raises(UserError, match=r"config: scale_factor is not known .*did you mean 'scaling_factor'"):
        convert(tmp_path / "vae.ckpt", tmp_path / "mine.json")


def test_kl16_is_known_by_its_name_and_its_sizes_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"model": to_ldm(tiny())}, tmp_path / "kl16.ckpt")
    assert not convert(tmp_path / "kl16.ckpt").scale.known
    sizes = {key: tiny().arguments[key] for key in klvae.KL16}
    monkeypatch.setattr(klvae, "KL16", sizes)
    converted = convert(tmp_path / "kl16.ckpt")
    assert converted.scale.factor == 0.2325 and converted.metadata["licence"] == "MIT"
    torch.save({"model": to_ldm(tiny())}, tmp_path / "other.ckpt")
    assert not convert(tmp_path / "other.ckpt").scale.known


def diffusers_folder(folder: Path, old_names: bool = False, **config: Any) -> AutoencoderKL:
    """A folder as diffusers writes it, with attention in the encoder's last block."""
    torch.manual_seed(1)
    sizes: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 16), "norm_num_groups": 4, "sample_size": 16, "scaling_factor": 0.25,
    }  # fmt: skip
    network = AutoencoderKL(**sizes).eval()
    network.save_pretrained(folder)
    if old_names:
        renamed = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        state = {}
        for name, tensor in network.state_dict().items():
            for new, old in renamed.items():
                name = name.replace(f".{new}.", f".{old}.")
            state[name] = tensor
        save_file(state, folder / "diffusion_pytorch_model.safetensors")
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return network


@pytest.mark.parametrize("old_names", [False, True])
def test_a_diffusers_folder_converts(tmp_path: Path, old_names: bool) -> None:
    network = diffusers_folder(tmp_path, old_names)
    vae = convert(tmp_path)
    assert vae.arguments["encoder_attention"] == [1] and vae.arguments["decoder_attention"] == []
    assert vae.scale.factor == 0.25 and vae.spec.grid == (8, 8)
    images = torch.rand(2, 3, 16, 16)
    with torch.inference_mode():
        expected = network.encode(2 * images - 1).latent_dist.mean
        assert torch.equal(vae.encode(images).latents, tokens(expected) * 0.25)
        decoded = (network.decode(expected).sample + 1) / 2
        torch.testing.assert_close(vae.decode(vae.encode(images)), decoded.clamp(0, 1))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"shift_factor": 0.1}, r"config: shift_factor=0\.1 is not known to this version of smalti, which has None"),
        ({"_class_name": "AutoencoderTiny"}, "says _class_name=AutoencoderTiny; give the config.json of an Autoenc"),
        ({"down_block_types": ["DownEncoderBlock2D", "DCDownBlock2d"]}, "down_block_types has DCDownBlock2d"),
        ({"tiles": 3}, "config: tiles=3 is not known to this version"),
        ({"norm_num_groups": 3}, "8 is not a multiple of norm_num_groups=3"),
        ({"layers_per_block": 2}, r"checkpoint does not fit its config: decoder\.up_blocks\.0\.resnets\.2"),
    ],
)
def test_what_a_klvae_has_not_is_refused_in_one_line(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    diffusers_folder(tmp_path, **config)
    with pytest.raises(UserError, match=said):
        convert(tmp_path)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"is no KL autoencoder: its names are a\.weight, …"):
        convert(tmp_path)
