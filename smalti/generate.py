"""`python generate.py model_path=DIR …` (installed: `smalti generate …`): compose, check, then generate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from smalti import usage
from smalti.checks import check_generate
from smalti.commands import Line, no_sweep, print_config, read
from smalti.config import compose
from smalti.errors import run_command


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command: `argv` is what follows its name, by default this process's arguments."""
    run_command(lambda: _command(read(argv)))


def _command(line: Line) -> None:
    if line.help:
        print(usage.text("generate"))
        return
    no_sweep("generate", line)
    config = compose("generate", line.overrides, line.config_dir).config
    if line.print_config:
        print_config(config)
        return
    check_generate(config)
    from smalti.generation import generate

    generate(config)
