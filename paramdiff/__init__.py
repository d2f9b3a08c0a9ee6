"""paramdiff: see what training did to the weights.

>>> import paramdiff
>>> diff = paramdiff.compare("sample_data/base", "sample_data/rl-adamw", tolerances=[1e-5])
>>> round(diff.summary()["sparsity"], 3)
0.387

Names are imported when first used, so that `import paramdiff` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paramdiff.comparing import compare
    from paramdiff.diff import Diff
    from paramdiff.errors import (
        BrokenFile,
        ChangedWhileReading,
        CheckpointError,
        DeviceError,
        NotFound,
        NothingToCompare,
        OptionError,
        OutputError,
        PairingError,
        ParamdiffError,
        UnsupportedFormat,
    )
    from paramdiff.loading import load
    from paramdiff.moments import Moments
    from paramdiff.optimizers import OptimizerState, optimizer
    from paramdiff.optimizers.measuring import adam
    from paramdiff.report import write_report

__version__ = "0.1.0"

_HOME = {
    "Diff": "diff", "compare": "comparing", "load": "loading", "Moments": "moments", "adam": "optimizers.measuring",
    "OptimizerState": "optimizers", "optimizer": "optimizers", "write_report": "report",
    "ParamdiffError": "errors", "CheckpointError": "errors", "NotFound": "errors", "UnsupportedFormat": "errors",
    "BrokenFile": "errors", "ChangedWhileReading": "errors", "PairingError": "errors", "NothingToCompare": "errors",
    "OptionError": "errors", "DeviceError": "errors", "OutputError": "errors",
}  # fmt: skip

__all__ = [
    "BrokenFile",
    "ChangedWhileReading",
    "CheckpointError",
    "DeviceError",
    "Diff",
    "Moments",
    "NotFound",
    "NothingToCompare",
    "OptimizerState",
    "OptionError",
    "OutputError",
    "PairingError",
    "ParamdiffError",
    "UnsupportedFormat",
    "adam",
    "compare",
    "load",
    "optimizer",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"paramdiff.{_HOME[name]}"), name)
    raise AttributeError(f"module 'paramdiff' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
