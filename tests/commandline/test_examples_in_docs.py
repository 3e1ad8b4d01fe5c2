"""The command lines in docs/configs.md, the README and `--help` compose as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from smalti import usage
from smalti.commands import read
from smalti.config import compose, parse
from smalti.sweep import combinations

ROOT = Path(__file__).resolve().parents[2]
# Pages on classes of your own have tests of their own, which make these classes first: tests/docs.
PAGES = [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").rglob("*.md")) if "your-own" not in page.name)]


def lines() -> list[str]:
    found = [line for examples in usage.EXAMPLES.values() for line in examples]
    for page in PAGES:
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.M | re.S):
            if language not in ("", "bash", "sh", "console"):
                continue
            joined = block.replace("\\\n", " ")
            typed = [line.removeprefix("$ ") for line in joined.splitlines()]
            found += [line for line in typed if re.match(r"(python \w+\.py|smalti) ", line)]
    return sorted(set(found))


@pytest.mark.parametrize("line", lines())
def test_an_example_composes(line: str) -> None:
    words = [word for word in shlex.split(line, comments=True) if word not in ("…", "...")]
    words = words[1:] if words[0] == "smalti" else [Path(words[1]).stem, *words[2:]]
    typed = read(words[1:])
    if typed.multirun:
        for job in combinations(parse(words[0], typed.overrides)):
            compose(words[0], job)
    elif not typed.help:
        compose(words[0], typed.overrides)
