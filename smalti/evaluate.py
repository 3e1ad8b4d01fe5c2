"""`python evaluate.py model_path=DIR …` (installed: `smalti evaluate …`): compose, check, then evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from smalti import usage
from smalti.checks import check_evaluate
from smalti.commands import Line, no_sweep, print_config, read
from smalti.config import compose
from smalti.errors import run_command


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command: `argv` is what follows its name, by default this process's arguments."""
    run_command(lambda: _command(read(argv)))


def _command(line: Line) -> None:
    if line.help:
        print(usage.text("evaluate"))
        return
    no_sweep("evaluate", line)
    config = compose("evaluate", line.overrides, line.config_dir).config
    if line.print_config:
        print_config(config)
        return
    check_evaluate(config)
    from smalti.evaluation.run import evaluate

    evaluate(config)
