"""The recipes: every config composes, and `scale=paper` is the published table to the last number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from smalti.config import FOLDER, options
from smalti.config import compose as compose_command

EXPERIMENTS = options("experiment")
SCALES = options("scale")


def composed(experiment: str, scale: str, *more: str) -> dict[str, Any]:
    with initialize_config_module("smalti.configs", version_base="1.3"):
        config = compose("train", [f"experiment={experiment}", f"scale={scale}", *more])
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    return plain


def flat(config: Any, key: str = "") -> dict[str, Any]:
    if isinstance(config, dict):
        return {path: value for name, item in config.items() for path, value in flat(item, f"{key}.{name}").items()}
    return {key[1:]: config}


# Source of every number: titok fact sheet (bytedance/1d-tokenizer@942a96f, its configs and READMEs), if not said.
EVERY_PAPER_RECIPE = {
    "data.image_size": 256, "data.resize": 256, "data.crop": "random", "data.flip": True, "data.batch_size": 256,
    "optimizer.lr": 1e-4, "optimizer.discriminator_lr": 1e-4, "optimizer.weight_decay": 1e-4, "optimizer.eps": 1e-8,
    "optimizer.end_lr": 1e-5, "optimizer.schedule": "cosine", "optimizer.clip": 1.0, "ema.decay": 0.999, "seed": 42,
    "optimizer.no_decay": ["ln", "bias", "latent_tokens", "mask_token", "embedding", "norm", "gamma", "embed"],
}  # fmt: skip
STAGE_1 = {
    "trainer.max_steps": 1_000_000, "optimizer.betas": [0.9, 0.99], "optimizer.warmup_steps": 10_000,
    "tokenizer.latent_layout": "legacy", "tokenizer.head": "codes", "tokenizer.proxy_codebook_size": 1024,
    "tokenizer.quantizer.codebook_size": 4096, "tokenizer.quantizer.dim": 12, "tokenizer.quantizer.distance": "cosine",
    "tokenizer.quantizer.commitment_weight": 0.25, "objective.quantizer_weight": 1.0, "stage": 1,
}  # fmt: skip
STAGE_2 = {
    "optimizer.schedule_processes": 8, "trainer.max_steps": 500_000, "optimizer.betas": [0.9, 0.999],
    "optimizer.warmup_steps": 5_000, "tokenizer.latent_layout": "legacy", "tokenizer.head": "soft_codes",
    "tokenizer.freeze_encoder": True,
    "tokenizer.quantizer.codebook_size": 4096, "tokenizer.quantizer.dim": 12, "tokenizer.quantizer.distance": "cosine",
    "tokenizer.quantizer.commitment_weight": 0.0, "objective.quantizer_weight": 0.0,
    "objective.reconstruction": "l2", "objective.reconstruction_weight": 1.0, "objective.perceptual_weight": 0.1,
    "objective.perceptual._target_": "smalti.objectives.perceptual.ConvNeXtLogits",
    "objective.adversarial.start": 20_000, "objective.adversarial.factor": 1.0, "objective.adversarial.weight": 0.01,
    "objective.adversarial.lecam.weight": 0.001, "objective.adversarial.lecam.decay": 0.999,
    "objective.adversarial.discriminator.hidden_channels": 128, "objective.adversarial.discriminator.num_stages": 3,
    "tokenizer.pixel_decoder.channels": 128, "tokenizer.pixel_decoder.channel_mult": [1, 1, 2, 2, 4],
    "tokenizer.pixel_decoder.num_res_blocks": 2, "tokenizer.pixel_decoder.dim": 256, "stage": 2,
    "tokenizer.pixel_decoder.shortcut": "published",
}  # fmt: skip
ONE_STAGE = {  # steps and losses as the maintainers name them, the rest as TA-TiTok: "reconstructed" in the headers
    "trainer.max_steps": 1_000_000, "optimizer.betas": [0.9, 0.999], "optimizer.warmup_steps": 10_000,
    "tokenizer.latent_layout": "corrected", "tokenizer.head": "pixels",
    "objective.reconstruction": "l2", "objective.reconstruction_weight": 1.0, "objective.perceptual_weight": 1.1,
    "objective.perceptual.lpips_weight": 1.0, "objective.perceptual.convnext_weight": 0.1,
    "objective.adversarial.start": 200_000, "objective.adversarial.factor": 1.0, "objective.adversarial.weight": 0.1,
    "objective.adversarial.lecam.weight": 0.001, "objective.adversarial.lecam.decay": 0.999,
}  # fmt: skip
VQ8K = {
    "tokenizer.quantizer.codebook_size": 8192, "tokenizer.quantizer.dim": 64,
    "tokenizer.quantizer.distance": "euclidean",
    "tokenizer.quantizer.commitment_weight": 0.25, "objective.quantizer_weight": 1.0,
}  # fmt: skip
VAE = {"tokenizer.quantizer.dim": 16, "objective.quantizer_weight": 1e-6}
SIZES = {"S": (512, 8, 8), "B": (768, 12, 12), "L": (1024, 24, 16)}


def sizes(encoder: str, decoder: str, tokens: int) -> dict[str, Any]:
    both = {"encoder": SIZES[encoder], "decoder": SIZES[decoder]}
    numbers = {
        f"tokenizer.{tower}.{name}": value
        for tower, size in both.items()
        for name, value in zip(("width", "depth", "heads"), size, strict=True)
    }
    patches = {f"tokenizer.{tower}.patch_size": 16 for tower in both}
    return {**numbers, **patches, "tokenizer.num_latent_tokens": tokens}


def onedpiece(size: str, micro_batches: dict[int, int], stage: int) -> dict[str, Any]:
    """One-D-Piece's numbers, where they are not TiTok's. Source: turingmotors/One-D-Piece@473665d, its configs."""
    return {
        **(STAGE_1 if stage == 1 else STAGE_2),
        **sizes(size, size, 256),
        "data.batch_size": 1024 if stage == 1 else 512,
        "trainer.accumulate": micro_batches[stage],
        "trainer.precision": "bf16-mixed",
        "optimizer.no_decay": ["ln", "bias", "latent_tokens", "mask_token", "embedding", "norm", "gamma"],
        "tokenizer.quantizer.commitment_weight": 0.25,
        "tokenizer.regularizer._target_": "smalti.tokenizers.regularizers.TailDrop",
        "tokenizer.regularizer.per": "batch",
    }


ONE_D_PIECE = {
    f"{name}{'' if stage == 1 else '_stage2'}": onedpiece(size, micro_batches, stage)
    for name, size, micro_batches in (
        ("onedpiece", "S", {1: 1, 2: 1}),
        ("onedpiece_b256", "B", {1: 1, 2: 1}),
        ("onedpiece_l256", "L", {1: 4, 2: 2}),
    )
    for stage in (1, 2)
}
FLEXTOK = {  # sizes and section 4 of the flextok fact sheet; the rest is ours, as the headers say
    "data.batch_size": 1024, "tokenizer.num_latent_tokens": 256, "tokenizer.patch_size": 2,
    "tokenizer.quantizer.levels": [8, 8, 8, 5, 5, 5], "tokenizer.encoder.mask": "causal_last",
    "tokenizer.repa.layer": 1,
    "tokenizer.noise.distribution": "mode", "tokenizer.noise.mode_scale": 0.25, "tokenizer.init": "published",
    "tokenizer.sampling.steps": 25, "tokenizer.sampling.guidance": 7.5, "tokenizer.sampling.apg": True,
    "tokenizer.sampling.momentum": -0.5, "tokenizer.sampling.threshold": 2.5, "tokenizer.sampling.eta": 0.0,
    "optimizer.lr": 2e-4, "optimizer.weight_decay": 0.02, "optimizer.end_lr": 2e-6, "ema.decay": 0.9999,
    "optimizer.no_decay": ["bias", "registers", "positions", "mask_token", "null_token", "modulation"],
}  # fmt: skip


def depths(encoder: int, decoder: int) -> dict[str, Any]:
    """FlexTok's sizes: width 64 a block, 64 channels a head."""
    return {
        f"tokenizer.{tower}.{name}": value
        for tower, depth in (("encoder", encoder), ("decoder", decoder))
        for name, value in (("width", 64 * depth), ("depth", depth), ("heads", depth))
    }


VQGAN = {  # llamagen fact sheet (FoundationVision/LlamaGen@ce98ec4), sections 3.1 to 3.4
    "data.crop": "adm_random", "data.resize": None, "data.batch_size": 128,
    "trainer.max_steps": 40 * (1_281_167 // 128),
    "optimizer.betas": [0.9, 0.95], "optimizer.weight_decay": 0.0, "optimizer.schedule": "constant",
    "optimizer.end_lr": 1e-5, "optimizer.warmup_steps": 0, "ema.decay": 0.9999, "ema.constant": True,
    "trainer.precision": "bf16-mixed",
    "tokenizer.channels": 128, "tokenizer.z_channels": 256, "tokenizer.num_res_blocks": 2, "tokenizer.norm_groups": 32,
    "tokenizer.dropout": 0.0, "tokenizer.decoder_channel_mult": None,
    "tokenizer.quantizer.codebook_size": 16384, "tokenizer.quantizer.dim": 8, "tokenizer.quantizer.distance": "cosine",
    "tokenizer.quantizer.init": "unit", "tokenizer.quantizer.commitment_weight": 0.25,
    "tokenizer.quantizer.codebook_weight": 1.0, "tokenizer.quantizer.entropy_weight": 0.0,
    "objective.reconstruction": "l2", "objective.reconstruction_weight": 1.0, "objective.pixel_range": "signed",
    "objective.perceptual._target_": "smalti.objectives.perceptual.LPIPS", "objective.perceptual_weight": 1.0,
    "objective.quantizer_weight": 1.0, "objective.adversarial.loss": "hinge",
    "objective.adversarial.generator_loss": None, "objective.adversarial.weight": 1.0,
    "objective.adversarial.factor": 0.5, "objective.adversarial.start": 20_000 - 1,  # theirs counts from 1
    "objective.adversarial.adaptive_weight_max": None,
    "objective.adversarial.discriminator._target_": "smalti.objectives.discriminators.PatchGAN",
    "objective.adversarial.discriminator.channels": 64, "objective.adversarial.discriminator.num_layers": 3,
}  # fmt: skip
MASKGIT = {  # maskgit-rar fact sheet (bytedance/1d-tokenizer@942a96f), section 2.5; guidance is theirs plus 1 if linear
    "data.resize": 256, "data.crop": "center", "data.flip": True, "data.batch_size": 2048,
    "optimizer.lr": 2e-4, "optimizer.betas": [0.9, 0.96], "optimizer.eps": 1e-8, "optimizer.weight_decay": 0.03,
    "optimizer.schedule": "cosine", "optimizer.warmup_steps": 10_000, "optimizer.end_lr": 1e-5, "optimizer.clip": 1.0,
    "optimizer.no_decay": EVERY_PAPER_RECIPE["optimizer.no_decay"], "trainer.max_steps": 500_000,
    "trainer.precision": "bf16-mixed", "ema.decay": 0.999, "seed": 42, "generator.heads": 16,
    "generator.label_dropout": 0.1, "generator.label_smoothing": 0.1, "generator.unmasked_weight": 0.1,
    "generator.mask_schedule": "arccos", "generator.sampling.mask_schedule": "arccos",
    "generator.sampling.softmax_annealing": True, "generator.sampling.guidance_power": 3.0,
}  # fmt: skip
MASKGIT_BERT = {
    **MASKGIT, "generator.body": "bert", "generator.width": 768, "generator.depth": 24, "generator.mlp_width": 3072,
    "generator.dropout": 0.1, "generator.attention_dropout": 0.1, "generator.sampling.steps": 8,
    "generator.sampling.guidance_schedule": "linear",
}  # fmt: skip


def rar(width: int, depth: int, mlp_width: int, temperature: float, guidance: float, power: float) -> dict[str, Any]:
    """RAR's numbers: section 3.4 of the same."""
    return {
        **{key: value for key, value in MASKGIT.items() if not key.startswith(("generator.", "ema."))},
        "optimizer.lr": 4e-4, "optimizer.warmup_steps": 62_500, "trainer.max_steps": 250_000, "ema": None,
        "generator.width": width, "generator.depth": depth, "generator.heads": 16, "generator.mlp_width": mlp_width,
        "generator.dropout": 0.1, "generator.attention_dropout": 0.1, "generator.label_dropout": 0.1,
        "generator.anneal_start": 125_000, "generator.anneal_end": 187_500,
        "generator.sampling.temperature": temperature, "generator.sampling.guidance": guidance,
        "generator.sampling.guidance_schedule": "power_cosine", "generator.sampling.guidance_power": power,
        "generator.sampling.top_k": None, "generator.sampling.top_p": 1.0,
    }  # fmt: skip


GPT = {  # llamagen fact sheet (FoundationVision/LlamaGen@ce98ec4), sections 2 and 4
    "generator.condition_rope": "zero", "generator.rope_base": 10000, "generator.positions": "rope",
    "generator.kv_heads": None, "generator.hidden": None, "generator.norm_eps": 1e-5, "generator.drop_path": 0.0,
    "generator.label_dropout": 0.1, "generator.token_dropout": 0.1, "generator.residual_dropout": 0.1,
    "generator.mlp_dropout": 0.1, "generator.sampling.temperature": 1.0, "generator.sampling.top_p": 1.0,
    "generator.sampling.guidance_schedule": "constant", "optimizer.betas": [0.9, 0.95], "optimizer.eps": 1e-8,
    "optimizer.weight_decay": 0.05, "optimizer.no_decay": [], "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0, "optimizer.clip": 1.0, "ema": None, "trainer.precision": "bf16-mixed",
}  # fmt: skip


def gpt(width: int, depth: int, heads: int, batch: int, lr: float, guidance: float, side: int) -> dict[str, Any]:
    """A size of LlamaGen's by class: sections 2.5, 4.1 and 6.1; crops at random stand for the published ten."""
    return {
        **GPT, "data.crop": "random", "data.flip": True, "data.resize": int(1.1 * side), "data.batch_size": batch,
        "trainer.max_steps": 300 * (1_281_167 // batch), "optimizer.lr": lr, "generator.width": width,
        "generator.depth": depth, "generator.heads": heads, "generator.sampling.guidance": guidance,
        "generator.sampling.top_k": None,
    }  # fmt: skip


MAR = {  # mar fact sheet (LTH14/mar@fe470ac), sections 1, 3 and 4: 625 steps an epoch of 2,048 images
    "data.resize": None, "data.crop": "adm", "data.flip": True, "data.batch_size": 2048,
    "optimizer.lr": 1e-4 * 2048 / 256, "optimizer.betas": [0.9, 0.95], "optimizer.eps": 1e-8,
    "optimizer.weight_decay": 0.02, "optimizer.no_decay": ["head."], "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 100 * 625, "optimizer.clip": 3.0, "ema.decay": 0.9999, "ema.constant": True,
    "trainer.precision": "bf16-mixed", "generator.buffer": 64, "generator.dropout": 0.1,
    "generator.attention_dropout": 0.1, "generator.label_dropout": 0.1, "generator.mask_ratio_min": 0.7,
    "generator.loss_repeats": 4, "generator.patch_size": 1, "generator.head": "diffusion",
    "generator.sampling.steps": 100, "generator.sampling.temperature": 1.0, "generator.sampling.sampler": "ancestral",
    "generator.sampling.guidance_schedule": "linear", "generator.sampling.max_timestep": None,
    "generator.sampling.annealing": "none", "requires.tokenizer_path.experiment": "klvae_kl16",
}  # fmt: skip


def mar(width: int, depth: int, heads: int, head_depth: int, head_width: int, guidance: float) -> dict[str, Any]:
    """A released model of MAR's: sections 1.2 and 3, 800 epochs."""
    return {
        **MAR, "trainer.max_steps": 800 * 625, "generator.attention": "bidirectional", "generator.order": "random",
        "generator.width": width, "generator.depth": depth, "generator.heads": heads,
        "generator.head_depth": head_depth, "generator.head_width": head_width,
        "generator.sampling.iterations": 256, "generator.sampling.guidance": guidance,
    }  # fmt: skip


TOKENBRIDGE = {  # mar-tokenbridge fact sheet (YuqingWang1029/TokenBridge@3ede281), section 7: MAR's loop, other numbers
    "data.resize": None, "data.crop": "adm", "data.flip": True, "data.batch_size": 2048, "bridging.bits": 6,
    "optimizer.lr": 5e-5 * 2048 / 256, "optimizer.betas": [0.9, 0.95], "optimizer.eps": 1e-8,
    "optimizer.weight_decay": 0.02, "optimizer.no_decay": [], "optimizer.schedule": "cosine", "optimizer.end_lr": 0.0,
    "optimizer.warmup_steps": 100 * 625, "optimizer.clip": 3.0, "ema.decay": 0.9999, "ema.constant": True,
    "trainer.precision": "bf16-mixed", "generator.buffer": 64, "generator.dropout": 0.1,
    "generator.attention_dropout": 0.1, "generator.label_dropout": 0.1, "generator.mask_ratio_min": 0.7,
    "generator.head_heads": 8, "generator.sampling.iterations": 256, "generator.sampling.guidance_schedule": "linear",
    "generator.sampling.shifted_start": False, "requires.tokenizer_path.experiment": "klvae_kl16",
}  # fmt: skip


def tokenbridge(
    width: int, depth: int, heads: int, head: tuple[int, int], epochs: int, guidance: float, temperature: float
) -> dict[str, Any]:
    """A published size of TokenBridge's: section 7.3."""
    return {
        **TOKENBRIDGE, "trainer.max_steps": epochs * 625, "generator.width": width, "generator.depth": depth,
        "generator.heads": heads, "generator.head_width": head[0], "generator.head_depth": head[1],
        "generator.sampling.guidance": guidance, "generator.sampling.temperature": temperature,
    }  # fmt: skip


GENERATORS = {
    "gpt": gpt(768, 12, 12, 256, 1e-4, 2.0, 256),
    "gpt_l": gpt(1024, 24, 16, 256, 1e-4, 1.75, 256),
    "gpt_xl": gpt(1280, 36, 20, 256, 2e-4, 1.75, 384),
    "gpt_xxl": gpt(1536, 48, 24, 512, 2e-4, 1.75, 384),
    "gpt_3b": gpt(3200, 24, 32, 512, 2e-4, 1.65, 384),
    "gpt_t2i": {  # sections 2.2, 4.2 and 5 of the same: batch and steps are ours
        **gpt(1280, 36, 20, 256, 1e-4, 7.5, 256), "data.crop": "adm", "data.flip": False, "data.resize": None,
        "data.short_captions": 0.3, "trainer.max_steps": 50_000_000 // 256, "generator.num_classes": None,
        "generator.text_dim": 2048, "generator.text_length": 120, "generator.null_text": "fixed",
        "generator.sampling.top_k": 1000,
    },
    "flextok_ar": {  # flextok fact sheet, section 8; its training is not published
        "generator.width": 1792, "generator.depth": 28, "generator.heads": 28, "generator.label_dropout": 0.1,
        "generator.sampling.guidance": 1.5, "generator.sampling.temperature": 1.0, "generator.sampling.top_k": None,
        "generator.sampling.top_p": 1.0, "generator.sampling.null_class": "none",
    },
    "maskgit": {
        **MASKGIT, "generator.body": "uvit", "generator.width": 1024, "generator.depth": 20,
        "generator.mlp_width": 4096, "generator.sampling.steps": 64, "generator.sampling.temperature": 2.8,
        "generator.sampling.guidance": 6.9, "generator.sampling.guidance_schedule": "power_cosine",
    },
    "maskgit_b64": {**MASKGIT_BERT, "generator.sampling.temperature": 11.0, "generator.sampling.guidance": 3.0 + 1},
    "maskgit_l32": {**MASKGIT_BERT, "generator.sampling.temperature": 9.5, "generator.sampling.guidance": 4.5 + 1},
    "rar": rar(768, 24, 3072, 1.0, 16.0, 2.75),
    "rar_l": rar(1024, 24, 4096, 1.02, 15.5, 2.5),
    "rar_xl": rar(1280, 32, 5120, 1.02, 6.9, 1.5),
    "rar_xxl": rar(1408, 40, 6144, 1.02, 8.0, 1.2),
    "mar": mar(768, 12, 12, 6, 1024, 2.9),
    "mar_l": mar(1024, 16, 16, 8, 1280, 3.0),
    "mar_h": mar(1280, 20, 16, 12, 1536, 3.2),
    "mar_ar": {  # the paper's ablation: 400 epochs of MAR-L's size, no encoder
        **mar(1024, 16, 16, 3, 1024, 3.0), "trainer.max_steps": 400 * 625, "generator.attention": "causal",
        "generator.order": "raster", "generator.sampling.iterations": None,
    },
    "tokenbridge": tokenbridge(768, 12, 12, (768, 4), 400, 3.1, 0.96),  # L's training and sampling: none is published
    "tokenbridge_l": tokenbridge(1024, 16, 16, (1024, 4), 400, 3.1, 0.96),
    "tokenbridge_h": tokenbridge(1280, 20, 16, (1024, 6), 800, 3.45, 0.91),
}  # fmt: skip
KL16 = {
    "block_out_channels": [128, 128, 256, 256, 512], "layers_per_block": 2, "norm_num_groups": 32,
    "latent_channels": 16, "encoder_attention": [4], "decoder_attention": [], "scaling_factor": None,
}  # fmt: skip
PAPER = {
    "flextok": {**FLEXTOK, **depths(18, 18)},
    "flextok_d12_d12": {**FLEXTOK, **depths(12, 12), "optimizer.lr": 3e-4, "optimizer.end_lr": 3e-6},
    "flextok_d18_d18": {**FLEXTOK, **depths(18, 18)},
    "flextok_d18_d28": {
        **FLEXTOK, **depths(18, 28), "data.batch_size": 2048, "trainer.max_steps": 477_000,
        "optimizer.lr": 1e-4, "optimizer.end_lr": 1e-6,
    },
    "titok_s128": {**STAGE_1, **sizes("S", "S", 128)},
    "titok_b64": {**STAGE_1, **sizes("B", "B", 64)},
    "titok_l32": {**STAGE_1, **sizes("L", "L", 32)},
    "titok_s128_stage2": {**STAGE_2, **sizes("S", "S", 128)},
    "titok_b64_stage2": {**STAGE_2, **sizes("B", "B", 64)},
    "titok_l32_stage2": {**STAGE_2, **sizes("L", "L", 32)},
    "titok_bl64": {**ONE_STAGE, **VQ8K, **sizes("B", "L", 64)},
    "titok_bl128": {**ONE_STAGE, **VQ8K, **sizes("B", "L", 128)},
    "titok_sl256": {**ONE_STAGE, **VQ8K, **sizes("S", "L", 256)},
    "titok_ll32_vae": {**ONE_STAGE, **VAE, **sizes("L", "L", 32)},
    "titok_bl64_vae": {**ONE_STAGE, **VAE, **sizes("B", "L", 64)},
    "titok_bl128_vae": {**ONE_STAGE, **VAE, **sizes("B", "L", 128)},
    "titok": {**ONE_STAGE, **sizes("S", "S", 128)},
    **ONE_D_PIECE,
    "flextok_vae": {  # the network is published (flextok fact sheet, section 5), the training is not
        "tokenizer.block_out_channels": [128, 256, 512, 512], "tokenizer.layers_per_block": 2,
        "tokenizer.norm_num_groups": 32, "tokenizer.latent_channels": 16, "optimizer.weight_decay": 0.0,
    },
    "klvae": {  # sizes of KL-16 but its attention; the recipe is that of flextok_vae
        **{f"tokenizer.{key}": value for key, value in KL16.items()}, "tokenizer.encoder_attention": [],
        "optimizer.weight_decay": 0.0,
    },
    "klvae_kl16": {  # mar fact sheet (LTH14/mar@fe470ac), section 5; the rest is latent diffusion's, per value
        **{f"tokenizer.{key}": value for key, value in KL16.items()}, "tokenizer.sample_posterior": True,
        "data.batch_size": 256, "optimizer.lr": 1e-4, "optimizer.betas": [0.5, 0.9], "optimizer.weight_decay": 0.0,
        "optimizer.schedule": "constant", "optimizer.warmup_steps": 0, "optimizer.clip": None, "ema": None,
        "ema.decay": None, "objective.reconstruction": "l1", "objective.pixel_range": "signed",
        "objective.perceptual_weight": 1.0, "objective.quantizer_weight": pytest.approx(1e-6 / (3 * 256**2), rel=1e-3),
        "objective.adversarial.weight": 0.5, "objective.adversarial.factor": 1.0,
        "objective.adversarial.adaptive_weight_max": pytest.approx(1e4 / (3 * 256**2), rel=1e-3),
        "objective.adversarial.start": 50_001, "objective.adversarial.loss": "hinge",
    },
    "vqgan": {**VQGAN, "tokenizer.channel_mult": [1, 1, 2, 2, 4]},
    "vqgan_f8": {**VQGAN, "tokenizer.channel_mult": [1, 2, 2, 4]},
    "maskgit_vqgan": {
        "tokenizer.channels": 128, "tokenizer.channel_mult": [1, 1, 2, 2, 4], "tokenizer.num_res_blocks": 2,
        "tokenizer.shortcut": "published", "tokenizer.quantizer.codebook_size": 1024, "tokenizer.quantizer.dim": 256,
        "tokenizer.quantizer.distance": "euclidean",
    },
}  # fmt: skip


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("scale", SCALES)
def test_every_experiment_composes_at_every_scale(experiment: str, scale: str) -> None:
    config = composed(experiment, scale)
    assert config["scale"] == scale
    if config["generator"] is None:
        assert config["tokenizer"]["_target_"].startswith("smalti.tokenizers.")
    else:
        assert config["generator"]["_target_"].startswith("smalti.generators.")
        assert not config["tokenizer"] and config["objective"] is None


def test_every_yaml_is_an_option_of_a_group_that_composes() -> None:
    """A file that no command can reach is dead: each one is picked once, at the place that its folder names."""
    unreached = []
    for path in sorted(FOLDER.rglob("*.yaml")):
        group, option = path.parent.relative_to(FOLDER).as_posix(), path.stem
        if group == ".":
            assert option in ("train", "evaluate", "encode", "generate", "export")
        elif group.startswith("overlay/"):
            _, kind, scale = group.split("/")
            known = (
                EXPERIMENTS if kind == "experiment" else options({"quantizer": "tokenizer/quantizer"}.get(kind, kind))
            )
            if option not in known or scale not in SCALES:
                unreached.append(path)
        elif group not in ("launcher", "sweep"):  # they need plugins: tests/commandline/test_sweeps.py
            with initialize_config_module("smalti.configs", version_base="1.3"):
                compose("train", [f"{group}={option}"])
    assert not unreached


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_paper_scale_is_the_published_recipe(experiment: str) -> None:
    expected = GENERATORS.get(experiment) or {**EVERY_PAPER_RECIPE, **PAPER[experiment]}
    found = flat(composed(experiment, "paper"))
    assert {key: found.get(key) for key in expected} == expected


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_headers_say_what_is_reproduced_and_how(experiment: str) -> None:
    text = Path(FOLDER, "experiment", f"{experiment}.yaml").read_text()
    for word in ("Source:", "Expected:", "Command: python train.py experiment="):
        assert word in text


def test_a_scale_may_take_other_options_than_the_recipe_and_the_command_line_wins() -> None:
    pixels = compose_command("train", ["experiment=onedpiece", "scale=tiny"])
    assert pixels.config.objective._target_ == "smalti.objectives.pixels.PixelObjective"
    assert pixels.config.requires is None and "instead" not in pixels.config and pixels.changes == {}
    typed = compose_command("train", ["experiment=onedpiece", "scale=tiny", "objective=codes"])
    assert typed.config.objective._target_ == "smalti.objectives.codes.ProxyCodeObjective"
    assert typed.changes == {"objective": "codes"}  # a run folder of its own
    paper = compose_command("train", ["experiment=onedpiece", "scale=paper"])
    assert paper.config.objective._target_ == "smalti.objectives.codes.ProxyCodeObjective"


@pytest.mark.parametrize("name", ["nested_dropout", "tail_drop"])
def test_any_titok_takes_any_regularizer_by_config_and_none_by_null(name: str) -> None:
    given = compose_command("train", ["experiment=titok_bl64_vae", f"tokenizer/regularizer={name}"])
    assert given.config.tokenizer.regularizer._target_.startswith("smalti.tokenizers.regularizers.")
    assert given.changes == {"tokenizer/regularizer": name}
    without = compose_command("train", ["experiment=onedpiece", "tokenizer/regularizer=null"])
    assert "regularizer" not in without.config.tokenizer
    assert without.changes == {"tokenizer/regularizer": None}
