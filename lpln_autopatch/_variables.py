"""The names of our environment variables, and the search for one that has no effect."""

from __future__ import annotations

import os
from collections.abc import Callable

NAMES = ("LPLN_PRECISION", "LPLN_BACKEND", "LPLN_NORMS", "LPLN_EXEMPT", "LPLN_SUMMARY")


def mistake(asks: Callable[[str], bool]) -> str | None:
    """Return a sentence about variables that are misspelt or lack LPLN_PRECISION, or None.

    Args:
        asks: Returns True if a value asks for a precision, or for another effect.
    """
    main, *others = NAMES
    given = [name for name in os.environ if name.startswith("LPLN_")]
    if main in given and not asks(os.environ[main]):
        return None
    for name in given:
        if name not in NAMES:
            from difflib import get_close_matches  # costs nothing: torch has imported it

            stems = [our.removeprefix("LPLN_") for our in NAMES]
            meant = get_close_matches(name.removeprefix("LPLN_"), stems, 1, 0.75)
            if meant:
                return f"{name} has no effect: did you mean LPLN_{meant[0]}?"
    alone = [name for name in others if asks(os.environ.get(name, ""))]
    if alone and main not in given:
        verb = "has" if len(alone) == 1 else "have"
        sentence = f"{' and '.join(alone)} {verb} no effect at this import without {main}"
        return f"{sentence}: did you mean {main}=amp, too?"
    return None
