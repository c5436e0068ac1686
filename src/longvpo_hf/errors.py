"""Errors that a user can mend.

    LongVPOError
    ├── ConfigError     a setting, or settings that exclude each other
    ├── CorpusError     a corpus, an archive or a metadata file is not as its reader expects
    ├── VideoError      a video, or a clip of one, cannot be read
    ├── DatasetError    preference rows, captions or the folder they are in
    ├── ModelError      a checkpoint, a processor or a model's family
    ├── TrainingError   a run whose numbers are no longer finite
    └── EndpointError   a server that answers requests

Every message says what was wrong, with the value and the bound, and what to do. The command line shows these as one
line of advice and lets every other exception show its traceback: a defect of ours must not look like advice.

The subclasses are `ValueError`s too, or `RuntimeError`s where the arguments were right and the world was not, so that
code that catches the built-in ones keeps working.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

#: Exit status of a program that ends with advice, as argparse has it.
_ADVICE = 2


class LongVPOError(Exception):
    """Base of the errors that a user can mend."""


class ConfigError(LongVPOError, ValueError):
    """A setting has a value it cannot have, or settings exclude each other."""


class CorpusError(LongVPOError, ValueError):
    """A corpus is not as its reader expects; names the file, the record and the field."""


class VideoError(LongVPOError, ValueError):
    """A video, or a clip of one, cannot be read."""


class DatasetError(LongVPOError, ValueError):
    """Preference rows or captions, or the folder that holds them, are not as they should be."""


class ModelError(LongVPOError, ValueError):
    """A checkpoint or a processor is missing or cannot do what is asked of it."""


class TrainingError(LongVPOError, RuntimeError):
    """A run cannot go on: its loss, a gradient or a weight is not finite."""


class EndpointError(LongVPOError, RuntimeError):
    """A server refuses what it is asked, or is gone."""


@contextmanager
def advice(program: str) -> Iterator[None]:
    """Shows a `LongVPOError` as one line of advice and ends the program with status 2; raises every other exception.

    Args:
        program: What the user called, to begin the line with.
    """
    try:
        yield
    except LongVPOError as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(_ADVICE)
