"""Fitting published weights to models of ours by their names and shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from smalti.errors import UserError


def check_shapes(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raises UserError naming the first key whose shape differs, or which only one side has."""
    for name in sorted(expected.keys() | given.keys()):
        ours, theirs = (tuple(state[name].shape) if name in state else None for state in (expected, given))
        if ours != theirs:
            raise UserError(
                f"checkpoint does not fit its config: {name} is {theirs or 'missing'} in the file and "
                f"{ours or 'missing'} in the model; give the config that belongs to this checkpoint"
            )


def renamed(name: str, rules: Sequence[tuple[str, str]]) -> str:
    """A name after all rules, each a pattern and what replaces it, in their order."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def count(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number that `pattern` captures in any of the names; none at all is a UserError."""
    found = {int(match[1]) for match in map(re.compile(pattern).match, names) if match}
    if not found:
        raise UserError(f"checkpoint is incomplete: no key matches {pattern}; download it again")
    return max(found) + 1
