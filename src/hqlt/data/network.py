"""Whether the Hugging Face hub answers: asked once, and not again and again for a minute by each library."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

SECONDS = 5


@contextlib.contextmanager
def offline_if_unreachable(name: str = "") -> Iterator[str]:
    """Where the hub does not answer, only what is cached is looked for within the context.

    name: of what is looked for; a local file or folder needs no hub. Gives an empty text, or a clause that says so.
    """
    if name and Path(name).exists():
        yield ""
        return
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield "HF_HUB_OFFLINE is set; "
    elif answers():
        yield ""
    else:
        with contextlib.ExitStack() as stack:
            for settings in filter(None, (constants, sys.modules.get("datasets.config"))):
                stack.callback(setattr, settings, "HF_HUB_OFFLINE", False)
                setattr(settings, "HF_HUB_OFFLINE", True)  # noqa: B010
            yield f"{constants.ENDPOINT} does not answer; "


def answers() -> bool:
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception:  # of whichever library it asks by
        return False
    return True
