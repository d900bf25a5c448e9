"""Training: `rankfold train` from Python.

from rankfold.train import train
result = train("run.yaml", "training.seed=1")   # or a dictionary with a run file's keys
result.after, result.output
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankfold.train.result import TrainResult as TrainResult
    from rankfold.train.rollouts import FoldedRollouts as FoldedRollouts
    from rankfold.train.run import train as train
    from rankfold.train.vllm_engine import VllmEngine as VllmEngine

# Looked up when they are asked for: the rest of the room imports the extra `train`, which rollouts do not need.
_HOMES = {"train": "run", "TrainResult": "result", "FoldedRollouts": "rollouts", "VllmEngine": "vllm_engine"}
__all__ = ["FoldedRollouts", "TrainResult", "VllmEngine", "train"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value
