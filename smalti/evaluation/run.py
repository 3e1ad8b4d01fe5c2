"""One evaluation, from a config to figures, a table and a picture; the program behind `evaluate.py`.

    python evaluate.py model_path=DIR data.path=FOLDER          every figure whose weights are there
    torchrun --nproc-per-node 8 evaluate.py model_path=DIR …    the same figures, sooner
    python evaluate.py model_path=DIR lengths=all               at 1, 2, 4, … tokens, beside JPEG, WebP, AVIF, JPEG XL
    python evaluate.py model_path=DIR image=photo.jpg           one photo: smalti/evaluation/photo.py
    python evaluate.py model_path=GENERATOR data.path=FOLDER    a generator: smalti/evaluation/samples.py

Batches are numbered and go to the processes in turn: which images share a batch does not depend on how many there are.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader

from smalti.data.module import DataModule
from smalti.data.order import Batch
from smalti.errors import UserError, did_you_mean
from smalti.evaluation import pictures, plots, tables
from smalti.evaluation.baselines import CODECS, Baselines, codecs, further_budgets
from smalti.evaluation.baselines import why_absent as why_no_codec
from smalti.evaluation.inception import Inception, load_inception
from smalti.evaluation.inception import why_absent as why_no_inception
from smalti.evaluation.kinds import of_samples
from smalti.evaluation.lengths import bits_of, bytes_of, chosen_lengths, decode_prefixes
from smalti.evaluation.lpips import MeasuredLPIPS, load_lpips
from smalti.evaluation.lpips import why_absent as why_no_lpips
from smalti.evaluation.metrics import ReconstructionMetrics, psnr
from smalti.evaluation.photo import reconstruct_photo
from smalti.evaluation.processes import processes
from smalti.evaluation.protocol import describe_model, libraries, preprocessing
from smalti.evaluation.sampling import describe_sampling, override_sampling
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.spec import TokenSpec
from smalti.training.draws import seed_of

FIGURES = {
    "psnr": ("psnr",),
    "ssim": ("ssim",),
    "lpips": ("lpips",),
    "rfid": ("rfid", "inception_score"),
    "codebook": ("codebook_usage", "codebook_entropy", "codebook_perplexity"),
}
BY_LENGTH = ("psnr", "ssim", "lpips", "rfid")
LPIPS_SIZE = 16  # the least side that VGG16's poolings leave anything of
STRIP_ROWS = 6  # images in the strip: more are no clearer


def evaluate(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Measure a tokenizer, or a generator's samples, or reconstruct one photo, as configs/evaluate.yaml describes.

    Returns the report that it wrote. Raises UserError for what cannot work, before anything is written.
    """
    cfg: Any = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else dict(config)
    with processes(cfg["device"]) as (rank, world_size, device):
        if of_samples(cfg):
            from smalti.evaluation import samples  # which needs generate.py's machinery, and that this file

            nothing = cfg["model_path"] is None and cfg["samples_path"] is None
            return (samples.train_alone if nothing else samples.measure_samples)(cfg, device, rank, world_size)
        tokenizer = load_tokenizer(cfg["model_path"], cfg["teacher_path"]).to(device)
        override_sampling(tokenizer, cfg["sampling"])
        if cfg["image"] is not None:
            return reconstruct_photo(tokenizer, cfg, output_folder(cfg, "photos"), device)
        return measure(tokenizer, cfg, device, rank, world_size)


def measure(
    tokenizer: Tokenizer, cfg: Mapping[str, Any], device: torch.device, rank: int, world_size: int
) -> dict[str, Any]:
    """The figures of a tokenizer over a data set; the first process writes and prints them."""
    wanted = _wanted(cfg["metrics"])
    lengths = chosen_lengths(cfg["lengths"], tokenizer.spec)
    if cfg["pictures"] < 1:
        raise UserError(f"pictures={cfg['pictures']} must be at least 1")
    spec = tokenizer.spec
    lpips, inception, left_out = _networks(wanted, cfg, device, spec.image_size)
    budgets = [size for k in lengths if (size := bytes_of(spec, k)) is not None]
    baselines = _baselines(budgets, cfg, spec.image_size, left_out)
    data = data_for(tokenizer, cfg)
    whole = data.test_loader(images=cfg["images"])
    batches: Any = list(whole.batch_sampler)  # type: ignore[arg-type]  # of Batch, which torch types as lists
    output = output_folder(cfg, Path(str(data.path or "shapes")).name)

    metrics: dict[int, ReconstructionMetrics] = {}  # the longest first, in which the codes are counted
    for k in reversed(lengths):
        longest = metrics.get(lengths[-1])
        counted = spec.codebook_size if longest is None else None
        metrics[k] = ReconstructionMetrics(counted, depth=spec.depth, lpips=lpips, inception=inception, beside=longest)
    mine = list(enumerate(batches))[rank::world_size]
    starts = np.cumsum([0, *(len(batch.samples) for batch in batches)]).tolist()
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
        tokens, ours = tokenizer.encode(images), []
        for k, decoded in decode_prefixes(tokenizer, tokens, lengths, seed=seed_of("evaluate", cfg["seed"], number)):
            metrics[k].update(images, decoded, None if tokens.indices is None else tokens.indices[:, :k])
            ours.append(psnr(images, decoded))
        if baselines is not None:
            baselines.update(images, torch.stack(ours), starts[number])
    for k in lengths:
        metrics[k].all_reduce()
    if baselines is not None:
        baselines.all_reduce()

    computed = metrics[lengths[-1]].compute()
    figures = {name: computed[name] for kind in wanted for name in FIGURES[kind] if name in computed}
    figures |= _sizes(spec, lengths[-1])
    if baselines is not None:
        figures["mean_colour_psnr"] = baselines.colour()
        figures["gain_over_mean_colour"] = computed["psnr"] - baselines.colour()
        figures |= baselines.figures(-1) if budgets else {}
    report: dict[str, Any] = {
        "figures": figures,
        "left_out": left_out,
        "protocol": {
            "images": metrics[lengths[-1]].count,
            "resolution": f"{spec.image_size} × {spec.image_size}",
            "preprocessing": preprocessing(data.crop, spec.image_size),
            "data": {
                "name": str(data.path or "shapes"),
                "split": split_name(data),
                "fingerprint": fingerprint(whole.dataset, batches),
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
            "sampling": describe_sampling(tokenizer),
            "baseline_images": None if baselines is None or not baselines.codecs else baselines.compared,
            "libraries": libraries(),
        },
    }
    if cfg["lengths"] is not None:
        report["by_length"] = [
            _sizes(spec, k)
            | {name: value for name, value in metrics[k].compute().items() if name in BY_LENGTH and name in wanted}
            | (baselines.figures(number) if baselines is not None and budgets else {})
            for number, k in enumerate(lengths)
        ]
        if not budgets:
            left_out["rate_distortion"] = "continuous tokens have no size in bytes"
        elif baselines is None:
            left_out["rate_distortion"] = "baselines=false leaves out what it would compare with"
        elif baselines is not None and baselines.compared:
            report["rate_distortion"] = baselines.rate_distortion()
    if rank == 0:
        files: dict[str, Any] = {"picture": _picture(tokenizer, whole.dataset, batches, cfg, device, figures)}
        if cfg["lengths"] is not None:
            files["strip"] = _strip(tokenizer, whole.dataset, batches, lengths, cfg, device)
            files["plot"] = _plot(report, spec.image_size) if "rate_distortion" in report else None
        report["files"] = _write(report, output, files)
        print(tables.to_text(report))
        print("\n".join(f"{name:8} {path}" for name, path in report["files"].items()))
    return report


def load_tokenizer(model_path: str, teacher_path: str | None, key: str = "model_path") -> Tokenizer:
    """The exported tokenizer, ready to make pixels: with its teacher, where it predicts that one's codes.

    key: the config's name of the path, for messages.
    """
    tokenizer = Tokenizer.from_pretrained(model_path)
    if tokenizer.spec.condition != "none":
        raise UserError(
            f"{key}={model_path} decodes with {tokenizer.spec.condition} beside the tokens, which is not at hand "
            "here; use smalti.load(…).decode(tokens, text=…) in Python"
        )
    attach: Callable[[Tokenizer], None] | None = getattr(tokenizer, "attach_teacher", None)
    predicts_codes = getattr(tokenizer, "head", None) == "codes"
    if predicts_codes and teacher_path is None:
        raise UserError(
            f"teacher_path=null but {key}={model_path} is a stage-1 model, which predicts codes and no pixels; "
            "give teacher_path=DIR, the tokenizer whose codes it was trained on"
        )
    if teacher_path is not None:
        if attach is None or not predicts_codes:
            raise UserError(f"teacher_path={teacher_path} is not needed: {key}={model_path} makes pixels itself")
        try:
            attach(Tokenizer.from_pretrained(teacher_path))
        except (ValueError, AttributeError) as error:
            raise UserError(f"teacher_path={teacher_path} does not fit {key}={model_path}: {error}") from error
    return tokenizer.eval()


def data_for(tokenizer: Tokenizer, cfg: Mapping[str, Any]) -> DataModule:
    """The images, cut to the size that the tokenizer takes. Raises UserError where the config asks for another one."""
    return data_of_size(tokenizer.spec.image_size, cfg, f"model_path={cfg['model_path']}")


def data_of_size(size: int, cfg: Mapping[str, Any], whose: str) -> DataModule:
    """The images, cut to `size`. whose: what takes images of that size, for the message where the config asks for
    another one."""
    from smalti.instantiate import instantiate

    data = dict(cfg["data"])
    for key in ("image_size", "resize"):
        if data[key] not in (None, size):
            raise UserError(
                f"data.{key}={data[key]}, but {whose} takes images of {size} × {size}, to which all are resized; leave "
                "it out"
            )
    if data["batch_size"] not in (None, cfg["batch_size"]):
        raise UserError(f"data.batch_size={data['batch_size']} is of training; use batch_size={data['batch_size']}")
    module = instantiate({**data, "image_size": size, "resize": None, "batch_size": cfg["batch_size"]}, "data")
    assert isinstance(module, DataModule)
    module.need_images()
    return module


def output_folder(cfg: Mapping[str, Any], name: str) -> Path:
    """Where results go: `output`, or evaluation/<name> inside the model's folder. Refused early when not writable."""
    measured = str(cfg["model_path"] or Path(cfg["samples_path"]).name)
    model = Path(measured).expanduser()
    home = model / "evaluation" if model.is_dir() else Path("evaluation") / measured.replace("/", "--")
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


def _baselines(
    budgets: Sequence[int], cfg: Mapping[str, Any], image_size: int, left_out: dict[str, str]
) -> Baselines | None:
    """What is measured beside the tokenizer; with `lengths`, unless `baselines=false`. Codecs that Pillow has not are
    added to what is left out."""
    by_length = cfg["lengths"] is not None
    if not (by_length if cfg["baselines"] is None else cfg["baselines"]):
        return None
    there = codecs() if budgets else ()
    left_out |= {name: why_no_codec(name) for name in CODECS if budgets and name not in there}
    further = further_budgets(budgets[-1], image_size) if by_length and budgets else ()
    return Baselines(budgets, further=further, codecs=there, limit=cfg["baseline_images"])


def _sizes(spec: TokenSpec, length: int) -> dict[str, float]:
    """What `length` tokens take."""
    figures: dict[str, float] = {"tokens": length}
    bits, size = bits_of(spec, length), bytes_of(spec, length)
    if bits is not None and size is not None:
        figures |= {"bits_per_image": bits, "bytes_per_image": size, "bits_per_pixel": bits / spec.image_size**2}
    return figures


def split_name(data: DataModule) -> str:
    """Which images `data.test` are: the folder's name, or that they were held out of the training images."""
    source = data.test.source
    if source is data.train.source:
        return "held out"
    folders = Path(source.place(0)).parts
    return next((name for name in reversed(folders) if name in ("test", "val", "validation")), "validation")


def fingerprint(dataset: Any, batches: Sequence[Batch]) -> str:
    """A hash of the keys of the measured images, in order."""
    split, keys = dataset.split, hashlib.sha256()
    for batch in batches:
        for sample in split.samples[batch.samples].tolist():
            keys.update(split.source.key(sample).encode("utf-8", "surrogateescape") + b"\0")
    return keys.hexdigest()[:16]


def _first(
    tokenizer: Tokenizer,
    dataset: Any,
    batches: Sequence[Batch],
    count: int,
    lengths: Sequence[int],
    cfg: Mapping[str, Any],
    device: torch.device,
) -> list[Tensor]:
    """The first `count` images, and as they come at each of `lengths`: tensors (count, 3, h, w)."""
    shown: list[list[Tensor]] = []
    for number, batch in enumerate(batches):
        left = count - sum(len(images[0]) for images in shown)
        if left <= 0:
            break
        images = dataset.__getitems__(batch)["image"][:left].to(device).float() / 255
        seed = seed_of("evaluate", cfg["seed"], number)
        decoded = decode_prefixes(tokenizer, tokenizer.encode(images), lengths, seed=seed)
        shown.append([images, *(each for _, each in decoded)])
    return [torch.cat(parts) for parts in zip(*shown, strict=True)]


def _picture(
    tokenizer: Tokenizer,
    dataset: Any,
    batches: Sequence[Batch],
    cfg: Mapping[str, Any],
    device: torch.device,
    figures: Mapping[str, float],
) -> Any:
    """The first images over their reconstructions from the most tokens that were measured."""
    length = int(figures["tokens"])
    originals, decoded = _first(tokenizer, dataset, batches, cfg["pictures"], [length], cfg, device)
    spec = tokenizer.spec
    size = f", {figures['bits_per_image']:,.0f} bits an image" if "bits_per_image" in figures else ""
    count = sum(len(batch.samples) for batch in batches)
    said = [f"{name.upper()} {tables.shown(name, figures[name])}" for name in ("psnr", "ssim") if name in figures]
    return pictures.reconstructions(
        originals,
        decoded,
        title=f"{type(tokenizer).__name__}, {length} tokens{size}",
        note=", ".join([*said, f"{count:,} images of {spec.image_size} × {spec.image_size}"]),
    )


def _strip(
    tokenizer: Tokenizer,
    dataset: Any,
    batches: Sequence[Batch],
    lengths: Sequence[int],
    cfg: Mapping[str, Any],
    device: torch.device,
) -> Any:
    """The first images and what each number of tokens gives of them."""
    rows = min(cfg["pictures"], STRIP_ROWS)
    originals, *decoded = _first(tokenizer, dataset, batches, rows, lengths, cfg, device)
    captions = [pictures.tokens_in_words(k, bytes_of(tokenizer.spec, k)) for k in lengths]
    return pictures.strip(
        [("original", originals), *zip(captions, decoded, strict=True)],
        title=f"{type(tokenizer).__name__}: the first tokens of {tokenizer.spec.length}",
    )


def _plot(report: Mapping[str, Any], image_size: int) -> Any:
    """PSNR over bytes, on the images that the codecs got."""
    protocol, found = report["protocol"], report["rate_distortion"]
    data = f"test images of {protocol['data']['name']}, {protocol['resolution']} pixels"
    return plots.rate_distortion(
        found["curves"],
        lengths=[int(row["tokens"]) for row in report["by_length"]],
        image_size=image_size,
        mean_colour=found["mean_colour_psnr"],
        title=f"{protocol['model']['name']} beside image codecs",
        note=f"the first {found['images']:,} {data}",
    )


def _write(report: Mapping[str, Any], folder: Path, files: Mapping[str, Any]) -> dict[str, str]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = {
        "figures": folder / "metrics.json",
        "table": folder / "metrics.md",
        "picture": folder / "reconstructions.png",
    }
    paths["figures"].write_text(tables.to_json(report), encoding="utf-8")
    paths["table"].write_text(tables.to_markdown(report), encoding="utf-8")
    pictures.save_png(files["picture"], paths["picture"])
    if files.get("strip") is not None:
        paths["strip"] = pictures.save_png(files["strip"], folder / "strip.png")
    if files.get("plot") is not None:
        paths["plot"], paths["vector"] = folder / "rate-distortion.png", folder / "rate-distortion.svg"
        plots.save(files["plot"], paths["plot"], paths["vector"])
    return {name: str(path) for name, path in paths.items()}
