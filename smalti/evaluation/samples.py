"""How good samples are: gFID, Inception Score, precision and recall by ADM's protocol, and a distance for machines that
have no Inception weights. Part of `evaluate.py`.

    python evaluate.py model_path=GENERATOR data.path=FOLDER samples=50000
    python evaluate.py samples_path=adm.npz reference=VIRTUAL_imagenet256_labeled.npz

Sample i is made from (seed, i) alone, as `generate.py` makes it, and quantised as that writes it; batches go to the
processes in turn. Images are looked at and let go: what is kept are sums and, for precision and recall, features in a
file. The reference is named in the report: the gFID of one is not comparable with that of another, nor with any rFID.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from smalti.data.module import DataModule
from smalti.errors import UserError
from smalti.evaluation import pictures, tables
from smalti.evaluation.adm import NEIGHBOURS, precision_recall
from smalti.evaluation.bounds import Bounds
from smalti.evaluation.classifier import BATCH, Trained, classes_of, load_classifier, train_classifier
from smalti.evaluation.inception import Inception, load_inception
from smalti.evaluation.inception import why_absent as why_no_inception
from smalti.evaluation.metrics import FeatureExtractor, FeatureMoments, InceptionScore, frechet_distance
from smalti.evaluation.protocol import describe_model, libraries, preprocessing, sha256_of
from smalti.evaluation.references import (
    Batches,
    Reference,
    channels_first,
    drawn_by,
    of_loader,
    reference_of,
    samples_file,
)
from smalti.evaluation.run import data_of_size, load_tokenizer, output_folder
from smalti.evaluation.sampling import override_sampling
from smalti.generation import Sampler, columns_for, load_sampler, with_prompts
from smalti.headway import Headway

SAMPLES = 50_000  # ADM's number
SPLIT = 5_000  # of the Inception Score
RECALLED = 10_000  # reference images of precision and recall: as many as ADM's files hold
CLASSIFIED = "classifier_frechet_distance"


class Seen:
    """What is kept of `images` images: sums of features, the score's sums, and the first features in a file."""

    def __init__(
        self,
        images: int,
        inception: FeatureExtractor | None,
        classifier: FeatureExtractor | None,
        features: np.ndarray | None = None,
    ) -> None:
        self.images, self.inception, self.classifier, self.features = images, inception, classifier, features
        self.moments = FeatureMoments(inception.width if inception else 0)
        self.score = InceptionScore(inception.classes if inception else 0, split_size=SPLIT, images=images)
        self.classified = FeatureMoments(classifier.width if classifier else 0)

    @torch.inference_mode()
    def update(self, images: Tensor, numbers: range) -> None:
        """images: uint8 (b, 3, h, w), those of `numbers`."""
        if self.inception is not None:
            features, logits = self.inception(images)
            self.moments.update(features)
            self.score.update(logits, torch.arange(numbers.start, numbers.stop))
            if self.features is not None and numbers.start < len(self.features):
                kept = features[: len(self.features) - numbers.start]
                self.features[numbers.start : numbers.start + len(kept)] = kept.cpu().numpy()
        if self.classifier is not None:
            self.classified.update(self.classifier(images)[0])

    def all_reduce(self) -> None:
        """Add up over all processes."""
        for sums in (self.moments, self.score, self.classified):
            sums.all_reduce()


@dataclass(frozen=True)
class Measurement:
    """One evaluation of samples of `size` × `size` pixels: its config, its data, its process, what it leaves out."""

    cfg: Mapping[str, Any]
    size: int
    data: DataModule
    device: torch.device
    rank: int
    world_size: int
    left_out: dict[str, str] = field(default_factory=dict)

    def look(self, seen: Seen, batches: Batches, what: str) -> Seen:
        """One pass over all images of `seen`, `batch_size` at a time, each process at its own."""
        step = self.cfg["batch_size"]
        ranges = [range(start, min(start + step, seen.images)) for start in range(0, seen.images, step)]
        mine = ranges[self.rank :: self.world_size]
        headway = Headway(sum(map(len, mine)), what, say=self.rank == 0)
        for numbers, images in zip(mine, batches(mine), strict=True):
            seen.update(images, numbers)
            headway.add(len(images))
        seen.all_reduce()
        return seen

    def inception(self, reference: Reference) -> Inception | None:
        inception = load_inception(self.cfg["inception_weights"])
        if inception is None:
            self.left_out["gfid"] = f"{why_no_inception()}; so do inception_score, precision and recall"
            return None
        if reference.statistics is not None and len(reference.statistics.mean) != inception.width:
            raise UserError(
                f"reference={self.cfg['reference']} has statistics of {len(reference.statistics.mean)} features, but "
                f"Inception's pool has {inception.width}; give a file of ADM's evaluation suite"
            )
        return inception if self.device.type == "mps" else inception.to(self.device)  # mps has no float64

    def classifier(self, reference: Reference | None) -> Trained | None:
        """The classifier of the data, trained first where it is new or asked for; None: `left_out` says why."""
        cfg, why, classes = self.cfg, None, 0
        if cfg["classifier"] == "none":
            why = "classifier=none"
        elif reference is not None and not reference.count:
            why = f"needs images, but reference={cfg['reference']} has statistics alone"
        elif reference is not None and not reference.of_data and self.data.path is None:
            why = "needs labelled images like those of the reference: data.path=FOLDER"
        elif (classes := classes_of(self.data)) < 2:
            why = f"needs labels of two classes or more; the data have {'one' if classes else 'none'}"
        if why is not None:
            self.left_out[CLASSIFIED] = why
            return None
        steps, batch_size = cfg["classifier_steps"], min(BATCH, len(self.data.train))
        data = data_of_size(self.size, {**cfg, "batch_size": batch_size}, "the classifier")
        again = cfg["classifier"] == "train"
        if self.rank == 0 and (again or load_classifier(data, steps=steps, device=self.device) is None):
            why = "classifier=train" if again else "no classifier of these data and this budget yet"
            print(f"{why}: training one, classifier_steps={steps} of {batch_size} images", flush=True)
            train_classifier(data, steps=steps, device=self.device)
        if self.world_size > 1:
            dist.barrier()
        return load_classifier(data, steps=steps, device=self.device)

    @contextmanager
    def feature_files(self, output: Path, rows: Mapping[str, int], width: int) -> Iterator[list[np.ndarray]]:
        """Arrays (rows, width) in files of the output folder, which all processes write; in the end they are gone."""
        files = [output / f".features-{name}.npy" for name in rows]
        try:
            if self.rank == 0:
                output.mkdir(parents=True, exist_ok=True)
                for file, count in zip(files, rows.values(), strict=True):
                    np.lib.format.open_memmap(file, "w+", dtype=np.float32, shape=(count, width))
            if self.world_size > 1:
                dist.barrier()
            yield [np.lib.format.open_memmap(file, "r+") for file in files]
        finally:
            if self.rank == 0:
                for file in files:
                    file.unlink(missing_ok=True)


def measure_samples(cfg: Mapping[str, Any], device: torch.device, rank: int, world_size: int) -> dict[str, Any]:
    """The figures of a generator's samples, or of those in a file; the first process writes and prints them."""
    sampler = None
    if cfg["samples_path"] is not None:
        file = samples_file(cfg)
        assert file.shape is not None
        size, count, drawn = file.shape[1], cfg["samples"] or file.count, channels_first(file.batches)
    else:
        sampler = load_sampler(cfg, device)
        size, count = sampler.size or sampler.tokenizer.spec.image_size, cfg["samples"] or SAMPLES
    data = data_of_size(size, cfg, "the evaluation")
    if sampler is not None:
        if sampler.generator.text_dim is not None:
            sampler = with_prompts(sampler, captions_for(cfg, data), cfg)
        drawn = drawn_by(sampler.pictures)
    run = Measurement(cfg, size, data, device, rank, world_size)
    reference = reference_of(cfg, data, size)
    output = output_folder(cfg, Path(str(data.path or "shapes")).name)
    inception, trained = run.inception(reference), run.classifier(reference)

    figures: dict[str, float] = {}
    bounds: dict[str, Seen] = {}
    network = None if trained is None else trained.network
    real, fake = Seen(reference.count, inception, network), Seen(count, inception, network)
    rows = {"reference": min(RECALLED, reference.count), "samples": count} if inception and reference.count else {}
    with run.feature_files(output, rows, inception.width if inception else 0) as files:
        if files:
            real.features, fake.features = files
        if inception or network:
            if reference.count:
                run.look(real, reference.batches, "reference images")
            run.look(fake, drawn, "samples")
        if inception:
            figures |= _by_adm(run, real, fake, reference)
    if network is not None:
        bounds = _bounds(run, sampler, network, count)
        for name, seen in {"": fake, **bounds}.items():
            figures[CLASSIFIED + name] = frechet_distance(real.classified, seen.classified)
    report: dict[str, Any] = {
        "figures": figures,
        "left_out": run.left_out,
        "notes": _notes(figures, reference, trained),
        "protocol": {
            "images": count,
            "resolution": f"{size} × {size}",
            "reference": reference.about,
            "preprocessing": preprocessing(data.crop, size) if reference.of_data else None,
            "model": _model(cfg, sampler),
            "generation": None if sampler is None else sampler.describe(),
            "weights": {"inception": inception.hash} if inception else {},
            "classifier": None if trained is None else trained.describe(),
            "bounds": {name[1:]: seen.images for name, seen in bounds.items()},
            "batch_size": cfg["batch_size"],
            "processes": world_size,
            "device": device.type,
            "seed": cfg["seed"],
            "libraries": libraries(),
        },
    }
    if rank == 0:
        report["files"] = _write(report, output, _picture(drawn, sampler, report, cfg))
        print(tables.to_text(report))
        print("\n".join(f"{name:8} {path}" for name, path in report["files"].items()))
    return report


def captions_for(cfg: Mapping[str, Any], data: DataModule) -> list[str]:
    """What a generator by text is given: captions of the test images. Raises UserError where there are none."""
    if not (captions := data.test_captions()):
        raise UserError(
            f"model_path={cfg['model_path']} makes pictures of texts, but the test images of {data.path or 'shapes'} "
            "have no captions; give shards with KEY.txt"
        )
    return captions


def train_alone(cfg: Mapping[str, Any], device: torch.device, rank: int, world_size: int) -> dict[str, Any]:
    """`classifier=train` without samples: the classifier of these data, for later."""
    size = cfg["data"]["image_size"]
    if size is None:
        raise UserError("data.image_size=null: a classifier is trained for one size; give data.image_size=64, or so")
    run = Measurement(cfg, size, data_of_size(size, cfg, "the classifier"), device, rank, world_size)
    trained = run.classifier(None)
    if trained is None:
        raise UserError(f"classifier=train {run.left_out[CLASSIFIED]}")
    if rank == 0:
        print(f"{trained.words()}, {trained.steps:,} steps")
    return {"classifier": trained.describe()}


def _by_adm(run: Measurement, real: Seen, fake: Seen, reference: Reference) -> dict[str, float]:
    figures = {"gfid": frechet_distance(reference.statistics or real.moments, fake.moments)}
    figures["inception_score"] = fake.score.compute()
    if real.features is None or fake.features is None:
        run.left_out["precision"] = f"needs images, but reference={reference.about['name']} has statistics alone"
    elif min(len(real.features), len(fake.features)) <= NEIGHBOURS:
        run.left_out["precision"] = f"needs more than {NEIGHBOURS} images on each side; so does recall"
    elif run.rank == 0:  # all processes have written their features: sums were added since
        ours, theirs = (torch.from_numpy(features).to(run.device) for features in (fake.features, real.features))
        figures["precision"], figures["recall"] = precision_recall(theirs, ours, half=True)
    return figures


def _bounds(run: Measurement, sampler: Sampler | None, network: FeatureExtractor, count: int) -> dict[str, Seen]:
    """What the distance of samples lies between: other real images, their reconstructions, random tokens."""
    cfg, data = run.cfg, run.data
    if (asked := count if cfg["bounds"] is None else cfg["bounds"]) == 0:
        return {}
    others = data.reference_loader if cfg["reference"] == "test" else data.test_loader
    there, images, _ = of_loader(others(images=asked), data)
    found = {"_real": run.look(Seen(there, None, network), images, "real images")}
    if sampler is not None:
        tokenizer = sampler.tokenizer
    elif cfg["tokenizer_path"] is not None:
        tokenizer = load_tokenizer(cfg["tokenizer_path"], cfg["teacher_path"], key="tokenizer_path").to(run.device)
        override_sampling(tokenizer, cfg["decoding"], "decoding")
    else:
        run.left_out[f"{CLASSIFIED}_reconstructions"] = "needs the samples' tokenizer: tokenizer_path=DIR"
        return found
    bounds = Bounds(tokenizer, run.device, length=cfg["length"], size=run.size, seed=cfg["seed"])
    passes: dict[str, tuple[int, Batches]] = {
        "_reconstructions": (there, lambda ranges: bounds.reconstructions(ranges, images(ranges))),
        f"_{bounds.random_name}": (asked, bounds.random),
    }
    for name, (number, batches) in passes.items():
        found[name] = run.look(Seen(number, None, network), batches, name[1:].replace("_", " "))
    return found


def _notes(figures: Mapping[str, float], reference: Reference, trained: Trained | None) -> list[str]:
    """What must be said beside the figures, so that nobody takes one for another."""
    notes = []
    if "gfid" in figures:
        notes.append(
            f"gfid is against {reference.words()}; neither the gfid of another reference nor a tokenizer's rfid is "
            "comparable"
        )
    if trained is not None:
        notes.append(
            f"{CLASSIFIED} is no FID: its features are those of {trained.words()}; comparable with figures of this "
            "classifier and this reference only"
        )
    return notes


def _model(cfg: Mapping[str, Any], sampler: Sampler | None) -> dict[str, Any]:
    if sampler is not None:
        return describe_model(sampler.generator, cfg)
    path = Path(cfg["samples_path"]).expanduser()
    return {"path": str(path), "name": f"Samples of {path.name}", "sha256": sha256_of(path)}


def _picture(drawn: Batches, sampler: Sampler | None, report: Mapping[str, Any], cfg: Mapping[str, Any]) -> Any:
    """The first samples, with some figures below."""
    count, step = min(cfg["pictures"], report["protocol"]["images"]), cfg["batch_size"]
    images = torch.cat(list(drawn([range(start, min(start + step, count)) for start in range(0, count, step)])))
    said = [f"{name} {tables.shown(name, value)}" for name, value in list(report["figures"].items())[:4]]
    return pictures.grid(
        [images],
        columns=columns_for((sampler.labels or sampler.prompts) if sampler else None),
        title=f"{report['protocol']['model']['name']}, {report['protocol']['resolution']}",
        note=", ".join(said),
    )


def _write(report: Mapping[str, Any], folder: Path, picture: Any) -> dict[str, str]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"figures": folder / "metrics.json", "table": folder / "metrics.md"}
    paths["figures"].write_text(tables.to_json(report), encoding="utf-8")
    paths["table"].write_text(tables.to_markdown(report), encoding="utf-8")
    paths["picture"] = pictures.save_png(picture, folder / "samples.png")
    return {name: str(path) for name, path in paths.items()}
