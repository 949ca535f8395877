"""What can go wrong in the quantizer and with checkpoints. Every message says what is wrong, where, and what to do.

QuantError
├── RecipeError        an option is out of range, or does not fit the model (a group size that does not divide)
├── SourceError        the source is no model this quantizer can read
├── OutputError        the output cannot be written: it exists, or the disk has no room for it
│   └── WriteError     writing failed on the way, as on a disk that others filled meanwhile
├── CheckpointError    a file of a checkpoint is missing, truncated, inconsistent or of an unknown format
└── QuantizationError  the computation failed, or gave a result that must not be written (not finite, fold not exact)
    ├── QualityError   the result is worse than the recipe allows; another bound may allow it
    └── DeviceFull     a GPU has no memory left; it may have some later
"""

from pathlib import Path


class QuantError(Exception):
    """The root: what the command line prints as one sentence, with exit code 2 for bad input and 1 otherwise."""

    exit_code = 2


class RecipeError(QuantError, ValueError):
    """field: the recipe's field at fault, for callers that call it something else; None where it is none of one field.

    An option that the message advises is named as the command line has it.
    """

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class SourceError(QuantError):
    pass


class OutputError(QuantError):
    pass


class WriteError(OutputError):
    exit_code = 1


class CheckpointError(QuantError):
    pass


class QuantizationError(QuantError):
    exit_code = 1


class QualityError(QuantizationError):
    pass


class DeviceFull(QuantizationError):
    pass


class Terminated(KeyboardInterrupt):
    """The system ends this process (SIGTERM, SIGHUP). Finished work is kept, which nobody asks for with Ctrl-C.

    kept_for: the output, as an absolute path, of the run that was ended by this and whose finished work was kept.
    """

    kept_for: Path | None = None
