"""Tags: names and values that whoever starts a job or a transfer puts on it, to find it again.

They travel in the query, ``?tag=NAME:VALUE`` once for each: published servers, whose documents know no tags, ignore
them. They are no part of what an idempotency key stands for: the first request's tags stay.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

#: How many a job or a transfer may have.
MOST = 16
_TAG = re.compile(r"([A-Za-z0-9_.-]{1,64}):([^\x00-\x1f\x7f]{0,512})")


def query(tags: Mapping[str, str]) -> list[str]:
    """The values of the query parameter `tag`.

    Raises:
        ValueError: a name or a value that services refuse.
    """
    words = [f"{name}:{value}" for name, value in tags.items()]
    read(words)
    return words


def read(words: Iterable[str]) -> dict[str, str]:
    """The tags in the query parameter `tag`.

    Raises:
        ValueError: one is not ``NAME:VALUE``, or there are too many.
    """
    tags: dict[str, str] = {}
    for word in words:
        match = _TAG.fullmatch(word)
        if match is None or not _storable(word):
            raise ValueError(
                f"tag {word[:80]!r} is not NAME:VALUE: a name of at most 64 letters, digits and `_.-`, a value of "
                "at most 512 printable characters"
            )
        tags[match[1]] = match[2]
    if len(tags) > MOST:
        raise ValueError(f"{len(tags)} tags are more than the {MOST} there may be")
    return tags


def _storable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def match(tags: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Whether something with these tags has all those that are wanted, with the same values."""
    return wanted.items() <= tags.items()
