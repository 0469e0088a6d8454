"""Whether the Hugging Face hub can be reached: where it cannot, its library looks into its cache and asks no more."""

from __future__ import annotations

import logging
import ssl
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

log = logging.getLogger(__name__)

PATIENCE = 4.0  # seconds that the hub, or the proxy on the way there, has for an answer
SWITCH = "HF_HUB_OFFLINE"


@contextmanager
def within_reach() -> Iterator[None]:
    """Within, the library (imported before) tries the hub again and again only if it answers at all; without network
    that takes it a minute for each file."""
    import huggingface_hub.constants as constants

    known: list[Any] = [constants, sys.modules.get("datasets.config")]
    places = [place for place in known if getattr(place, SWITCH, True) is False]
    off = bool(places) and not _answers(str(constants.ENDPOINT))
    if off:
        log.warning(
            "%s does not answer within %.0f s: only the cache is looked into", constants.ENDPOINT, PATIENCE
        )
    for place in places if off else ():
        setattr(place, SWITCH, True)
    try:
        yield
    finally:
        for place in places if off else ():
            setattr(place, SWITCH, False)


def _answers(url: str) -> bool:
    """Whether anything comes from ``url``; looking up its name may take longer than any timeout."""
    found: list[bool] = []

    def ask() -> None:
        try:
            with urlopen(Request(url, method="HEAD"), timeout=PATIENCE):
                found.append(True)
        except HTTPError:
            found.append(True)
        except URLError as error:  # whose certificates are others', the library may know
            found.append(isinstance(error.reason, ssl.SSLError))
        except (OSError, ValueError):
            found.append(False)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE)
    return bool(found) and found[0]
