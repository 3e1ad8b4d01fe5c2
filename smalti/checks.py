"""Checks of a composed config that need no data and no model: sizes, divisibility, ranges, paths.

Pure functions of the config and the file system; each raises a UserError that names the key, its value, why, and the
way out. What needs data or a built model is checked by the heavy part, before the run folder is made.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from smalti.errors import UserError, did_you_mean

IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

# Rules by the last part of a key, wherever it stands. null is left to the class that takes it.
POSITIVE = {  # whole numbers ≥ 1
    "image_size", "num_latent_tokens", "proxy_codebook_size", "width", "depth", "heads", "patch_size", "codebook_size", "dim",
    "channels", "max_steps", "batch_size", "every", "images", "accumulate", "num_nodes", "nan_limit", "length", "n_jobs",
}  # fmt: skip
NOT_NEGATIVE = {  # numbers ≥ 0
    "lr", "discriminator_lr", "end_lr", "weight_decay", "warmup_steps", "workers", "seed", "start", "start_step",
    "commitment_cost", "reconstruction_weight", "perceptual_weight", "quantizer_weight", "adversarial_weight", "kl_weight",
    "lecam_weight", "entropy_weight",
}  # fmt: skip
ABOVE_ZERO = {"eps", "clip"}  # numbers > 0
BELOW_ONE = {"betas", "decay"}  # numbers (each, in a list) in [0, 1)
PROBABILITY = {"flip", "probability", "dropout", "label_smoothing"}  # numbers in [0, 1]
CHOICES = {
    "resume": ("auto", "never", "must"),
    "schedule": ("cosine", "constant", "linear"),
    "precision": ("32", "32-true", "bf16", "bf16-mixed", "16-mixed"),
}


def check_train(config: DictConfig) -> None:
    """Everything about a training run that its config alone shows."""
    values = _plain(config)
    _check_values(values)
    _check_shapes(values)
    _check_batch(values)
    check_data(values.get("data"))
    for key in ("init_path", "teacher_path"):
        check_export(key, values.get(key))
    check_folder("output", values["output"])
    check_folder("run", values.get("run"))


def check_evaluate(config: DictConfig) -> None:
    """What an evaluation needs: an export, and images (a data set, or one image file)."""
    values = _plain(config)
    _check_values(values)
    check_export("model_path", values["model_path"])
    if values.get("image") is not None:
        check_file("image", values["image"])
    else:
        check_data(values.get("data"))
    check_folder("output", values.get("output"))


def check_export_request(config: DictConfig) -> None:
    """Either `run=` or `source= checkpoint=`, and a folder to write that holds nothing yet."""
    values = _plain(config)
    run, source, checkpoint = values["run"], values["source"], values["checkpoint"]
    if run is None and source is None:
        raise UserError("nothing to export: give run=RUNDIR, or source=titok checkpoint=FILE")
    if run is not None and (source is not None or checkpoint is not None):
        raise UserError(f"run={run} and source={source} checkpoint={checkpoint} exclude each other; give one of the two")
    if run is not None:
        if not Path(run).is_dir():
            raise UserError(f"run={run} is not a folder{_nearest(run)}")
        if not (Path(run) / "config.yaml").is_file():
            raise UserError(f"run={run} is not a run folder (no config.yaml); give the folder that train.py printed")
        if not any((Path(run) / "checkpoints").glob("*")):
            raise UserError(f"run={run} has no checkpoint yet; train until the first one (checkpoint.every steps)")
    else:
        if source not in SOURCES:
            raise UserError(f"source={source} is unknown{did_you_mean(source, SOURCES) or ';'} possible: {', '.join(SOURCES)}")
        if checkpoint is None:
            raise UserError(f"source={source} needs the published file: checkpoint=FILE")
        check_file("checkpoint", checkpoint)
        if values["config"] is not None:
            check_file("config", values["config"])
    output = Path(values["output"])
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"output={output} is not empty; name a new folder, or remove it first")
    check_folder("output", values["output"])


SOURCES = ("titok",)


def check_data(data: Any) -> None:
    """`data.path`, when given, exists and holds an image or a shard (the first one found is enough)."""
    if not isinstance(data, Mapping) or not data.get("path"):
        return
    path = str(data["path"])
    if "://" in path or any(mark in path for mark in "*?{["):
        return  # a pattern: the reader expands it and names what it found
    if not Path(path).exists():
        raise UserError(f"data.path={path} does not exist{_nearest(path)}")
    if Path(path).is_dir():
        if not _holds_data(path):
            raise UserError(
                f"data.path={path} holds no images and no .tar shards; "
                "give a folder with one sub-folder of images a class, or with shards"
            )
    elif not path.endswith(".tar"):
        raise UserError(f"data.path={path} is a file; give a .tar shard, or a folder of images or shards")


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


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_values(values: Mapping[str, Any]) -> None:
    """Signs and ranges, by the last part of each key."""
    for key, value in _leaves(values):
        name = key.rpartition(".")[2]
        for number in value if isinstance(value, list) else [value]:
            if name in CHOICES and value is not None and str(number) not in CHOICES[name]:
                hint = did_you_mean(str(number), CHOICES[name]) or ";"
                raise UserError(f"{key}={number} is unknown{hint} possible: {', '.join(CHOICES[name])}")
            if not _is_number(number):
                continue
            if number != number or number in (float("inf"), float("-inf")):
                raise UserError(f"{key}={number} is not a finite number; give one")
            if name in POSITIVE and number < 1:
                raise UserError(f"{key}={number} must be at least 1")
            if name in NOT_NEGATIVE and number < 0:
                raise UserError(f"{key}={number} must not be negative; use 0 or more")
            if name in ABOVE_ZERO and number <= 0:
                raise UserError(f"{key}={number} must be above 0{'; use null to switch it off' if name == 'clip' else ''}")
            if name in BELOW_ONE and not 0 <= number < 1:
                raise UserError(f"{key}={_list(value)} must lie in [0, 1); for example {0.9 if name == 'betas' else 0.999}")
            if name in PROBABILITY and not 0 <= number <= 1:
                raise UserError(f"{key}={number} is a probability; use a number from 0 to 1")
        if name == "betas" and (not isinstance(value, list) or len(value) != 2):
            raise UserError(f"{key}={_list(value)} must be two numbers, such as [0.9,0.999]")
    keep = (values.get("checkpoint") or {}).get("keep")
    if _is_number(keep) and keep < 2:
        raise UserError(f"checkpoint.keep={keep} must be at least 2: the one before is used when the newest is damaged")


def _check_shapes(values: Mapping[str, Any]) -> None:
    """Image side by patch side, width by heads, in the tokenizer and every section of it."""
    tokenizer = values.get("tokenizer") or {}
    size = tokenizer.get("image_size")
    data_size = (values.get("data") or {}).get("image_size")
    if size and data_size and size != data_size:
        raise UserError(f"data.image_size={data_size} but tokenizer.image_size={size}; make them equal")
    for key, part in _sections(tokenizer, "tokenizer"):
        patch = part.get("patch_size")
        if _is_number(patch) and _is_number(size) and size % patch:
            raise UserError(f"tokenizer.image_size={size} is not a multiple of {key}.patch_size={patch}; use {_nearby(size, patch)}")
        width, heads = part.get("width"), part.get("heads")
        if _is_number(width) and _is_number(heads) and width % heads:
            raise UserError(f"{key}.width={width} is not a multiple of {key}.heads={heads}; use {_nearby(width, heads)}")


def _check_batch(values: Mapping[str, Any]) -> None:
    """The global batch is cut evenly over processes and accumulated micro-batches."""
    batch = (values.get("data") or {}).get("batch_size")
    trainer = values.get("trainer") or {}
    devices = trainer.get("devices", 1)
    if isinstance(devices, list):
        devices = len(devices)
    if not _is_number(devices) or devices < 0:
        if devices not in ("auto", -1, "-1") and not _is_number(devices):
            raise UserError(f"trainer.devices={devices} is unknown; use a number, or auto")
        return  # counted by the heavy part
    if devices == 0:
        raise UserError("trainer.devices=0 must be at least 1")
    parts = devices * (trainer.get("num_nodes") or 1) * (trainer.get("accumulate") or 1)
    if _is_number(batch) and batch % parts:
        raise UserError(
            f"data.batch_size={batch} is not divisible by {devices} devices × {trainer.get('num_nodes') or 1} nodes "
            f"× accumulate {trainer.get('accumulate') or 1} = {parts}; use {_nearby(batch, parts)}"
        )


def _sections(node: Mapping[str, Any], key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield key, node
    for name, item in node.items():
        if isinstance(item, Mapping):
            yield from _sections(item, f"{key}.{name}")


def _nearby(value: int, step: int) -> str:
    """The multiples of `step` on both sides of `value`."""
    below = value // step * step
    return f"{below} or {below + step}" if below else f"{step}"


def _list(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)


def _nearest(path: str) -> str:
    """A similar name in the same folder, when there is one; else which part of the path is missing."""
    missing = Path(path)
    while not missing.parent.exists():
        missing = missing.parent
    try:
        names = os.listdir(missing.parent)
    except OSError:
        return f"; {missing.parent} cannot be read"
    hint = did_you_mean(missing.name, names)
    return hint or ("" if missing == Path(path) else f" ({missing.parent or '.'} has no {missing.name})") + "; check the path"


def _holds_data(path: str) -> bool:
    """Whether a folder, or a folder in it, has an image or a shard; stops at the first."""
    for _, folders, files in os.walk(path, followlinks=True):
        folders.sort()
        if any(os.path.splitext(name)[1].lower() in IMAGES | {".tar"} for name in files):
            return True
    return False
