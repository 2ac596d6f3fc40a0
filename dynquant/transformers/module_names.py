"""Entries of modules_to_not_convert, and the modules that they fit."""

import re
import time

import regex

_PATTERN_SECONDS = 10  # for all patterns and all modules of a model


def kept(names, patterns):
    """Those of `names` that an entry of modules_to_not_convert fits: from the start to the end or a
    dot, as a regular expression, or literally at the end. So transformers reads it, too, but with
    re, which may backtrack for ever over a pattern that somebody else has written.
    """
    compiled = [(regex.compile(rf"(?:{one})(?:(?<=\.)|(?=\.|$))"), one) for one in patterns]
    end = time.monotonic() + _PATTERN_SECONDS

    def fits(pattern, literal, name):
        left = max(end - time.monotonic(), 1e-3)
        try:
            return name.endswith(literal) or pattern.match(name, timeout=left)
        except TimeoutError:
            raise ValueError(
                f"modules_to_not_convert has {literal!r}, which takes too long to match {name!r}"
            ) from None

    return [name for name in names if any(fits(*one, name) for one in compiled)]


def only(name: str) -> str:
    """The entry of modules_to_not_convert for the module `name`: a bare name fits endings, too."""
    return f"^{re.escape(name)}"
