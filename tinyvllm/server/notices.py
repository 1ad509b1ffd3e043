"""Warnings that are logged once: fields, tools and blocks of requests that have no effect here."""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)

_logged: set[tuple[str, str]] = set()
_MAX_LOGGED = 200  # clients choose the names, so the set needs a bound


def warn_once(message: str, name: str) -> None:
    """Log `message`, which has one %s for the name. Each pair of a message and a name is logged once."""
    if (message, name) not in _logged and len(_logged) < _MAX_LOGGED:
        _logged.add((message, name))
        log.warning(message + " (logged once)", ascii(name[:80]))
