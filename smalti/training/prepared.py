"""What a kind of run hands to the part that all runs share (smalti/training/run.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import lightning.pytorch as pl

from smalti.data.module import DataModule
from smalti.model import Model
from smalti.training.module import TrainingModule


@dataclass(frozen=True)
class Prepared:
    """A run, built and checked, before anything is written.

    measuring: makes the callbacks that measure and show the model. shows: what its pictures are, such as
    "reconstructions"; None: it draws none. beside: models that were made for the run, and the folders of the run's that
    they are exported to at its start.
    """

    module: TrainingModule
    data: DataModule
    measuring: Callable[[], list[pl.Callback]]
    shows: str | None
    beside: Mapping[str, Model] = field(default_factory=dict)
