"""A page of docs/, followed: its files written into a copy of the checkout, its commands run there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = "_CLASSES: dict[str, str | type] = {\n"


@dataclass(frozen=True)
class Followed:
    """files: what the page shows by name; the line for smalti/registry.py is one of them. folder: the copy."""

    files: dict[str, str]
    folder: Path

    def run(self, *words: str) -> str:
        """A Python command in the copy; returns what it printed."""
        done = subprocess.run(
            [sys.executable, *words], cwd=self.folder, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def lines_of_code(self) -> int:
        return sum(bool(line.strip()) for text in self.files.values() for line in text.splitlines())


@pytest.fixture
def follow(tmp_path: Path) -> Callable[[str], Followed]:
    """`follow("your-own-tokenizer.md")`."""

    def followed(page: str) -> Followed:
        for part in ("smalti", "tokenizers", "generators", "data", "configs"):
            shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
        for part in ("pyproject.toml", "train.py", "generate.py"):
            shutil.copy(ROOT / part, tmp_path / part)
        text = (ROOT / "docs" / page).read_text()
        files = dict(re.findall(r"`([\w/]+\.(?:py|yaml))`:\n\n```\w+\n(.*?)```", text, flags=re.DOTALL))
        registry = tmp_path / "smalti" / "registry.py"
        assert TABLE in registry.read_text()
        for name, content in files.items():
            if tmp_path / name == registry:
                registry.write_text(registry.read_text().replace(TABLE, TABLE + content))
            else:
                assert not (tmp_path / name).exists()
                (tmp_path / name).write_text(content)
        return Followed(files, tmp_path)

    return followed
