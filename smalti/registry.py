"""Names for the classes that an export may contain, and how a module is described by plain values and rebuilt.

A config.json on disk holds names from this table, never an importable path, so that opening a file cannot run code.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smalti.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from smalti.model import Model

_CLASSES: dict[str, str | type] = {
    "titok": "smalti.tokenizers.titok:TiTok",
    "flextok": "smalti.tokenizers.flextok:FlexTok",
    "maskgit_vqgan": "smalti.tokenizers.maskgit_vqgan:MaskGITVQGAN",
    "vqgan": "smalti.tokenizers.vqgan:VQGAN",
    "klvae": "smalti.tokenizers.klvae:KLVAE",
    "patch_vae": "smalti.tokenizers.patch_vae:PatchVAE",
    "bridged": "smalti.tokenizers.tokenbridge:BridgedTokenizer",
    "gpt": "smalti.generators.gpt:GPT",
    "flextok_ar": "smalti.generators.flextok_ar:FlexTokAR",
    "maskgit": "smalti.generators.maskgit:MaskGIT",
    "rar": "smalti.generators.rar:RAR",
    "mar": "smalti.generators.mar:MAR",
    "tokenbridge": "smalti.generators.tokenbridge:TokenBridge",
    "vq": "smalti.tokenizers.quantizers.vq:VectorQuantizer",
    "kl": "smalti.tokenizers.quantizers.kl:GaussianQuantizer",
    "fsq": "smalti.tokenizers.quantizers.fsq:FSQ",
    "bridge": "smalti.tokenizers.quantizers.bridge:BridgeQuantizer",
    "nested_dropout": "smalti.tokenizers.regularizers:NestedDropout",
    "tail_drop": "smalti.tokenizers.regularizers:TailDrop",
}


class Described(type):
    """Metaclass of modules that remember the arguments they were built with (`module.arguments`).

    Arguments are plain JSON values or other described modules, so that `describe` can write them and `build` read them.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        instance = super().__call__(*args, **kwargs)
        bound = inspect.signature(type(instance).__init__).bind(instance, *args, **kwargs)
        bound.apply_defaults()
        instance.arguments = {name: value for name, value in bound.arguments.items() if name != "self"}
        return instance


def register(name: str, cls: type) -> None:
    """Give a class of your own a name, so that it can be exported and loaded (in processes that register it)."""
    known = _CLASSES.setdefault(name, cls)
    if known is not cls:
        raise ValueError(f"the registry already has {name!r}: {known}")


def find(name: str) -> type:
    """The class registered under `name`; raises UserError for an unknown one."""
    entry = _CLASSES.get(name)
    if entry is None:
        raise UserError(f"name={name!r} is not a model that smalti knows{did_you_mean(name, _CLASSES)}")
    if isinstance(entry, str):
        module, _, attribute = entry.partition(":")
        entry = getattr(import_module(module), attribute)
    assert isinstance(entry, type)
    return entry


def name_of(module: Any) -> str:
    """The registered name of a module's class; raises UserError when it has none."""
    path = f"{type(module).__module__}:{type(module).__qualname__}"
    for name, entry in _CLASSES.items():
        if entry is type(module) or entry == path:
            return name
    raise UserError(f"{path} is not registered; call smalti.registry.register(name, {type(module).__name__}) first")


def describe(value: Any, *, defaults: bool = True) -> Any:
    """A described module (also inside dicts and lists) as plain JSON values: its name and arguments.

    defaults: also the arguments that have their default value.
    """
    if isinstance(type(value), Described):
        known = {} if defaults else dict(inspect.signature(type(value).__init__).parameters)
        arguments = {
            key: describe(argument, defaults=defaults)
            for key, argument in value.arguments.items()
            if key not in known or _plain(argument) != _plain(known[key].default)
        }
        return {"name": name_of(value), **arguments}
    if isinstance(value, dict):
        return {key: describe(item, defaults=defaults) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(item, defaults=defaults) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} cannot be written into config.json: {value!r}")


def _plain(value: Any) -> Any:
    """Sequences as JSON gives them back: a default (0.5, 0.5) is also the [0.5, 0.5] of a file."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def build(description: Any) -> Any:
    """The inverse of `describe`: a module with fresh weights."""
    if isinstance(description, dict):
        arguments = {key: build(value) for key, value in description.items() if key != "name"}
        return find(description["name"])(**arguments) if "name" in description else arguments
    if isinstance(description, list):
        return [build(item) for item in description]
    return description


def load(path_or_hub_id: str | Path) -> Model:
    """The exported tokenizer or generator of a folder or of a Hugging Face repository, in evaluation mode.

    Raises UserError when the folder is not an export, is damaged, or holds a model that this version does not know.
    """
    from smalti.model import Model

    return Model.from_pretrained(str(path_or_hub_id))
