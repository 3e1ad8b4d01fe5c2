"""What a command line becomes: the composed config, the experiment's variants, and the objects that a config names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from smalti import config
from smalti.checks import check_train
from smalti.config import compose
from smalti.errors import UserError
from smalti.instantiate import instantiate

VARIANTS = [(experiment, scale) for experiment in config.options("experiment") for scale in config.options("scale")]


@pytest.mark.parametrize(("experiment", "scale"), VARIANTS)
def test_every_experiment_composes_at_every_scale(experiment: str, scale: str) -> None:
    composed = compose("train", [f"experiment={experiment}", f"scale={scale}"])
    assert composed.config.experiment == experiment and composed.config.scale == scale
    assert composed.config.stage == (2 if experiment.endswith("_stage2") else 1)
    assert composed.changes.keys() <= {"experiment", "scale"}
    check_train(composed.config)


@pytest.mark.parametrize(
    ("group", "option"),
    [
        (group, option)
        for group in [*config.groups_of("train"), "tokenizer/quantizer", "objective/perceptual"]
        for option in config.options(group)
    ],
)
def test_every_option_composes(group: str, option: str) -> None:
    assert compose("train", [f"{group}={option}"]).choices[group] == option


def test_the_scale_wins_over_the_experiment_and_the_command_line_over_both() -> None:
    paper, tiny = compose("train", ["scale=paper"]).config, compose("train", []).config
    assert tiny.trainer.max_steps < paper.trainer.max_steps
    assert compose("train", ["trainer.max_steps=7"]).config.trainer.max_steps == 7


def test_stage_2_is_an_experiment_of_its_own() -> None:
    by_stage = compose("train", ["experiment=titok_s128", "stage=2"])
    by_name = compose("train", ["experiment=titok_s128_stage2"])
    assert by_stage.config == by_name.config and by_stage.config.stage == 2
    assert compose("train", ["stage=1", "experiment=titok_s128"]).config.stage == 1


def test_a_part_that_a_scale_switches_off_is_switched_on_by_the_command_line() -> None:
    assert compose("train", []).config.objective.perceptual is None
    chosen = compose("train", ["objective/perceptual=lpips", "objective.perceptual.weights=mine.pt"]).config
    assert chosen.objective.perceptual.weights == "mine.pt"


def test_an_optional_part_is_switched_off_by_null() -> None:
    assert compose("train", ["scale=paper", "objective.adversarial=null"]).config.objective.adversarial is None


def test_a_whole_number_passes_as_a_number_and_null_where_it_is_allowed() -> None:
    composed = compose("train", ["optimizer.lr=1", "optimizer.clip=null", "trainer.devices=2", "data.batch_size=64"])
    assert composed.config.optimizer.lr == 1 and composed.config.optimizer.clip is None


def test_the_last_of_equal_keys_wins() -> None:
    assert compose("train", ["seed=1", "seed=2"]).config.seed == 2


def test_home_is_expanded_and_a_trailing_slash_dropped() -> None:
    assert compose("train", ["output=~/runs/"]).config.output == str(Path.home() / "runs")


@pytest.mark.parametrize("path", ["my photos (2)/cats", "a=b", 'say "hi"', "x~y", "über/ä"])
def test_paths_need_no_quoting(path: str) -> None:
    assert compose("train", [f"output={path}"]).config.output == path


def test_a_folder_of_the_users_own_adds_options(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\n# Mine.\noptimizer: {lr: 0.125}\n")
    assert compose("train", ["experiment=mine", "scale=paper"], str(tmp_path)).config.optimizer.lr == 0.125
    with pytest.raises(UserError, match="experiment=mine is unknown"):
        compose("train", ["experiment=mine"])


class Part:
    """Something to build: sizes are checked as everywhere."""

    def __init__(self, width: int, inner: Part | None = None, names: list[str] | None = None) -> None:
        if width % 2:
            raise ValueError(f"width={width} is odd; use {width - 1} or {width + 1}")
        self.width, self.inner, self.names = width, inner, names


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("smalti.config.Part", Part, raising=False)
    monkeypatch.setattr(Part, "__module__", "smalti.config")
    return "smalti.config.Part"


def test_instantiate_builds_with_plain_lists(part: str) -> None:
    node = OmegaConf.create({"_target_": part, "width": 2, "names": ["a"], "inner": {"_target_": part, "width": 4}})
    built = instantiate(node, "tokenizer")
    assert type(built.names) is list and built.inner.width == 4


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({"width": 3}, "tokenizer: width=3 is odd; use 2 or 4"),
        ({"width": 2, "inner": {"width": 5}}, "tokenizer.inner: width=5 is odd; use 4 or 6"),
        ({"widht": 2}, "tokenizer.widht is not an argument of smalti.config.Part; did you mean 'width'?"),
        ({"width": 2, "inner": {"wide": 1}}, "tokenizer.inner.wide is not an argument of smalti.config.Part"),
        ({"names": []}, "tokenizer.width is required by smalti.config.Part"),
    ],
)
def test_instantiate_names_the_key_that_is_wrong(part: str, node: dict, said: str) -> None:
    node = {"_target_": part, **node}
    if "inner" in node:
        node["inner"]["_target_"] = part
    with pytest.raises(UserError) as refused:
        instantiate(OmegaConf.create(node), "tokenizer")
    assert said in str(refused.value)


def test_instantiate_lets_a_bug_through(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Part, width: int) -> None:
        raise TypeError("ours")

    monkeypatch.setattr(Part, "__init__", broken)
    with pytest.raises(TypeError, match="ours"):
        instantiate({"_target_": part, "width": 2}, "tokenizer")


@pytest.mark.parametrize(
    "target", ["os.system", "smalti.runs.subprocess.run", "smalti.runs.os.system", "builtins.eval"]
)
def test_instantiate_builds_nothing_but_models(target: str) -> None:
    with pytest.raises(UserError, match="is not allowed"):
        instantiate({"_target_": target}, "tokenizer")


def test_the_config_that_reaches_the_heavy_part_is_resolved(call: Callable, trained: list) -> None:
    assert call("train", "data.image_size=32", "data.resize=32").code == 0
    assert trained[0].tokenizer.image_size == 32
    assert "${" not in OmegaConf.to_yaml(trained[0])
