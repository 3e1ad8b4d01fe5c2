"""How a model that samples goes about it: `sampling.steps=10 sampling.guidance=2` over its own settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any

from smalti.errors import UserError, did_you_mean
from smalti.model import Model


def override_sampling(model: Model, given: Mapping[str, Any], key: str = "sampling") -> None:
    """Replace fields of `model.sampling`, which a tokenizer's `decode` or a generator's `generate` reads.

    key: the section's place in the config, for messages. Raises UserError for a model that does not sample, and for
    fields and values that its sampling does not take.
    """
    if not given:
        return
    settings: Any = getattr(model, "sampling", None)
    if not is_dataclass(settings) or isinstance(settings, type):
        first = next(iter(given))
        raise UserError(f"{key}.{first}={given[first]}: {type(model).__name__} does not sample; leave {key} out")
    known = {field.name: getattr(settings, field.name) for field in fields(settings)}
    optional = {field.name for field in fields(settings) if "None" in str(field.type)}
    changes = dict(given)
    for name, value in given.items():
        if name not in known:
            hint = did_you_mean(str(name), known) or f"; it has {', '.join(known)}"
            raise UserError(f"{key}.{name} is not a setting of {type(model).__name__}'s sampling{hint}")
        old = known[name]
        if type(value) is int and type(old) is float:
            changes[name] = float(value)
        elif old is not None and type(value) is not type(old) and not (value is None and name in optional):
            shown = "null" if value is None else value
            raise UserError(f"{key}.{name}={shown} is not of the kind of {key}.{name}={old}; give such a value")
    try:
        changed: Any = replace(settings, **changes)
    except (TypeError, ValueError) as error:
        raise UserError(str(error) if str(error).startswith(key) else f"{key}: {error}") from error
    sampled: Any = model
    sampled.sampling = changed


def describe_sampling(model: Model) -> dict[str, Any] | None:
    """The settings that `decode` or `generate` uses, as plain values; None for models that do not sample."""
    settings: Any = getattr(model, "sampling", None)
    return asdict(settings) if is_dataclass(settings) and not isinstance(settings, type) else None
