"""Whether the Hugging Face hub is reachable: checked once, instead of each library retrying for a minute."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

TIMEOUT_SECONDS = 5


@contextlib.contextmanager
def offline_if_unreachable(name: str = "") -> Iterator[str]:
    """Use only the local cache within this context if the hub does not answer.

    name: what is going to be loaded; the hub is not checked for a local file or folder. Yields a clause for error
    messages that says why the hub is not used, or an empty string.
    """
    if name and Path(name).exists():
        yield ""
        return
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield "HF_HUB_OFFLINE is set; "
    elif hub_answers():
        yield ""
    else:
        with contextlib.ExitStack() as stack:
            for settings in filter(None, (constants, sys.modules.get("datasets.config"))):
                stack.callback(setattr, settings, "HF_HUB_OFFLINE", False)
                setattr(settings, "HF_HUB_OFFLINE", True)  # noqa: B010
            yield f"{constants.ENDPOINT} does not answer; "


def hub_answers() -> bool:
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT_SECONDS)
    except Exception:  # the error type depends on the HTTP library
        return False
    return True
