"""The two gain bits at the top of raw Jungfrau pixels.

A Jungfrau pixel is 16 bits: 14 of ADC value and, above them, the gain in which it was read (00 high, 01 medium, 11 low;
10 does not occur). Adding such words adds the gain code as 16384, 32768 or 49152 ADU.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
_VALUE_BITS = np.uint16(0x3FFF)
#: Rows and columns of one Jungfrau module.
_MODULE = (512, 1024)


class GainBits(StrEnum):
    """What to do with bits 14 and 15."""

    AUTO = "auto"
    KEEP = "keep"
    MASK = "mask"


@dataclass(frozen=True)
class GainDecision:
    """What is done with the gain bits, and why."""

    masked: bool
    reason: str


def decide(option: GainBits, path: str, array: Array) -> GainDecision:
    """Whether the gain bits of this detector are masked.

    Args:
        option: what the user asked for; ``auto`` masks uint16 data of a detector that is a Jungfrau by its name or by
            the shape of its modules.
        path: dataset path.
        array: any batch of it.

    Raises:
        ValueError: ``mask`` for data that have no such bits.
    """
    raw = array.dtype == np.uint16
    if option is GainBits.KEEP:
        return GainDecision(False, "asked to keep all 16 bits")
    if option is GainBits.MASK:
        if not raw:
            raise ValueError(f"--gain-bits mask: {path} is {array.dtype}; only raw uint16 pixels have gain bits")
        return GainDecision(True, "asked to mask bits 14 and 15")
    if not raw:
        return GainDecision(False, f"{array.dtype} data have no gain bits")
    if "jungfrau" in path.lower():
        return GainDecision(True, "raw Jungfrau by its name: bits 14 and 15 are the gain")
    if array.shape[-2:] == _MODULE:
        return GainDecision(True, "raw Jungfrau by its module of 512 x 1024 uint16: bits 14 and 15 are the gain")
    return GainDecision(False, "uint16, but no Jungfrau by name or shape")


def split(array: Array) -> tuple[Array, int]:
    """The 14-bit values, and how many pixels were not read in high gain."""
    return array & _VALUE_BITS, int(np.count_nonzero(array > _VALUE_BITS))
