"""Write an export: of a run of ours, or of a published checkpoint; the program behind `export.py`.

python export.py run=runs/titok/tiny output=DIR                the averaged weights of its newest good checkpoint
python export.py source=titok checkpoint=FILE output=DIR       a published file (smalti/published/<source>.py)
python export.py bridge=KL_EXPORT output=DIR                   a continuous tokenizer made discrete (smalti/bridging.py)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from smalti import exports
from smalti.bridging import bridging_of
from smalti.errors import UserError
from smalti.evaluation.processes import processes
from smalti.evaluation.run import data_of_size, load_tokenizer
from smalti.instantiate import instantiate
from smalti.latents import check_scale
from smalti.model import Model
from smalti.published import flextok, flextok_ar, klvae, llamagen, mar, maskgit, onedpiece, rar, titok, tokenbridge
from smalti.registry import build
from smalti.tokenizers.flextok import FlexTok
from smalti.training import checkpoint as checkpoints

SOURCES: dict[str, Callable[[str, str | None], Model]] = {
    "titok": titok.convert,
    "onedpiece": onedpiece.convert,
    "flextok": flextok.convert,
    "klvae": klvae.convert,
    "maskgit": maskgit.convert,
    "rar": rar.convert,
    "mar": mar.convert,
    "tokenbridge": tokenbridge.convert,
    "llamagen": llamagen.convert,
    "flextok_ar": flextok_ar.convert,
}


def export(config: DictConfig) -> Path:
    """The folder that `config.output` names, written; raises UserError before anything is."""
    model: Model
    if config.run is not None:
        model = from_run(Path(config.run))
    elif config.bridge is not None:
        model = from_continuous(config)
    else:
        model = SOURCES[config.source](config.checkpoint, config.config)
    output = Path(config.output)
    model.save_pretrained(output)
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"export: {output} ({type(model).__name__}, {size:.1f} M parameters)\nload:   smalti.load({str(output)!r})")
    return output


def from_run(run: Path) -> Model:
    """The (averaged) model of a run's newest good checkpoint, in evaluation mode, with its origin in `metadata`."""
    file = checkpoints.newest_good(run / "checkpoints", say=lambda said: print(said, file=sys.stderr))
    if file is None:
        raise UserError(f"run={run} has no checkpoint yet; train until the first one")
    config = OmegaConf.load(run / "config.yaml")
    assert isinstance(config, DictConfig)
    saved = checkpoints.load(file)
    model: Model
    if "generator" in saved:  # which also depends on its tokenizer and on the classes of the data
        model, kind = build(saved["generator"]["model"]), "generator."
    else:
        model, kind = instantiate(config.tokenizer, "tokenizer"), "tokenizer."
    prefix = "ema.model." if any(name.startswith("ema.model.") for name in saved["state_dict"]) else kind
    weights = {
        name.removeprefix(prefix): tensor for name, tensor in saved["state_dict"].items() if name.startswith(prefix)
    }
    if isinstance(model, FlexTok) and not any(name.startswith("decoder.projection.") for name in weights):
        model.leave_out_features()  # its objective read none, which the config alone does not show
    _load(model, weights, file)
    model.metadata = _metadata(run, config, int(saved["global_step"]))
    if "generator" in saved:
        model.metadata["tokenizer"] = saved["generator"]["tokenizer"]
        if (text := saved["generator"].get("text_encoder")) is not None:
            model.metadata["text_encoder"] = text
    return model.eval()


def from_continuous(config: DictConfig) -> Model:
    """The tokenizer that `config.bridge` names with discrete tokens, as `config` says."""
    cfg: Any = OmegaConf.to_container(config, resolve=True)
    bridging = bridging_of(cfg)
    with processes(cfg["device"]) as (_, _, device):
        tokenizer = load_tokenizer(cfg["bridge"], None, key="bridge")
        bridging.spec(tokenizer.spec, f"bridge={cfg['bridge']}")
        if not bridging.fit:
            check_scale(tokenizer, "bridge", cfg["bridge"])
        data = data_of_size(tokenizer.spec.image_size, cfg, f"bridge={cfg['bridge']}")
        return bridging(tokenizer, cfg["bridge"], data, device, seed=cfg["seed"])


def _load(model: Model, weights: dict[str, torch.Tensor], file: Path) -> None:
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        mine, theirs = (tuple(state[name].shape) if name in state else None for state in (own, weights))
        if mine != theirs:
            raise UserError(
                f"{file} does not fit the run's config.yaml: {name} is {theirs or 'missing'} in the checkpoint and "
                f"{mine or 'missing'} in the model; export with the smalti that trained it"
            )
    model.load_state_dict(weights)


def _metadata(run: Path, config: DictConfig, step: int) -> dict[str, Any]:
    """What the run's own export says, where it has one of the same step; else what its config tells."""
    written = run / "export" / "config.json"
    if written.is_file() and step == config.trainer.max_steps:
        known = json.loads(written.read_text(encoding="utf-8"))
        metadata = {key: known[key] for key in exports.METADATA if key in known}
        if "picture" in metadata:
            metadata["picture"] = str(run / "export" / metadata["picture"])
        return metadata
    picture = max((run / "images").glob("step-*.png"), default=None)
    return {
        "title": f"{config.experiment}, scale {config.scale}, step {step} of {config.trainer.max_steps}",
        "source": f"a run of smalti: {run}, step {step}",
        "training_data": str(config.data.path or "the shapes embedded in smalti"),
        **({"picture": str(picture)} if picture else {}),
    }
