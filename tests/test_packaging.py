"""The layout: smalti's packages lie in folders beside each other, and Hugging Face's `tokenizers` stays importable."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NAMESPACES = ("tokenizers", "generators", "data")  # folders beside smalti/, without __init__.py

# Typed into a process of each kind that is started in the repository root.
CHECK = """
import tokenizers
assert "site-packages" in tokenizers.__file__, tokenizers.__file__
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
import transformers, diffusers
from diffusers import AutoencoderKL
from smalti.tokenizers.base import Tokenizer as Ours
import smalti.tokenizers.spec as spec
assert Ours.__module__ == "smalti.tokenizers.base" and spec.__file__.startswith(ROOT), spec.__file__
print("all is well")
"""


def run(*command: str | Path, cwd: Path = ROOT, said: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd, env=environment, input=said, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def typed(code: str) -> str:
    """Code for an interactive interpreter: one line, whatever blocks it has."""
    return f"exec({f'ROOT = {str(ROOT)!r}' + code!r})\n"


def packages() -> dict[str, str]:
    """Every folder with modules, as package name → folder."""
    found = {"smalti.configs": "configs"}
    for top in ("smalti", *NAMESPACES):
        for folder in [ROOT / top, *(path for path in (ROOT / top).rglob("*") if path.is_dir())]:
            if any(folder.glob("*.py")):
                relative = folder.relative_to(ROOT)
                name = ".".join(relative.parts)
                found[name if top == "smalti" else f"smalti.{name}"] = str(relative)
    return found


def test_pyproject_lists_every_package() -> None:
    setuptools: Mapping = PROJECT["tool"]["setuptools"]
    assert set(setuptools["packages"]) == set(packages())
    for name, folder in packages().items():
        mapped = next(
            str(Path(place, *name.removeprefix(package).split(".")))
            for package, place in sorted(setuptools["package-dir"].items(), key=lambda item: -len(item[0]))
            if name == package or name.startswith(f"{package}.")
        )
        assert Path(mapped) == Path(folder), name


def test_folders_beside_smalti_have_no_init_file() -> None:
    # With one, `import tokenizers` in the root would be ours, and transformers would break.
    assert [str(file) for top in NAMESPACES for file in (ROOT / top).rglob("__init__.py")] == []
    assert (ROOT / "configs" / "__init__.py").is_file()  # Hydra's pkg:// looks for it


def test_links_for_type_checkers_are_complete() -> None:
    links = {link.name: link.resolve() for link in (ROOT / "typings" / "smalti").iterdir() if link.is_symlink()}
    inside = {
        path.name: path
        for path in (ROOT / "smalti").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert links == {**inside, **{name: ROOT / name for name in (*NAMESPACES, "configs")}}, "run `make links`"


def test_the_version_is_stated_once() -> None:
    import smalti

    assert PROJECT["project"]["version"] == smalti.__version__
    assert f"version: {smalti.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_tokenizers_is_hugging_faces_under_pytest() -> None:
    import diffusers
    import transformers

    import tokenizers

    assert "site-packages" in tokenizers.__file__
    assert transformers.PreTrainedTokenizerFast and diffusers.__version__


def test_tokenizers_is_hugging_faces_in_a_command() -> None:
    done = run(sys.executable, "-i", "train.py", "--help", said=typed(CHECK))
    assert done.stdout.endswith("all is well\n"), done.stderr


@pytest.mark.slow
def test_tokenizers_is_hugging_faces_under_torchrun(tmp_path: Path) -> None:
    (tmp_path / "check").write_text(typed(CHECK))
    script = f"exec {sys.executable} -i train.py --help < {tmp_path / 'check'} > {tmp_path}/said.$LOCAL_RANK"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    done = run(*torchrun, "bash", "-c", script)
    for rank in (0, 1):
        assert (tmp_path / f"said.{rank}").read_text().endswith("all is well\n"), done.stderr


@pytest.mark.slow
def test_tokenizers_is_hugging_faces_in_a_spawned_data_worker(tmp_path: Path) -> None:
    (tmp_path / "worker_check.py").write_text(
        f"def check(_):\n    scope = {{'ROOT': {str(ROOT)!r}}}\n    exec({CHECK!r}, scope)\n    return 'fine'\n\n\n"
        "class Checks:\n    def __len__(self):\n        return 1\n\n"
        "    def __getitem__(self, index):\n        return check(index)\n"
    )
    code = """
from torch.utils.data import DataLoader
from worker_check import Checks
print(*DataLoader(Checks(), batch_size=None, num_workers=1, multiprocessing_context="spawn"))
"""
    done = run(sys.executable, "-i", "train.py", "--help", said=typed(code), PYTHONPATH=str(tmp_path))
    assert done.stdout.endswith("fine\n"), done.stderr


@pytest.mark.slow
def test_tokenizers_is_hugging_faces_in_a_notebook() -> None:
    jupyter = pytest.importorskip("jupyter_client.manager", reason="needs ipykernel")
    manager, client = jupyter.start_new_kernel(cwd=str(ROOT))
    try:
        said: list[str] = []
        client.execute_interactive(
            f"ROOT = {str(ROOT)!r}\n{CHECK}",
            timeout=120,
            output_hook=lambda message: said.append(str(message["content"])),
        )
        assert "all is well" in "".join(said), said
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the files here."""
    folder = tmp_path_factory.mktemp("wheel")
    parts = ("smalti", *NAMESPACES, "configs", "pyproject.toml", "README.md", "LICENSE")
    for part in filter(lambda name: (ROOT / name).exists(), parts):
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / "copy" / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (folder / "copy").mkdir(exist_ok=True)
            shutil.copy(source, folder / "copy" / part)
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", folder]
    done = run(sys.executable, "-m", "pip", "wheel", folder / "copy", *options)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_a_wheel_holds_every_module_and_every_config(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    for name, folder in packages().items():
        for file in (ROOT / folder).glob("*.py"):
            assert f"{name.replace('.', '/')}/{file.name}" in held
    configs = {f"smalti/{file.relative_to(ROOT)}" for file in (ROOT / "configs").rglob("*.yaml")}
    assert configs <= held
    assert not any(name.split("/")[0] in (*NAMESPACES, "configs", "tests") for name in held)


@pytest.mark.slow
def test_an_installed_wheel_has_the_same_commands_elsewhere(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    done = run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel)
    assert done.returncode == 0, done.stderr
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def smalti(*words: str) -> subprocess.CompletedProcess[str]:
        return run(sys.executable, site / "bin" / "smalti", *words, cwd=elsewhere, PYTHONPATH=str(site))

    for command in ("train", "evaluate", "encode", "generate", "export"):
        assert smalti(command, "--help").stdout == run(sys.executable, f"{command}.py", "--help").stdout
    ours = run(sys.executable, "train.py", "experiment=titok_b64", "scale=paper", "--cfg", "job")
    assert smalti("train", "experiment=titok_b64", "scale=paper", "--cfg", "job").stdout == ours.stdout != ""
    wrong = smalti("train", "experiment=titk")
    assert wrong.returncode == 2 and "did you mean 'titok'" in wrong.stderr
    code = f"ROOT = {str(site)!r}\n{CHECK}"
    assert run(sys.executable, "-c", code, cwd=elsewhere, PYTHONPATH=str(site)).stdout == "all is well\n"
    assert list(elsewhere.iterdir()) == []
