"""Build the objects that a config names by `_target_`, and say beforehand what cannot be built.

Only classes of ours and of a short list of libraries are ever called.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import OmegaConf

from smalti.errors import UserError, did_you_mean

TARGETS = ("smalti.", "torch.nn.", "torch.optim.", "torchvision.models.", "timm.models.")
ALLOWED = ", ".join(f"{prefix}*" for prefix in TARGETS)


def instantiate(node: Any, key: str, **extra: Any) -> Any:
    """Build the object that a config node names by `_target_`; `key` is the node's place in the config, for messages.

    Lists and dicts arrive as plain ones. `extra` are arguments that no config holds. An argument that the class does
    not take, and a ValueError raised by a constructor, become a UserError that names the config key.
    """
    plain = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    check_arguments(plain, key, *extra)
    try:
        return hydra.utils.instantiate(plain, _convert_="all", **extra)
    except InstantiationException as error:
        cause: BaseException | None = error
        while isinstance(cause, InstantiationException):
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise cause from error
        if isinstance(cause, ValueError):
            inner = re.search(r"full_key: (\S+)", str(error))
            place = f"{key}.{inner[1]}" if inner else key
            raise UserError(f"{place}: {cause}") from error
        raise cause or error from None


def check_arguments(node: Any, key: str, *extra: str) -> None:
    """Each section's arguments are those of the class that it names; imports the classes and builds nothing.

    extra: arguments of the outermost one that no config holds. Raises UserError naming the config key.
    """
    plain = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    for path, part in targets(plain, key):
        _check_part(part, path, extra if part is plain else ())


def targets(node: Any, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every section with a `_target_`, with its place in the config."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield key, dict(node) if not isinstance(node, dict) else node
        for name, item in node.items():
            yield from targets(item, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for index, item in enumerate(node):
            yield from targets(item, f"{key}[{index}]")


def _check_part(part: dict[str, Any], key: str, extra: tuple[str, ...]) -> None:
    """The arguments of one section; `extra` come from no config."""
    target = part["_target_"]
    refusal = f"{key}._target_={target} is not allowed; a config builds {ALLOWED}"
    if not str(target).startswith(TARGETS):
        raise UserError(refusal)
    try:
        called = hydra.utils.get_object(target)
    except Exception as error:
        raise UserError(f"{key}._target_={target} cannot be imported: {error}") from error
    if not f"{getattr(called, '__module__', '')}.".startswith(TARGETS):  # such as smalti.runs.subprocess.run
        raise UserError(refusal)
    function = called.__init__ if inspect.isclass(called) else called
    parameters = dict(inspect.signature(function).parameters)
    if inspect.isclass(called):
        parameters.pop("self", None)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    given = [name for name in part if name not in ("_target_", "_convert_", "_recursive_", "_partial_")]
    for name in given:
        if name not in parameters:
            hint = did_you_mean(name, parameters) or f"; it takes {', '.join(parameters)}"
            raise UserError(f"{key}.{name} is not an argument of {target}{hint}")
    for name, parameter in parameters.items():
        needed = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL
        if needed and name not in given and name not in extra and not part.get("_partial_"):
            raise UserError(f"{key}.{name} is required by {target}; add it to the config of {key}")
