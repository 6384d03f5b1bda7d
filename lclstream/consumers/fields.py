"""Which dataset of a message is the detector, which the pulse energy, which the time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lclstream.client.batch import Batch

Array = npt.NDArray[Any]
_ENERGY_WORDS = ("energy", "gmd", "gdet", "pulse", "intensity", "joule", "ipm")
_MISSING, _OFFSETS = "_missing", "_offsets"


class FieldError(ValueError):
    """A dataset was named that is not in the messages, or does not have the shape it needs."""


@dataclass(frozen=True)
class Fields:
    """Dataset paths of what is analysed; None for what the stream does not have.

    Attributes:
        image: detector; events x (…, rows, columns), or events x samples for a trace.
        scalar: one float an event, such as the pulse energy.
        timestamp: one time an event.
        exact: whether `timestamp` is integer nanoseconds (a float in seconds loses about 0.5 µs).
    """

    image: str | None
    scalar: str | None
    timestamp: str | None
    exact: bool


def choose(
    arrays: Mapping[str, Array], *, image: str | None = None, scalar: str | None = None, timestamp: str | None = None
) -> Fields:
    """The fields to analyse: the named ones, and the likeliest for those not named.

    The image is the dataset with the most bytes an event that has at least two axes; the scalar a floating dataset
    with one axis, preferably with a name such as ``energy`` or ``gmd``; the timestamp the engine's ``…_ns`` dataset,
    else a float whose name has ``time`` in it. Ragged data have no value an event, and are never chosen.

    Raises:
        FieldError: a named dataset is missing, is ragged, or has the wrong shape.
        MessageError: offsets beside a dataset cannot be right.
    """
    batch = arrays if isinstance(arrays, Batch) else Batch(dict(arrays), {})
    ragged = {path for path in batch if batch.is_ragged(path)}
    beside = {f"{path}{_OFFSETS}" for path in ragged}
    for option, named in (("--image", image), ("--scalar", scalar), ("--timestamp", timestamp)):
        if named is not None and _rooted(named) in ragged:
            raise FieldError(f"{option} {named} is ragged: it has no single value an event; name another dataset")
    data = {
        path: array
        for path, array in arrays.items()
        if array.dtype.kind in "biuf" and not path.endswith(_MISSING) and path not in ragged and path not in beside
    }
    if timestamp is not None:
        timestamp = _named(data, timestamp, "--timestamp", axes=(1,))
        companion = f"{timestamp}_ns"
        time = companion if companion in data else timestamp
    else:
        times = [path for path, array in data.items() if array.ndim == 1 and "time" in path.rsplit("/", 1)[-1].lower()]
        times.sort(key=lambda path: (data[path].dtype.kind == "f", path))
        time = times[0] if times else ""
    if image is not None:
        image = _named(data, image, "--image", axes=(2, 3, 4, 5))
    else:
        detectors = [path for path, array in data.items() if array.ndim >= 2]
        image = max(detectors, key=lambda path: data[path][:1].nbytes, default=None)
    if scalar is not None:
        scalar = _named(data, scalar, "--scalar", axes=(1,))
    else:
        plain = [path for path, array in data.items() if array.ndim == 1 and array.dtype.kind == "f"]
        plain = [path for path in plain if "time" not in path.rsplit("/", 1)[-1].lower()]
        scalar = min(
            plain, key=lambda path: (not any(word in path.lower() for word in _ENERGY_WORDS), path), default=None
        )
    exact = bool(time) and data[time].dtype.kind in "iu"
    return Fields(image, scalar, time or None, exact)


def _rooted(path: str) -> str:
    return path if path.startswith("/") else f"/{path}"


def _named(data: Mapping[str, Array], path: str, option: str, *, axes: tuple[int, ...]) -> str:
    path = _rooted(path)
    if path not in data:
        raise FieldError(f"{option} {path}: the messages have only {', '.join(sorted(data)) or 'no numeric dataset'}")
    if data[path].ndim not in axes:
        wanted = " or ".join(map(str, axes))
        raise FieldError(f"{option} {path} has shape {data[path].shape}; it needs {wanted} axes, the first the event")
    return path


def nanoseconds(values: Array) -> npt.NDArray[np.int64]:
    """Times as integer nanoseconds; floats are taken as seconds."""
    if values.dtype.kind in "iu":
        return values.astype(np.int64)
    return np.round(values * 1e9).astype(np.int64)


def units_of(path: str, attributes: Mapping[str, Mapping[str, Any]], *, default: str) -> str:
    """Units of a dataset: its attribute, else what its name gives away, else `default`."""
    stated = attributes.get(path, {}).get("units")
    if stated:
        return str(stated)
    name = path.lower()
    # LCLS gas monitors report millijoules (their field is called milliJoulesPerPulse).
    return "mJ" if any(word in name for word in ("gmd", "millijoule", "_mj", "gdet")) else default
