"""What a configuration will read, as far as it can be told without reading anything."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from lclstreamer.config import Parameters

_MAX_EVENTS = re.compile(r"(?:^|[,:;])\s*max_events=([0-9]+)")
_NAMED_BITS = {"bool": 8, "int": 64, "uint": 64, "float": 64, "double": 64, "single": 32, "half": 16, "complex": 128}
_NAMED = re.compile(r"([a-z]+?)([0-9]+)?")
_CODED = re.compile(r"[<>=|]?[?a-zA-Z]([0-9]+)")


@dataclass(frozen=True)
class Estimate:
    """Numbers of a configuration; None where only the data can tell.

    Attributes:
        events: events, or the most there can be.
        messages: messages, over all ranks.
        bytes: of the data, before serialization and compression.
    """

    events: int | None
    messages: int | None
    bytes: int | None


def estimate(parameters: Parameters, ranks: int) -> Estimate:
    """How much will come.

    Args:
        parameters: the configuration.
        ranks: ranks that send; each may end with a partial batch, so the messages are an upper bound.
    """
    events = getattr(parameters.event_source, "number_of_events_to_generate", None)
    if events is None:
        match = _MAX_EVENTS.search(parameters.source_identifier)
        # As in psana, 0 is no limit.
        events = (int(match[1]) or None) if match else None
    if events is None:
        return Estimate(None, None, None)
    batches = [section.batch_size for section in parameters.pipelines if getattr(section, "batch_size", None)]
    batch = batches[0] if batches else 1
    shares = [events // ranks + (1 if rank < events % ranks else 0) for rank in range(ranks)]
    sizes = [_bytes_of(section) for section in parameters.data_sources.values()]
    known = [size for size in sizes if size is not None]
    return Estimate(
        events=events,
        messages=sum(math.ceil(share / batch) for share in shares),
        bytes=events * sum(known) if len(known) == len(sizes) else None,
    )


def _bytes_of(section: object) -> int | None:
    """Bytes that a data source gives for an event; None for what only the data can tell."""
    kind = getattr(section, "type", "")
    if kind in ("FloatValue", "IntValue"):
        return 8
    if kind == "GenericRandomNumpyArray":
        item = _item_bytes(str(getattr(section, "array_dtype", "")))
        return None if item is None else item * math.prod(getattr(section, "shape", ()))
    return None


def _item_bytes(dtype: str) -> int | None:
    named = _NAMED.fullmatch(dtype)
    if named and named[1] in _NAMED_BITS:
        return int(named[2] or _NAMED_BITS[named[1]]) // 8
    coded = _CODED.fullmatch(dtype)
    return int(coded[1]) if coded else None
