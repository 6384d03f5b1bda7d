"""Event sources and data sources that need no psana."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lclstreamer import models
from lclstreamer.errors import ComponentError, ConfigurationError
from lclstreamer.sources.base import DataSource, Reader, SourceContext
from lclstreamer.sources.generic import FloatValue, GenericRandomNumpyArray, IntValue, SourceIdentifier
from lclstreamer.sources.internal import InternalEventSource


def indices(total: int, rank: int, size: int, limit: int | None = None) -> list[int]:
    options = models.InternalEventSource(type="InternalEventSource", number_of_events_to_generate=total)
    source = InternalEventSource(options, SourceContext("", {}, rank, size, limit))
    source.open()
    return [event.index for event in source.events()]


@pytest.mark.parametrize(
    ("total", "size", "limit"), [(10, 1, None), (10, 3, None), (2, 4, None), (10, 3, 7), (0, 2, None)]
)
def test_ranks_together_make_every_event_once(total: int, size: int, limit: int | None) -> None:
    everybody = [index for rank in range(size) for index in indices(total, rank, size, limit)]
    assert sorted(everybody) == list(range(min(total, limit or total)))


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int64", "float32", "float64", "float16", ">u2"])
def test_random_arrays_have_the_asked_shape_and_type(dtype: str) -> None:
    options = models.GenericRandomNumpyArray(type="GenericRandomNumpyArray", array_shape="20, 2", array_dtype=dtype)
    array = GenericRandomNumpyArray("r", options, {}).get(None)
    assert array.shape == (20, 2)
    assert array.dtype == np.dtype(dtype)
    assert array.min() >= 0
    assert array.max() < (255 if array.dtype.kind in "iu" else 1.0001)


def test_random_strings_are_refused() -> None:
    options = models.GenericRandomNumpyArray(type="GenericRandomNumpyArray", array_shape="2", array_dtype="str")
    with pytest.raises(ConfigurationError, match=r"data_sources\.r\.array_dtype"):
        GenericRandomNumpyArray("r", options, {})


def test_fixed_values_have_no_axes() -> None:
    info = {"source_identifier": "exp=é"}
    whole = IntValue("i", models.IntValue(type="IntValue", value=42), info).get(None)
    part = FloatValue("f", models.FloatValue(type="FloatValue", value=3.5), info).get(None)
    text = SourceIdentifier("s", models.SourceIdentifier(type="SourceIdentifier"), info).get(None)
    assert (whole.dtype, whole.shape, int(whole)) == (np.int64, (), 42)
    assert (part.dtype, part.shape, float(part)) == (np.float64, (), 3.5)
    assert (text.dtype.kind, text.shape, str(text)) == ("U", (), "exp=é")


class _Fails(DataSource):
    def __init__(self, error: Exception) -> None:
        super().__init__("bad", None, {})
        self.error = error

    def get(self, event: Any) -> Any:
        raise self.error


def test_what_psana_raises_for_an_incomplete_detector_is_a_missing_value() -> None:
    read = Reader({"bad": _Fails(AttributeError("no segment"))})
    assert read(object()) == {"bad": None}


def test_any_other_failure_names_the_data_source() -> None:
    with pytest.raises(ComponentError, match=r"data_sources\.bad: reading an event failed: broken"):
        Reader({"bad": _Fails(ValueError("broken"))})(object())
