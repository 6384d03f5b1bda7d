"""Keyed routing: all messages with the same key go to the same group of consumers.

A detector whose sectors each send a message for every frame puts the frame's number into them; with one ``--out`` a
group of consumers, a group gets all sectors of its frames and can put them together.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from nngstream.errors import ConfigurationError

_TEXT = re.compile(r"(?P<offset>\d{1,9}):u(?P<bits>8|16|32|64)(?P<order>le|be)?")


@dataclass(frozen=True)
class Route:
    """Where in a message the key lies: an unsigned integer.

    Attributes:
        offset: bytes before it, from the beginning of the message, or of its first part when it has several.
        width: bytes of it.
        order: of its bytes.
    """

    offset: int
    width: int
    order: Literal["little", "big"]

    def __str__(self) -> str:
        return f"{self.offset}:u{8 * self.width}{'le' if self.order == 'little' else 'be'}"

    def group(self, view: memoryview, first: int, last: int, groups: int) -> int:
        """The group for a message whose first part lies in ``view[first:last]``.

        A message too short to have the key is for the first group.
        """
        first += self.offset
        if first + self.width > last:
            return 0
        return int.from_bytes(view[first : first + self.width], self.order) % groups


def parse(text: str) -> Route:
    """Read ``OFFSET:TYPE``, such as ``8:u32le``.

    Raises:
        ConfigurationError: it is not that.
    """
    found = _TEXT.fullmatch(text)
    if not found or (found["bits"] != "8" and found["order"] is None):
        raise ConfigurationError(
            f"{text!r} is no route: write OFFSET:TYPE, the byte where the key begins and one of u8, u16le, "
            "u16be, u32le, u32be, u64le, u64be; such as 8:u32le"
        )
    return Route(int(found["offset"]), int(found["bits"]) // 8, "big" if found["order"] == "be" else "little")
