"""FlexTok in every published form: the numbers of the published code from its configuration and its weights.

The published code packs a list of images, of any sizes, into one sequence with a block mask. Ours takes dense batches
of equal sizes: here each image goes through alone, and what it gives is laid out in the packed order to be compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from torch import Tensor, nn

from smalti.errors import UserError
from smalti.layers.adaln import modulate
from smalti.layers.masks import among_present, attention_mask
from smalti.layers.patches import patchify, unpatchify
from smalti.layers.positions import LearnedPositions, SinCosPositions
from smalti.published.flextok import (
    Module,
    Names,
    build_tokenizer,
    convert,
    load_published,
    read_decoder,
    read_encoder,
    read_positions,
    read_quantizer,
    register_sizes,
    to_published,
)
from smalti.tokenizers.flextok import Decoder, Encoder, FlexTok, Positions, Registers, RegisterTokens
from smalti.tokenizers.regularizers import kept_mask
from smalti.tokenizers.spec import Tokens

CPU = torch.device("cpu")


def images_of(case: Any, name: str) -> list[Tensor]:
    """The tensors `name/0`, `name/1`, … of a case's inputs."""
    count = sum(key.startswith(f"{name}/") for key in case.inputs)
    return [case.inputs[f"{name}/{i}"] for i in range(count)]


def packed(parts: list[list[Tensor]]) -> Tensor:
    """(1, n, d): the parts (1, …, d) of each sample one behind the other, then the samples."""
    return torch.cat([part.flatten(1, -2) for sample in parts for part in sample], dim=1)


def packed_mask(sizes: list[tuple[int, ...]], mode: str) -> Tensor:
    """(n, n) bool: our masks of the samples along the diagonal."""
    masks = [attention_mask(s, mode, CPU) for s in sizes]
    full = [torch.ones(sum(s), sum(s), dtype=torch.bool) for s in sizes]
    return torch.block_diag(*(f if m is None else m for f, m in zip(full, masks, strict=True))).bool()


def padded_length(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def gradients(model: nn.Module, names: Names) -> Callable[[str], Tensor]:
    """Gradients by published name, in the published layout."""
    held = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert held[name] is not None, f"{name} has no gradient"
        parameter.data = parameter.grad  # type: ignore[assignment]
    published = to_published(model, names)
    return lambda name: published[name]


@pytest.fixture
def tower(case: Any) -> tuple[Any, Names]:
    """The encoder or the decoder of a case with its published weights, and their published names."""
    (name,) = (name for name in ("encoder", "decoder") if name in case.config)
    read = read_encoder(case.config) if name == "encoder" else read_decoder(case.config)
    tower = read.encoder() if name == "encoder" else read.decoder()
    load_published(nn.ModuleDict({name: tower}), case.weights, read.names)
    return tower.eval(), read.names


# --- encoder


def counts_of(case: Any, encoder: Encoder, images: list[Tensor]) -> list[int]:
    """How many registers each image gets."""
    given = case.inputs.get("register_sizes")
    n = len(encoder.registers.tokens)
    return [encoder.registers.at_inference or n] * len(images) if given is None else given.tolist()


@pytest.mark.family("flextok-encode", kind="encode")
def test_every_block_and_token_of_the_encoder_is_the_published_one(case: Any, tower: tuple[Encoder, Names]) -> None:
    encoder, names = tower
    images = images_of(case, "vae_latents")
    quantizer = read_quantizer(Module("regularizer", case.config["regularizer"]))
    train = case.config["run"]["mode"] == "train"
    counts, sizes, parts, states, losses = counts_of(case, encoder, images), [], [], [], []
    with torch.set_grad_enabled(train):
        for i, (latents, count) in enumerate(zip(images, counts, strict=True)):
            patches, registers = encoder.patches(latents), encoder.registers(count)
            case.compare(f"patches/{i}", patches)
            parts.append([patches, registers])
            sizes.append((patches.shape[1] * patches.shape[2], registers.shape[1]))
            x = packed(parts[-1:])
            mask = attention_mask(sizes[-1], encoder.mask, CPU)
            blocks = []
            for block in encoder.blocks:
                x = block(x, mask)
                blocks.append(x)
            states.append(blocks)
            case.compare(f"patches_out/{i}", x[:, : sizes[-1][0]].view_as(patches))
            coded = encoder(latents, count)
            case.compare(f"latents/{i}", coded)
            quantized = quantizer(coded)
            case.compare(f"quant/{i}", quantized.latents)
            margins(case, i, coded, quantizer)
            indices_equal(case, i, quantized.indices)
            if train:
                losses.append((quantized.latents * case.inputs[f"probe/{i}"]).sum())
    case.compare("packed", packed(parts))
    for layer in range(len(encoder.blocks)):
        case.compare(f"block/{layer}", torch.cat([blocks[layer] for blocks in states], dim=1))
    case.compare("mask", packed_mask(sizes, encoder.mask))
    lengths(case, sizes, case.config["encoder"])
    if train:
        loss = torch.stack(losses).sum()
        case.compare("probe_loss", loss)
        loss.backward()
        model = nn.ModuleDict({"encoder": encoder})
        case.compare_gradients(gradients(model, names))
        published = {part for name, _ in model.named_parameters() for part in names.published(name)}
        assert published == set(case.names("grad_norm/"))


@pytest.mark.family("flextok-encode", kind="encode")
def test_a_batch_of_any_register_counts_encodes_as_its_images_alone(case: Any, tower: tuple[Encoder, Names]) -> None:
    encoder, _ = tower
    images = images_of(case, "vae_latents")
    counts = counts_of(case, encoder, images)
    for shape in {image.shape for image in images}:
        chosen = [i for i, image in enumerate(images) if image.shape == shape]
        with torch.no_grad():
            together = encoder(torch.cat([images[i] for i in chosen]), torch.tensor([counts[i] for i in chosen]))
        for row, i in enumerate(chosen):
            case.compare(f"latents/{i}", together[row : row + 1, : counts[i]])


def margins(case: Any, i: int, coded: Tensor, quantizer: Any) -> None:
    """How far each bounded value is from where rounding changes."""
    bounded = quantizer.bound(coded.detach())
    away = 0.5 - (bounded - bounded.round()).abs()
    case.compare(f"margin/{i}", away)


def indices_equal(case: Any, i: int, indices: Tensor) -> None:
    """Equal indices, wherever no channel is near a rounding boundary."""
    clear = (case.outputs[f"margin/{i}"] > 1e-5).all(-1)
    theirs = case.outputs[f"tokens/{i}"]
    assert indices.shape == theirs.shape and torch.equal(indices[clear], theirs[clear]), f"{case} tokens/{i}"


def lengths(case: Any, sizes: list[tuple[int, ...]], config: Any) -> None:
    total = sum(map(sum, sizes))
    packers = [m for m in config["module_dict"].values() if m["_target_"].endswith("BlockWiseSequencePacker")]
    if "packed_length" in case.outputs:
        case.compare("packed_length", total)
        case.compare("padded_length", padded_length(total, packers[0].get("pad_to_multiple", 128)))


@pytest.mark.family("flextok-encode", kind="registers")
def test_registers_are_the_published_ones(case: Any) -> None:
    config = case.config["register_module"]
    ordering, most = config["ordering_mode"], config["n_max"]
    sizes = register_sizes(config["size_sampling_mode"], config["n_min"], most)
    case.compare("valid_sizes", sizes)
    case.compare("eval_sizes", [config.get("n_eval") or most] * len(case.inputs["input_lengths"]))
    given = case.inputs["register_sizes"]
    for name in ("registers", "extra_registers"):
        if name in case.weights:
            table = case.weights[name]
            registers = RegisterTokens(*table.shape, Registers(ordering, sizes, config.get("n_eval")))
            registers.load_state_dict({"tokens": table})
            together = registers(given).expand(len(given), -1, -1)
            for i, count in enumerate(given.tolist()):
                case.compare(f"{name}/{i}", registers(count))
                case.compare(f"{name}/{i}", together[i : i + 1, :count])


# --- decoder


def chosen(case: Any, variant: dict[str, Any], count: int) -> tuple[Tensor | None, Tensor | None]:
    """(lengths, null) of a variant of a case."""
    null = variant.get("null")
    masks = {"all": torch.ones(count, dtype=torch.bool), "some": case.inputs.get("eval_dropout_mask"), None: None}
    return case.inputs["eval_keep_k"] if variant.get("keep") else None, masks[null]


@pytest.mark.family("flextok-decode")
def test_every_block_and_velocity_of_the_decoder_is_the_published_one(case: Any, tower: Any) -> None:
    model: Decoder = tower[0]
    codes, noised, t = images_of(case, "quant"), images_of(case, "noised"), case.inputs["timesteps"]
    for variant in case.config["run"]["variants"]:
        name = variant["name"]
        kept, null = chosen(case, variant, len(codes))
        sizes, parts, states = [], [], []
        compare_optional(case, f"{name}/temb", model.time(t))
        for i in range(len(codes)):
            one = slice(i, i + 1)
            compare_optional(case, f"{name}/registers_posemb/{i}", model.embed(codes[i]))
            context = model.context(codes[i], part(kept, one), part(null, one))
            tokens = context.tokens if context.present is None else context.tokens[:, context.present[0]]
            case.compare(f"{name}/registers_dropped/{i}", tokens)
            patches = model.patches(noised[i])
            parts.append([patches, tokens])
            sizes.append((patches.shape[1] * patches.shape[2], tokens.shape[1]))
            x, condition, blocks = packed(parts[-1:]), F.silu(model.time(t[one])), []
            groups = sizes[-1] if model.groups == 2 else (sum(sizes[-1]),)
            for block in model.blocks:
                x = block(x, condition, groups, attention_mask(sizes[-1], model.mask, CPU))
                blocks.append(x)
            states.append(blocks)
            velocity, features = model(noised[i], t[one], context)
            case.compare(f"{name}/velocity/{i}", velocity)
            if model.features_of is not None:
                case.compare(f"{name}/repa/{i}", features.view_as(patches))
        case.compare(f"{name}/packed", packed(parts))
        compare_optional(case, f"{name}/mask", packed_mask(sizes, model.mask))
        for layer in range(len(model.blocks)):
            case.compare(f"{name}/block/{layer}", torch.cat([blocks[layer] for blocks in states], dim=1))
        compared = ("temb", "registers_posemb", "registers_dropped", "velocity", "repa", "packed", "mask", "block")
        assert {output.split("/")[1] for output in case.outputs if output.startswith(f"{name}/")} <= set(compared)


@pytest.mark.family("flextok-decode")
def test_a_batch_of_any_lengths_and_conditions_decodes_as_its_images_alone(case: Any, tower: Any) -> None:
    model: Decoder = tower[0]
    codes, noised, t = images_of(case, "quant"), images_of(case, "noised"), case.inputs["timesteps"]
    for variant in case.config["run"]["variants"]:
        kept, null = chosen(case, variant, len(codes))
        for shape in {x.shape for x in noised}:
            rows = [i for i, x in enumerate(noised) if x.shape == shape]
            context = model.context(torch.cat([codes[i] for i in rows]), part(kept, rows), part(null, rows))
            velocity, _ = model(torch.cat([noised[i] for i in rows]), t[rows], context)
            for row, i in enumerate(rows):
                case.compare(f"{variant['name']}/velocity/{i}", velocity[row : row + 1])


@pytest.mark.family("flextok-encode", kind="encode")
def test_names_of_encoders_translate_there_and_back(case: Any, tower: tuple[Encoder, Names]) -> None:
    same_names(case, nn.ModuleDict({"encoder": tower[0]}), tower[1])


@pytest.mark.family("flextok-decode")
def test_names_of_decoders_translate_there_and_back(case: Any, tower: tuple[Decoder, Names]) -> None:
    same_names(case, nn.ModuleDict({"decoder": tower[0]}), tower[1])


def same_names(case: Any, model: nn.Module, names: Names) -> None:
    state = to_published(model, names)
    assert state.keys() == case.weights.keys()
    for key, tensor in state.items():  # sine-cosine tables are computed here, and read there
        torch.testing.assert_close(tensor, case.weights[key], atol=1e-6, rtol=0)


def part(x: Tensor | None, rows: slice | list[int]) -> Tensor | None:
    return None if x is None else x[rows]


def compare_optional(case: Any, name: str, ours: Tensor) -> None:
    """For what a case states once, not for every variant."""
    if name in case.outputs:
        case.compare(name, ours)


# --- masks, positions, patches


@pytest.mark.family("flextok-masks")
def test_masks_positions_and_patches_are_the_published_ones(case: Any) -> None:
    kinds = {"packer": packer, "xattn": cross_attention, "patch": patches, "posemb": positions}
    kinds[case.config["run"]["kind"]](case)


def packer(case: Any) -> None:
    config = case.config["seq_packer"]
    keys, mode = config["input_list_read_keys"], config["mask_mode"]
    samples = list(zip(*(images_of(case, key) for key in keys), strict=True))
    sizes = [tuple(x.flatten(1, -2).shape[1] for x in sample) for sample in samples]
    total = sum(map(sum, sizes))
    pad = padded_length(total, config["pad_to_multiple"]) - total
    sequence = packed([list(sample) for sample in samples])
    case.compare("packed", F.pad(sequence, (0, 0, 0, pad)))
    case.compare("mask", F.pad(packed_mask(sizes, mode), (0, pad, 0, pad)))
    ids = torch.cat([torch.full((sum(s),), i) for i, s in enumerate(sizes)])
    case.compare("seq_ids", F.pad(ids, (0, pad), value=-1))
    groups = len(keys) if config["per_subseq_embs"] else 1
    expanded = []
    for emb, sample in zip(case.inputs["emb"], sizes, strict=True):
        vectors = emb.view(1, groups, -1)
        parts = sample if groups > 1 else (sum(sample),)
        nothing = torch.zeros(1, sum(sample), vectors.shape[-1])
        expanded.append(modulate(nothing, vectors, torch.zeros_like(vectors), parts))
    case.compare("emb_packed", torch.cat(expanded, dim=1))
    flat = [size for sample in sizes for size in sample]
    for number, piece in enumerate(sequence.split(flat, dim=1)):
        i, key = number // len(keys), keys[number % len(keys)]
        case.compare(f"unpacked/{key}/{i}", piece.view_as(samples[i][number % len(keys)]))


def cross_attention(case: Any) -> None:
    queries, contexts = case.inputs["seq_lens"], case.inputs["ctx_lens"]
    rows, columns = case.config["run"]["max_seq_len"], case.config["run"]["max_ctx_len"]
    present = kept_mask(contexts, int(contexts.max()), CPU)
    masks = []
    for i, (q, c) in enumerate(zip(queries.tolist(), contexts.tolist(), strict=True)):
        everywhere = torch.ones(q, present.shape[1], dtype=torch.bool)
        masks.append(among_present(everywhere, present[i : i + 1])[0, 0, :, :c])
    mask = torch.block_diag(*masks).bool()
    case.compare("mask", F.pad(mask, (0, columns - mask.shape[1], 0, rows - mask.shape[0])))
    for name, lens, size in (("seq_ids", queries, rows), ("ctx_ids", contexts, columns)):
        ids = torch.arange(len(lens)).repeat_interleave(lens)
        case.compare(name, F.pad(ids, (0, size - len(ids)), value=-1))


def patches(case: Any) -> None:
    x = rearrange(case.inputs["x"], "b h w c -> b c h w")
    rows, columns = case.config["run"]["patch_sizes"]
    ours = patchify(x, (rows, columns))
    case.compare("patches", ours)
    case.compare("n", ours.shape[1:3])
    case.compare("flat", ours.flatten(1, 2))
    case.compare("back", rearrange(unpatchify(ours, (rows, columns)), "b c h w -> b h w c"))


def positions(case: Any) -> None:
    config = case.config["posemb"]
    if len(config["max_sizes"]) == 1:
        ours: Any = LearnedPositions(config["max_sizes"][0], config["dim"])
    else:
        settings, grid = read_positions(Module("posemb", config))
        ours = Positions(**settings).build(grid, config["dim"])
    if isinstance(ours, SinCosPositions):
        case.compare("table", rearrange(ours.table, "h w d -> 1 d h w"))
    else:
        ours.load_state_dict({"tables": rearrange(case.weights["posembs"], "axes 1 d n -> axes n d")})
    for i, shape in enumerate(case.config["run"]["shapes"]):
        case.compare(f"pos/{i}", ours(*shape).movedim(-1, 0)[None])
    x = case.inputs["x"]
    case.compare("added", x + ours(*x.shape[1:-1]))


# --- the whole model


@pytest.fixture
def model(case: Any) -> tuple[FlexTok, Names]:
    model, names = build_tokenizer(case.config, case.config["vae_base_cfg"])
    load_published(model, case.weights, names)
    return model.eval(), names


@pytest.mark.family("flextok-pipeline")
def test_images_to_tokens_and_any_prefix_back_are_the_published_ones(case: Any, model: Any) -> None:
    tokenizer, _ = model
    tokens_and_images(case, tokenizer)


def tokens_and_images(case: Any, tokenizer: FlexTok) -> None:
    run, n = case.config["run"], tokenizer.spec.length
    noise = torch.cat(images_of(case, "noise"))
    kept = case.inputs.get("keep")
    if "image" in case.inputs:
        image = (case.inputs["image"] + 1) / 2
        draws = {"vae.noise": rearrange(case.inputs["eps"], "b c h w -> b (h w) c")}
        with torch.inference_mode():
            latents = tokenizer._latents(image, draws)
            coded = tokenizer.encoder(latents)
        tokens = tokenizer.encode(image, draws=draws)
        for i in range(len(image)):
            case.compare(f"vae_latents/{i}", latents[i : i + 1])
            margins(case, i, coded[i : i + 1], tokenizer.quantizer)
            indices_equal(case, i, tokens.indices[i : i + 1])
        ids = [case.outputs[f"tokens/{i}"][:, : kept[i]] for i in range(len(image))]
    else:
        ids = images_of(case, "token_ids")
    padded = torch.cat([F.pad(x, (0, n - x.shape[1])) for x in ids])
    lengths = torch.tensor([x.shape[1] for x in ids])
    whole = tokenizer.tokens(padded)
    tokens = Tokens(whole.latents, lengths, whole.indices)
    for i, given in enumerate(ids):
        case.compare(f"kept_tokens/{i}", given)
        case.compare(f"padded_quant/{i}", tokenizer.quantizer.lookup(padded[i : i + 1]))
    sampling = {"steps": run["timesteps"], "guidance": run["guidance_scale"], "apg": run["perform_norm_guidance"]}
    with torch.inference_mode():
        latents = tokenizer.sample_latents(tokens, noise, **sampling)
        pixels = tokenizer.vae.pixels(latents / tokenizer.vae.scale.factor)  # type: ignore[union-attr, operator]
    for i in range(len(ids)):
        case.compare(f"latents/{i}", latents[i : i + 1])
    case.compare("images", 2 * pixels - 1)
    decoded = tokenizer.decode(tokens, noise=noise, **sampling)
    torch.testing.assert_close(decoded, pixels.clamp(0, 1), atol=1e-6, rtol=0)


@pytest.mark.family("flextok-pipeline")
def test_whole_models_translate_there_and_back(case: Any, model: Any) -> None:
    same_names(case, *model)


@pytest.mark.family("flextok-pipeline")
def test_a_published_file_and_a_published_folder_convert(case: Any, tmp_path: Path) -> None:
    base = {"norm_num_groups": case.config["vae_base_cfg"]["norm_num_groups"]}  # the rest is read off the weights
    published = {key: value for key, value in case.config.items() if key not in ("run", "vae_base_cfg", "_target_")}
    file = tmp_path / "model.safetensors"
    file.write_bytes((case.path / "weights.safetensors").read_bytes())
    with safe_open(file, "pt") as content:
        told = "encoder" in (content.metadata() or {})
    if told:
        converted = convert(file, vae_base=base)
        assert isinstance(converted, FlexTok) and "research only" in converted.metadata["licence"]
        tokens_and_images(case, converted)
    else:
        with pytest.raises(UserError, match="give config=FILE"):
            convert(file, vae_base=base)
    (tmp_path / "config.json").write_text(json.dumps(published))
    converted = convert(tmp_path, vae_base=base)
    assert isinstance(converted, FlexTok)
    tokens_and_images(case, converted)
