"""ADM's figures of generated images, their features given (family llamagen-eval)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from smalti.evaluation.adm import nearest_radii, precision_recall
from smalti.evaluation.metrics import FeatureMoments, InceptionScore, frechet_distance

pytestmark = pytest.mark.family("llamagen-eval")


def moments(features: Tensor) -> FeatureMoments:
    result = FeatureMoments(features.shape[1])
    for batch in features.split(32):
        result.update(batch)
    return result


def test_the_frechet_distance_is_the_published_one(case: Any) -> None:
    samples = moments(case.inputs["samples"])
    case.compare("mu", samples.mean)
    case.compare("sigma", samples.covariance)
    case.compare("fid", frechet_distance(moments(case.inputs["reference"]), samples))


def test_the_inception_score_of_splits_is_the_published_one(case: Any) -> None:
    logits = case.inputs["samples"] @ case.inputs["softmax_weight"]
    images, split_size = len(logits), case.config["split_size"]
    halves = [InceptionScore(logits.shape[1], split_size=split_size, images=images) for _ in range(2)]
    numbers = torch.arange(images)
    for half, score in enumerate(halves):  # as two processes that take turns, and merge
        for batch in numbers[half::2].split(32):
            score.update(logits[batch], batch)
    halves[0].merge(halves[1])
    case.compare("inception_score", halves[0].compute())


def test_precision_and_recall_are_the_published_ones(case: Any) -> None:
    options = {"half": case.config["half"], "block": case.config["batch"]}
    reference, samples = case.inputs["reference"], case.inputs["samples"]
    for name, points in (("reference", reference), ("samples", samples)):
        if f"radii_{name}" in case.outputs:
            case.compare(f"radii_{name}", nearest_radii(points, **options)[:, None])
    precision, recall = precision_recall(reference, samples, **options)
    assert precision == pytest.approx(case.outputs["precision"].item(), abs=1e-12)
    assert recall == pytest.approx(case.outputs["recall"].item(), abs=1e-12)
