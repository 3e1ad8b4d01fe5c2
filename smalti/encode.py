"""`python encode.py image=… model_path=DIR output=…` (installed: `smalti encode …`): compose, check, then encode.

With `decode=` instead of `image=`, the way back; with `data.path=` (or `data=shapes`) a whole data set as token shards,
or with `rescale=` the tokenizer anew, its latents scaled by what they are on these images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import OmegaConf

from smalti import tokfile, usage
from smalti.checks import IMAGES, check_encode, check_folder
from smalti.commands import Line, no_sweep, print_config, read
from smalti.config import compose
from smalti.errors import UserError, run_command

PICTURE, PNG = ".png", b"\x89PNG\r\n\x1a\n"
Pair = tuple[Path, Path]  # what is read, what is written


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command: `argv` is what follows its name, by default this process's arguments."""
    run_command(lambda: _command(read(argv)))


def _command(line: Line) -> None:
    if line.help:
        print(usage.text("encode"))
        return
    no_sweep("encode", line)
    config = compose("encode", line.overrides, line.config_dir).config
    if line.print_config:
        print_config(config)
        return
    data_set = any(word.partition("=")[0].split(".")[0] == "data" for word in line.overrides)
    check_encode(config, data_set=data_set)
    if config.rescale is not None:
        from smalti.latents import rescale

        rescale(config)
        return
    if data_set:
        from smalti.tokenising import tokenise

        tokenise(config)
        return
    key = "image" if config.decode is None else "decode"
    given = OmegaConf.to_container(config)[key]  # type: ignore[index,call-overload]
    pairs = plan(key, given, config.output)
    if key == "image":
        from smalti.encoding import encode

        encode(config, pairs)
    else:
        files = [tokfile.read(source, f"decode={source}") for source, _ in pairs]
        from smalti.encoding import decode

        decode(config, pairs, files)


def plan(key: str, given: Any, output: str) -> list[Pair]:
    """What is read and where each is written. key: "image" or "decode"; given: a file, a folder, or a list of them.

    A folder is searched with all its sub-folders, and `output` gets the same ones. Raises UserError for what is not
    there or holds nothing, for two files of one name, and where something else would be overwritten.
    """
    suffix = tokfile.SUFFIX if key == "image" else PICTURE
    places = given if isinstance(given, list) else [given]
    found = [pair for place in places for pair in _found(key, Path(str(place)))]
    if (single := _as_file(output, suffix)) is not None and (len(found) > 1 or isinstance(given, list)):
        raise UserError(f"output={output} is one file, but {key}={_show(given)} may be several; give output=FOLDER")
    pairs = [(source, single or Path(output) / inner.with_suffix(suffix)) for source, inner in found]
    taken: dict[Path, Path] = {}
    for source, target in pairs:
        if target in taken:
            raise UserError(f"{key}: {taken[target]} and {source} would both become {target}; rename one of them")
        taken[target] = source
        check_folder("output", target.parent)
        if target.exists():
            _check_own(target, suffix)
    return pairs


def _found(key: str, place: Path) -> list[Pair]:
    """The files of one place with their names inside `output`."""
    if not place.is_dir():
        return [(place, Path(place.name))]
    wanted = IMAGES if key == "image" else {tokfile.SUFFIX}
    files = sorted(path for path in place.rglob("*") if path.suffix.lower() in wanted and path.is_file())
    if not files:
        what = "images" if key == "image" else f"{tokfile.SUFFIX} files"
        raise UserError(f"{key}={place} holds no {what}; give a file, or a folder that does")
    return [(path, path.relative_to(place)) for path in files]


def _as_file(output: str, suffix: str) -> Path | None:
    """`output` as the one file to write, None where it is a folder."""
    path = Path(output)
    if path.is_dir() or not path.suffix:
        return None
    if path.suffix.lower() != suffix:
        raise UserError(f"output={output} must end in {suffix}, or be a folder; use {path.with_suffix(suffix)}")
    return path


def _check_own(target: Path, suffix: str) -> None:
    """What is there already may be replaced by a file of its own kind only."""
    magic = tokfile.MAGIC if suffix == tokfile.SUFFIX else PNG
    try:
        with target.open("rb") as file:
            own = file.read(len(magic)) == magic
    except OSError:
        own = False
    if not own:
        raise UserError(f"output: {target} exists and is no {suffix} file; choose another output, or remove it first")


def _show(given: Any) -> str:
    return f"[{','.join(map(str, given))}]" if isinstance(given, list) else str(given)
