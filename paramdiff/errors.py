"""Every error that paramdiff raises on purpose.

    ParamdiffError
    ├── CheckpointError        something about one checkpoint, file or tensor
    │   ├── NotFound           the path does not exist, or holds no checkpoint
    │   ├── UnsupportedFormat  recognised, but not readable by this version
    │   ├── BrokenFile         truncated, inconsistent or unreadable
    │   └── ChangedWhileReading
    ├── PairingError           the two sides cannot be matched one to one
    │   └── NothingToCompare   no tensor has a partner
    ├── OptionError            an option that makes no sense
    ├── DeviceError            the device asked for is not there
    └── OutputError            a result could not be written or read

Each message is one sentence that names the file or tensor and says what was expected against what was found; `hint`
is the next step, where there is one. The library never prints; the CLI shows both.
"""

from __future__ import annotations


class ParamdiffError(Exception):
    """Base class. `str(error)` is the sentence, followed by the hint.

    >>> str(ParamdiffError("No such path: x.", hint="Check the spelling."))
    'No such path: x. Check the spelling.'
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message} {hint}")
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions cross process boundaries; the default would call __init__ without the hint.
        return (_rebuild, (type(self), self.message, self.hint))


def _rebuild(kind: type[ParamdiffError], message: str, hint: str | None) -> ParamdiffError:
    return kind(message, hint=hint)


class CheckpointError(ParamdiffError):
    """Something about one checkpoint, file or tensor."""


class NotFound(CheckpointError):
    """The path does not exist, or holds no checkpoint."""


class UnsupportedFormat(CheckpointError):
    """Recognised, but not readable by this version."""


class BrokenFile(CheckpointError):
    """Truncated, inconsistent or unreadable."""


class ChangedWhileReading(CheckpointError):
    """The file was rewritten while it was being read, so the numbers would mix two states."""


class PairingError(ParamdiffError):
    """The two sides cannot be matched one to one."""


class NothingToCompare(PairingError):
    """No tensor of one side has a partner on the other."""


class OptionError(ParamdiffError):
    """An option that makes no sense."""


class DeviceError(ParamdiffError):
    """The device asked for is not there."""


class OutputError(ParamdiffError):
    """A result could not be written or read."""
