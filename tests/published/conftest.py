"""Cases of published fixtures, for the runners beside this file.

    @pytest.mark.family("titok-vq")
    def test_…(case): ...                           # once a case of the family; marks may name several families
    @pytest.mark.family("titok-schedules", kind="lr")
    def test_…(case): ...                           # only the cases whose fixture.json has this value

`pytest tests/published` reads tests/fixtures and, where it exists, ../shared/fixtures (or $SMALTI_SHARED/fixtures);
`pytest tests/published --fixtures DIR` reads DIR/<family>/<case> instead. A family without cases is skipped.
"""

from __future__ import annotations

import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]


class Case:
    """One folder of the fixture format: numbers that the published code gives, and how closely they must be met.

    meta: fixture.json. inputs, outputs, weights: tensors by published name, halves cast to float32 (exact).
    table: outputs.json, for families of lists and statistics.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.meta: dict[str, Any] = json.loads((path / "fixture.json").read_text())

    def __str__(self) -> str:
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def config(self) -> dict[str, Any]:
        """The published configuration, in its own keys."""
        return self.meta["config"]

    def says(self, key: str) -> Any:
        """A value that tells cases of a family apart: of fixture.json, else of its config's `run`, or of the config."""
        config = self.meta["config"] if isinstance(self.meta.get("config"), dict) else {}
        return self.meta.get(key, (config.get("run") or {}).get(key, config.get(key)))

    @property
    def size_overrides(self) -> dict[str, Any]:
        """The numbers that the published code hard-codes and that this case made small."""
        return self.meta.get("size_overrides") or {}

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return self._tensors("inputs")

    @cached_property
    def outputs(self) -> dict[str, Tensor]:
        return self._tensors("outputs")

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        return self._tensors("weights")

    @cached_property
    def table(self) -> dict[str, Any]:
        return json.loads((self.path / "outputs.json").read_text())

    def weights_of(self, role: str) -> dict[str, Tensor]:
        """The weights under `role.`, without that prefix."""
        prefix = f"{role}."
        return {name[len(prefix) :]: tensor for name, tensor in self.weights.items() if name.startswith(prefix)}

    def names(self, prefix: str) -> list[str]:
        """What follows `prefix` in the names of outputs: `case.names("grad_norm/")` are parameter names."""
        return [name[len(prefix) :] for name in self.outputs if name.startswith(prefix)]

    def left_out(self, name: str) -> bool:
        """Whether the case says not to compare this parameter (its gradient is zero in theory)."""
        return any(name in (self.meta.get(key) or ()) for key in ("left_out_of_final", "gradient_is_rounding_noise"))

    def tolerance(self, name: str) -> tuple[float, float]:
        """(atol, rtol) of an output; an override is a larger absolute tolerance, or both."""
        atol, rtol = self.meta["tolerance"]["atol"], self.meta["tolerance"]["rtol"]
        override = (self.meta.get("tolerance_overrides") or {}).get(name)
        if isinstance(override, dict):
            return override.get("atol", atol), override.get("rtol", rtol)
        return (atol if override is None else override), rtol

    def compare(self, name: str, ours: Any) -> None:
        """|ours − theirs| ≤ atol + rtol·|theirs| for output `name`, where its mask (if any) is true."""
        theirs = self.outputs[name].double()
        value = torch.as_tensor(ours).detach().double()
        assert value.shape == theirs.shape, (
            f"{self} {name}: shape {tuple(value.shape)}, published {tuple(theirs.shape)}"
        )
        mask = self.outputs.get(f"mask/{name}")
        if mask is not None:
            value, theirs = value[mask.bool()], theirs[mask.bool()]
        atol, rtol = self.tolerance(name)
        np.testing.assert_allclose(value.numpy(), theirs.numpy(), rtol=rtol, atol=atol, err_msg=f"{self} {name}")

    def compare_indices(self, name: str, ours: Tensor, margin: str = "margin") -> None:
        """Equal indices wherever the second choice was more than 1e-5 away (everywhere without a margin)."""
        theirs, value = self.outputs[name].flatten(), ours.detach().flatten()
        assert value.shape == theirs.shape, f"{self} {name}: {value.numel()} indices, published {theirs.numel()}"
        clear = self.outputs[margin].flatten() > 1e-5 if margin in self.outputs else torch.ones_like(theirs).bool()
        different = ((value != theirs) & clear).nonzero().flatten().tolist()
        assert not different, f"{self} {name}: differs at {different} of {theirs.numel()}"

    def compare_gradients(self, gradient_of: Any) -> None:
        """Every `grad_norm/<name>` and `grad/<name>`; `gradient_of(published name)` gives ours in their layout."""
        for name in self.names("grad_norm/"):
            self.compare(f"grad_norm/{name}", gradient_of(name).norm())
        for name in self.names("grad/"):
            self.compare(f"grad/{name}", gradient_of(name))

    def _tensors(self, what: str) -> dict[str, Tensor]:
        file = self.path / f"{what}.safetensors"
        tensors = load_file(file) if file.is_file() else {}
        return {name: tensor.float() if tensor.dtype == torch.float16 else tensor for name, tensor in tensors.items()}


def fixture_folders(option: str | None) -> list[Path]:
    """Where cases are looked for; the first folder that has a case wins."""
    if option is not None:
        return [Path(option)]
    shared = Path(os.environ.get("SMALTI_SHARED", REPOSITORY.parent / "shared"))
    return [REPOSITORY / "tests" / "fixtures", shared / "fixtures"]


def cases(family: str, folders: list[Path], **wanted: Any) -> list[Case]:
    """The cases of a family in `folders`, by name, each once.

    `wanted` values select among them, as `Case.says` finds them.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        for file in sorted((folder / family).glob("*/fixture.json")):
            found.setdefault(file.parent.name, file.parent)
    chosen = [Case(found[name]) for name in sorted(found)]
    return [case for case in chosen if all(case.says(key) == value for key, value in wanted.items())]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "family(*names, **values): run once for each case of these fixture families")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    # pytest has an option of this name already (it lists fixtures and takes no value), so that DIR arrives as one more
    # path to collect: it is taken back here. Without a folder behind it the option keeps pytest's meaning.
    given = list(config.invocation_params.args)
    following = given[given.index("--fixtures") + 1 :] if "--fixtures" in given else []
    if following and Path(following[0]).is_dir():
        config.option.published_fixtures = str(Path(following[0]).resolve())
        config.option.showfixtures = False
        config.args.remove(following[0])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("family")
    if marker is None or "case" not in metafunc.fixturenames:
        return
    folders = fixture_folders(metafunc.config.getoption("published_fixtures", default=None))
    found = [case for family in marker.args for case in cases(family, folders, **marker.kwargs)]
    if found:
        metafunc.parametrize("case", found, ids=str)
    else:
        where = ", ".join(map(str, folders))
        reason = f"no case of {', '.join(marker.args)} in {where}"
        metafunc.parametrize("case", [pytest.param(None, marks=pytest.mark.skip(reason=reason), id="none")])
