"""`smalti train|evaluate|encode|generate|export …`: the entry point of an installed smalti, and what commands share.

The scripts in the root of a checkout do the same: `python train.py …` is `smalti train …`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import NoReturn

from omegaconf import DictConfig, OmegaConf

import smalti
from smalti.errors import UserError, did_you_mean, run_command

# torch's CPU threads sleep where they wait for each other, instead of spinning: beside other work on two cores, tiny
# training is 8 × as fast (97 against 12 images/s), with the same results. Read when torch is imported, which is later.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

COMMANDS = {
    "train": "train a tokenizer or a generator from a recipe (an experiment) on a set of images",
    "evaluate": "measure an exported tokenizer or generator, or reconstruct one photo",
    "encode": "write images as tokens into small files (.tok), and back; or a data set as token shards",
    "generate": "make pictures with an exported generator",
    "export": "write a run of ours or a published checkpoint as a folder that smalti.load reads",
}
_FLAGS = ("--help", "--multirun", "--cfg", "--config-dir", "--version")


@dataclass(frozen=True)
class Line:
    """A command line, taken apart: overrides (`key=value`) and flags."""

    overrides: tuple[str, ...] = ()
    help: bool = False
    multirun: bool = False
    print_config: bool = False
    config_dir: str | None = None


def read(argv: Sequence[str] | None) -> Line:
    """The command line of one command (by default this process's)."""
    words = list(sys.argv[1:] if argv is None else argv)
    overrides: list[str] = []
    found: dict[str, bool | str] = {}
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if flag in ("-h", "--help"):
            found["help"] = True
        elif flag in ("-m", "--multirun"):
            found["multirun"] = True
        elif flag in ("-c", "--cfg"):
            value = value if equals else (words.pop(0) if words else "")
            if value != "job":
                raise UserError(f"{flag} {value}: use {flag} job, which prints the composed config")
            found["print_config"] = True
        elif flag == "--config-dir":
            found["config_dir"] = value if equals else (words.pop(0) if words else "")
        elif flag.startswith("-") and not flag.startswith("-="):
            if equals:
                raise UserError(f"{word}: options have no dashes here; did you mean {word.lstrip('-')}?")
            raise UserError(f"{word} is not a flag{did_you_mean(word, _FLAGS) or '; flags: ' + ', '.join(_FLAGS[:-1])}")
        else:
            overrides.append(word)
    return Line(overrides=tuple(overrides), **found)  # type: ignore[arg-type]


def print_config(config: DictConfig) -> None:
    """`--cfg job`: the composed config as YAML."""
    print(OmegaConf.to_yaml(config), end="")


def no_sweep(command: str, line: Line) -> None:
    """Refuse `-m` where there is nothing to sweep."""
    if line.multirun:
        raise UserError(f"-m: only `train` sweeps; run `{command}` once for each value")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command that the first word names."""
    words = list(sys.argv[1:] if argv is None else argv)
    run_command(lambda: _dispatch(words))


def _dispatch(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("smalti: visual tokenizers and generators.\n")
        print("Use: smalti COMMAND [key=value …]; smalti COMMAND --help explains each.\n")
        print("\n".join(f"  {name.ljust(width)}  {text}" for name, text in COMMANDS.items()))
    elif words[0] == "--version":
        print(f"smalti {smalti.__version__}")
    elif words[0] in COMMANDS:
        import_module(f"smalti.{words[0]}").main(words[1:])
    else:
        hint = did_you_mean(words[0], COMMANDS) or f"; commands: {', '.join(COMMANDS)}"
        raise UserError(f"'{words[0]}' is not a command{hint}")


if __name__ == "__main__":
    main()
