"""One evaluation, from a config to figures, a table and a picture; the program behind `evaluate.py`.

    python evaluate.py model_path=DIR data.path=FOLDER          every figure whose weights are there
    torchrun --nproc-per-node 8 evaluate.py model_path=DIR …    the same figures, sooner
    python evaluate.py model_path=DIR image=photo.jpg           one photo: smalti/evaluation/photo.py

Batches are numbered and go to the processes in turn: which images share a batch does not depend on how many there are.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader

from smalti.data.module import DataModule
from smalti.data.order import Batch
from smalti.errors import UserError, did_you_mean
from smalti.evaluation import pictures, tables
from smalti.evaluation.baselines import Baselines
from smalti.evaluation.inception import Inception, load_inception
from smalti.evaluation.inception import why_absent as why_no_inception
from smalti.evaluation.lpips import MeasuredLPIPS, load_lpips
from smalti.evaluation.lpips import why_absent as why_no_lpips
from smalti.evaluation.metrics import ReconstructionMetrics
from smalti.evaluation.photo import reconstruct_photo
from smalti.evaluation.processes import processes
from smalti.evaluation.protocol import describe_model, libraries, preprocessing
from smalti.registry import load
from smalti.tokenizers.base import Tokenizer
from smalti.training.draws import seed_of

FIGURES = {
    "psnr": ("psnr",),
    "ssim": ("ssim",),
    "lpips": ("lpips",),
    "rfid": ("rfid", "inception_score"),
    "codebook": ("codebook_usage", "codebook_entropy", "codebook_perplexity"),
}
LPIPS_SIZE = 16  # the least side that VGG16's poolings leave anything of


def evaluate(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Measure a tokenizer, or reconstruct one photo, as configs/evaluate.yaml describes; returns what it wrote.

    Raises UserError for what cannot work, before anything is written.
    """
    cfg: Any = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else dict(config)
    with processes(cfg["device"]) as (rank, world_size, device):
        tokenizer = load_tokenizer(cfg["model_path"], cfg["teacher_path"]).to(device)
        if cfg["image"] is not None:
            return reconstruct_photo(tokenizer, cfg, output_folder(cfg, "photos"), device)
        return measure(tokenizer, cfg, device, rank, world_size)


def measure(
    tokenizer: Tokenizer, cfg: Mapping[str, Any], device: torch.device, rank: int, world_size: int
) -> dict[str, Any]:
    """The figures of a tokenizer over a data set; the first process writes and prints them."""
    wanted = _wanted(cfg["metrics"])
    if cfg["pictures"] < 1:
        raise UserError(f"pictures={cfg['pictures']} must be at least 1")
    spec = tokenizer.spec
    lpips, inception, left_out = _networks(wanted, cfg, device, spec.image_size)
    data = data_for(tokenizer, cfg)
    whole = data.test_loader(images=cfg["images"])
    batches: Any = list(whole.batch_sampler)  # type: ignore[arg-type]  # of Batch, which torch types as lists
    output = output_folder(cfg, Path(str(data.path or "shapes")).name)

    budget = None if spec.bits is None else -(-round(spec.length * spec.bits) // 8)
    metrics = ReconstructionMetrics(spec.codebook_size, lpips=lpips, inception=inception)
    baselines = Baselines(budget) if cfg["baselines"] else None
    mine = list(enumerate(batches))[rank::world_size]
    loader = DataLoader(
        whole.dataset,
        batch_sampler=[batch for _, batch in mine],
        num_workers=whole.num_workers,
        collate_fn=whole.collate_fn,
        generator=torch.Generator(),
    )
    hidden = rank > 0 or not sys.stderr.isatty()
    for (number, _), batch in zip(mine, track(loader, "measuring", disable=hidden, transient=True), strict=True):
        images = batch["image"].to(device, non_blocking=True).float() / 255
        decoded, indices = reconstruct(tokenizer, images, seed=seed_of("evaluate", cfg["seed"], number))
        metrics.update(images, decoded, indices)
        if baselines is not None:
            baselines.update(images, decoded)
    metrics.all_reduce()
    if baselines is not None:
        baselines.all_reduce()

    computed = metrics.compute()
    figures = {name: computed[name] for kind in wanted for name in FIGURES[kind] if name in computed}
    figures["tokens"] = spec.length
    if spec.bits is not None:
        figures["bits_per_image"] = spec.length * spec.bits
        figures["bits_per_pixel"] = spec.length * spec.bits / spec.image_size**2
    if baselines is not None:
        figures |= baselines.compute(computed["psnr"])
    report: dict[str, Any] = {
        "figures": figures,
        "left_out": left_out,
        "protocol": {
            "images": metrics.count,
            "resolution": f"{spec.image_size} × {spec.image_size}",
            "preprocessing": preprocessing(data.crop, spec.image_size),
            "data": {
                "name": str(data.path or "shapes"),
                "split": _split_name(data),
                "fingerprint": _fingerprint(whole.dataset, batches),
            },
            "model": describe_model(tokenizer, cfg),
            "weights": {
                name: network.hash for name, network in (("lpips", lpips), ("inception", inception)) if network
            },
            "batch_size": cfg["batch_size"],
            "processes": world_size,
            "device": device.type,
            "precision": str(next(tokenizer.parameters()).dtype).removeprefix("torch."),
            "seed": cfg["seed"],
            "libraries": libraries(),
        },
    }
    if rank == 0:
        report["files"] = _write(report, output, _picture(tokenizer, whole.dataset, batches, cfg, device, figures))
        print(tables.to_text(report))
        print("\n".join(f"{name:8} {path}" for name, path in report["files"].items()))
    return report


def reconstruct(tokenizer: Tokenizer, images: Tensor, *, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    """Images (b, 3, h, w) in [0, 1] through the tokens and back, and the indices, where tokens are discrete."""
    tokens = tokenizer.encode(images)
    return tokenizer.decode(tokens, seed=seed), tokens.indices


def load_tokenizer(model_path: str, teacher_path: str | None) -> Tokenizer:
    """The exported tokenizer, ready to make pixels: with its teacher, where it predicts that one's codes."""
    tokenizer = load(model_path)
    if tokenizer.spec.condition != "none":
        raise UserError(
            f"model_path={model_path} decodes with {tokenizer.spec.condition} beside the tokens, which evaluate.py has "
            "not; use smalti.load(…).decode(tokens, text=…) in Python"
        )
    attach: Callable[[Tokenizer], None] | None = getattr(tokenizer, "attach_teacher", None)
    predicts_codes = getattr(tokenizer, "head", None) == "codes"
    if predicts_codes and teacher_path is None:
        raise UserError(
            f"teacher_path=null but model_path={model_path} is a stage-1 model, which predicts codes and no pixels; "
            "give teacher_path=DIR, the tokenizer whose codes it was trained on"
        )
    if teacher_path is not None:
        if attach is None or not predicts_codes:
            raise UserError(f"teacher_path={teacher_path} is not needed: model_path={model_path} makes pixels itself")
        try:
            attach(load(teacher_path))
        except (ValueError, AttributeError) as error:
            raise UserError(f"teacher_path={teacher_path} does not fit model_path={model_path}: {error}") from error
    return tokenizer.eval()


def data_for(tokenizer: Tokenizer, cfg: Mapping[str, Any]) -> DataModule:
    """The images, cut to the size that the tokenizer takes."""
    from smalti.config import instantiate

    own = {"image_size": tokenizer.spec.image_size, "resize": None, "batch_size": cfg["batch_size"]}
    module = instantiate({**cfg["data"], **own}, "data")
    assert isinstance(module, DataModule)
    return module


def output_folder(cfg: Mapping[str, Any], name: str) -> Path:
    """Where results go: `output`, or evaluation/<name> inside the model's folder. Refused early when not writable."""
    model = Path(cfg["model_path"]).expanduser()
    home = model / "evaluation" if model.is_dir() else Path("evaluation") / str(cfg["model_path"]).replace("/", "--")
    folder = Path(cfg["output"]).expanduser() if cfg["output"] is not None else home / name
    above = next(place for place in (folder, *folder.parents) if place.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"output={folder} cannot be written ({above} is not a writable folder); give output=DIR")
    return folder


def _wanted(names: Sequence[str]) -> list[str]:
    for name in names:
        if name not in FIGURES:
            raise UserError(f"metrics={name} is unknown{did_you_mean(name, FIGURES)}; possible: {', '.join(FIGURES)}")
    return list(names)


def _networks(
    wanted: Sequence[str], cfg: Mapping[str, Any], device: torch.device, image_size: int
) -> tuple[MeasuredLPIPS | None, Inception | None, dict[str, str]]:
    """The networks that the wanted figures need, and why those without one are left out."""
    left_out: dict[str, str] = {}
    lpips = None
    if "lpips" in wanted and image_size < LPIPS_SIZE:
        left_out["lpips"] = f"needs images of at least {LPIPS_SIZE} × {LPIPS_SIZE} pixels"
    elif "lpips" in wanted:
        lpips = load_lpips(cfg["lpips_weights"])
        if lpips is None:
            left_out["lpips"] = why_no_lpips()
    inception = load_inception(cfg["inception_weights"]) if "rfid" in wanted else None
    if "rfid" in wanted and inception is None:
        left_out["rfid"] = why_no_inception()
    if inception is not None and device.type != "mps":  # which has no float64
        inception.to(device)
    return lpips, inception, left_out


def _split_name(data: DataModule) -> str:
    """Which images `data.test` are: the folder's name, or that they were held out of the training images."""
    source = data.test.source
    if source is data.train.source:
        return "held out"
    folders = Path(source.place(0)).parts
    return next((name for name in reversed(folders) if name in ("test", "val", "validation")), "validation")


def _fingerprint(dataset: Any, batches: Sequence[Batch]) -> str:
    """A hash of the keys of the measured images, in order."""
    split, keys = dataset.split, hashlib.sha256()
    for batch in batches:
        for sample in split.samples[batch.samples].tolist():
            keys.update(split.source.key(sample).encode("utf-8", "surrogateescape") + b"\0")
    return keys.hexdigest()[:16]


def _picture(
    tokenizer: Tokenizer,
    dataset: Any,
    batches: Sequence[Batch],
    cfg: Mapping[str, Any],
    device: torch.device,
    figures: Mapping[str, float],
) -> Any:
    """The first images over their reconstructions."""
    shown: list[tuple[Tensor, Tensor]] = []
    for number, batch in enumerate(batches):
        if sum(len(images) for images, _ in shown) >= cfg["pictures"]:
            break
        images = dataset.__getitems__(batch)["image"].to(device).float() / 255
        shown.append((images, reconstruct(tokenizer, images, seed=seed_of("evaluate", cfg["seed"], number))[0]))
    originals, decoded = (torch.cat(part)[: cfg["pictures"]] for part in zip(*shown, strict=True))
    spec = tokenizer.spec
    size = f", {figures['bits_per_image']:,.0f} bits an image" if "bits_per_image" in figures else ""
    count = sum(len(batch.samples) for batch in batches)
    said = [f"{name.upper()} {tables.shown(name, figures[name])}" for name in ("psnr", "ssim") if name in figures]
    return pictures.reconstructions(
        originals,
        decoded,
        title=f"{type(tokenizer).__name__}, {spec.length} tokens{size}",
        note=", ".join([*said, f"{count:,} images of {spec.image_size} × {spec.image_size}"]),
    )


def _write(report: Mapping[str, Any], folder: Path, picture: Any) -> dict[str, str]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = {
        "figures": folder / "metrics.json",
        "table": folder / "metrics.md",
        "picture": folder / "reconstructions.png",
    }
    paths["figures"].write_text(tables.to_json(report), encoding="utf-8")
    paths["table"].write_text(tables.to_markdown(report), encoding="utf-8")
    pictures.save_png(picture, paths["picture"])
    return {name: str(path) for name, path in paths.items()}
