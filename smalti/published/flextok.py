"""Published FlexTok checkpoints and VAEs (apple/ml-flextok) as models of ours.

    convert("…/flextok_d18_d28_dfn")      a hub folder: config.json and model.safetensors
    convert("model.safetensors")          a file alone: its header repeats the configuration
    convert("…/flextok_vae_c16")          a VAE alone (diffusers' AutoencoderKL), as a KLVAE

The configuration is a tree of `_target_`s with their arguments. It is read as data: nothing in it is imported, and a
module or an argument that is not known is an error, since weights alone would not show what it did. Modules are
recognised by their class and by the keys through which they are joined, not by the names that they have in the tree.

What differs: names (`Names`); queries, keys and values, which are one matrix here, and so are the two inner halves of a
gated MLP; learned position tables, (axes, 1, width, length) there; sine-cosine tables, which are weights there.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from smalti.errors import UserError
from smalti.layers.positions import SinCosPositions
from smalti.published.klvae import sizes_of
from smalti.published.regularizers import nested_dropout
from smalti.settings import read_settings
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.flextok import (
    Decoder,
    DecoderTrunk,
    Encoder,
    EncoderTrunk,
    Features,
    FlexTok,
)
from smalti.tokenizers.klvae import KLVAE
from smalti.tokenizers.quantizers.fsq import FSQ

State = dict[str, Tensor]

# What the published code takes from diffusers' base configuration, not from its own.
VAE_BASE: dict[str, Any] = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32}
VAE_IMAGE_SIZE = 256  # of the published VAEs' training; their weights serve any size
LICENCE = "Apple Machine Learning Research Model licence: research only, its attribution is required when redistributed"
_POSITIONS = {"sincos": "sincos", "learnable_sum": "learned_sum", "learnable_prod": "learned_product"}
_PLUMBING = ("PerSampleOp", "SequenceUnpacker")  # moves lists of tensors about
# Arguments without effect on values, or on values of this form: lists, padding, devices, initial weights, precision.
_WITHOUT_EFFECT = {
    "_target_", "_partial_", "per_sample_op", "flatten_patches", "pad_to_multiple", "weight_init_style",
    "dtype_override", "zero_init_out_proj", "compile_block_mask", "return_materialized_mask", "use_flex_attention",
    "packed_call",
}  # fmt: skip


class Module:
    """A module of the published tree: its class, and arguments that are to be read once each."""

    def __init__(self, path: str, config: Mapping[str, Any]) -> None:
        self.path, self.config, self._read = path, config, set[str]()
        self.kind = str(config.get("_target_", "")).rpartition(".")[2]

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        if key not in self.config:
            raise UserError(f"config: {self.path}.{key} is missing; give the config that belongs to this checkpoint")
        return self.config[key]

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if self.config.get(key) is not None else default

    def check_read(self) -> None:
        """Raises UserError for an argument that nobody read and that could change what the module computes."""
        for key, value in self.config.items():
            harmless = key in self._read or key in _WITHOUT_EFFECT or key.endswith(("_key", "_keys"))
            if not harmless and value not in (None, False, 0, 0.0, [], {}):
                raise UserError(f"config: {self.path}.{key}={value} is not known to this version of smalti")


def modules_of(config: Mapping[str, Any], name: str, known: tuple[str, ...]) -> list[Module]:
    """The modules of config[name] in their order, plumbing left out; raises UserError for an unknown class."""
    modules = config.get(name, {}).get("module_dict")
    if not isinstance(modules, Mapping):
        raise UserError(f"config: {name}.module_dict is missing: this is not a published FlexTok configuration")
    found = [Module(f"{name}.module_dict.{key}", module) for key, module in modules.items()]
    for module in found:
        if module.kind not in (*known, *_PLUMBING):
            target = module.config.get("_target_")
            raise UserError(f"config: {module.path}._target_={target} is not known; known: {', '.join(known)}")
    return [module for module in found if module.kind in known]


ENCODER = (
    "PatchEmbedder", "PositionalEmbeddingAdder", "Registers1D", "BlockWiseSequencePacker", "FlexTransformer",
    "LinearHead",
)  # fmt: skip
_DECODER_ONCE = (
    "LinearLayer", "MaskedNestedDropout", "PatchEmbedder", "BlockWiseSequencePacker", "TimestepEmbedder",
    "FlexTransformer", "ToPatchesLinearHead",
)  # fmt: skip
DECODER = (*_DECODER_ONCE, "PositionalEmbeddingAdder", "LearnedNullCond", "ZeroNullCond", "MLPHead")


def one(modules: list[Module], kind: str, **keys: Any) -> Module:
    """The only module of a class (with these arguments); raises UserError when there is none, or more."""
    found = [m for m in modules if m.kind == kind and all(m.config.get(k) == v for k, v in keys.items())]
    if len(found) != 1:
        where = modules[0].path.split(".")[0] if modules else "the model"
        raise UserError(f"config: {where} has {len(found)} modules of class {kind}, where FlexTok has one")
    return found[0]


@dataclass(frozen=True)
class Names:
    """Published names of our parameters. places: {our prefix: published prefix}. gated: our prefixes of gated MLPs."""

    places: Mapping[str, str]
    gated: tuple[str, ...]

    def published(self, name: str) -> list[str]:
        """One name, or several whose tensors are stacked in one of ours."""
        place = max((place for place in self.places if name.startswith(place)), key=len)
        rest = name.removeprefix(place)
        for ours, theirs in _JOINED.items():
            if ours in rest and (ours != ".mlp.fc." or place in self.gated):
                return [self.places[place] + rest.replace(ours, part) for part in theirs]
        for ours, part in _RENAMED.items():
            rest = rest.replace(ours, part)
        return [self.places[place] + rest]


_JOINED = {".attn.qkv.": (".attn.wq.", ".attn.wk.", ".attn.wv."), ".mlp.fc.": (".mlp.fc1.", ".mlp.fc3.")}
_RENAMED = {
    ".attn.out.": ".attn.proj.",
    ".mlp.fc.": ".mlp.fc1.",
    ".mlp.proj.": ".mlp.fc2.",
    ".modulation.": ".adaLN_modulation.1.",
}


@dataclass(frozen=True)
class Tower:
    """What the published tree says of an encoder or a decoder.

    settings: fields of EncoderTrunk or DecoderTrunk. grid: rows and columns of the patches' position table. tokens: n,
    registers or learned token positions. dim: d. The last three are of decoders: features, fields of Features.
    """

    settings: dict[str, Any]
    channels: int
    patch: tuple[int, int]
    grid: tuple[int, int]
    tokens: int
    dim: int
    names: Names
    checkpointing: bool = False
    features: dict[str, Any] | None = None
    null_dropout: float = 0.0
    nested: Mapping[str, Any] | None = None

    def encoder(self) -> Encoder:
        trunk = read_settings(EncoderTrunk, "encoder", self.settings)
        return Encoder(trunk, self.channels, self.grid, self.patch, self.tokens, self.dim)

    def decoder(self) -> Decoder:
        trunk = read_settings(DecoderTrunk, "decoder", self.settings)
        features = None if self.features is None else Features(**self.features)
        return Decoder(trunk, self.channels, self.grid, self.patch, self.tokens, self.dim, features)


def read_encoder(config: Mapping[str, Any]) -> Tower:
    """The encoder of a published configuration; raises UserError for what is not known."""
    modules = modules_of(config, "encoder", ENCODER)
    embed, adder, registers, packer, trunk, head = (one(modules, kind) for kind in ENCODER)
    positions, grid = read_positions(adder)
    settings = {
        **_trunk(trunk),
        "mask": packer.get("mask_mode", "full"),
        "positions": positions,
        "registers": read_registers(registers),
    }
    places = {
        "encoder.patch_embed.": f"{embed.path}.patch_proj.",
        "encoder.positions.table": f"{adder.path}.posembs",
        "encoder.positions.tables": f"{adder.path}.posembs",
        "encoder.registers.tokens": f"{registers.path}.registers",
        "encoder.blocks": f"{trunk.path}.blocks",
        "encoder.head.": f"{head.path}.proj.",
    }
    tower = Tower(
        settings=settings,
        channels=embed["channels_in"],
        patch=_patch(embed),
        grid=grid,
        tokens=registers["n_max"],
        dim=head["dim_out"],
        names=Names(places, ("encoder.blocks",) if settings["gated_mlp"] else ()),
        checkpointing=bool(trunk.get("use_act_checkpoint")),
    )
    _check_dims(trunk, embed, adder, registers, head)
    for module in modules:
        module.check_read()
    return tower


def read_decoder(config: Mapping[str, Any]) -> Tower:
    """The decoder of a published configuration; raises UserError for what is not known."""
    modules = modules_of(config, "decoder", DECODER)
    linear, nested, embed, packer, time, trunk, head = (one(modules, kind) for kind in _DECODER_ONCE)
    null = one(modules, "ZeroNullCond" if any(m.kind == "ZeroNullCond" for m in modules) else "LearnedNullCond")
    token_adder = one(modules, "PositionalEmbeddingAdder", read_key=linear["write_key"])
    adder = one(modules, "PositionalEmbeddingAdder", read_key=embed["patches_list_write_key"])
    positions, grid = read_positions(adder)
    groups = 2 if packer.get("per_subseq_embs") else 1
    if trunk.get("adaLN_expansion", 1) != groups:
        raise UserError(
            f"config: {trunk.path}.adaLN_expansion={trunk['adaLN_expansion']} but {packer.path} packs {groups} "
            "group(s) of embeddings; give the config that belongs to this checkpoint"
        )
    single = null.get("replace_with_single_token")
    settings = {
        **_trunk(trunk),
        "mask": packer.get("mask_mode", "full"),
        "positions": positions,
        "modulation_groups": groups,
        "time_size": time.get("frequency_embedding_size", 256),
        "max_timestep": float(time.get("max_timestep", 1000.0)),
        "null": "zero" if null.kind == "ZeroNullCond" else "learned_single" if single else "learned",
    }
    places = {
        "decoder.token_embed.": f"{linear.path}.proj.",
        "decoder.token_positions.tables": f"{token_adder.path}.posembs",
        "decoder.mask_token": f"{nested.path}.dropout_mask_token",
        "decoder.null_token": f"{null.path}.nullcond",
        "decoder.patch_embed.": f"{embed.path}.patch_proj.",
        "decoder.positions.table": f"{adder.path}.posembs",
        "decoder.positions.tables": f"{adder.path}.posembs",
        "decoder.time.fc.": f"{time.path}.mlp.0.",
        "decoder.time.proj.": f"{time.path}.mlp.2.",
        "decoder.blocks": f"{trunk.path}.blocks",
        "decoder.modulation.": f"{head.path}.adaLN_modulation.1.",
        "decoder.head.": f"{head.path}.proj.",
    }
    features, heads = _features(trunk, modules)
    tower = Tower(
        settings=settings,
        channels=embed["channels_in"],
        patch=_patch(embed),
        grid=grid,
        tokens=_token_positions(token_adder),
        dim=linear["dim_in"],
        names=Names({**places, **heads}, ("decoder.blocks",) if settings["gated_mlp"] else ()),
        checkpointing=bool(trunk.get("use_act_checkpoint")),
        features=features,
        null_dropout=float(null.get("dropout_prob", 0.0)),
        nested={key: nested[key] for key in ("size_sampling_mode", "zipf_a") if key in nested.config},
    )
    _check_dims(trunk, embed, adder, token_adder, linear, nested, null, time, head)
    if head.get("channels_out") != tower.channels or _patch(head) != tower.patch:
        raise UserError(f"config: {head.path} and {embed.path} have different patches or channels; check config=")
    for module in modules:
        module.check_read()
    return tower


def build_tokenizer(config: Mapping[str, Any], vae_base: Mapping[str, Any] | None = None) -> tuple[FlexTok, Names]:
    """The model of a published configuration with fresh weights, and the published names of its weights.

    vae_base: replaces parts of VAE_BASE. Raises UserError for what is not known.
    """
    enc, dec = read_encoder(config), read_decoder(config)
    if (enc.channels, enc.patch) != (dec.channels, dec.patch):
        raise UserError("config: encoder and decoder have different patches or channels; smalti has one kind for both")
    base = {**VAE_BASE, **(vae_base or {})}
    factor = 2 ** (len(base["block_out_channels"]) - 1)
    height, width = (enc.grid[axis] * enc.patch[axis] * factor for axis in (0, 1))
    if height != width:
        raise UserError(
            f"config: {enc.grid} patches are {height} × {width} pixels; smalti's FlexTok takes square images"
        )
    decoder = dict(dec.settings)
    if dec.grid != enc.grid:
        decoder["positions"] = {**decoder["positions"], "grid": list(dec.grid)}
    if dec.tokens != enc.tokens:
        decoder["token_positions"] = dec.tokens
    model = FlexTok(
        image_size=height,
        vae=build_vae(config.get("vae") or {}, base, height),
        num_latent_tokens=enc.tokens,
        quantizer=read_quantizer(Module("regularizer", config.get("regularizer") or {})),
        encoder=enc.settings,
        decoder=decoder,
        patch_size=enc.patch[0] if enc.patch[0] == enc.patch[1] else list(enc.patch),
        regularizer=nested_dropout(dec.nested or {}),
        null_dropout=dec.null_dropout,
        noise=read_noise(Module("flow_matching_noise_module", config.get("flow_matching_noise_module") or {})),
        repa=dec.features,
        activation_checkpointing=enc.checkpointing or dec.checkpointing,
    )
    places = {**enc.names.places, **dec.names.places, "vae.autoencoder.": "vae.vae."}
    return model, Names(places, enc.names.gated + dec.names.gated)


def build_vae(config: Mapping[str, Any], base: Mapping[str, Any], image_size: int) -> KLVAE:
    """The VAE of a published wrapper's configuration, or of diffusers' own. base: fills what it does not say."""
    module = Module("vae", config)
    if module.kind not in ("StableDiffusionVAE", ""):
        raise UserError(f"config: vae._target_={config['_target_']} is not known; known: StableDiffusionVAE")
    scale = module.get("scaling_factor", base.get("scaling_factor"))
    if scale is None:
        raise UserError("config: vae.scaling_factor is missing, and nothing else tells it; give it in config=")
    return KLVAE(
        image_size=image_size,
        latent_channels=module["latent_channels"],
        block_out_channels=list(base["block_out_channels"]),
        layers_per_block=base["layers_per_block"],
        norm_num_groups=base["norm_num_groups"],
        scaling_factor=scale,
        sample_posterior=bool(config.get("sample_posterior", True)),
    )


def to_published(model: nn.Module, names: Names) -> State:
    """Weights of ours under published names and in published shapes, sine-cosine tables included."""
    state: State = {}
    for name, tensor in _weights(model):
        theirs = names.published(name)
        if name.endswith("positions.table"):
            tensor = rearrange(tensor, "h w d -> 1 d h w")
        elif name.endswith("positions.tables"):
            tensor = rearrange(tensor, "axes n d -> axes 1 d n")
        state.update(zip(theirs, tensor.chunk(len(theirs)), strict=True))
    return state


def load_published(model: nn.Module, state: Mapping[str, Tensor], names: Names) -> None:
    """Copy published weights into a model; raises UserError naming the first one that does not fit."""
    expected = to_published(model, names)
    for name in sorted(expected.keys() | state.keys()):
        ours, theirs = (tuple(of[name].shape) if name in of else None for of in (expected, state))
        if ours != theirs:
            raise UserError(
                f"checkpoint does not fit its config: {name} is {theirs or 'missing'} in the file and "
                f"{ours or 'missing'} in the model; give the config that belongs to this checkpoint"
            )
    values: State = {}
    for name, _ in _weights(model):
        parts = names.published(name)
        tensor = torch.cat([state[part] for part in parts])
        if name.endswith("positions.table"):  # not a weight here: it must be what the formula gives
            if (tensor.float() - expected[parts[0]]).abs().max() > 1e-2:
                raise UserError(f"checkpoint: {parts[0]} is no sine-cosine table, as its config says; check config=")
            continue
        if name.endswith("positions.tables"):
            tensor = rearrange(tensor, "axes 1 d n -> axes n d")
        values[name] = tensor
    model.load_state_dict(values)


def convert(
    checkpoint: str | Path, config: str | Path | None = None, vae_base: Mapping[str, Any] | None = None
) -> Tokenizer:
    """A published checkpoint as a model of ours, in evaluation mode, with its origin and licence in `metadata`.

    checkpoint: a .safetensors file, or a hub folder with one. config: the published config.json; None: the one beside
    the file, or else the file's own header. vae_base: replaces parts of VAE_BASE that weights do not show
    (norm_num_groups). Raises UserError with one line.
    """
    checkpoint = Path(checkpoint).expanduser()
    file = _weights_file(checkpoint)
    state, header = _read(file)
    settings, where = _settings(file, header, config)
    model: Tokenizer
    try:
        if any(".module_dict." in name for name in state):
            base = {**sizes_of(state, "vae.vae."), **(vae_base or {})}
            model, names = build_tokenizer(settings, base)
        else:
            model, names = _vae_alone(state, settings, vae_base or {})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        missing = f"lacks {error}" if isinstance(error, KeyError) else _reason(error)
        raise UserError(f"{where} does not describe a FlexTok or its VAE: {missing}; check config=") from error
    load_published(model, state, names)
    model.metadata = {"source": f"apple/ml-flextok, converted from {checkpoint.name}", "licence": LICENCE}
    if known := next((name for name in _TRAINED_ON if name in "/".join(checkpoint.resolve().parts[-2:]).lower()), None):
        model.metadata |= {"title": f"{known} (published weights)", "training_data": _TRAINED_ON[known]}
    return model.eval()


_TRAINED_ON = {
    "flextok_d12_d12_in1k": "ImageNet-1k",
    "flextok_d18_d18_in1k": "ImageNet-1k",
    "flextok_d18_d28_in1k": "ImageNet-1k",
    "flextok_d18_d28_dfn": "DFN",
}


def _vae_alone(state: State, config: Mapping[str, Any], vae_base: Mapping[str, Any]) -> tuple[KLVAE, Names]:
    """A VAE's file, in the published wrapper's names (`vae.…`) or in diffusers'."""
    prefix = "vae." if any(name.startswith("vae.") for name in state) else ""
    if f"{prefix}encoder.conv_in.weight" not in state:
        some = ", ".join(sorted(state)[:3])
        raise UserError(f"checkpoint is neither a FlexTok nor its VAE: its names are {some}, …; check the file")
    told = {key: config[key] for key in (*VAE_BASE, "scaling_factor") if config.get(key) is not None}
    base = {**VAE_BASE, **told, **sizes_of(state, prefix), **vae_base}
    wrapper = config["vae"] if isinstance(config.get("vae"), Mapping) else config
    return build_vae(wrapper, base, VAE_IMAGE_SIZE), Names({"autoencoder.": prefix}, ())


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.state_dict().items()
    for name, module in model.named_modules():
        if isinstance(module, SinCosPositions):
            yield f"{name}.table", module.table


def _trunk(module: Module) -> dict[str, Any]:
    """Fields of `Trunk` from a FlexTransformer, but mask and positions."""
    for key, wanted in (("act_layer", "SiLU"), ("norm_layer", "LayerNorm")):
        given = module.get(key)
        if given is not None and wanted not in str(given.get("_target_") if isinstance(given, Mapping) else given):
            raise UserError(f"config: {module.path}.{key}={given} is not known; known: {wanted}")
    return {
        "width": module["dim"],
        "depth": module["depth"],
        "heads": module["dim"] // module.get("head_dim", 64),
        "gated_mlp": bool(module.get("gated_mlp", True)),
        "mlp_ratio": float(module.get("mlp_ratio", 4.0)),
        "mlp_bias": bool(module.get("mlp_bias", False)),
        "qk_norm": bool(module.get("qk_norm", True)),
        "qkv_bias": bool(module.get("qkv_bias", False)),
        "proj_bias": bool(module.get("proj_bias", False)),
    }


def read_positions(module: Module) -> tuple[dict[str, Any], tuple[int, int]]:
    """Fields of `Positions` and the grid of the table, from the adder of a grid's positions."""
    kind, sizes = module.get("posemb_type", "sincos"), module["max_sizes"]
    if kind not in _POSITIONS or len(sizes) != 2:
        raise UserError(f"config: {module.path} has posemb_type={kind}, max_sizes={sizes}: not known for patches")
    settings: dict[str, Any] = {"kind": _POSITIONS[kind]}
    scaling = module.get("posemb_scaling", "absolute")
    if kind == "sincos":
        settings["scaling"] = scaling
        if sizes[0] != sizes[1]:
            settings["layout"] = "published"
    elif scaling != "absolute":
        raise UserError(f"config: {module.path}.posemb_scaling={scaling} is not known for learned positions")
    return settings, (sizes[0], sizes[1])


def _token_positions(module: Module) -> int:
    """Rows of the learned table of token positions."""
    kind, sizes = module.get("posemb_type", "sincos"), module["max_sizes"]
    if kind not in ("learnable_sum", "learnable_prod") or len(sizes) != 1:  # the two are the same on one axis
        raise UserError(f"config: {module.path} has posemb_type={kind}, max_sizes={sizes}: not known for tokens")
    if module.get("posemb_scaling", "absolute") != "absolute":
        raise UserError(f"config: {module.path}.posemb_scaling={module['posemb_scaling']} is not known for tokens")
    return sizes[0]


def read_registers(module: Module) -> dict[str, Any]:
    """Fields of `Registers`."""
    if module.get("extra_registers_dim") is not None:
        raise UserError(f"config: {module.path} has extra registers, which FlexTok's decoder does not read")
    smallest, most = module.get("n_min", module["n_max"]), module["n_max"]
    settings: dict[str, Any] = {"ordering": module.get("ordering_mode", "nested")}
    sizes = register_sizes(module.get("size_sampling_mode", "uniform"), smallest, most)
    if sizes != [most]:
        settings["sizes"] = sizes
    if module.get("n_eval", most) != most:
        settings["at_inference"] = module["n_eval"]
    return settings


def register_sizes(mode: str, smallest: int, most: int) -> list[int]:
    """The numbers of registers that a published size_sampling_mode draws from, all alike."""
    if mode == "uniform":
        return list(range(smallest, most + 1))
    if mode == "powers_of_two":
        return [2**power for power in range(most.bit_length()) if smallest <= 2**power <= most]
    if mode.startswith("k="):
        return [int(size) for size in mode.removeprefix("k=").split("-")]
    raise UserError(f"size_sampling_mode={mode} of registers is not known; known: uniform, powers_of_two, k=1-2-4")


def _features(trunk: Module, modules: list[Module]) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """Fields of `Features` with the places of the projection's weights; None where no block is tapped."""
    layers = trunk.get("intermediate_layers")
    heads = [module for module in modules if module.kind == "MLPHead"]
    if not layers:
        for head in heads:
            raise UserError(f"config: {head.path} projects features, but the decoder has no intermediate_layers")
        return None, {}
    if len(layers) > 1 or len(heads) > 1:
        raise UserError(
            f"config: {trunk.path} has features of {layers} and {len(heads)} heads; smalti knows one of each"
        )
    if not heads:
        return {"layer": layers[0], "dim": None}, {}
    settings, places = read_head(heads[0], "decoder.projection.")
    return {"layer": layers[0], **settings}, places


def read_head(module: Module, ours: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Fields of `Features` but the layer from an MLPHead, and the places of its weights."""
    _refuse_mup(module)
    count = module["num_layers"]
    norm = "norm_layer" not in module.config or module.get("norm_layer") is not None
    settings = {
        "dim": module["dim_out"],
        "hidden_layers": count - 1,
        "hidden_ratio": float(module.get("dim_hidden_ratio", 4.0)),
        "norm": norm,
        "bias": bool(module["bias"]) if "bias" in module.config else True,
    }
    module.get("dim")
    places = {f"{ours}layers.{i}.": f"{module.path}.mlp.{2 * i + norm}." for i in range(count - 1)}
    return settings, {**places, f"{ours}layers.{count - 1}.": f"{module.path}.out_proj."}


def read_quantizer(module: Module) -> FSQ:
    """The published FSQ; there, noise of packed lists is drawn once a batch, here once a sample."""
    if module.kind != "FSQ":
        raise UserError(f"config: regularizer._target_={module.config.get('_target_')} is not known; known: FSQ")
    most = float(module.get("corrupt_tokens_p", 0.0))
    least = float(module.get("min_corrupt_tokens_p", 0.0)) or most  # 0 means the same as none, as published
    applied = float(module.get("apply_corrupt_tokens_p", 0.2))
    quantizer = FSQ(
        levels=list(module["levels"]),
        drop_probability=float(module.get("drop_quant_p", 0.0)),
        corrupt_probability=applied if most > 0 else 0.0,
        corrupt_share=[least, most] if most > 0 else [0.5, 0.5],
    )
    module.check_read()
    return quantizer


def read_noise(module: Module) -> dict[str, Any]:
    """Fields of `NoiseLevels`; there, stratified draws exist for logit-normal levels only."""
    normal, scale = bool(module.get("ln")), float(module.get("mode_scale", 0.0))
    stratified = normal and bool(module.get("stratisfied"))
    module.check_read()
    if normal:
        return {"distribution": "logit_normal", "stratified": stratified}
    return {"distribution": "mode", "mode_scale": scale} if scale else {"distribution": "uniform"}


def _patch(module: Module) -> tuple[int, int]:
    rows, columns = module["patch_sizes"]
    return rows, columns


def _refuse_mup(module: Module) -> None:
    if module.get("use_mup_readout"):
        raise UserError(f"config: {module.path}.use_mup_readout=true: muP's scaled readout is not known to smalti")


def _check_dims(trunk: Module, *modules: Module) -> None:
    for module in modules:
        _refuse_mup(module)
        if module.get("dim", trunk["dim"]) != trunk["dim"]:
            raise UserError(
                f"config: {module.path}.dim={module['dim']} but {trunk.path}.dim={trunk['dim']}; check config="
            )


def _weights_file(checkpoint: Path) -> Path:
    if checkpoint.is_file():
        return checkpoint
    if not checkpoint.is_dir():
        raise UserError(f"checkpoint={checkpoint} does not exist; give a published file or folder")
    for name in ("model.safetensors", "diffusion_pytorch_model.safetensors"):
        if (checkpoint / name).is_file():
            return checkpoint / name
    raise UserError(f"checkpoint={checkpoint} holds no model.safetensors; give the file itself")


def _read(file: Path) -> tuple[State, dict[str, str]]:
    """Tensors of a .safetensors file, halves as float32, and the strings of its header."""
    try:
        state = load_file(file)
        with safe_open(file, "pt") as content:
            header = content.metadata() or {}
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"checkpoint={file} is no safetensors file, or damaged ({_reason(error)})") from error
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}, header


def _settings(file: Path, header: Mapping[str, str], given: str | Path | None) -> tuple[dict[str, Any], str]:
    """The configuration and where it was found: the file that was given, the one beside the weights, their header."""
    found = Path(given) if given is not None else file.parent / "config.json"
    if given is not None or found.is_file():
        try:
            settings = json.loads(found.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"config={found} cannot be read ({_reason(error)}); check the file") from error
        if not isinstance(settings, dict):
            raise UserError(f"config={found} is no published FlexTok configuration; check the file")
        return settings, str(found)
    settings = {name: _literal(text) for name, text in header.items() if name != "format"}
    if not settings:
        raise UserError(f"checkpoint={file} has no config.json beside it and none in its header; give config=FILE")
    return settings, f"the header of {file}"


def _literal(text: str) -> Any:
    """A python literal as a value; what is none stays a string, as the published code has it."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:150] if lines else type(error).__name__
