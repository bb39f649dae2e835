"""Ctrl-C and SIGTERM during an attack stop it at its next progress, never inside JAX or orbax.

An exception raised between two instructions of their code leaves half-made arrays behind: the state could then not be
saved. So while `deferred`, the first signal is only noted; a second one stops at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LATER = b"\nstopping at the next progress, to save the state; once more stops at once\n"

_state = {"deferring": False, "asked": False}


def install() -> None:
    """Both signals raise KeyboardInterrupt from now on: at once, or at the next `check` while `deferred`."""
    _state.update(deferring=False, asked=False)
    for number in SIGNALS:
        signal.signal(number, _handle)


def _handle(_signal, _frame) -> None:
    if not _state["deferring"] or _state["asked"]:
        raise KeyboardInterrupt
    _state["asked"] = True
    os.write(2, LATER)  # print is not safe here: the signal may have come inside another print


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """A signal in this block is raised by `check`, or at the block's end.

    Raises:
      KeyboardInterrupt: a signal came, and the block ended without checking.
    """
    _state["deferring"] = True
    try:
        yield
    except BaseException:
        _state.update(deferring=False, asked=False)
        raise
    _state["deferring"] = False  # a signal from here on raises at once, one before it is in `asked`
    asked, _state["asked"] = _state["asked"], False
    if asked:
        raise KeyboardInterrupt


def check() -> None:
    """Stop here if a signal asked to.

    Raises:
      KeyboardInterrupt: it did.
    """
    if _state["asked"]:
        raise KeyboardInterrupt
