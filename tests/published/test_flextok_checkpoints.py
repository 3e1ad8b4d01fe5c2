"""Published FlexTok files and folders, and what is said of those that are none: one line, and nothing is imported."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import smalti
from smalti.errors import UserError
from smalti.published.flextok import build_tokenizer, convert
from smalti.tokenizers.klvae import KLVAE
from smalti.tokenizers.regularizers import NestedDropout


@pytest.mark.family("flextok-vae")
@pytest.mark.parametrize("names", ["the wrapper's", "diffusers'"])
def test_a_vae_alone_converts_from_either_names(case: Any, names: str, tmp_path: Path) -> None:
    base, wrapper = case.config["vae_base_cfg"], case.config["vae"]
    weights = {name.removeprefix("vae.") if names[-1] == "'" else name: w for name, w in case.weights.items()}
    save_file(weights, tmp_path / "model.safetensors")
    told = {**base, "latent_channels": wrapper["latent_channels"], "scaling_factor": wrapper["scaling_factor"]}
    (tmp_path / "config.json").write_text(json.dumps(wrapper if names == "the wrapper's" else told))
    vae = convert(tmp_path, vae_base={"norm_num_groups": base["norm_num_groups"]})
    assert isinstance(vae, KLVAE) and "research only" in vae.metadata["licence"]
    if "latents_given" in case.inputs:
        with torch.inference_mode():
            case.compare("decoded_given", 2 * vae.pixels(case.inputs["latents_given"] / vae.scale.factor) - 1)


@pytest.mark.family("flextok-pipeline")
def test_every_value_is_read_from_the_configuration(case: Any) -> None:
    config = copy.deepcopy(case.config)
    encoder, decoder = (config[name]["module_dict"] for name in ("encoder", "decoder"))
    changed = {
        ("encoder", "enc_register_module"): {"n_min": 1, "n_eval": 3, "ordering_mode": "avg_pool"},
        ("encoder", "enc_transformer"): {"mlp_ratio": 3.0, "qk_norm": False, "use_act_checkpoint": False},
        ("decoder", "dec_transformer"): {"intermediate_layers": [0], "use_act_checkpoint": False},
        ("decoder", "dec_nested_dropout"): {"size_sampling_mode": "uniform_pow2"},
        ("decoder", "dec_latent_dropout"): {"dropout_prob": 0.3, "replace_with_single_token": True},
        ("decoder", "dec_time_embedder"): {"frequency_embedding_size": 32, "max_timestep": 1.0},
    }
    for (tower, name), values in changed.items():
        config[tower]["module_dict"][name].update(values)
    config["regularizer"].update(levels=[4] * 6, drop_quant_p=0.1, corrupt_tokens_p=0.4, min_corrupt_tokens_p=0.2)
    config["flow_matching_noise_module"].update(ln=True, stratisfied=True)
    model, _ = build_tokenizer(config, case.config["vae_base_cfg"])
    said = model.arguments
    most = encoder["enc_register_module"]["n_max"]
    assert said["encoder"]["registers"] == {"ordering": "avg_pool", "sizes": [*range(1, most + 1)], "at_inference": 3}
    assert (said["encoder"]["mlp_ratio"], said["encoder"]["qk_norm"]) == (3.0, False)
    assert said["encoder"]["width"] == encoder["enc_transformer"]["dim"]
    assert said["repa"] == {"layer": 0, "dim": None} and not said["activation_checkpointing"]
    assert isinstance(said["regularizer"], NestedDropout) and said["regularizer"].mode == "uniform_powers_of_two"
    assert (said["null_dropout"], said["decoder"]["null"]) == (0.3, "learned_single")
    assert (said["decoder"]["time_size"], said["decoder"]["max_timestep"]) == (32, 1.0)
    assert said["decoder"]["depth"] == decoder["dec_transformer"]["depth"]
    assert said["noise"] == {"distribution": "logit_normal", "stratified": True}
    quantizer = said["quantizer"].arguments
    assert (quantizer["levels"], quantizer["drop_probability"]) == ([4] * 6, 0.1)
    assert (quantizer["corrupt_probability"], quantizer["corrupt_share"]) == (0.2, [0.2, 0.4])
    assert said["vae"].arguments["scaling_factor"] == config["vae"]["scaling_factor"]


@pytest.mark.family("flextok-pipeline")
def test_a_projector_of_features_and_rectangular_options_build(case: Any) -> None:
    config = copy.deepcopy(case.config)
    modules = config["decoder"]["module_dict"]
    modules["dec_repa_head"] = {
        "_target_": "flextok.model.postprocessors.heads.MLPHead",
        "read_key": "dec_patches_repa_layer",
        "write_key": "dec_patches_repa_layer",
        "dim": modules["dec_transformer"]["dim"],
        "dim_out": 10,
        "num_layers": 2,
        "bias": False,
    }
    model, names = build_tokenizer(config, case.config["vae_base_cfg"])
    assert model.decoder.projection(torch.zeros(1, 4, modules["dec_transformer"]["dim"])).shape == (1, 4, 10)
    path = "decoder.module_dict.dec_repa_head"
    assert names.published("decoder.projection.layers.0.weight") == [f"{path}.mlp.1.weight"]
    assert names.published("decoder.projection.layers.1.weight") == [f"{path}.out_proj.weight"]


@pytest.mark.family("flextok-pipeline")
def test_a_converted_model_is_exported_and_loaded(case: Any, tmp_path: Path) -> None:
    model = convert(published(case, tmp_path / "hub"), vae_base=case.config["vae_base_cfg"])
    model.save_pretrained(tmp_path / "export")
    loaded = smalti.load(str(tmp_path / "export"))
    assert loaded.fingerprint() == model.fingerprint() and loaded.metadata["licence"] == model.metadata["licence"]
    images = torch.rand(2, 3, model.spec.image_size, model.spec.image_size)
    tokens = model.encode(images)
    assert torch.equal(loaded.encode(images).latents, tokens.latents)
    # Weights that are read from a file lie elsewhere in memory, and kernels of odd widths round by alignment.
    torch.testing.assert_close(loaded.decode(tokens.prefix(2), steps=2), model.decode(tokens.prefix(2), steps=2))


def published(case: Any, folder: Path, change: Callable[[dict[str, Any]], Any] | None = None) -> Path:
    """A hub folder of a case."""
    folder.mkdir()
    config = {key: value for key, value in case.config.items() if key not in ("run", "vae_base_cfg", "_target_")}
    config = copy.deepcopy(config)
    if change is not None:
        change(config)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(load_file(case.path / "weights.safetensors")), folder / "model.safetensors")
    return folder


def set_in(*keys: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    def change(config: dict[str, Any]) -> None:
        for key in keys[:-1]:
            config = config[key]
        config[keys[-1]] = value

    return change


ENC, DEC = ("encoder", "module_dict"), ("decoder", "module_dict")
WRONG = {
    "an unknown class": (set_in(*ENC, "enc_to_latents", "_target_", value="os.system"), r"enc_to_latents\._target_=os"),
    "an unknown module": (
        set_in(*DEC, "extra", value={"_target_": "a.MaskTokenModule"}),
        "MaskTokenModule is not known",
    ),
    "an unknown argument": (
        set_in(*ENC, "enc_transformer", "magic", value=3),
        r"enc_transformer\.magic=3 is not known",
    ),
    "no registers": (lambda c: c["encoder"]["module_dict"].pop("enc_register_module"), "has 0 modules of class Regist"),
    "muP": (set_in(*ENC, "enc_to_latents", "use_mup_readout", value=True), "use_mup_readout=true"),
    "extra registers": (set_in(*ENC, "enc_register_module", "extra_registers_dim", value=4), "extra registers"),
    "another activation": (
        set_in(*DEC, "dec_transformer", "act_layer", value={"_target_": "torch.nn.GELU"}),
        "act_layer",
    ),
    "another quantizer": (set_in("regularizer", "_target_", value="flextok.VQ"), r"regularizer\._target_=flextok\.VQ"),
    "another VAE": (set_in("vae", "_target_", value="flextok.Cosmos"), r"vae\._target_=flextok\.Cosmos"),
    "no scaling factor": (set_in("vae", "scaling_factor", value=None), r"vae\.scaling_factor is missing"),
    "another mode": (set_in(*DEC, "dec_nested_dropout", "size_sampling_mode", value="odd"), "size_sampling_mode=odd"),
    "another mask": (set_in(*ENC, "enc_seq_packer", "mask_mode", value="odd"), "mask='odd' is not known"),
    "a missing size": (lambda c: c["encoder"]["module_dict"]["enc_transformer"].pop("depth"), r"depth is missing"),
    "another width": (set_in(*ENC, "enc_transformer", "dim", value=240), r"dim=\d+ but .*dim=240"),
    "another depth": (
        set_in(*DEC, "dec_transformer", "depth", value=9),
        r"blocks\.\d.* is missing in the file",
    ),
    "groups that differ": (set_in(*DEC, "dec_transformer", "adaLN_expansion", value=1), "adaLN_expansion=1 but"),
    "other tables": (set_in(*ENC, "enc_posemb_module", "posemb_type", value="rope"), "posemb_type=rope"),
    "sizes that are no square": (set_in(*ENC, "enc_posemb_module", "max_sizes", value=[4, 3]), "square images"),
    "no tree": (lambda c: c.pop("encoder"), r"encoder\.module_dict is missing"),
}


@pytest.mark.family("flextok-pipeline")
@pytest.mark.parametrize("wrong", WRONG)
def test_a_configuration_that_is_not_understood_is_one_line(case: Any, wrong: str, tmp_path: Path) -> None:
    change, message = WRONG[wrong]
    folder = published(case, tmp_path / "hub", change)
    with pytest.raises(UserError, match=message) as caught:
        convert(folder, vae_base=case.config["vae_base_cfg"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda f: f.write_bytes(b""), "no safetensors file, or damaged"),
        (lambda f: f.write_bytes(b"not a checkpoint"), "no safetensors file, or damaged"),
        (lambda f: save_file({"a": torch.zeros(1)}, f), "neither in its header|give config=FILE"),
        (lambda f: save_file({"a": torch.zeros(1)}, f, metadata={"vae": "{}"}), "neither a FlexTok nor its VAE"),
        (lambda f: None, "does not exist"),
        (lambda f: f.mkdir(), "holds no model.safetensors"),
    ],
)
def test_a_file_that_is_no_published_checkpoint_is_one_line(write: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path / "file.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        convert(tmp_path / "file.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.family("flextok-pipeline")
def test_a_table_that_is_not_sine_cosine_is_refused(case: Any, tmp_path: Path) -> None:
    folder = published(case, tmp_path / "hub")
    state = load_file(folder / "model.safetensors")
    name = "encoder.module_dict.enc_posemb_module.posembs"
    state[name] = state[name].roll(1, dims=2).contiguous()
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError, match="no sine-cosine table"):
        convert(folder, vae_base=case.config["vae_base_cfg"])
