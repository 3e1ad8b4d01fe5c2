"""A small classifier, trained here, whose features stand in for Inception's on machines without those weights.

uint8 images (b, 3, h, w) -> 128 features and logits: a ResNet (He et al. 2016, arXiv:1512.03385) of three stages, which
learns the labels of the data that samples are compared with. The Fréchet distance of its features orders samples of one
data set as long as the classifier is the same one; it is no FID, and another classifier's figures are not comparable.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from smalti.data.module import DataModule
from smalti.data.source import replacing
from smalti.errors import UserError
from smalti.evaluation.protocol import sha256_of
from smalti.headway import Headway
from smalti.training.draws import generator as draws_of

WIDTHS = (32, 64, 128)
SIDE = 32  # larger images are made this small first: it must be cheap on a CPU
BATCH = 64
LR, WEIGHT_DECAY = 3e-3, 0.05
TESTED = 10_000  # images of its accuracy
LOOKED_AT = 64  # images whose pixels go into the key, beside the keys of all


@dataclass(frozen=True)
class Trained:
    """A classifier and what a figure must say of it.

    hash: SHA-256 of its weights' file. accuracy: share of `tested` test images that it names rightly.
    """

    network: Classifier
    hash: str
    accuracy: float
    tested: int
    steps: int

    def describe(self) -> dict[str, Any]:
        return {
            "hash": self.hash,
            "accuracy": self.accuracy,
            "tested_on": self.tested,
            "steps": self.steps,
            "batch_size": BATCH,
            "features": self.network.width,
            "classes": self.network.classes,
        }

    def words(self) -> str:
        """Which one it is, in half a line."""
        return f"classifier {self.hash[:16]} (test accuracy {100 * self.accuracy:.1f} % on {self.tested:,} images)"


class Block(nn.Module):
    """Two convolutions beside a shortcut, (b, c, h, w) -> (b, c', h / stride, w / stride)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.shortcut = nn.Identity() if before == after else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(h + self.shortcut(x))


class Classifier(nn.Module):
    """Features and logits as `metrics.FeatureExtractor` has them."""

    width = WIDTHS[-1]

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.stem = nn.Sequential(nn.Conv2d(3, WIDTHS[0], 5, 2, 2, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU())
        befores = (WIDTHS[0], *WIDTHS)
        self.blocks = nn.Sequential(*(Block(a, b, 1 if a == b else 2) for a, b in zip(befores, WIDTHS, strict=False)))
        self.head = nn.Linear(self.width, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images: uint8 (b, 3, h, w). Returns features (b, 128) and logits (b, classes), float32."""
        x = images.to(self.head.weight.device).float() / 127.5 - 1
        if max(x.shape[-2:]) > SIDE:
            x = F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
        features = self.blocks(self.stem(x)).mean((2, 3))
        return features, self.head(features)


def classes_of(data: DataModule) -> int:
    """How many classes the data's labels tell apart."""
    return data.largest_label() + 1


def load_classifier(data: DataModule, *, steps: int, device: torch.device) -> Trained | None:
    """The classifier of these data and this budget, or None where none was trained yet."""
    file = _file(data, steps)
    try:
        with safe_open(file, "pt") as saved:
            state = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118 (not a dict)
            said = json.loads(saved.metadata()["classifier"])
        network = Classifier(said["classes"])
        network.load_state_dict(state)
    except FileNotFoundError:
        return None
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{file} is damaged; remove it, or train it again by classifier=train") from error
    return Trained(network.to(device).eval(), sha256_of(file), said["accuracy"], said["tested"], steps)


def train_classifier(data: DataModule, *, steps: int, device: torch.device) -> None:
    """Learn the labels of the training images in `steps` steps, measure it on the test images, and keep it in the cache
    folder of the data."""
    classes = classes_of(data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(data.seed)
        network = Classifier(classes).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    headway = Headway(steps, "steps of the classifier")
    for step, batch in enumerate(data.train_loader(total=steps)):
        draws = draws_of("classifier", data.seed, step)
        images = _blurred(_shifted(batch["image"], draws), draws)
        loss = F.cross_entropy(network(images.to(device))[1], batch["label"].to(device), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        headway.add(1)
    accuracy, tested = _accuracy(network.eval(), data)
    file = _file(data, steps)
    said = json.dumps({"classes": classes, "accuracy": accuracy, "tested": tested})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            state = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
            save_file(state, temporary, metadata={"classifier": said})
    except OSError as error:
        raise UserError(f"data.cache: {file} cannot be written ({error.strerror}); give data.cache=DIR") from error


@torch.inference_mode()
def _accuracy(network: Classifier, data: DataModule) -> tuple[float, int]:
    right = tested = 0
    for batch in data.test_loader(images=TESTED):
        known = batch["label"] >= 0
        right += int((network(batch["image"])[1].argmax(1).cpu() == batch["label"])[known].sum())
        tested += int(known.sum())
    return right / max(tested, 1), tested


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to an eighth of its side, edges mirrored."""
    side, most = images.shape[-1], max(1, images.shape[-1] // 8)
    padded = F.pad(images.float(), (most,) * 4, mode="reflect").to(torch.uint8)
    places = torch.randint(2 * most + 1, (len(images), 2), generator=generator).tolist()
    return torch.stack([one[:, y : y + side, x : x + side] for one, (y, x) in zip(padded, places, strict=True)])


def _blurred(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images, the first ones, made 2 to 8 times smaller and enlarged again.

    What tokenizers of few tokens decode is blurred: a classifier that has only seen sharp images takes that for a class
    of its own, and uniform tokens for nearer to real images than reconstructions are.
    """
    side, half = images.shape[-1], len(images) // 2
    small = max(1, side // int(torch.randint(2, 9, (), generator=generator)))
    x = F.interpolate(images[:half].float(), size=(small, small), mode="bilinear", antialias=True, align_corners=False)
    x = F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
    return torch.cat([x.round().to(torch.uint8), images[half:]])


def _file(data: DataModule, steps: int) -> Path:
    """Where the classifier of these data lies: named by a hash of the data and of everything that training depends on.

    Keys alone do not tell two folders of 0.png, 1.png, … apart, so that the first images are looked at.
    """
    settings = {
        "data": data.describe() | {"name": None},
        "image_size": data.image_size,
        "preprocessing": [data.crop, data.resize, data.flip],
        "training": [steps, data.batch_size, data.seed, LR, WEIGHT_DECAY],
        "network": [*WIDTHS, SIDE],
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for batch in data.reference_loader(images=LOOKED_AT):
        digest.update(batch["image"].numpy().tobytes() + batch["label"].numpy().tobytes())
    return data.cache / "classifiers" / f"{digest.hexdigest()[:32]}.safetensors"
