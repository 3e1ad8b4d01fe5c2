"""TiTok and MaskGIT-VQGAN: invariants, and what a wrong argument is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.layers.positions import resize_grid
from smalti.published.titok import HARD_CODED, build_tokenizer, to_published
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.maskgit_vqgan import MaskGITVQGAN
from smalti.tokenizers.quantizers.kl import GaussianQuantizer
from smalti.tokenizers.quantizers.vq import VectorQuantizer
from smalti.tokenizers.spec import Tokens
from smalti.tokenizers.titok import TiTok

TOWER = {"width": 32, "depth": 2, "heads": 2, "patch_size": 4}
PIXEL_DECODER = {"dim": 8, "channels": 32, "channel_mult": [1, 1, 1], "num_res_blocks": 1}


def titok(**options: Any) -> TiTok:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(codebook_size=16, dim=6)
    defaults = {"image_size": 16, "num_latent_tokens": 5, "encoder": TOWER, "decoder": TOWER, "init": "fan_in"}
    return TiTok(**{"quantizer": quantizer, **defaults, **options})


def vqgan(**options: Any) -> MaskGITVQGAN:
    torch.manual_seed(1)
    quantizer = VectorQuantizer(codebook_size=20, dim=8)
    defaults = {"image_size": 16, "channels": 32, "channel_mult": [1, 1, 1], "num_res_blocks": 1}
    return MaskGITVQGAN(**{"quantizer": quantizer, **defaults, **options})


def images(b: int = 3, size: int = 16) -> torch.Tensor:
    return torch.rand(b, 3, size, size, generator=torch.Generator().manual_seed(2))


MODELS = {
    "one-stage vq": lambda: titok(),
    "one-stage vae": lambda: titok(quantizer=GaussianQuantizer(dim=6)),
    "legacy": lambda: titok(latent_layout="legacy"),
    "other patches": lambda: titok(decoder={**TOWER, "patch_size": 2, "width": 48, "heads": 3}),
    "stage 2": lambda: titok(
        head="soft_codes", proxy_codebook_size=20, pixel_decoder=PIXEL_DECODER, freeze_encoder=True
    ),
    "vqgan": lambda: vqgan(),
    "vqgan with the published shortcut": lambda: vqgan(channel_mult=[1, 2, 1], shortcut="published"),
}
every_model = pytest.mark.parametrize("model", [pytest.param(make, id=name) for name, make in MODELS.items()])


@every_model
def test_tokens_and_images_have_the_shapes_that_the_spec_states(model: Any) -> None:
    model = model()
    tokens = model.encode(images())
    assert tokens.latents.shape == (3, model.spec.length, model.spec.dim)
    assert (tokens.indices is None) == (model.spec.kind == "continuous")
    assert tokens.lengths.tolist() == [model.spec.length] * 3
    decoded = model.decode(tokens)
    assert decoded.shape == (3, 3, 16, 16) and decoded.min() >= 0 and decoded.max() <= 1


@every_model
@settings(max_examples=5, deadline=None)
@given(first=st.integers(0, 6))
def test_a_sample_does_not_depend_on_its_batch(model: Any, first: int) -> None:
    model, batch = model().eval(), images(7)
    for name, parameter in model.named_parameters():
        if name.endswith("embedding"):  # fresh codes are so small that norms behind them amplify rounding
            parameter.data.normal_()
    together, alone = model.encode(batch), model.encode(batch[first : first + 1])
    torch.testing.assert_close(alone.latents[0], together.latents[first], atol=1e-4, rtol=1e-3)
    one = model.decode(Tokens.full(together.latents[first : first + 1]))
    torch.testing.assert_close(one[0], model.decode(together)[first], atol=1e-4, rtol=1e-3)


@every_model
def test_an_empty_batch_is_a_batch(model: Any) -> None:
    model = model()
    assert model.decode(model.encode(images(0))).shape == (0, 3, 16, 16)


@every_model
def test_encoding_leaves_the_training_state_alone(model: Any) -> None:
    model = model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    model.decode(model.encode(images()))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_encoding_in_training_mode_does_not_move_an_ema_codebook() -> None:
    model = titok(quantizer=VectorQuantizer(codebook_size=16, dim=6, ema_decay=0.5, restart_after=1)).train()
    before = model.quantizer.embedding.clone()
    model.encode(images())
    assert torch.equal(model.quantizer.embedding, before)
    model(images(), model.draw(3, torch.Generator().manual_seed(0)))
    assert not torch.equal(model.quantizer.embedding, before)


@every_model
def test_indices_alone_decode_to_the_same_picture(model: Any) -> None:
    model = model()
    tokens = model.encode(images())
    if tokens.indices is None:
        pytest.skip("continuous tokens have no indices")
    nothing = torch.zeros_like(tokens.latents)
    assert torch.equal(model.decode(Tokens.full(nothing, tokens.indices)), model.decode(tokens))


@every_model
def test_every_trainable_parameter_gets_a_gradient(model: Any) -> None:
    model = model().train()
    output = model(images(), model.draw(3, torch.Generator().manual_seed(0)))
    (output.reconstruction.square().mean() + sum(output.quantized.losses.values())).backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    assert any(model.last_layer is parameter for parameter in model.parameters())


@every_model
def test_equal_draws_give_equal_outputs(model: Any) -> None:
    model = model().eval()
    draws = model.draw(3, torch.Generator().manual_seed(0))
    assert torch.equal(model(images(), draws).reconstruction, model(images(), draws).reconstruction)


@every_model
def test_a_half_precision_model_keeps_its_dtype(model: Any) -> None:
    model = model().bfloat16()
    tokens = model.encode(images())
    assert model.decode(tokens).dtype == torch.bfloat16


def test_a_frozen_encoder_stays_frozen_and_in_evaluation_mode() -> None:
    model = MODELS["stage 2"]().train()
    frozen = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert frozen == {"latent_tokens", "encoder", "quantizer"}
    assert trained == {"decoder", "pixel_decoder", "proxy_embedding"}
    assert model.training and not model.encoder.training and not model.quantizer.training
    assert model(images()).quantized.losses == {}


def test_a_stage_1_model_decodes_only_through_its_teacher() -> None:
    model, teacher = titok(head="codes", proxy_codebook_size=20), vqgan()
    tokens = model.encode(images())
    with pytest.raises(ValueError, match="call attach_teacher"):
        model.decode(tokens)
    names = model.state_dict().keys()
    model.attach_teacher(teacher)
    logits = model(images()).logits
    assert model(images()).reconstruction is None and logits.shape == (3, 20, 4, 4)
    codes = logits.argmax(1).flatten(1)
    assert torch.equal(model.decode(tokens), teacher.decode(Tokens.full(teacher.quantizer.lookup(codes), codes)))
    assert model.state_dict().keys() == names


def test_a_teacher_with_other_codes_is_refused() -> None:
    model = titok(head="codes", proxy_codebook_size=21)
    with pytest.raises(ValueError, match="the teacher has"):
        model.attach_teacher(vqgan())


def test_the_legacy_layout_reads_the_same_memory_the_other_way() -> None:
    corrected, legacy = titok().eval(), titok(latent_layout="legacy").eval()
    legacy.load_state_dict(corrected.state_dict())
    seen: list[torch.Tensor] = []
    for model in (corrected, legacy):
        model.encoder.conv_out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model.encode(images())
    assert torch.equal(seen[1], seen[0].reshape(3, 32, 5).mT)


def test_a_model_with_unit_scales_starts_with_mid_grey_and_with_contrast_in_its_patches() -> None:
    model = titok(init="unit").eval()
    assert torch.equal(model(images()).reconstruction, torch.full((3, 3, 16, 16), 0.5))
    grey = model.encoder.patch_embed(torch.full((1, 3, 16, 16), 0.5))
    torch.testing.assert_close(grey, torch.zeros_like(grey), atol=1e-5, rtol=0)
    assert 0.8 < float(model.encoder.patch_embed(images(50)).detach().std()) < 1.6
    logits = titok(init="unit", head="codes", proxy_codebook_size=20)(images()).logits
    assert torch.equal(logits, torch.zeros(3, 20, 4, 4))


def test_text_states_change_the_picture_and_are_required() -> None:
    model = titok(text={"width": 7, "length": 3}).eval()
    tokens = model.encode(images())
    states = torch.randn(3, 3, 7, generator=torch.Generator().manual_seed(0))
    assert model.spec.condition == "text"
    assert not torch.equal(model.decode(tokens, text=states), model.decode(tokens, text=-states))
    with pytest.raises(ValueError, match=r"text is missing: .* \(b, 3, 7\)"):
        model.decode(tokens)
    with pytest.raises(ValueError, match=r"expected \(b, 3, 7\)"):
        model.decode(tokens, text=states[:, :2])
    with pytest.raises(ValueError, match="reads none"):
        titok().decode(tokens, text=states)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 18}, r"image_size=18 is not a multiple of encoder.patch_size=4; use 16 or 20"),
        ({"num_latent_tokens": 0}, "num_latent_tokens=0"),
        ({"encoder": {**TOWER, "heads": 3}}, "encoder.width=32 is not a multiple of encoder.heads=3"),
        ({"decoder": {**TOWER, "depth": -1}}, "decoder.depth=-1"),
        ({"encoder": {"width": 32, "dept": 2, "heads": 2, "patch_size": 4}}, "must have exactly the keys"),
        ({"latent_layout": "scrambled"}, "latent_layout='scrambled'"),
        ({"head": "pixel"}, "head='pixel'"),
        ({"init": "unity"}, "init='unity' is not known; use 'published', 'fan_in' or 'unit'"),
        ({"head": "codes"}, "proxy_codebook_size=None with head=codes"),
        ({"proxy_codebook_size": 4}, "proxy_codebook_size=4 with head=pixels"),
        ({"pixel_decoder": PIXEL_DECODER}, "pixel_decoder=.* with head=pixels"),
    ],
)
def test_a_wrong_argument_of_titok_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        titok(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 18}, r"image_size=18 is not a multiple of 4 .*; use 16 or 20"),
        ({"channels": 20}, "make channels a multiple of 32"),
        ({"shortcut": "none"}, "shortcut='none'"),
    ],
)
def test_a_wrong_argument_of_the_vqgan_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vqgan(**options)


@every_model
def test_wrong_images_and_tokens_are_refused(model: Any) -> None:
    model = model()
    with pytest.raises(ValueError, match=r"expected \(b, 3, 16, 16\)"):
        model.encode(images(size=20))
    with pytest.raises(ValueError, match="expected floats"):
        model.encode((images() * 255).byte())
    with pytest.raises(ValueError, match=r"tokens.latents of shape \(2, 1, 1\)"):
        model.decode(Tokens.full(torch.zeros(2, 1, 1)))


def test_a_pixel_decoder_of_another_scale_is_named() -> None:
    model = titok(head="soft_codes", proxy_codebook_size=20, pixel_decoder={**PIXEL_DECODER, "channel_mult": [1, 1]})
    with pytest.raises(ValueError, match="has 2 levels: 4 codes a side make 8 pixels, not image_size=16"):
        model(images())


def test_resized_position_tables_keep_the_class_position_and_the_mean() -> None:
    table = torch.randn(1 + 16, 8, generator=torch.Generator().manual_seed(0))
    assert resize_grid(table, 4, leading=1) is table
    larger = resize_grid(table, 8, leading=1)
    assert larger.shape == (65, 8) and torch.equal(larger[0], table[0])
    torch.testing.assert_close(larger[1:].mean(0), table[1:].mean(0), atol=0.1, rtol=0)
    ramp = torch.arange(16.0).reshape(4, 4).repeat_interleave(1, 0).reshape(16, 1)
    assert (resize_grid(ramp, 8).reshape(8, 8).diff(dim=1) > 0).all()
    with pytest.raises(ValueError, match="do not form a square"):
        resize_grid(table, 4)


# Parameter counts (millions) and numbers of keys of the published checkpoints: reference sheet, sections 2.9 and 7.
FULL = {
    "titok_l32": ({"enc": "large", "dec": "large", "n": 32, "legacy": True}, 641.1, 692),
    "titok_b64": ({"enc": "base", "dec": "base", "n": 64, "legacy": True}, 204.8, 404),
    "titok_s128": ({"enc": "small", "dec": "small", "n": 128, "legacy": True}, 83.7, 308),
    "titok_bl64_vq8k": ({"enc": "base", "dec": "large", "n": 64}, 390.0, 459),
    "titok_sl256_vq8k": ({"enc": "small", "dec": "large", "n": 256}, 330.3, 411),
    "titok_bl64_vae_c16": ({"enc": "base", "dec": "large", "n": 64, "vae": True}, 389.4, 458),
    "titok_ll32_vae_c16": ({"enc": "large", "dec": "large", "n": 32, "vae": True}, 606.9, 602),
    "tatitok_bl64_vq": ({"enc": "base", "dec": "large", "n": 64, "text": True}, 390.9, 462),
    "tatitok_bl32_vae": ({"enc": "base", "dec": "large", "n": 32, "text": True, "vae": True}, 390.2, 461),
    "tatitok_sl128_vae": ({"enc": "small", "dec": "large", "n": 128, "text": True, "vae": True}, 330.3, 413),
}


@pytest.mark.parametrize("name", FULL)
def test_full_size_models_have_the_published_parameters_and_keys(name: str) -> None:
    what, millions, keys = FULL[name]
    legacy = what.get("legacy", False)
    vq_model = {
        "codebook_size": 4096 if legacy else 8192,
        "token_size": 12 if legacy else 16 if what.get("vae") else 64,
        "quantize_mode": "vae" if what.get("vae") else "vq",
        "use_l2_norm": legacy,
        "vit_enc_model_size": what["enc"],
        "vit_dec_model_size": what["dec"],
        "vit_enc_patch_size": 16,
        "vit_dec_patch_size": 16,
        "num_latent_tokens": what["n"],
        "is_legacy": legacy,
        "finetune_decoder": legacy,
        **({"text_context_length": 77, "text_embed_dim": 768} if what.get("text") else {}),
    }
    with torch.device("meta"):
        model = build_tokenizer({"model": {"vq_model": vq_model}, "dataset": {"preprocessing": {"crop_size": 256}}})
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
    assert len(to_published(model)) == keys


def test_the_full_size_vqgan_has_the_published_number_of_parameters() -> None:
    vqgan = {**HARD_CODED["pixel_vqgan"], "resolution": 256}
    with torch.device("meta"):
        model = build_tokenizer({"vqgan": vqgan, "quantizer": {"num_embeddings": 1024, "embedding_dim": 256}})
    assert isinstance(model, Tokenizer)
    counts = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.encoder, model.decoder, model)]
    assert [round(count, 2) for count in counts[:2]] == [23.78, 30.48] and round(counts[2], 1) == 54.5
