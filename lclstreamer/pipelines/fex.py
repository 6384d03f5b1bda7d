"""Feature extraction of digitizer waveforms, as used for electron time of flight.

The three forms are those of the published TMO systems: the raw waveforms; what is above a threshold, with the number of
its first sample; and arrival times finer than a sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lclstreamer.errors import ComponentError
from lclstreamer.events import Channels, Event, Ragged
from lclstreamer.pipelines.base import Pipeline


class FexPipeline(Pipeline):
    """Replaces the waveforms of an event by ragged values that say the same shorter.

    The value may be :class:`lclstreamer.events.Channels`, an array (samples,) or (channels, samples). With several
    channels everything is one after the other, channel by channel:

    * `waveform`: ``_samples`` (as they came), ``_lengths`` (uint32, a channel), ``_channels`` (uint16, a channel);
    * `pieces`: ``_samples``, ``_starts`` (uint32: sample of the waveform), ``_lengths``, ``_channels``, a piece each;
    * `times`: ``_times`` (float64, unit of `sample_period`), ``_heights`` (float32, above the baseline), ``_channels``.
    """

    def process(self, event: Event) -> Iterable[Event]:
        """The event with features in place of waveforms; all missing where the waveforms are.

        Raises:
            ComponentError: the value is no waveform.
        """
        name = self.parameters.data_source
        value = event.values.pop(name)
        made = self.parameters.makes
        if value is None:
            event.values.update(dict.fromkeys(made))
            return (event,)
        parts: Any = {"waveform": self._waveform, "pieces": self._pieces, "times": self._times}[self.parameters.form]
        for key, part in zip(made, parts(list(self._channels(name, value))), strict=True):
            event.values[key] = Ragged(part)
        return (event,)

    @staticmethod
    def _channels(name: str, value: Any) -> Iterator[tuple[int, NDArray[Any]]]:
        if isinstance(value, Channels):
            yield from zip(value.numbers, value.samples, strict=True)
        elif isinstance(value, np.ndarray) and value.ndim in (1, 2) and value.dtype.kind in "iuf":
            yield from enumerate(np.atleast_2d(value))
        else:
            shape = getattr(value, "shape", type(value).__name__)
            raise ComponentError(f"FexPipeline: {name} must be (samples,) or (channels, samples), not {shape}")

    def _waveform(self, channels: list[tuple[int, NDArray[Any]]]) -> tuple[NDArray[Any], ...]:
        samples = [one for _, one in channels]
        return (
            np.concatenate(samples) if samples else np.empty(0),
            np.array([one.size for one in samples], np.uint32),
            np.array([number for number, _ in channels], np.uint16),
        )

    def _pieces(self, channels: list[tuple[int, NDArray[Any]]]) -> tuple[NDArray[Any], ...]:
        samples, starts, lengths, numbers = [], [], [], []
        for number, waveform in channels:
            for first, last in self._found(self._signal(waveform)):
                start = max(0, first - self.parameters.margin)
                piece = waveform[start : min(waveform.size, last + self.parameters.margin)]
                samples.append(piece)
                starts.append(start)
                lengths.append(piece.size)
                numbers.append(number)
        kind = channels[0][1].dtype if channels else np.dtype(np.float64)
        return (
            np.concatenate(samples) if samples else np.empty(0, kind),
            np.array(starts, np.uint32),
            np.array(lengths, np.uint32),
            np.array(numbers, np.uint16),
        )

    def _times(self, channels: list[tuple[int, NDArray[Any]]]) -> tuple[NDArray[Any], ...]:
        times, heights, numbers = [], [], []
        for number, waveform in channels:
            signal = self._signal(waveform)
            for first, last in self._found(signal):
                top = first + int(np.argmax(signal[first:last]))
                where, height = parabola(signal, top)
                if self.parameters.time == "edge":
                    where = rise(signal, top, self.parameters.fraction * height)
                times.append(where * self.parameters.sample_period)
                heights.append(height)
                numbers.append(number)
        return np.array(times, np.float64), np.array(heights, np.float32), np.array(numbers, np.uint16)

    def _signal(self, waveform: NDArray[Any]) -> NDArray[np.float64]:
        baseline = self.parameters.baseline
        level = float(np.median(waveform)) if baseline == "median" else float(baseline)
        signal: NDArray[np.float64] = waveform.astype(np.float64) - level
        return signal if self.parameters.polarity == "positive" else -signal

    def _found(self, signal: NDArray[np.float64]) -> Iterator[tuple[int, int]]:
        """First and one past the last sample of everything above the threshold."""
        above = np.concatenate(([False], signal > self.parameters.threshold, [False]))
        edges = np.flatnonzero(above[1:] != above[:-1])
        for first, last in edges.reshape(-1, 2).tolist():
            if last - first >= self.parameters.minimum_width:
                yield first, last


def parabola(signal: NDArray[np.float64], top: int) -> tuple[float, float]:
    """Place and height of the top of the parabola through the highest sample and its two neighbours.

    Place = top + (a - c) / (2 (a - 2b + c)), height = b - (a - c)² / (8 (a - 2b + c)), with a, b, c the three samples.
    """
    if 0 < top < signal.size - 1:
        before, middle, after = (float(one) for one in signal[top - 1 : top + 2])
        bend = before - 2 * middle + after
        if bend < 0:
            return top + 0.5 * (before - after) / bend, middle - (before - after) ** 2 / (8 * bend)
    return float(top), float(signal[top])


def rise(signal: NDArray[np.float64], top: int, level: float) -> float:
    """Where the signal reaches a level on its way up to the top, between two samples by linear interpolation."""
    sample = top
    while sample > 0 and signal[sample - 1] >= level:
        sample -= 1
    if sample == 0:
        return 0.0
    low, high = float(signal[sample - 1]), float(signal[sample])
    return sample - (high - level) / (high - low) if high > low else float(sample)
