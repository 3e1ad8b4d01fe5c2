"""Checks of a composed config that need no data and no model: signs, ranges, divisibility, paths.

Pure functions of the config and the file system; each raises a UserError that names the key, its value, why, and the
way out. What needs data or a built model is checked by the heavy part, before the run folder is made.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from smalti.errors import UserError, did_you_mean

# Published code bases that export.py converts.
SOURCES = ("titok", "onedpiece", "flextok", "klvae", "maskgit", "rar", "mar", "tokenbridge", "llamagen", "flextok_ar")
IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"}
MOST_IN_A_PICTURE = 1024  # of generate.py
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

# Rules by the last part of a key, wherever it stands. null is left to the class that takes it.
POSITIVE = {  # whole numbers ≥ 1 (each, in a list)
    "image_size", "resize", "num_latent_tokens", "proxy_codebook_size", "codebook_size", "dim", "width", "depth",
    "heads", "patch_size", "channels", "channel_mult", "num_res_blocks", "hidden_channels", "num_stages", "num_layers",
    "length", "z_channels", "norm_groups", "size", "text_length", "text_dim", "max_steps", "batch_size", "every",
    "images", "pictures", "baseline_images", "length_images", "num", "samples", "classifier_steps",
    "accumulate", "num_nodes", "nan_limit", "bits",
}  # fmt: skip
NOT_NEGATIVE = {  # numbers ≥ 0
    "num_classes", "bounds", "lr", "discriminator_lr", "end_lr", "weight_decay", "warmup_steps", "workers", "seed",
    "start", "weight", "factor",
    "reconstruction_weight", "perceptual_weight", "quantizer_weight", "commitment_weight", "entropy_weight",
    "lpips_weight", "convnext_weight", "adaptive_weight_max",
}  # fmt: skip
ABOVE_ZERO = {"eps", "clip"}  # numbers > 0
BELOW_ONE = {"betas", "decay"}  # numbers (each, in a list) in [0, 1)
CHOICES = {
    "resume": ("auto", "never", "must"),
    "schedule": ("cosine", "constant"),
    "precision": ("32-true", "bf16-mixed"),
    "crop": ("random", "center", "adm", "adm_random"),
    "remainder": ("drop", "pad"),
    "views": ("center", "flip", "ten_crop"),
    "latent_dtype": ("float16", "float32"),
    "reconstruction": ("l1", "l2"),
    "latent_layout": ("corrected", "legacy"),
    "tokenizer.head": ("pixels", "codes", "soft_codes"),
    "classifier": ("auto", "train", "none"),
    "wandb.mode": ("online", "offline", "disabled"),
}


def check_train(config: DictConfig) -> None:
    """Everything about a training run that its config alone shows."""
    values = _plain(config)
    _check_values(values)
    if (keep := values["checkpoint"]["keep"]) < 2:
        raise UserError(f"checkpoint.keep={keep} must be at least 2: a damaged newest one falls back to the one before")
    if values["generator"] is None:
        _check_tokenizer_run(values)
        _check_shapes(values)
    else:
        _check_generator_run(values)
    _check_batch(values)
    check_data(values.get("data"))
    for key in ("init_path", "teacher_path", "tokenizer_path", "vae_path"):
        check_export(key, values.get(key))
    check_text_encoder(values["text_encoder"])
    for key in ("output", "run"):
        check_folder(key, values.get(key))


def check_evaluate(config: DictConfig) -> None:
    """What an evaluation needs: an export or samples, and images (a data set, or one image file)."""
    values = _plain(config)
    _check_values(values)
    model, samples, reference = (values[key] for key in ("model_path", "samples_path", "reference"))
    if model is None and samples is None and values["classifier"] != "train":
        raise UserError("model_path is required: the export of a tokenizer or generator; or give samples_path=FILE.npz")
    for key in ("model_path", "tokenizer_path", "teacher_path"):
        check_export(key, values[key])
    check_text_encoder(values["text_encoder"])
    if samples is not None:
        check_file("samples_path", samples)
    if reference not in ("train", "test"):
        if Path(reference).suffix != ".npz":
            raise UserError(f"reference={reference} is unknown; give train or test (of the data), or an .npz")
        check_file("reference", reference)
    _check_labels(values["labels"])
    if isinstance(values.get("image"), list):
        raise UserError(f"image={_show(values['image'])} is a list; give one photo, or a folder by data.path=DIR")
    if values.get("image") is not None:
        check_file("image", values["image"])
    else:
        check_data(values.get("data"))
    check_folder("output", values.get("output"))


def check_generate(config: DictConfig) -> None:
    """An exported generator, and an output that tells by its name what it is."""
    values = _plain(config)
    _check_values(values)
    for key in ("model_path", "tokenizer_path", "teacher_path"):
        check_export(key, values[key])
    check_text_encoder(values["text_encoder"])
    _check_labels(values["labels"])
    _check_prompts(values["prompts"], values["prompts_file"], values["labels"])
    output = Path(values["output"])
    if output.suffix not in ("", ".png", ".npz"):
        raise UserError(f"output={output} must end in .png or .npz, or be a folder; use {output.with_suffix('.png')}")
    if output.suffix == ".png" and values["num"] > MOST_IN_A_PICTURE:
        raise UserError(
            f"num={values['num']} pictures are too many for one, output={output}; use at most {MOST_IN_A_PICTURE}, or "
            "output=FOLDER, or an .npz"
        )
    if output.suffix and output.is_dir():
        raise UserError(f"output={output} is a folder; give a file, or a folder without {output.suffix} in its name")
    check_folder("output", str(output.parent if output.suffix else output))


def _check_labels(labels: Any) -> None:
    """Class numbers, one at least."""
    if labels == []:
        raise UserError("labels=[] names no class; give some, such as [0,1], or null for all in turn")
    given = labels if isinstance(labels, list) else []
    if any(not isinstance(label, int) or isinstance(label, bool) for label in given):
        raise UserError(f"labels={_show(labels)} must be class numbers, such as [0,1]")


def _check_prompts(prompts: Any, file: str | None, labels: Any) -> None:
    """Texts, one at least, or a file of them; no classes beside them."""
    if prompts == []:
        raise UserError("prompts=[] has no text; give some, such as 'prompts=[\"a red circle\"]'")
    given = prompts if isinstance(prompts, list) else []
    if any(not isinstance(prompt, str) for prompt in given):
        raise UserError(f"prompts={_show(prompts)} must be texts; put them in quotes: 'prompts=[\"7 circles\"]'")
    named = {
        name: value
        for name, value in (("prompts", prompts), ("prompts_file", file), ("labels", labels))
        if value is not None
    }
    if len(named) > 1:
        (one, first), (two, second), *_ = named.items()
        raise UserError(f"{one}={_show(first)} and {two}={_show(second)} exclude each other; give one of them")
    if file is not None:
        check_file("prompts_file", file)


def check_text_encoder(value: Any) -> None:
    """A folder of transformers, which has config.json, or what may be the id of a repository."""
    if value is None:
        return
    path = Path(value)
    if path.is_file():
        raise UserError(f"text_encoder={value} is a file; give the folder, or the id of a repository of Hugging Face")
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"text_encoder={value} is no model of transformers (no config.json); give the folder of one")
    if not path.is_dir() and (
        not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(value)) or (path.parent != Path() and path.parent.exists())
    ):
        raise UserError(f"text_encoder={value} does not exist{_nearest(str(value))}")


def check_encode(config: DictConfig, *, data_set: bool = False) -> None:
    """Either images to encode or files to decode, which exist; and one way at most to say how many tokens.

    data_set: whether the command line names one, whose token shards are to be written instead.
    """
    values = _plain(config)
    _check_values(values)
    check_export("model_path", values["model_path"])
    check_export("teacher_path", values["teacher_path"])
    if data_set:
        _check_tokenising(values)
        return
    if values["text_encoder"] is not None:
        raise UserError(
            f"text_encoder={values['text_encoder']} is for the captions of a data set; give data.path=DIR, or leave it "
            "out"
        )
    if values["rescale"] is not None:
        raise UserError(f"rescale={values['rescale']} needs images to measure: give data.path=DIR, or data=shapes")
    image, decode, length = values["image"], values["decode"], values["length"]
    targets = {f"quality.{name}": value for name, value in values["quality"].items() if value is not None}
    shown = " and ".join(f"{key}={_show(value)}" for key, value in targets.items())
    if image is None and decode is None:
        raise UserError(
            "nothing to do: give image=photo.jpg (to tokens), decode=photo.tok (and back), or data.path=DIR (all of it)"
        )
    if image is not None and decode is not None:
        raise UserError(f"image={_show(image)} and decode={_show(decode)} exclude each other; give one of them")
    key, given = ("image", image) if decode is None else ("decode", decode)
    if given == []:
        raise UserError(f"{key}=[] names no file; give one")
    for place in map(str, given if isinstance(given, list) else [given]):
        if not Path(place).is_dir():
            check_file(key, place)
    if len(targets) > 1:
        raise UserError(f"{shown} exclude each other; give one of them")
    if targets and length is not None:
        raise UserError(f"length={length} and {shown} exclude each other; give one of them")
    for name, low, high in (("psnr", 0, 100), ("ssim", 0, 1), ("lpips", 0, 10)):
        value = values["quality"][name]
        if value is not None and not low < value <= high:
            raise UserError(f"quality.{name}={_show(value)} must be above {low} and at most {high}")
    picture = values["picture"]
    needless = [*targets, *(["picture"] if picture is not None else [])]
    if decode is not None and needless:
        raise UserError(f"{needless[0]} needs the original image, which decode={_show(decode)} has not; leave it out")
    if picture is not None:
        if Path(picture).suffix.lower() != ".png" or Path(picture).is_dir():
            raise UserError(f"picture={picture} must be a file that ends in .png")
        check_folder("picture", str(Path(picture).parent))


def _check_tokenising(values: Mapping[str, Any]) -> None:
    """A data set, its views, and a folder; nothing that is of single images."""
    check_data(values["data"])
    single = {key: values[key] for key in ("image", "decode", "length", "picture")}
    single |= {f"quality.{name}": value for name, value in values["quality"].items()}
    for key, value in single.items():
        if value is not None:
            raise UserError(f"{key}={_show(value)} is for single images, but data=… is given; leave one of them out")
    if values["views"] != "ten_crop" and values["enlarge"] != [1.1]:
        raise UserError(f"enlarge={_show(values['enlarge'])} is for views=ten_crop, not views={values['views']}")
    if not values["enlarge"] or min(values["enlarge"]) < 1:
        raise UserError(f"enlarge={_show(values['enlarge'])} must be numbers of at least 1, such as [1.1]")
    check_text_encoder(values["text_encoder"])
    if values["text_encoder"] is None and values["text_length"] != 120:
        raise UserError(f"text_length={values['text_length']} is of text_encoder, which is not given; leave it out")
    output = values["output"]
    if Path(output).suffix == ".tar":
        raise UserError(f"output={output} must be a folder, in which the shards are written")
    if values["rescale"] is not None and values["rescale"] < 1:
        raise UserError(f"rescale={values['rescale']} must be at least 1: images to measure the scale on")
    for key, unless in (("views", "center"), ("text_encoder", None)):
        if values["rescale"] is not None and values[key] != unless:
            raise UserError(
                f"{key}={values[key]} is for tokens, but rescale={values['rescale']} writes none; leave it out"
            )
    check_folder("output", output)


def check_export_request(config: DictConfig) -> None:
    """One of `run=`, `source= checkpoint=` and `bridge=`, and a folder to write that holds nothing yet."""
    values = _plain(config)
    run, source, checkpoint, bridge = (values[key] for key in ("run", "source", "checkpoint", "bridge"))
    if run is None and source is None and bridge is None:
        raise UserError(
            "nothing to export: give run=RUNDIR, or source=titok checkpoint=FILE, or bridge=DIR, a continuous tokenizer"
        )
    of_source = ("source", "checkpoint", "config")
    for key, others in (("run", (*of_source, "bridge")), ("bridge", of_source)):
        for other in others:
            if values[key] is not None and values[other] is not None:
                raise UserError(
                    f"{key}={values[key]} and {other}={values[other]} exclude each other; give either {key}=, or "
                    f"{'bridge' if other == 'bridge' else 'source'}="
                )
    if bridge is None:
        _check_no_bridging(values)
    else:
        _check_values(values)
        check_export("bridge", bridge)
        check_data(values["data"])
    if run is not None:
        _check_run(run)
    elif source is not None:
        if source not in SOURCES:
            raise UserError(f"source={source} is unknown{_choose(source, SOURCES)}")
        if checkpoint is None:
            raise UserError(f"source={source} needs the published file: checkpoint=FILE")
        if not Path(checkpoint).is_dir():  # a folder of the hub, or of the published training, is read, too
            check_file("checkpoint", checkpoint)
        if values["config"] is not None:
            check_file("config", values["config"])
    output = Path(values["output"])
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"output={output} is not empty; name a new folder, or remove it first")
    check_folder("output", values["output"])


def _check_no_bridging(values: Mapping[str, Any]) -> None:
    """Nothing that is of `bridge=` alone."""
    given = {**values, "data.path": values["data"]["path"]}
    alone = {"bits": 6, "fit": True, "order": "data", "images": 1024, "batch_size": 32, "device": "auto", "seed": 42}
    for key, default in {**alone, "data.path": None}.items():
        if given[key] != default:
            raise UserError(f"{key}={_show(given[key])} is of bridge=DIR, a continuous tokenizer; leave it out")


def check_data(data: Any) -> None:
    """`data.path` and `data.val_path`, when given, exist and hold an image or a shard (the first found is enough)."""
    for name in ("path", "val_path"):
        given = data.get(name) if isinstance(data, Mapping) else None
        for path in given if isinstance(given, list) else [given]:
            if path is not None:
                _check_images(f"data.{name}", str(path))


def check_export(key: str, value: Any) -> None:
    """An export is a folder with config.json and model.safetensors; anything of the form user/name may be a hub id."""
    if value is None:
        return
    path = Path(value)
    if path.is_file():
        raise UserError(f"{key}={value} is a file; give the folder of an export (export.py writes one)")
    if path.is_dir():
        for name in ("config.json", "model.safetensors"):
            if not (path / name).is_file():
                inner = path / "export"
                hint = f"; did you mean {key}={inner}?" if inner.is_dir() else "; export.py writes such a folder"
                raise UserError(f"{key}={value} is not an export (no {name}){hint}")
    elif not HUB_ID.fullmatch(str(value)) or path.parent.exists():
        raise UserError(f"{key}={value} does not exist{_nearest(str(value))}")


def check_file(key: str, value: str) -> None:
    """A file that exists and can be read."""
    if not Path(value).exists():
        raise UserError(f"{key}={value} does not exist{_nearest(value)}")
    if not Path(value).is_file():
        raise UserError(f"{key}={value} is a folder; give a file")
    if not os.access(value, os.R_OK):
        raise UserError(f"{key}={value} cannot be read; check its permissions")


def check_folder(key: str, value: Any) -> None:
    """A folder that can be made or written in; nothing is made here."""
    if value is None:
        return
    path = Path(value).absolute()
    there = next(parent for parent in (path, *path.parents) if parent.exists() or parent.is_symlink())
    if not there.is_dir():
        raise UserError(f"{key}={value} cannot be a folder: {there} is not one; choose another {key}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{key}={value} cannot be written: no permission in {there}; choose another {key}")


def _plain(config: DictConfig) -> dict[str, Any]:
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value with its dotted key; a list counts as one value."""
    if isinstance(node, Mapping):
        for name, item in node.items():
            yield from _leaves(item, f"{key}.{name}" if key else str(name))
    else:
        yield key, node


def _sections(node: Mapping[str, Any], key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield key, node
    for name, item in node.items():
        if isinstance(item, Mapping):
            yield from _sections(item, f"{key}.{name}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_values(values: Mapping[str, Any]) -> None:
    """Signs and ranges, by the last part of each key."""
    for key, value in _leaves(values):
        *_, section, name = ("", *key.split("."))
        choices = CHOICES.get(name) or CHOICES.get(f"{section}.{name}")
        if choices and value is not None and value not in choices:
            raise UserError(f"{key}={_show(value)} is unknown{_choose(_show(value), choices)}")
        if name == "betas" and (not isinstance(value, list) or len(value) != 2):
            raise UserError(f"{key}={_show(value)} must be two numbers, such as [0.9,0.999]")
        for number in value if isinstance(value, list) else [value]:
            if _is_number(number):
                _check_number(key, name, number, _show(value))


def _check_number(key: str, name: str, number: float, shown: str) -> None:
    if not math.isfinite(number):
        raise UserError(f"{key}={shown} is not a finite number; give one")
    if name in POSITIVE and number < 1:
        raise UserError(f"{key}={shown} must be at least 1")
    if name in NOT_NEGATIVE and number < 0:
        raise UserError(f"{key}={shown} must not be negative; use 0 or more")
    if name in ABOVE_ZERO and number <= 0:
        raise UserError(f"{key}={shown} must be above 0{'; null switches it off' if name == 'clip' else ''}")
    if name in BELOW_ONE and not 0 <= number < 1:
        raise UserError(f"{key}={shown} must lie in [0, 1), such as {'[0.9,0.999]' if name == 'betas' else '0.999'}")


def _check_tokenizer_run(values: Mapping[str, Any]) -> None:
    """A run without a generator trains a tokenizer, by an objective."""
    for part in ("tokenizer", "objective"):
        if values[part] is None:
            raise UserError(f"{part} and generator are both null; pick what to train, such as experiment=titok or gpt")
    if values["tokenizer_path"] is not None:
        raise UserError(
            f"tokenizer_path={values['tokenizer_path']} is for generators, but this run trains a tokenizer; use "
            "init_path to start from its weights, or a generator's experiment"
        )
    if values["text_encoder"] is not None:
        raise UserError(
            f"text_encoder={values['text_encoder']} is for generators by text, but this run trains a tokenizer; leave "
            "it out"
        )


def _check_generator_run(values: Mapping[str, Any]) -> None:
    """A generator is trained alone: its tokenizer is frozen, and its objective its own."""
    for part in ("tokenizer", "objective"):
        if values[part] is not None:
            raise UserError(
                f"{part} is given, but this run trains a generator; leave {part}=… out and name a trained tokenizer by "
                "tokenizer_path=DIR, or pick a tokenizer's experiment"
            )
    asked, encoder = values["generator"].get("text_dim"), values["text_encoder"]
    if isinstance(asked, str) and asked != "auto":
        raise UserError(f"generator.text_dim={asked} must be a number of channels, auto (as there are), or null (none)")
    if encoder is not None and asked is None:
        way_out = "set generator.text_dim=auto" if "text_dim" in values["generator"] else "take one, such as gpt"
        raise UserError(
            f"text_encoder={encoder} is for generators by text, but this one takes none; leave it out, or {way_out}"
        )
    for key, section in _sections(values["generator"], "generator"):
        width, heads = section.get("width"), section.get("heads")
        if width and heads and width % heads:
            raise UserError(
                f"{key}.width={width} is not a multiple of {key}.heads={heads}; use {_nearby(width, heads)}"
            )


def _check_shapes(values: Mapping[str, Any]) -> None:
    """Image side by patch side, width by heads, in the tokenizer and every section of it."""
    tokenizer, data = values["tokenizer"], values["data"]
    size, resize = tokenizer.get("image_size"), data.get("resize")
    if size != data.get("image_size"):
        raise UserError(
            f"tokenizer.image_size={size} but data.image_size={data.get('image_size')}; set only the latter"
        )
    if _is_number(resize) and resize < size:
        raise UserError(
            f"data.resize={resize} is smaller than the crop, data.image_size={size}; set data.resize={size}"
        )
    for key, part in _sections(tokenizer, "tokenizer"):
        if (patch := part.get("patch_size")) and size % patch:
            near = _nearby(size, patch)
            raise UserError(f"data.image_size={size} is not a multiple of {key}.patch_size={patch}; use {near}")
        width, heads = part.get("width"), part.get("heads")
        if width and heads and width % heads:
            near = _nearby(width, heads)
            raise UserError(f"{key}.width={width} is not a multiple of {key}.heads={heads}; use {near}")
    levels = tokenizer.get("channel_mult")
    if levels and size % (side := 2 ** (len(levels) - 1)):
        near = _nearby(size, side)
        raise UserError(
            f"data.image_size={size} is not a multiple of {side} (tokenizer.channel_mult halves); use {near}"
        )


def _check_batch(values: Mapping[str, Any]) -> None:
    """The global batch is cut evenly over processes and accumulated micro-batches."""
    batch, trainer = values["data"]["batch_size"], values["trainer"]
    devices, nodes, accumulate = trainer["devices"], trainer["num_nodes"], trainer["accumulate"]
    if devices == "auto":
        return  # counted by the heavy part
    if not isinstance(devices, int) or devices < 1:
        raise UserError(f"trainer.devices={_show(devices)} must be a number of processes from 1, or auto")
    parts = devices * nodes * accumulate
    if batch % parts:
        raise UserError(
            f"data.batch_size={batch} is not divisible by {parts} = trainer.devices {devices} × num_nodes {nodes} × "
            f"accumulate {accumulate}; use {_nearby(batch, parts)}"
        )


def _check_run(run: str) -> None:
    """A run folder with something to export."""
    if not Path(run).is_dir():
        raise UserError(f"run={run} is not a folder{_nearest(run)}")
    if not (Path(run) / "config.yaml").is_file():
        raise UserError(f"run={run} is not a run folder (no config.yaml); give the folder that train.py printed")
    if not any((Path(run) / "checkpoints").glob("*")):
        raise UserError(f"run={run} has no checkpoint yet; train until the first one (checkpoint.every steps)")


def _check_images(key: str, path: str) -> None:
    """A folder with an image or a shard in it, or a .tar file. Patterns are left to the reader, which expands them."""
    if "://" in path or any(mark in path for mark in "*?{["):
        return
    if not Path(path).exists():
        raise UserError(f"{key}={path} does not exist{_nearest(path)}")
    if Path(path).is_dir():
        if not _holds_data(path):
            raise UserError(
                f"{key}={path} holds no images and no .tar shards; "
                "give a folder with one sub-folder of images a class, or with shards"
            )
    elif not path.endswith(".tar"):
        raise UserError(f"{key}={path} is a file; give a .tar shard, or a folder of images or shards")


def _holds_data(path: str) -> bool:
    """Whether a folder, or a folder in it, has an image or a shard; stops at the first."""
    for _, folders, files in os.walk(path, followlinks=True):
        folders.sort()
        if any(os.path.splitext(name)[1].lower() in IMAGES | {".tar"} for name in files):
            return True
    return False


def _nearby(value: int, step: int) -> str:
    """The multiples of `step` on both sides of `value`."""
    below = value // step * step
    return f"{below} or {below + step}" if below else f"{step}"


def _show(value: Any) -> str:
    """A value as it would be typed."""
    if isinstance(value, list):
        return f"[{','.join(map(_show, value))}]"
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _choose(value: str, possible: Iterable[str]) -> str:
    """The nearest of what is possible, and all of it."""
    possible = list(possible)
    return f"{did_you_mean(value, possible).rstrip('?')}; possible: {', '.join(possible)}"


def _nearest(path: str) -> str:
    """A similar name in the same folder, when there is one; else which part of the path is missing."""
    missing = Path(path)
    while not missing.parent.exists():
        missing = missing.parent
    hint = did_you_mean(missing.name, os.listdir(missing.parent) if os.access(missing.parent, os.R_OK) else [])
    which = "" if missing == Path(path) else f" ({missing.parent} has no {missing.name})"
    return hint or f"{which}; check the path"
