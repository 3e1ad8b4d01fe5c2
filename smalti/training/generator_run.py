"""A run that trains a generator: its tokens' tokenizer or shards, its data's classes or texts, what is measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig, OmegaConf

from smalti import runs
from smalti.bridging import bridging_of
from smalti.data.module import DataModule
from smalti.data.tokens import holds_tokens
from smalti.errors import UserError
from smalti.evaluation.processes import processes
from smalti.evaluation.run import load_tokenizer
from smalti.exports import absolute
from smalti.generators.base import Generator
from smalti.instantiate import instantiate
from smalti.latents import check_scale
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.spec import TokenSpec
from smalti.tokenizers.tokenbridge import BridgedTokenizer
from smalti.training.callbacks.generation import Samples, ValidationLoss
from smalti.training.draws import seed_of
from smalti.training.ema import EMAConfig
from smalti.training.generator_module import GeneratorModule
from smalti.training.optim import OptimConfig
from smalti.training.prepared import Prepared
from smalti.training.text_source import TextSource, open_texts

SAMPLES = 16  # in a picture
TOKENIZER = "tokenizer"  # folder of a run's, of a tokenizer that was bridged for it


@dataclass(frozen=True)
class Source:
    """Where tokens come from. origin: path (None: unknown) and fingerprint of the tokenizer, for exports. latent_scale:
    of moments in token shards. made: whether the tokenizer was made for this run, and is to be kept in its folder."""

    spec: TokenSpec
    data: DataModule
    tokenizer: Tokenizer | None
    origin: dict[str, Any]
    latent_scale: float = 1.0
    made: bool = False


def prepare(config: DictConfig, settings: dict[str, Any], share: dict[str, int]) -> Prepared:
    """The run that a config asks for; raises UserError for what cannot work."""
    source = open_source(config, share)
    texts = open_texts(config, source.data)
    torch.manual_seed(seed_of("generator", config.seed))
    generator = build(config, source.spec, source.data, texts)
    generator.metadata["tokenizer"] = source.origin
    if texts is not None:
        generator.metadata["text_encoder"] = texts.origin
    if config.init_path is not None:
        initialise(generator, config.init_path)
    trainer = settings["trainer"]
    module = GeneratorModule(
        generator,
        OptimConfig(**settings["optimizer"]),
        tokenizer=source.tokenizer,
        text_encoder=None if texts is None else texts.encoder,
        latent_scale=source.latent_scale,
        max_steps=trainer["max_steps"],
        ema=None if settings["ema"] is None else EMAConfig(**settings["ema"]),
        accumulate=share["accumulate"],
        seed=config.seed,
        nan_limit=trainer["nan_limit"],
        compile=trainer["compile"],
    )
    every, images = settings["validation"]["every"], settings["validation"]["images"]

    def batches() -> Iterable[dict[str, Any]]:
        return source.data.validation_loader(images=images, rank=runs.rank(), **share)

    def shown() -> Iterable[dict[str, Any]]:
        return source.data.validation_loader(images=SAMPLES, accumulate=share["accumulate"])

    def measuring() -> list[pl.Callback]:
        pictures = [] if source.tokenizer is None else [Samples(SAMPLES, Path(config.run) / "images", every, shown)]
        return [ValidationLoss(batches, every), *pictures]

    shows = None if source.tokenizer is None else "samples"
    beside = {TOKENIZER: source.tokenizer} if source.made and source.tokenizer is not None else {}
    return Prepared(module, source.data, measuring, shows, beside)


def open_source(config: DictConfig, share: Mapping[str, int]) -> Source:
    """Images with the tokenizer that `tokenizer_path` names, or token shards, which that must have made."""
    path = config.tokenizer_path
    if path is None and (config.data.path is None or not holds_tokens(config.data.path)):
        raise UserError(
            "tokenizer_path is required: an export of the tokenizer whose tokens the generator learns (train.py or "
            "export.py make one); or give data.path=DIR of token shards, which encode.py makes"
        )
    tokenizer = None if path is None else load_tokenizer(path, config.teacher_path, key="tokenizer_path")
    data = build_data(config, None if tokenizer is None else tokenizer.spec)
    data.check(**share)
    if data.tokens is None:
        assert tokenizer is not None
        if config.bridging is not None and tokenizer.spec.kind == "continuous":
            return bridged_source(config, tokenizer, data, share)
        check_scale(tokenizer, "tokenizer_path", path)
        return Source(tokenizer.spec, data, tokenizer, {"path": absolute(path), "fingerprint": tokenizer.fingerprint()})
    theirs = data.tokens["tokenizer"]
    spec = TokenSpec.from_dict(theirs["spec"])
    bridged = isinstance(tokenizer, BridgedTokenizer) and spec.kind == "continuous"
    maker = tokenizer.tokenizer if isinstance(tokenizer, BridgedTokenizer) and bridged else tokenizer
    if maker is not None and (own := maker.fingerprint()) != theirs["fingerprint"]:
        raise UserError(
            f"data.path={config.data.path} has tokens of tokenizer {theirs['fingerprint'][:16]}, but "
            f"tokenizer_path={path} is {own[:16]}; give the one that made them, or encode the images with this one"
        )
    if spec.kind == "continuous" and config.bridging is not None and not bridged:
        if tokenizer is None:
            raise UserError(
                f"data.path={config.data.path} has {spec.words()}, whose codes only their tokenizer knows; give it, or "
                "a bridged one of it, by tokenizer_path=DIR"
            )
        return bridged_source(config, tokenizer, data, share)
    if bridged and tokenizer is not None:
        return Source(tokenizer.spec, data, tokenizer, {"path": absolute(path), "fingerprint": tokenizer.fingerprint()})
    where = theirs.get("path") if path is None else absolute(path)
    origin, statistics = {"path": where, "fingerprint": theirs["fingerprint"]}, data.tokens.get("statistics", {})
    return Source(spec, data, tokenizer, origin, statistics.get("scale_factor", 1.0))


def bridged_source(config: DictConfig, tokenizer: Tokenizer, data: DataModule, share: Mapping[str, int]) -> Source:
    """The continuous tokenizer with discrete tokens as `config.bridging` says: made now, or by the run that goes on."""
    bridging, path = bridging_of(config.bridging), config.tokenizer_path
    key = f"tokenizer_path={path}"
    spec, folder = bridging.spec(tokenizer.spec, key), (Path(config.run) / TOKENIZER).resolve()
    if not bridging.fit:
        check_scale(tokenizer, "tokenizer_path", path)
    if (kept := folder / "config.json").is_file():
        made: Tokenizer = BridgedTokenizer.from_pretrained(folder)
        if made.metadata["bridged_from"]["fingerprint"] != tokenizer.fingerprint() or made.spec.bits != spec.bits:
            raise UserError(f"{kept} was not made of {key}; give that tokenizer, or start a new run: resume=never")
        return Source(made.spec, data, made, {"path": str(folder), "fingerprint": made.fingerprint()})
    if share.get("world_size", 1) > 1 or runs.processes() > 1:
        raise UserError(
            f"{key} gives {tokenizer.spec.words()}, and several processes would each measure its levels; bridge it "
            f"first: python export.py bridge={path} output=DIR, then tokenizer_path=DIR"
        )
    with processes("auto") as (_, _, device):
        made = bridging(tokenizer, path, data, device, seed=config.seed)
    print(f"{key} gives {tokenizer.spec.words()}: bridged to {made.spec.words()}, kept in {folder}", flush=True)
    return Source(made.spec, data, made, {"path": str(folder), "fingerprint": made.fingerprint()}, made=True)


def build_data(config: DictConfig, spec: TokenSpec | None) -> DataModule:
    """The data of a run. Images have the tokenizer's size; raises UserError where another one was typed."""
    size = config.data.image_size
    if spec is not None and size not in (None, spec.image_size):
        raise UserError(
            f"data.image_size={size}, but tokenizer_path={config.tokenizer_path} takes images of {spec.image_size}; "
            "leave data.image_size out"
        )
    settings = OmegaConf.to_container(config.data, resolve=True)
    assert isinstance(settings, dict)
    if size is None:  # without a tokenizer the data must be token shards, where it has no effect
        settings["image_size"] = settings["resize"] or 1 if spec is None else spec.image_size
    data = instantiate(settings, "data")
    assert isinstance(data, DataModule)
    return data


def build(config: DictConfig, spec: TokenSpec, data: DataModule, texts: TextSource | None) -> Generator:
    """The generator with fresh weights, for these tokens, and these texts or the classes of the data.

    generator.num_classes: null takes the data's, 0 is none. Raises UserError for tokens that it cannot model, and for
    labels that it would not know.
    """
    settings = OmegaConf.to_container(config.generator, resolve=True)
    assert isinstance(settings, dict)
    given = settings.get("num_classes")
    if texts is not None:
        settings |= {"text_dim": texts.dim, "num_classes": given or None}
    elif "num_classes" in settings and given != 0:
        largest = data.largest_label()
        if given is not None and largest >= given:
            where = config.data.path or "the embedded shapes"
            raise UserError(
                f"generator.num_classes={given}, but {where} has labels up to {largest}; use {largest + 1}, or null"
            )
        settings["num_classes"] = given if given is not None or largest < 0 else largest + 1
    elif given == 0:
        settings["num_classes"] = None
    generator = instantiate(settings, "generator", tokens=spec.to_dict())
    if not isinstance(generator, Generator):
        raise UserError(f"generator._target_={settings['_target_']} is no generator; pick one, such as generator=gpt")
    return generator


def check_before_its_tokenizer(config: DictConfig, needed: DictConfig) -> None:
    """Refuse what cannot work before the tokenizer is trained that `needed` describes."""
    if any(needed.get(key) is None for key in needed.get("requires") or {}):
        return  # it cannot be built before another run has ended
    spec = instantiate(needed.tokenizer, "tokenizer").spec
    if config.bridging is not None and spec.kind == "continuous":
        spec = bridging_of(config.bridging).spec(spec, f"experiment={needed.experiment}")
    data = build_data(config, spec)
    build(config, spec, data, open_texts(config, data))


def initialise(generator: Generator, path: str) -> None:
    """Load the weights of an export of the same generator; raises UserError for another one."""
    source = Generator.from_pretrained(path)
    own, given = generator.state_dict(), source.state_dict()
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in (own, given)]
    different = sorted(name for name in own.keys() | given.keys() if shapes[0].get(name) != shapes[1].get(name))
    if type(source) is not type(generator) or different:
        name = different[0] if different else ""
        why = f": {name} is {shapes[1].get(name)} there and {shapes[0].get(name)} here" if name else ""
        raise UserError(
            f"init_path={path} holds a {type(source).__name__}{why}; give a generator of the same kind and size"
        )
    generator.load_state_dict(given)
