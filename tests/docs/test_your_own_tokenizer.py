"""docs/your-own-tokenizer.md, done as it says in a copy of the checkout."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "your-own-tokenizer.md").read_text()


def test_the_page_makes_a_tokenizer_that_trains_exports_and_loads(tmp_path: Path) -> None:
    for part in ("smalti", "tokenizers", "data", "configs"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "train.py"):
        shutil.copy(ROOT / part, tmp_path / part)
    files = dict(re.findall(r"`([\w/]+\.(?:py|yaml))`:\n\n```\w+\n(.*?)```", PAGE, flags=re.DOTALL))
    line = files.pop("smalti/registry.py")
    assert len(files) == 3
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    registry = tmp_path / "smalti" / "registry.py"
    table = "_CLASSES: dict[str, str | type] = {\n"
    assert table in registry.read_text()
    registry.write_text(registry.read_text().replace(table, table + line))

    small = ["data.size=40", f"data.cache={tmp_path}/cache", "data.batch_size=8", "trainer.max_steps=2"]
    run(tmp_path, "train.py", "experiment=patches", "run=trained", *small)
    code = "import smalti; print(smalti.load('trained/export').spec.length)"
    assert run(tmp_path, "-c", code).stdout.strip() == "64"


def test_the_page_keeps_its_promise_of_sixty_lines() -> None:
    code = re.findall(r"(?:\.py`:|\.yaml`:)\n\n```\w+\n(.*?)```", PAGE, flags=re.DOTALL)
    written = [line for block in code for line in block.splitlines() if line.strip()]
    assert 40 < len(written) <= 60


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done
