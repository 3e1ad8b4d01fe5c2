"""Exports: a folder that holds one model, which `smalti.load` gives back.

model.safetensors   the weights, under our names
config.json         {"model": name and arguments, "spec", "fingerprint", "smalti_version", and metadata}
README.md           a model card
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from smalti import __version__
from smalti.errors import UserError
from smalti.registry import build, describe, find

if TYPE_CHECKING:
    from smalti.model import Model

M = TypeVar("M", bound="Model")

METADATA = {  # what an export says of itself beside that; further keys (plain JSON values) are kept and shown too
    "title": "one line: what the model is",
    "source": "where the weights come from: a run, or a published checkpoint",
    "licence": "under which licence they may be used",
    "training_data": "what it was trained on",
    "preprocessing": "what was done to an image before it reached the model",
    "results": "measured figures, {name: value or sentence}",
    "tokenizer": "of a generator: path (null: unknown) and fingerprint of the tokenizer whose tokens it writes",
    "text_encoder": "of a generator by text: path, fingerprint (null: unknown), dim and length of its text encoder",
    "picture": "path of a PNG to show on the card; it is copied into the folder",
}
_OURS = {"model", "spec", "smalti_version", "fingerprint"}
_FILES = ("model.safetensors", "README.md", "config.json")  # config.json last: without it a folder is no export
_CONVERT = "published TiTok files are converted by `python export.py source=titok checkpoint=FILE output=DIR`"


def fingerprint(model: Model) -> str:
    """32 hex digits over arguments and weights (names, dtypes, shapes, bytes).

    Arguments at their default leave no trace, so that one which a later version adds changes no fingerprint.
    """
    return _digest(describe(model, defaults=False), model)


def _digest(description: Any, model: Model) -> str:
    digest = hashlib.blake2b(json.dumps(description, sort_keys=True).encode(), digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save(model: Model, folder: Path, metadata: dict[str, Any]) -> None:
    """Write the three files, each under a temporary name first; raises UserError where that is not possible."""
    known = {**model.metadata, **metadata}
    if taken := known.keys() & _OURS:
        raise ValueError(f"metadata must not have {sorted(taken)}: that is written from the model itself")
    picture = known.get("picture")
    if not (picture and Path(picture).is_file()):
        picture = None
    config = {
        "model": describe(model),
        "spec": model.spec.to_dict(),
        "preprocessing": "RGB in [0, 1], shorter side resized and centre crop, image_size square",
        **{key: value for key, value in known.items() if key != "picture"},
        **({"picture": "picture.png"} if picture else {}),
        "smalti_version": __version__,
        "fingerprint": fingerprint(model),
    }
    drafts = {name: folder / f".{name}.tmp" for name in _FILES}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, drafts["model.safetensors"], metadata={"format": "pt"})
        drafts["README.md"].write_text(_card(config, model.card()), encoding="utf-8")
        drafts["config.json"].write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if picture and Path(picture).resolve() != (folder / "picture.png").resolve():
            shutil.copyfile(picture, folder / "picture.png")
        for name in _FILES:
            _sync(drafts[name])
            os.replace(drafts[name], folder / name)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"output={folder} cannot be written ({_reason(error)}); choose another folder") from error
    finally:
        for draft in drafts.values():
            if draft.is_file():
                draft.unlink()


def load(name: str, cls: type[M], hub: dict[str, Any]) -> M:
    """The model of a folder or of a Hugging Face repository; raises UserError with one line."""
    folder = _folder_of(name, hub)
    config = _read_config(folder)
    try:
        model = build(config["model"])
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder / 'config.json'} does not describe a model of smalti {__version__} ({_reason(error)}); it was "
            f"written by smalti {config.get('smalti_version')}: use that version"
        ) from error
    if not isinstance(model, cls):
        raise UserError(f"{name} holds a {type(model).__name__}, not a {cls.__name__}; use smalti.load({name!r})")
    file = folder / "model.safetensors"
    try:
        weights = load_file(file)
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing; export the model again, or download the whole folder") from error
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{file} is damaged ({_reason(error)}); export the model again, or download it again"
        ) from error
    _load_weights(model, weights, file)
    # Before arguments at their default were left out, a fingerprint was taken over all that config.json describes.
    if config.get("fingerprint") not in (None, fingerprint(model), _digest(config["model"], model)):
        raise UserError(
            f"{file} does not have the fingerprint that config.json states: it is damaged, or from another export; "
            "export the model again, or download both files again"
        )
    model.metadata = {key: value for key, value in config.items() if key not in _OURS}
    if "picture" in model.metadata:
        model.metadata["picture"] = str(folder / model.metadata["picture"])
    return model.eval()


def class_of(name: str) -> type:
    """The class of the model of a folder or of a Hugging Face repository, whose weights are not read."""
    return find(_read_config(_folder_of(name, {}))["model"]["name"])


def absolute(path: str) -> str:
    """An export's folder as it is found from anywhere; the id of a repository as it is."""
    return str(Path(path).resolve()) if Path(path).exists() else path


def _load_weights(model: Model, weights: dict[str, torch.Tensor], file: Path) -> None:
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        ours, theirs = (tuple(state[name].shape) if name in state else None for state in (own, weights))
        if ours != theirs:
            raise UserError(
                f"{file} does not fit its config.json: {name} is {theirs or 'missing'} in the file and "
                f"{ours or 'missing'} in the model; export the model again"
            )
    model.load_state_dict(weights, assign=True)  # in the dtype they were saved in


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} is not an export of smalti: it has no config.json; {_CONVERT}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({_reason(error)}); export the model again") from error
    description = config.get("model") if isinstance(config, dict) else None
    if not isinstance(description, dict) or not isinstance(description.get("name"), str):
        raise UserError(f"{file} was not written by smalti: it names no model; {_CONVERT}")
    return config


def _folder_of(name: str, hub: dict[str, Any]) -> Path:
    folder = Path(name).expanduser()
    return folder if folder.exists() else _download(name, hub)


def _download(name: str, hub: dict[str, Any]) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise UserError(f"{name} is neither a folder nor the id of a Hugging Face repository; check the path")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[*_FILES, "picture.png"], **hub))
    except Exception as error:  # the library raises its own, requests' and the system's errors
        raise UserError(
            f"{name} is no folder here, and Hugging Face did not give it either ({_reason(error)}); check the path or "
            "the id"
        ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    """The first line of an error's message, shortened."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]


def _card(config: dict[str, Any], card: tuple[str, str, list[str]]) -> str:
    """A model card: front matter for the hub, what it is, how to use it, where it comes from, what was measured."""
    name, (tag, sentence, lines_of_use) = config["model"]["name"], card
    shown_elsewhere = {"model", "spec", "title", "results", "picture"}
    facts = {key.replace("_", " "): _words(value) for key, value in config.items() if key not in shown_elsewhere}
    licence = str(config.get("licence") or "")
    lines = [
        "---",
        "library_name: smalti",
        f"tags: [{tag}, {name}]",
        *([f"license: {licence.lower()}"] if re.fullmatch(r"[A-Za-z0-9.-]+", licence) else []),
        "---",
        f"# {config.get('title') or name}",
        "",
        sentence,
        "",
        *([f"![What it makes]({config['picture']})", ""] if config.get("picture") else []),
        "```python",
        *lines_of_use,
        "```",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in facts.items()),
        "",
    ]
    if config.get("results"):
        results = [f"| {key} | {value} |" for key, value in config["results"].items()]
        lines += ["| measured | |", "|---|---|", *results, ""]
    return "\n".join(lines)


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_words(item)}" for key, item in value.items())
    return str(value)
