"""Published checkpoints and their configurations as files."""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from smalti.errors import UserError

_WEIGHTS = (  # diffusers' names last
    "model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin",
)  # fmt: skip


def weights_file(checkpoint: Path) -> Path:
    """The file itself, that of a hub folder, or that of a published training's folder, of its averaged weights."""
    if checkpoint.is_file():
        return checkpoint
    if not checkpoint.is_dir():
        raise UserError(f"checkpoint={checkpoint} does not exist; give a published file or folder")
    # Averaged weights first: 1d-tokenizer's training writes its live ones under the plain name beside them.
    for folder in ("ema_model", "", "unwrapped_model"):
        for name in _WEIGHTS:
            if (file := checkpoint / folder / name).is_file():
                return file
    raise UserError(f"checkpoint={checkpoint} holds none of {', '.join(_WEIGHTS)}; give the file itself")


def read_weights(file: Path, roots: Sequence[str] = ("state_dict", "model")) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of one that torch saved; floating point as float32.

    roots: names under which a file may hold them beside others, in order of preference. Raises UserError.
    """
    return tensors_of(read_content(file), file, roots)


def read_content(file: Path) -> dict[str, Any]:
    """All that a file holds. Pickled objects are refused, never run; of settings that argparse read, which some
    trainings save beside, only the values are."""
    try:
        if file.suffix == ".safetensors":
            content: Any = load_file(file)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint={file} is no file of tensors: it holds pickled objects, which are never run, or it is damaged"
        ) from error
    except (OSError, RuntimeError, EOFError, SafetensorError, ValueError) as error:
        raise UserError(f"checkpoint={file} cannot be read ({reason(error)}); download it again") from error
    return content if isinstance(content, dict) else {}


def tensors_of(content: Mapping[str, Any], file: Path, roots: Sequence[str]) -> dict[str, Tensor]:
    """The weights in a file's content, see `read_weights`."""
    for key in roots:
        if isinstance(content.get(key), dict):
            content = content[key]
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"checkpoint={file} is no dictionary of tensors; give the weights file of the published model")
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in content.items()}


def config_beside(file: Path) -> Path | None:
    """config.json or config.yaml beside a weights file, or above it where the published training writes it."""
    folders = [file.parent]
    if file.parent.name in ("ema_model", "unwrapped_model"):
        folders += [file.parent.parent, file.parent.parent.parent]
    for folder in folders:
        for name in ("config.json", "config.yaml"):
            if (folder / name).is_file():
                return folder / name
    return None


def read_config(file: Path) -> dict[str, Any]:
    """A published .json or .yaml as plain values, references within it resolved."""
    try:
        text = file.read_text(encoding="utf-8")
        config = OmegaConf.create(json.loads(text) if file.suffix == ".json" else text)
        values = OmegaConf.to_container(config, resolve=True)
    except Exception as error:  # OSError, JSON's, and YAML's own
        raise UserError(f"config={file} cannot be read ({reason(error)}); check the file") from error
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}


def reason(error: Exception) -> str:
    """The first line of what an error says."""
    lines = str(error).strip().splitlines()
    return lines[0][:150] if lines else type(error).__name__
