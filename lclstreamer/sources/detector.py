"""Reading fields of psana's detector objects, the same for psana1 and psana2."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lclstreamer.errors import ConfigurationError, SourceError
from lclstreamer.models import nearest


def call_of(place: str, detector: Any, psana_name: str, chain: str) -> Callable[[Any], Any]:
    """A function that reads a dotted chain of attributes of a detector for an event.

    The last attribute is called with the event, or without it if it takes nothing, or is the value itself.

    Raises:
        SourceError: the detector has no such attribute; the text names those it has.
    """
    found = detector
    for word in chain.split("."):
        if not hasattr(found, word):
            names = [name for name in dir(found) if not name.startswith("_")]
            raise SourceError(
                f"{place}.psana_fields: {chain!r}: {psana_name} has no {word!r}; "
                f"it has {', '.join(names) or 'no public fields'}{nearest(word, names)}"
            )
        found = getattr(found, word)
    if not callable(found):
        return lambda event: found
    try:
        inspect.signature(found).bind(object())
    except TypeError:
        return lambda event: found()
    except ValueError:  # a compiled function that does not tell its arguments
        return lambda event: _either(found, event)
    return found  # type: ignore[no-any-return]


def _either(function: Any, event: Any) -> Any:
    try:
        return function(event)
    except TypeError:
        return function()


def not_there(place: str, wanted: str, where: str, detectors: Iterable[str], variables: Iterable[str]) -> SourceError:
    """The error for a detector that is not in the data; it names those that are."""
    detectors, variables = sorted(detectors), sorted(variables)
    there = f"detectors: {', '.join(detectors) or 'none'}"
    if variables:
        more = f" and {len(variables) - 20} more" if len(variables) > 20 else ""
        there += f"; EPICS variables: {', '.join(variables[:20])}{more}"
    return SourceError(
        f"{place}.psana_name: {wanted!r} is not in {where}; it has {there}" + nearest(wanted, detectors + variables)
    )


def as_array(place: str, parameters: Any, values: list[Any], dtype: np.dtype[Any] | None) -> NDArray[Any] | None:
    """What the fields gave as one array; several fields are stacked along a new first axis.

    Raises:
        ConfigurationError: a field is a dictionary, which is no array.
    """
    if any(value is None for value in values):
        return None
    value = values[0] if len(values) == 1 else values
    if isinstance(value, dict):
        raise ConfigurationError(
            f"{place}: {parameters.psana_name} {parameters.psana_fields} is a dictionary with the keys "
            f"{', '.join(map(repr, value))}, which is no array; read a field that is one"
        )
    return np.asarray(value, dtype=dtype)
