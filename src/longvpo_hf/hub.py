"""Whether the Hub can be reached at all: a machine without a network should say so in seconds.

huggingface_hub and datasets ask again for minutes, file by file, where nobody answers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

#: For one answer, of any kind.
_MOST_SECONDS = 5.0


def go_offline_if_unreachable(names: Iterable[str | None]) -> None:
    """Has this process and its children ask nothing of the Hub, as with HF_HUB_OFFLINE=1, where it does not answer.

    What is in the Hub's cache is then used, and what is not is an error at once. Says so on stderr.

    Args:
        names: What is needed: the Hub is asked only if one of them is no path on this machine.
    """
    if all(name is None or os.path.exists(name) for name in names):
        return
    import httpx2
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    try:
        httpx2.head(constants.ENDPOINT, timeout=_MOST_SECONDS)
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, ImportError) as error:  # the latter: of proxy settings
        print(
            f"{constants.ENDPOINT} cannot be reached ({error or type(error).__name__}): going on with what is in "
            f"{Path(constants.HF_HUB_CACHE)}, as with HF_HUB_OFFLINE=1.",
            file=sys.stderr,
        )
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:  # it has its own copy
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
