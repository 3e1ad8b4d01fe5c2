"""From a command line to a checked configuration: compose with Hydra, explain what cannot be, before anything heavy.

Only Hydra and OmegaConf are imported here (0.2 s). Values are checked in smalti/checks.py; smalti/instantiate.py builds
the objects that a config names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

import smalti.configs
from smalti.errors import UserError, did_you_mean
from smalti.instantiate import ALLOWED, TARGETS, targets

FOLDER = Path(smalti.configs.__file__).resolve().parent
HYDRA_KEYS = ("hydra.launcher.", "hydra.sweeper.")
HIDDEN_GROUPS = "overlay/"  # picked by the primary config itself, from the scale and the other choices
FREE = ("sampling", "decoding")  # sections whose keys the loaded model knows, and no config
PATHS = (
    "output", "run", "init_path", "teacher_path", "tokenizer_path", "vae_path", "model_path", "checkpoint", "config",
    "bridge", "image", "decode", "picture", "samples_path", "data.path", "data.val_path", "data.cache", "lpips_weights",
    "inception_weights", "text_encoder", "prompts_file",
)  # fmt: skip

# What a key holds whose value in the configs is null (null says nothing about the type of what replaces it). These may
# also become null again; so may optional parts (sections with a `_target_`).
OPTIONAL: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(PATHS, (str,)),
    "image": (str, list),
    "decode": (str, list),
    "length": (int,),
    "quality.psnr": (float,),
    "quality.ssim": (float,),
    "quality.lpips": (float,),
    "data.path": (str, list),
    "data.val_path": (str, list),
    "data.resize": (int,),
    "data.image_size": (int,),
    "trainer.devices": (int, str),
    "generator.num_classes": (int,),
    "generator.text_dim": (int, str),
    "labels": (int, list),
    "prompts": (str, list),
    "size": (int,),
    "ema": (dict,),
    "source": (str,),
    "order": (str, list),
    "bridging": (dict,),
    "bridging.order": (str, list),
    "bridging.images": (int,),
    "images": (int,),
    "rescale": (int,),
    "samples": (int,),
    "bounds": (int,),
    "lengths": (str, list, int),
    "baselines": (bool,),
    "baseline_images": (int,),
    "validation.images": (int,),
    "validation.lengths": (str, list, int),
    "optimizer.clip": (float,),
    "logger.wandb": (dict,),
    "objective.logvar_init": (float,),
    "objective.adversarial": (dict,),
    "objective.adversarial.lecam": (dict,),
    "objective.adversarial.adaptive_weight_max": (float,),
    "objective.adversarial.generator_loss": (str,),
    "tokenizer.decoder_channel_mult": (list,),
    "tokenizer.scaling_factor": (float,),
    "tokenizer.quantizer.scaling_factor": (float,),
}

_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a section",
}


@dataclass(frozen=True)
class Composed:
    """A resolved config, the options that were chosen for its groups, and what the command line really changed.

    choices: group → option. changes: key → value, as it names a run folder: overrides that repeat the default are left
    out.
    """

    config: DictConfig
    choices: dict[str, str]
    changes: dict[str, Any]


def compose(command: str, overrides: Sequence[str], config_dir: str | None = None) -> Composed:
    """The checked config of `command` ("train", "evaluate", "encode", "generate" or "export") under its `overrides`.

    Unknown keys, options and types are refused with a UserError that says what is possible.
    """
    parsed = parse(command, overrides, config_dir)
    for override in parsed:
        if override.is_sweep_override():
            if command != "train" and list in OPTIONAL.get(override.key_or_group, ()):
                listed = f"{override.key_or_group}=[{override.get_value_string()}]"
                raise UserError(f"{override.input_line} has several values; write them as a list: {listed}")
            raise UserError(
                f"{override.input_line} has several values: add -m for a sweep, or quote a text with commas: "
                f"{override.key_or_group}=\"'a,b'\""
            )
    launch = [override for override in parsed if override.is_hydra_override()]
    own = [override for override in parsed if not override.is_hydra_override()]
    groups = [override for override in own if is_group(override.key_or_group, config_dir)]
    values = [override for override in own if override not in groups]
    recipe = [override for override in groups if override.key_or_group in ("experiment", "scale")]
    search = search_path(config_dir)
    chosen = search + _lines(groups + launch)
    with session():
        chosen, before, choices = _recipe(command, chosen, groups)
        config = before
        if parts := _switched_on(before, groups, config_dir):
            chosen += parts
            config, _ = before, _ = _hydra(command, chosen)
        of_recipe = choices if groups == recipe else _recipe(command, search + _lines(recipe), recipe)[2]
        for override in values:
            _check_key(before, override)
        if values:
            config, _ = _hydra(command, chosen + _lines(values))
    _interpolate(config)
    for override in values:
        _check_type(
            override.key_or_group, _select(before, override.key_or_group), _select(config, override.key_or_group)
        )
    _expand_paths(config)
    _check_targets(config)
    typed = [override.key_or_group for override in groups]
    changes: dict[str, Any] = {
        group: choices.get(group) for group in typed if choices.get(group) != of_recipe.get(group)
    }
    for override in values:
        key, value = override.key_or_group, _select(config, override.key_or_group)
        if value != _select(before, key):
            changes[key] = value
    resolved = _resolved(config, choices)
    if command == "train":
        _settle_what_is_trained(resolved, [override.key_or_group for override in values])
    return Composed(resolved, choices, changes)


@contextmanager
def session() -> Iterator[None]:
    """Hydra, ready to compose from the configs of the package; also within a job that Hydra runs."""
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_module("smalti.configs", version_base="1.3", job_name="smalti"):
            yield
    finally:
        GlobalHydra.instance().hydra = outer


def parse(command: str, overrides: Sequence[str], config_dir: str | None = None) -> list[Override]:
    """Overrides as Hydra reads them, group options checked, `stage=2` rewritten; the last of equal keys wins."""
    parser = OverridesParser.create()
    parsed: dict[str, Override] = {}
    for text in overrides:
        _check_form(command, text)
        key, _, value = text.partition("=")
        try:
            override = parser.parse_overrides([_quoted_path(parser, key, value) or text])[0]
        except OverrideParseException as error:
            said = [
                line for line in str(error).splitlines() if not line.startswith(("Error parsing override", "Lexer"))
            ]
            reason = said[0].strip(" ^") or "an unexpected character"
            raise UserError(
                f"{text} cannot be read ({reason}); quote a value with special characters: '{key}=\"{value}\"'"
            ) from error
        if override.is_delete():
            raise UserError(
                f"{text}: keys cannot be removed; use {override.key_or_group}=null where a part is optional"
            )
        if not override.is_sweep_override() and override.value() == "":
            raise UserError(f"{text} has no value; write {override.key_or_group}=null for none")
        if is_group(override.key_or_group, config_dir):
            _check_option(command, override, config_dir)
        elif override.is_hydra_override() and not override.key_or_group.startswith(HYDRA_KEYS):
            raise UserError(f"{text}: of Hydra's own keys only {'* and '.join(HYDRA_KEYS)}* can be set here")
        parsed.pop(override.key_or_group, None)
        parsed[override.key_or_group] = override
    return _rewrite_stage(parsed, config_dir) if command == "train" else list(parsed.values())


def search_path(config_dir: str | None) -> list[str]:
    """The override that lets Hydra look for options in a folder of the user's own, too."""
    if config_dir is None:
        return []
    if not Path(config_dir).is_dir():
        raise UserError(f"--config-dir {config_dir} is not a folder")
    return [f"hydra.searchpath=['file://{Path(config_dir).resolve()}']"]


def is_group(key: str, config_dir: str | None = None) -> bool:
    """Whether a key picks a file of configs/ (or of Hydra's own groups)."""
    return key.startswith("hydra/") or any((folder / key).is_dir() for folder in _folders(config_dir))


def options(group: str, config_dir: str | None = None) -> list[str]:
    """The files of a group, by name."""
    return sorted({path.stem for folder in _folders(config_dir) for path in (folder / group).glob("*.yaml")})


def groups_of(command: str) -> list[str]:
    """The groups in a command's defaults list, in its order."""
    defaults = OmegaConf.select(OmegaConf.load(FOLDER / f"{command}.yaml"), "defaults", default=[])
    names = [str(next(iter(entry))) for entry in defaults if isinstance(entry, (dict, DictConfig))]
    return [name for name in names if " " not in name]


def _folders(config_dir: str | None) -> list[Path]:
    return [FOLDER] if config_dir is None else [FOLDER, Path(config_dir)]


def _lines(overrides: Sequence[Override]) -> list[str]:
    """Overrides as Hydra takes them; it leaves out a group (`tokenizer/regularizer=null`) by another sign."""
    return [
        f"~{override.key_or_group}"
        if override.value() is None and is_group(override.key_or_group)
        else f"{'++' if _is_free(override) else ''}{override.get_key_element()}={override.get_value_element_as_str()}"
        for override in overrides
    ]


def _is_free(override: Override) -> bool:
    return override.key_or_group.split(".")[0] in FREE and "." in override.key_or_group and not override.is_add()


def _recipe(command: str, lines: list[str], groups: Sequence[Override]) -> tuple[list[str], DictConfig, dict[str, str]]:
    """Compose, with the options that a scale puts in place of the recipe's; the lines it took, config and choices.

    `instead: {objective: pixels}` says so in an overlay: Hydra allows none of its own overrides there.
    """
    config, choices = _hydra(command, lines)
    given = [override.key_or_group for override in groups]
    others = [f"{group}={name}" for group, name in (config.get("instead") or {}).items() if group not in given]
    if others:
        lines = lines + others
        config, choices = _hydra(command, lines)
    return lines, config, choices


def _hydra(command: str, lines: list[str]) -> tuple[DictConfig, dict[str, str]]:
    """Compose, with Hydra's and OmegaConf's refusals as UserError. The config without Hydra's node, and the choices."""
    try:
        config = hydra.compose(command, lines, return_hydra_config=True)
        choices = {
            str(group).split("@")[0]: str(option)
            for group, option in config.hydra.runtime.choices.items()
            if option is not None and not str(group).startswith("hydra/")
        }
        with open_dict(config):
            del config["hydra"]
        return config, {group: option for group, option in choices.items() if not group.startswith(HIDDEN_GROUPS)}
    except (HydraException, OmegaConfBaseException) as error:
        text = str(error)
        if missing := re.search(r"hydra/(launcher|sweeper)/(\w+)", text):
            raise UserError(
                f"hydra/{missing[1]}={missing[2]} needs a plugin that is not installed; pip install 'smalti[cluster]'"
            ) from error
        if all(line.startswith("hydra.searchpath") for line in lines):
            raise  # the configs themselves do not compose
        reason = " ".join(text.split("\n    full_key")[0].split("See https")[0].split())
        raise UserError(f"{' '.join(lines)}: {reason}") from error


def _resolved(config: DictConfig, choices: Mapping[str, str]) -> DictConfig:
    """Interpolations replaced by values; required keys present; the experiment's name inside."""
    with open_dict(config):
        if "experiment" in choices:
            config["experiment"] = choices["experiment"]
        config.pop("instead", None)  # it has been done
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"{missing[0]} is required: give {missing[0]}=…; `--help` says what it is")
    resolved = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    assert isinstance(resolved, DictConfig)
    OmegaConf.set_struct(resolved, True)
    return resolved


def _settle_what_is_trained(config: DictConfig, typed: Sequence[str]) -> None:
    """Images for a generator have the size of its tokenizer, unless another one is typed (and then refused)."""
    config.tokenizer = config.tokenizer or None  # tokenizer=frozen is empty
    if config.generator is not None and "data.image_size" not in typed:
        config.data.image_size = None


def _switched_on(config: DictConfig, groups: Sequence[Override], config_dir: str | None) -> list[str]:
    """The command line wins over all: the option it names for a part that a scale sets to null, as overrides."""
    lines = []
    for override in groups:
        key, name = override.key_or_group.replace("/", "."), override.value()
        if "." not in key or name is None or OmegaConf.select(config, key) is not None:
            continue
        file = next(
            path
            for folder in _folders(config_dir)
            if (path := folder / key.replace(".", "/") / f"{name}.yaml").is_file()
        )
        part: Any = OmegaConf.to_container(OmegaConf.load(file))
        lines.append(f"{key}={Override._get_value_element_as_str(part)}")
    return lines


def _interpolate(config: DictConfig) -> None:
    """Refuse a ${…} that leads nowhere."""
    try:
        OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from error


def _quoted_path(parser: OverridesParser, key: str, value: str) -> str | None:
    """A path with characters that Hydra's grammar refuses (~, parentheses, spaces), in quotes; None if it has none."""
    if key not in PATHS or not value or value[0] in "'\"[{":
        return None
    try:
        parser.parse_rule(f"{key}={value}", "override")
        return None
    except HydraException:
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'{key}="{escaped}"'


def _check_form(command: str, text: str) -> None:
    """`key=value` in one word, without dashes."""
    key, equals, value = text.partition("=")
    if not key or key != key.strip() or (equals and value[:1] == " "):
        raise UserError(f"'{text}' is not key=value; write it without spaces around '='")
    if equals or text.startswith("~"):
        return
    for group in sorted(groups_of(command), key=lambda name: name != "experiment"):
        if text in options(group):
            raise UserError(f"'{text}' is not key=value; did you mean {group}={text}?")
    examples = {"train": "experiment=titok", "encode": "image=photo.jpg"}
    examples |= dict.fromkeys(("evaluate", "generate"), "model_path=DIR")
    example = examples.get(command, "output=DIR")
    raise UserError(f"'{text}' is not key=value (without spaces around '='), such as {example}")


def _check_option(command: str, override: Override, config_dir: str | None) -> None:
    """A group takes the name of one of its files (or null, or a list of names)."""
    group = override.key_or_group
    if group.startswith("hydra/"):
        return
    if group.split("/")[0] not in groups_of(command):
        own = groups_of(command)
        raise UserError(f"{group} is not a group of `{command}`; it has {', '.join(own) if own else 'none'}")
    if override.is_sweep_override():
        names: list[Any] = list(override.sweep_iterator()) if override.is_choice_sweep() else []
        names = names or [override.get_value_string()]
    else:
        value = override.value()
        names = value if isinstance(value, list) else [value]
    possible = options(group, config_dir)
    for name in names:
        if name is None and group in ("launcher", "sweep", "tokenizer/regularizer"):
            continue
        if str(name) not in possible:
            hint = did_you_mean(str(name), possible)
            raise UserError(
                f"{group}={'null' if name is None else name} is unknown{hint or ';'} possible: {', '.join(possible)}"
            )


def _rewrite_stage(parsed: dict[str, Override], config_dir: str | None) -> list[Override]:
    """`experiment=X stage=2` composes experiment X_stage2: Hydra's groups cannot be picked by a number."""
    stage = parsed.pop("stage", None)
    if stage is None:
        return list(parsed.values())
    if stage.is_sweep_override():
        raise UserError(
            f"{stage.input_line}: stages follow each other (stage 2 starts from stage 1's export); run them in turn"
        )
    if stage.value() not in (1, 2):
        raise UserError(f"{stage.input_line} is not a stage; use stage=1 or stage=2")
    experiment = parsed.get("experiment")
    names = _names(experiment, "titok")
    if stage.value() == 1:
        late = [name for name in names if name.endswith("_stage2")]
        if late:
            raise UserError(
                f"experiment={late[0]} is stage 2; use experiment={late[0].removesuffix('_stage2')} for stage 1"
            )
        return list(parsed.values())
    known = options("experiment", config_dir)
    rewritten = [name if name.endswith("_stage2") else f"{name}_stage2" for name in names]
    for name, target in zip(names, rewritten, strict=True):
        if target not in known:
            two = [option.removesuffix("_stage2") for option in known if option.endswith("_stage2")]
            raise UserError(f"stage=2: experiment={name} has one stage; with two: {', '.join(two) or 'none'}")
    parsed["experiment"] = OverridesParser.create().parse_overrides([f"experiment={','.join(rewritten)}"])[0]
    return list(parsed.values())


def _names(override: Override | None, default: str) -> list[str]:
    """The option names of a group override, one or (in a sweep) several."""
    if override is None:
        return [default]
    return (
        [str(name) for name in override.sweep_iterator()] if override.is_sweep_override() else [str(override.value())]
    )


def _select(config: DictConfig, key: str) -> Any:
    """The plain, resolved value at a dotted key; None when it is missing or cannot be resolved yet."""
    try:
        value = OmegaConf.select(config, key)
    except OmegaConfBaseException:
        return None
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=False)
    return value


def _keys(config: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a config, sections included."""
    if isinstance(config, DictConfig):
        for name in map(str, config):
            yield prefix + name
            if not OmegaConf.is_missing(config, name) and not OmegaConf.is_interpolation(config, name):
                yield from _keys(config[name], f"{prefix}{name}.")


def _check_key(config: DictConfig, override: Override) -> None:
    """The key exists (or, behind `+`, is a new argument of something that is built)."""
    key, parts = override.key_or_group, override.key_or_group.split(".")
    node: Any = config
    for depth, part in enumerate(parts):
        if not isinstance(node, DictConfig):
            whole = ".".join(parts[:depth])
            raise UserError(f"{key}: {whole} is a value, not a section; override {whole}=… as a whole")
        if depth and not node and parts[0] not in FREE:
            of = "the tokenizer is the one of tokenizer_path, as it is" if parts[0] == "tokenizer" else "it is empty"
            raise UserError(f"{key}: {'.'.join(parts[:depth])} has no keys in this config, {of}; leave it out")
        if part not in node.keys():  # noqa: SIM118, "???" is not `in` a DictConfig
            last = depth == len(parts) - 1
            if last and depth and parts[0] in FREE:
                return
            if last and (override.is_add() or override.is_force_add()) and "_target_" in node:
                return
            raise UserError(f"{key} is not a key of this config{_suggest(config, key, '.'.join(parts[:depth]))}")
        node = None if OmegaConf.is_missing(node, part) else node[part]
    if override.is_add():
        raise UserError(f"+{key}: the key exists; write {key}=… without the plus")


def _suggest(config: DictConfig, key: str, parent: str) -> str:
    """The nearest key: a sibling, the same name elsewhere, or a similar one anywhere; else what the section has."""
    every = list(_keys(config))
    name = key[len(parent) + 1 :] if parent else key
    siblings = [other for other in every if other.rpartition(".")[0] == parent]
    near = did_you_mean(name.split(".")[0], [other.rpartition(".")[2] for other in siblings])
    if near:
        found = near.split("'")[1]
        rest = name.partition(".")[2]
        full = ".".join(part for part in (parent, found, rest) if part)
        return f"; did you mean '{full if full in every else (parent + '.' if parent else '') + found}'?"
    last = key.rpartition(".")[2]
    same = [other for other in every if other.rpartition(".")[2] == last]
    if same:
        return f"; did you mean '{min(same, key=len)}'?"
    hint = did_you_mean(key, [other for other in every if not key.startswith(f"{other}.")])
    if hint:
        return hint
    inside = ", ".join(other.rpartition(".")[2] for other in siblings if not other.endswith("_target_"))
    return f"; {parent or 'the top level'} has {inside}"


def _check_type(key: str, old: Any, new: Any) -> None:
    """A value keeps its type: a whole number passes as a number; null is replaced by what OPTIONAL names for it."""
    old = None if old == "???" else old
    if new is None:
        if old is None or key in OPTIONAL or (isinstance(old, dict) and "_target_" in old):
            return
        raise UserError(f"{key}=null, but it needs {_NAMES[type(old)]}{_such_as(old)}")
    if isinstance(new, str) and is_group(key.replace(".", "/")):
        raise UserError(f"{key} is picked as a group: write {key.replace('.', '/')}={_show(new)}")
    if isinstance(old, dict) and isinstance(new, dict):
        for name in new:
            _check_type(f"{key}.{name}", old.get(name), new[name])
    elif isinstance(old, list) and isinstance(new, list):
        if len({type(item) for item in old}) == 1:
            for index, item in enumerate(new):
                _check_type(f"{key}[{index}]", old[0], item)
    elif isinstance(old, dict):
        has = ", ".join(str(name) for name in old if name != "_target_")
        raise UserError(f"{key}={_show(new)}, but {key} is a section; set one of its keys: {has}")
    else:
        kinds = OPTIONAL.get(key, () if old is None else (type(old),))
        number = type(new) is int and float in kinds
        if not kinds or type(new) in kinds or number or (isinstance(new, str) and "${" in new):
            return
        quoted = f"; for text write {key}=\"'{_show(new)}'\"" if str in kinds and not isinstance(new, dict) else ""
        needs = " or ".join(_NAMES[kind] for kind in kinds)
        raise UserError(f"{key}={_show(new)} is {_NAMES[type(new)]}, but it needs {needs}{_such_as(old)}{quoted}")


def _such_as(value: Any) -> str:
    return "" if value is None or isinstance(value, dict) else f", such as {_show(value)}"


def _show(value: Any) -> str:
    """A value as it would be typed."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_show, value))}]"
    if isinstance(value, dict):
        return "{…}"
    return "null" if value is None else str(value)


def _expand_paths(config: DictConfig) -> None:
    """`~` means the home folder, which shells do not put in behind `key=`; a trailing slash means nothing."""
    for key in PATHS:
        value = _select(config, key)
        if isinstance(value, list):
            OmegaConf.update(config, key, [_expanded(item) for item in value], merge=False)
        elif value is not None:
            OmegaConf.update(config, key, _expanded(value))


def _expanded(value: Any) -> Any:
    if not isinstance(value, str) or value in ("", "???") or "://" in value:
        return value
    return os.path.normpath(os.path.expanduser(value))


def _check_targets(config: DictConfig) -> None:
    """Only classes of ours and of a short list of libraries are built from a config."""
    for key, part in targets(OmegaConf.to_container(config, resolve=False), ""):
        target = part["_target_"]
        if not isinstance(target, str) or not target.startswith(TARGETS):
            raise UserError(f"{key}._target_={target} is not allowed; a config builds {ALLOWED}")
