"""One-D-Piece: the numbers of the published code, from single forwards to training, and its checkpoints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from test_objectives import ConvolutionDistance, GivenCodes
from test_titok_models import gradients, grid
from test_titok_schedules import optim_config
from test_titok_trajectories import published_discriminator_terms, published_terms, train
from torch import Tensor

import smalti
from smalti.errors import UserError
from smalti.objectives.base import Objective
from smalti.published.onedpiece import build_tokenizer, convert
from smalti.published.titok import convert as convert_titok
from smalti.published.titok import load_published, published_name, to_published
from smalti.published.titok_objective import load_objective_weights, objective_from_config, published_names
from smalti.tokenizers.titok import TiTok
from smalti.training.optim import NO_DECAY, OptimConfig, discriminator_learning_rate, learning_rate

ONE_D_PIECE = {"source": "One-D-Piece@473665d"}  # its cases in a family of several methods


def sizes(config: dict[str, Any]) -> dict[str, Any]:
    """What the case made small, in the words of smalti.published.titok.HARD_CODED."""
    small = config.get("size_overrides")
    if small is None:
        return {}
    vit = {"width": small["width"], "num_layers": small["layers"], "num_heads": small["heads"]}
    names = {config["model"]["vq_model"][f"vit_{side}_model_size"] for side in ("enc", "dec")}
    discriminator = {"hidden_channels": small.get("disc_hidden"), "num_stages": small.get("disc_stages")}
    return {
        "vit": dict.fromkeys(names, vit),
        "proxy_codebook": small["proxy_codebook"],
        "pixel_vqgan": small["pixel_decoder"],
        "discriminator": {name: value for name, value in discriminator.items() if value is not None},
    }


def model_of(case: Any, weights: dict[str, Tensor]) -> TiTok:
    model = build_tokenizer(case.config, sizes(case.config))
    load_published(model, weights)
    return model.eval()


def lengths(b: int, k: int) -> dict[str, Tensor]:
    """The one draw of a published forward, for each of its samples."""
    return {"lengths": torch.full((b,), k)}


def decoded(logits: Tensor | None, pixels: Tensor | None) -> Tensor | None:
    return logits if pixels is None else pixels


@pytest.mark.family("onedpiece-forward")
def test_codes_are_the_published_ones(case: Any) -> None:
    model, images = model_of(case, case.weights), case.inputs["images"]
    with torch.inference_mode():
        latents = model.encoder(images, model.latent_tokens)
        quantized = model.quantizer(latents)
    case.compare("z", grid(latents))
    case.compare("z_quantized", grid(quantized.latents))
    case.compare_indices("min_encoding_indices", model.encode(images).indices, margin="argmin_margin")
    assert model.spec.prefix_decodable


@pytest.mark.family("onedpiece-forward")
def test_prefixes_give_the_published_pictures_from_images_and_from_indices(case: Any) -> None:
    model, images = model_of(case, case.weights), case.inputs["images"]
    indices = case.outputs["min_encoding_indices"][:, 0]
    for k in case.inputs["eval_lengths"].tolist():
        with torch.inference_mode():
            output = model(images, lengths(len(images), k))
            tokens = model.tokens(indices[:, :k])
            parts = model._decode(model.tokens_to_latents(tokens), None, tokens.lengths)
        case.compare(f"eval_decoded/{k}", decoded(output.logits, output.reconstruction))
        case.compare(f"eval_decode_tokens/{k}", decoded(*parts))
        if parts[1] is not None:
            assert torch.equal(model.decode(tokens), parts[1].clamp(0, 1))
            assert torch.equal(model.decode(model.encode(images).prefix(k)), model.decode(tokens))


@pytest.mark.family("onedpiece-forward")
def test_a_batch_of_several_lengths_gives_the_published_picture_of_each(case: Any) -> None:
    model, images = model_of(case, case.weights), case.inputs["images"]
    several = case.inputs["eval_lengths"]
    with torch.inference_mode():
        output = model(images.repeat(len(several), 1, 1, 1), {"lengths": several.repeat_interleave(len(images))})
    made = decoded(output.logits, output.reconstruction)
    assert made is not None
    for k, pictures in zip(several.tolist(), made.chunk(len(several)), strict=True):
        case.compare(f"eval_decoded/{k}", pictures)


@pytest.mark.family("onedpiece-forward")
def test_losses_and_gradients_are_the_published_ones(case: Any) -> None:
    model, images = model_of(case, case.weights).train(), case.inputs["images"]
    output = model(images, lengths(len(images), int(case.inputs["keep_length"])))
    case.compare("train_decoded", decoded(output.logits, output.reconstruction))
    if "proxy_codes" in case.inputs:
        assert output.logits is not None
        teacher: Any = GivenCodes(case.inputs["proxy_codes"], output.logits.shape[1])
        terms = objective_from_config(case.config, teacher=teacher)(output, images, step=0)
        case.compare("train_reconstruction_loss", terms["reconstruction"])
        case.compare("train_quantizer_loss", terms["quantizer"])
        loss = terms["reconstruction"] + terms["quantizer"]
    else:
        assert output.reconstruction is not None
        loss = F.mse_loss(output.reconstruction, images)
        case.compare("train_quantizer_loss", sum(output.quantized.losses.values()))
    for name in ("commitment", "codebook"):
        case.compare(f"train_{name}_loss", output.quantized.losses.get(name, 0.0))
    case.compare("train_loss", loss)
    loss.backward()
    case.compare_gradients(gradients(model, case))
    published = {published_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert published == set(case.names("grad_norm/"))


class GivenTeacher(GivenCodes):
    """A teacher that knows the case's images, and answers with their codes."""

    def __init__(self, model: TiTok, images: Tensor, codes: Tensor) -> None:
        super().__init__(codes[0], int(model.decoder.proxy_codebook_size or 0))
        side = model.decoder.grid
        self.spec = SimpleNamespace(**vars(self.spec), grid=(side, side))
        self.known = list(zip(images, codes, strict=True))

    def encode(self, images: Tensor) -> Any:
        (codes,) = [codes for known, codes in self.known if torch.equal(known, images)]
        return SimpleNamespace(indices=codes)


def objective_of(case: Any, model: TiTok) -> Objective:
    loss = case.weights_of("loss")
    if "proxy_codes" in case.inputs:
        teacher: Any = GivenTeacher(model, case.inputs["images"], case.inputs["proxy_codes"])
        return objective_from_config(case.config, teacher=teacher)
    channels = len(loss["perceptual_loss.conv.bias"])
    objective = objective_from_config(case.config, sizes(case.config), perceptual=ConvolutionDistance(channels))
    load_objective_weights(objective, loss)
    return objective


@pytest.mark.family("onedpiece-trajectory")
def test_the_published_steps_are_ours(case: Any, tmp_path: Path) -> None:
    model = model_of(case, case.weights_of("model"))
    before = {f"model.{name}": value.clone() for name, value in to_published(model).items()}
    optim = replace(optim_config(case.config), no_decay=tuple(word for word in NO_DECAY if word != "embed"))
    steps = len(case.outputs["lr_model"])
    draws = [lengths(case.inputs["images"].shape[1], k) for k in case.inputs["keep_lengths"].tolist()]
    objective = objective_of(case, model)
    names = published_names(objective)
    before |= {f"loss.{names[name]}": value.clone() for name, value in objective.state_dict().items()}
    module, record = train(case, tmp_path, model, objective, optim=optim, steps=steps, draws=draws)

    ended = [output for output in record.outputs if output.ended]
    turns = [output for output in record.outputs if output.discriminator]
    columns = {
        "gen": [published_terms(case, model, output) for output in record.outputs],
        "disc": [published_discriminator_terms(output) for output in turns],
    }
    for turn, rows in columns.items():
        for term in case.names(f"{turn}/"):
            case.compare(f"{turn}/{term}", torch.stack([torch.as_tensor(row[term]).float().mean() for row in rows]))
    case.compare("lr_model", torch.tensor([output.rates["lr"] for output in ended]))
    case.compare("grad_norm_model", torch.stack([output.norms["grad_norm"] for output in ended]))
    if turns:
        case.compare("lr_discriminator", torch.tensor([output.rates["discriminator_lr"] for output in turns]))
        norms = torch.stack([output.norms["discriminator_grad_norm"] for output in turns])
        case.compare("grad_norm_discriminator", norms)
    case.compare("ema_decay", torch.tensor([module.ema.config.at(count) for count in range(1, steps + 1)]))

    final = {f"model.{name}": value for name, value in to_published(model).items()}
    averaged = module.ema.model
    assert isinstance(averaged, TiTok)
    final |= {f"ema.{name}": value for name, value in to_published(averaged).items()}
    final |= {f"loss.{names[name]}": value for name, value in objective.state_dict().items()}
    for name in case.names("final/"):
        compare_where_meant(case, "final", name, final[name])
    for name in case.names("final_norm/"):
        compare_norm(case, "final_norm", name, final[name])
    for name in case.names("final_delta_norm/"):
        start = before[name.replace("ema.", "model.", 1) if name.startswith("ema.") else name]
        compare_norm(case, "final_delta_norm", name, final[name] - start.reshape(final[name].shape))
    compared = ("gen/", "disc/", "lr_", "grad_norm_", "ema_decay", "final", "mask/")
    assert not [name for name in case.outputs if not name.startswith(compared)]


def meant(case: Any, name: str, shape: torch.Size) -> Tensor:
    """Where a parameter is to be compared: everywhere but where its true gradient is zero."""
    mask = case.outputs.get(f"mask/{name}")
    return torch.ones(shape, dtype=torch.bool) if mask is None else mask.bool().reshape(shape)


def compare_where_meant(case: Any, role: str, name: str, value: Tensor) -> None:
    theirs = case.outputs[f"{role}/{name}"]
    value = value.detach().reshape(theirs.shape)
    case.compare(f"{role}/{name}", torch.where(meant(case, name, theirs.shape), value, theirs))


def compare_norm(case: Any, role: str, name: str, value: Tensor) -> None:
    case.compare(f"{role}/{name}", value.detach()[meant(case, name, value.shape)].norm())


@pytest.mark.family("onedpiece-schedules")
def test_learning_rates_are_the_published_ones(case: Any) -> None:
    config, steps = case.config, case.config["steps"]
    total, start = config["max_train_steps"], config.get("discriminator_start")
    optim = OptimConfig(
        lr=config["learning_rate"],
        end_lr=config["end_lr"],
        warmup_steps=config["warmup_steps"],
        discriminator_lr=config.get("discriminator_learning_rate", config["learning_rate"]),
        rise_past_end=True,
        schedule_processes=config["num_processes"],
    )
    rates = [learning_rate(optim, step, total) for step in steps]
    case.compare("lr_model", torch.tensor(rates, dtype=torch.float64))
    if start is not None:
        rates = [0.0 if step < start else discriminator_learning_rate(optim, step, total, start) for step in steps]
        case.compare("lr_discriminator", torch.tensor(rates, dtype=torch.float64))


@pytest.mark.family("checkpoint-layouts-onedpiece-robusttok", **ONE_D_PIECE)
def test_full_size_models_have_the_published_names_and_shapes(case: Any) -> None:
    with torch.device("meta"):
        model = build_tokenizer(case.config)
    ours = {name: list(tensor.shape) for name, tensor in to_published(model).items()}
    assert ours == {name: case.outputs[f"shape/{name}"].tolist() for name in case.names("shape/")}
    parameters = list(model.parameters())
    assert sum(p.numel() for p in parameters) == case.outputs["parameters"]
    assert sum(p.numel() for p in parameters if p.requires_grad) == case.outputs["trainable_parameters"]


def published_folder(case: Any, folder: Path, training: bool) -> Path:
    """The case's weights as the published code leaves them: a hub folder, or a checkpoint of its training."""
    config = {key: value for key, value in case.config.items() if key != "size_overrides"}
    if not training:
        (folder / "config.json").write_text(json.dumps(config))
        torch.save(case.weights, folder / "pytorch_model.bin")
        return folder
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    live = {name: tensor + 1 for name, tensor in case.weights.items()}
    for place, state in {".": live, "unwrapped_model": live, "ema_model": case.weights}.items():
        (folder / "checkpoint-5" / place).mkdir(parents=True, exist_ok=True)
        torch.save(state, folder / "checkpoint-5" / place / "pytorch_model.bin")
    return folder / "checkpoint-5"


@pytest.mark.family("onedpiece-forward")
@pytest.mark.parametrize("training", [False, True], ids=["hub", "training"])
def test_a_published_folder_becomes_an_export_that_decodes_prefixes(case: Any, training: bool, tmp_path: Path) -> None:
    (tmp_path / "published").mkdir()
    place = published_folder(case, tmp_path / "published", training)
    convert(place, size_overrides=sizes(case.config)).save_pretrained(tmp_path / "export")
    model = smalti.load(tmp_path / "export")
    assert isinstance(model, TiTok) and model.spec.prefix_decodable
    assert model.metadata["licence"] == "Apache-2.0" and "One-D-Piece" in model.metadata["source"]
    tokens = model.encode(case.inputs["images"])
    case.compare_indices("min_encoding_indices", tokens.indices, margin="argmin_margin")
    k = int(case.inputs["eval_lengths"][0])
    with torch.inference_mode():
        parts = model._decode(model.tokens_to_latents(tokens), None, tokens.prefix(k).lengths)
    case.compare(f"eval_decoded/{k}", decoded(*parts))
    with pytest.raises(UserError, match=r"describes a One-D-Piece model.*use source=onedpiece"):
        convert_titok(place, size_overrides=sizes(case.config))


@pytest.mark.family("onedpiece-forward")
def test_a_file_alone_gives_a_model_of_the_same_sizes(case: Any, tmp_path: Path) -> None:
    torch.save(case.weights, tmp_path / "pytorch_model.bin")
    model = convert(tmp_path / "pytorch_model.bin")
    expected = model_of(case, case.weights)
    assert isinstance(model, TiTok) and (model.spec, model.head) == (expected.spec, expected.head)
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_model_in_the_corrected_layout_is_no_one_d_piece() -> None:
    vq_model = {
        "codebook_size": 8, "token_size": 4, "vit_enc_model_size": "small", "vit_dec_model_size": "small",
        "vit_enc_patch_size": 16, "vit_dec_patch_size": 16, "num_latent_tokens": 4, "is_legacy": False,
    }  # fmt: skip
    with torch.device("meta"), pytest.raises(UserError, match="is not One-D-Piece's"):
        build_tokenizer({"model": {"vq_model": vq_model}, "dataset": {"preprocessing": {"crop_size": 32}}})
