"""`train.py` with a stub for training, for sweeps whose jobs run in processes of their own.

python sweep_stub.py -m optimizer.lr=1e-3,0.5 launcher=local
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import ModuleType

from omegaconf import DictConfig

from smalti import runs


def train(config: DictConfig) -> dict[str, float]:
    if config.optimizer.lr == 0.5:
        raise RuntimeError("the network fell over")
    if config.optimizer.lr == 0.75:
        time.sleep(3)  # while the others end
        os._exit(9)  # as when memory runs out
    runs.create(config)
    (Path(config.run) / "pid").write_text(str(os.getpid()))
    return {"psnr": 20.0 - config.optimizer.lr}


def install() -> None:
    stub = ModuleType("smalti.training.run")
    stub.train = train  # type: ignore[attr-defined]
    sys.modules["smalti.training.run"] = stub


install()  # in the processes of a launcher too, which import this module to find `run_job`
from smalti import sweep  # noqa: E402
from smalti.train import main  # noqa: E402


def run_job(config: DictConfig) -> object:
    return ORIGINAL(config)


ORIGINAL = sweep.run_job
if __name__ == "__main__":
    import sweep_stub

    if "SUBMITIT_LOCALLY" in os.environ:  # everything as for SLURM, but its own executor for one machine
        import submitit

        executor = submitit.AutoExecutor
        submitit.AutoExecutor = lambda cluster, **options: executor(cluster="local", **options)

    sweep.run_job = sweep_stub.run_job
    main()
