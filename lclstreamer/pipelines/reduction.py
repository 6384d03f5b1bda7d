"""Pipelines that make images smaller without calibration: crop, bin, mask, zero suppression.

They work on the last two axes, so stacks of segments keep their first axis. Missing values stay missing.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lclstreamer.errors import ComponentError, ConfigurationError
from lclstreamer.events import Event
from lclstreamer.pipelines.base import Pipeline


class Reduction(Pipeline):
    """Replaces the value of one data source by another array."""

    def process(self, event: Event) -> Iterable[Event]:
        """The event with the value replaced.

        Raises:
            ComponentError: the value does not have the axes that are needed.
        """
        name = self.parameters.data_source
        value = event.values[name]
        if value is not None:
            if not isinstance(value, np.ndarray) or value.ndim < self.axes:
                raise ComponentError(f"{type(self).__name__}: {name} must be an array of at least {self.axes} axes")
            event.values[name] = self.reduce(value)
        return (event,)

    #: How many axes a value must have.
    axes = 2

    @abc.abstractmethod
    def reduce(self, value: NDArray[Any]) -> NDArray[Any]:
        """The new value."""


class CropPipeline(Reduction):
    """Keeps rows and columns; a copy, with the dtype of the image."""

    def reduce(self, value: NDArray[Any]) -> NDArray[Any]:
        """The part of the image.

        Raises:
            ComponentError: the part is not inside the image.
        """
        (top, bottom), (left, right) = self.parameters.rows, self.parameters.columns
        height, width = value.shape[-2:]
        if bottom > height or right > width:
            raise ComponentError(
                f"CropPipeline: rows {top}:{bottom} and columns {left}:{right} are not inside "
                f"{self.parameters.data_source}, "
                f"which has {height} rows and {width} columns"
            )
        return np.ascontiguousarray(value[..., top:bottom, left:right])


class BinningPipeline(Reduction):
    """Joins pixels: sums as 64-bit integers or floats, means as float32 (float64 of float64)."""

    def reduce(self, value: NDArray[Any]) -> NDArray[Any]:
        """The binned image."""
        down, across = self.parameters.rows, self.parameters.columns
        height, width = value.shape[-2] // down, value.shape[-1] // across
        blocks = value[..., : height * down, : width * across].reshape(*value.shape[:-2], height, down, width, across)
        if self.parameters.operation == "mean":
            kind = np.float64 if value.dtype == np.float64 else np.float32
            mean: NDArray[Any] = blocks.mean(axis=(-3, -1), dtype=kind)
            return mean
        total: NDArray[Any] = blocks.sum(axis=(-3, -1))
        return total


class Replacing(Reduction):
    """Puts the option `value` in the place of some pixels."""

    def filling(self, dtype: np.dtype[Any]) -> Any:
        """The value in the type of an image; what is behind the point is left out for integers.

        Raises:
            ComponentError: the type cannot hold it; numpy would wrap it or fail.
        """
        value = self.parameters.value
        holds = True
        if dtype.kind in "iu":
            holds = math.isfinite(value) and np.iinfo(dtype).min <= math.trunc(value) <= np.iinfo(dtype).max
        elif dtype.kind == "f" and math.isfinite(value):
            holds = abs(value) <= float(np.finfo(dtype).max)
        if not holds:
            raise ComponentError(
                f"{type(self).__name__}: value {value} is nothing that pixels can be: {self.parameters.data_source} is "
                f"{dtype.name}; choose another value, or a floating dtype of the data source"
            )
        return dtype.type(value)


class MaskPipeline(Replacing):
    """Puts a value where the mask is not zero; the dtype of the image is kept."""

    axes = 1

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters)
        try:
            self._bad = np.load(parameters.mask, allow_pickle=False) != 0
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"processing_pipeline.mask: {parameters.mask} cannot be read: {error}; a .npy file is needed"
            ) from error

    def reduce(self, value: NDArray[Any]) -> NDArray[Any]:
        """A masked copy.

        Raises:
            ComponentError: mask and image have different shapes, or the image's type cannot hold the value.
        """
        if value.shape[value.ndim - self._bad.ndim :] != self._bad.shape:
            raise ComponentError(
                f"MaskPipeline: the mask {self.parameters.mask} has the shape {self._bad.shape}, "
                f"{self.parameters.data_source} has {value.shape}"
            )
        return np.where(self._bad, self.filling(value.dtype), value)


class ThresholdPipeline(Replacing):
    """Puts a value, zero by default, where the image is below the threshold; the dtype is kept."""

    axes = 0

    def reduce(self, value: NDArray[Any]) -> NDArray[Any]:
        """A copy without what is below the threshold.

        Raises:
            ComponentError: the image's type cannot hold the value.
        """
        return np.where(value < self.parameters.threshold, self.filling(value.dtype), value)
