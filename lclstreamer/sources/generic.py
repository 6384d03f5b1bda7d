"""Data sources that need no detector; they work with every event source."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lclstreamer.errors import ConfigurationError
from lclstreamer.sources.base import DataSource


class GenericRandomNumpyArray(DataSource):
    """Random arrays of the configured shape and dtype: integers in [0, 255), floats in [0, 1)."""

    def __init__(self, name: str, parameters: Any, info: Any) -> None:
        super().__init__(name, parameters, info)
        self._dtype = np.dtype(parameters.array_dtype if parameters.array_dtype != "native" else "float64")
        if self._dtype.kind not in "iuf":
            raise ConfigurationError(
                f"data_sources.{name}.array_dtype: {parameters.array_dtype!r}: only integer and floating types can be "
                "random"
            )
        self._shape = parameters.shape
        self._random = np.random.default_rng()

    def get(self, event: Any) -> NDArray[Any]:
        """An array of the configured shape and dtype."""
        values: NDArray[Any]
        if self._dtype.kind == "f":
            exact = np.float32 if self._dtype == np.float32 else np.float64
            values = np.asarray(self._random.random(self._shape, dtype=exact))
        else:
            top = min(255, np.iinfo(self._dtype).max)
            values = self._random.integers(0, top, self._shape, dtype=f"{self._dtype.kind}{self._dtype.itemsize}")
        return values.astype(self._dtype, copy=False)


class _Fixed(DataSource):
    """The same value for every event."""

    _value: NDArray[Any]

    def get(self, event: Any) -> NDArray[Any]:
        """An array without axes."""
        return self._value


class FloatValue(_Fixed):
    """A fixed float64."""

    def __init__(self, name: str, parameters: Any, info: Any) -> None:
        super().__init__(name, parameters, info)
        self._value = np.array(parameters.value, dtype=np.float64)


class IntValue(_Fixed):
    """A fixed int64."""

    def __init__(self, name: str, parameters: Any, info: Any) -> None:
        super().__init__(name, parameters, info)
        self._value = np.array(parameters.value, dtype=np.int64)


class SourceIdentifier(_Fixed):
    """The configuration's source identifier, a string."""

    def __init__(self, name: str, parameters: Any, info: Any) -> None:
        super().__init__(name, parameters, info)
        self._value = np.array(info["source_identifier"], dtype=np.str_)
