"""`python train.py experiment=titok …` (installed: `smalti train …`): compose, check, then train.

Nothing heavy is imported before the config is composed and checked, and nothing is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from smalti import runs, usage
from smalti.checks import check_train
from smalti.commands import Line, print_config, read
from smalti.config import Composed, compose
from smalti.errors import UserError, run_command
from smalti.instantiate import check_arguments

# Overrides that a run hands on to the one that it needs first (a teacher, a tokenizer), which keeps its own length.
HANDED_ON = ("data", "trainer", "logger", "seed", "output", "scale", "teacher_path", "vae_path")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command: `argv` is what follows its name, by default this process's arguments."""
    run_command(lambda: _command(read(argv)))


def _command(line: Line) -> None:
    if line.help:
        print(usage.text("train"))
    elif line.multirun:
        from smalti.sweep import sweep

        sweep(line)
    elif line.print_config:
        print_config(compose("train", line.overrides, line.config_dir).config)
    else:
        train_once(line.overrides, line.config_dir)


def train_once(overrides: Sequence[str], config_dir: str | None = None) -> tuple[str, Mapping[str, Any]]:
    """One run, from its overrides to its folder and final metrics; a finished run says so and gives those it has."""
    composed = compose("train", overrides, config_dir)
    check_train(composed.config)
    _check_changes(composed)
    first = needed_first(composed, overrides, config_dir)
    if first:
        given = [f"{key}={export}" for key, (_, export) in first.items()]
        composed = replace(composed, config=compose("train", [*overrides, *given], config_dir).config)
    run = runs.plan(composed)
    if run.state == "finished":
        if runs.rank() == 0:
            print(runs.finished_message(run, f"python train.py experiment={composed.config.experiment}"))
        return str(run.folder), run.results["metrics"]
    scale = composed.choices.get("scale")
    if runs.rank() == 0:
        hint = "" if scale == "paper" else "; scale=paper is the published recipe"
        print(f"scale={scale}{hint}. Run folder: {run.folder} ({run.state})", flush=True)
    for part, filled in (("data", ()), ("tokenizer", ()), ("objective", ()), ("generator", ("tokens",))):
        if composed.config[part] is not None:
            check_arguments(composed.config[part], part, *filled)
    if "tokenizer_path" in first:
        from smalti.training.generator_run import check_before_its_tokenizer

        its_tokenizer = compose("train", first["tokenizer_path"][0], config_dir).config
        check_before_its_tokenizer(composed.config, its_tokenizer)
    for key, (needed, _) in first.items():
        print(f"{key} is not given: {needed[0]} is trained first (give {key}=DIR to use an export)", flush=True)
        train_once(needed, config_dir)
    from smalti.training.run import train

    metrics = train(composed.config)
    if runs.rank() == 0:
        runs.finish(composed.config, metrics)
    return str(run.folder), metrics


def needed_first(
    composed: Composed, overrides: Sequence[str], config_dir: str | None
) -> dict[str, tuple[list[str], str]]:
    """Runs that must come first, by the key that takes their export: their overrides and where that export will lie.

    An experiment says so by `requires: {teacher_path: {experiment: maskgit_vqgan}}`. Only the tiny scale trains them by
    itself: elsewhere that is hours, and the user's decision. A text encoder, `requires: {text_encoder: NAME}`, nobody
    trains here at any scale.
    """
    config = composed.config
    first: dict[str, tuple[list[str], str]] = {}
    for key, needed in (config.get("requires") or {}).items():
        of_tokens = key in ("tokenizer_path", "text_encoder")
        if config.get(key) is not None or (of_tokens and _holds_tokens(config.data.path)):
            continue
        if key == "text_encoder":
            raise UserError(
                "text_encoder is required: a frozen one of transformers, which nobody trains here, such as "
                f"text_encoder={needed}; or data.path=DIR of token shards with features (encode.py text_encoder=…)"
            )
        scale, name = composed.choices.get("scale"), needed["experiment"]
        if scale != "tiny" or config.trainer.devices not in (1, "1", "auto") or runs.processes() > 1:
            raise UserError(
                f"{key} is required: an export of experiment={name}; make one with `python train.py experiment={name} "
                f"scale={scale}` or convert a published one with `export.py source=…`, then give {key}=DIR"
                + ("; or data.path=DIR of token shards (encode.py)" if key == "tokenizer_path" else "")
            )
        keys = {text: text.lstrip("+").partition("=")[0] for text in overrides}
        handed = [text for text, of in keys.items() if of.partition(".")[0] in HANDED_ON and of != "trainer.max_steps"]
        needed_overrides = [f"experiment={name}", *handed]
        folder = runs.folder_of(compose("train", needed_overrides, config_dir))
        first[key] = needed_overrides, str(folder / "export")
    return first


def _check_changes(composed: Composed) -> None:
    """Refuse what is typed about images where data.path has their tokens."""
    typed = [key for key in ("data.crop", "data.resize", "data.flip", "data.image_size") if key in composed.changes]
    if composed.config.generator is not None and typed and _holds_tokens(composed.config.data.path):
        key, shown = typed[0], str(composed.changes[typed[0]]).lower()
        raise UserError(
            f"{key}={shown} has no effect: data.path={composed.config.data.path} has tokens, whose "
            "crops were cut when encode.py made them; leave it out"
        )


def _holds_tokens(path: Any) -> bool:
    """Whether `data.path` names token shards."""
    if path is None or "://" in str(path):
        return False
    from smalti.data.tokens import holds_tokens

    return holds_tokens(path)
