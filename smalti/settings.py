"""Frozen dataclasses of settings from plain values, such as a config's `sampling: {…}`, and words for wrong ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

Settings = TypeVar("Settings")


def read_settings(cls: type[Settings], name: str, values: Mapping[str, Any]) -> Settings:
    """A dataclass from plain values; a field that is a dataclass itself is read from a mapping.

    name: the argument that holds the values. Raises ValueError naming what is wrong in it.
    """
    known = [item.name for item in fields(cls)]  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{name}.{unknown[0]} is not known; {name} has {', '.join(known)}")
    given, kinds = dict(values), get_type_hints(cls)
    for key, value in given.items():
        if is_dataclass(kinds[key]) and isinstance(value, Mapping):
            given[key] = read_settings(kinds[key], f"{name}.{key}", value)
    try:
        return cls(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def override(settings: Settings, name: str, values: Mapping[str, Any] | None) -> Settings:
    """The same settings but for the given fields; raises as `read_settings` does."""
    return read_settings(type(settings), name, {**asdict(settings), **(values or {})})  # type: ignore[call-overload]


def check_choice(name: str, value: str, possible: Collection[str]) -> None:
    """Raises ValueError unless the value is one of the possible ones."""
    if value not in possible:
        raise ValueError(f"{name}={value!r} is not known; use one of {', '.join(possible)}")


def check_sizes(**sizes: int | None) -> None:
    """Raises ValueError unless each is 1 or more; None is left to whom it means something."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name}={size} is not positive")


def check_shares(**shares: float) -> None:
    """Raises ValueError unless each is a probability below 1."""
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise ValueError(f"{name}={share} is not in [0, 1)")
