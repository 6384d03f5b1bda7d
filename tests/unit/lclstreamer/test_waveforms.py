"""The channels of digitizers, with detectors that leave out what has no waveform, as psana's do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lclstreamer import models
from lclstreamer.errors import ComponentError
from lclstreamer.events import Event
from lclstreamer.pipelines.base import make_chain
from lclstreamer.sources.psana2_data import Psana2Waveforms


class Digitizer:
    """An event is what psana gives for it."""

    def __init__(self, active: dict[int, list[int]]) -> None:
        self._active = active

    def _seg_chans(self) -> dict[int, list[int]]:
        return self._active

    def padded(self, event: Any) -> Any:
        return event


class Untold:
    """A digitizer that does not say which channels are active."""

    def padded(self, event: Any) -> Any:
        return event


def source(raw: Any) -> Psana2Waveforms:
    run = SimpleNamespace(Detector=lambda name: SimpleNamespace(raw=raw))
    parameters = models.Psana2Waveforms(type="Psana2Waveforms", psana_name="hsd", psana_fields="raw.padded")
    return Psana2Waveforms("hsd", parameters, {"run": run})


def waveform(*channels: int) -> dict[Any, Any]:
    samples: dict[Any, Any] = {channel: np.arange(4, dtype=np.uint16) + channel for channel in channels}
    return samples | {"times": np.arange(4) * 1e-9}


def numbers(source: Psana2Waveforms, event: Any) -> list[int]:
    found = source.get(event)
    assert found is not None
    return list(found.numbers)


@pytest.mark.parametrize("raw", [Digitizer({segment: [0] for segment in range(4)}), Untold()])
def test_a_pulse_keeps_its_channel_in_events_that_lack_other_segments(raw: Any) -> None:
    hsd = source(raw)
    fex = make_chain([models.FexPipeline(type="FexPipeline", data_source="hsd", form="waveform")])
    found = []
    for shot in ({segment: waveform(0) for segment in range(4)}, {3: waveform(0)}, {2: waveform(0), 0: waveform(0)}):
        (event,) = fex.process(Event({"hsd": hsd.get(shot)}, 0))
        found.append(event.values["hsd_channels"].values.tolist())
    assert found == [[0, 1, 2, 3], [3], [0, 2]]


def test_segments_of_several_channels_are_numbered_through_whichever_are_there() -> None:
    hsd = source(Digitizer({0: [0, 1], 1: [0, 1], 2: [1]}))
    assert numbers(hsd, {segment: waveform(0, 1) for segment in range(3)}) == [0, 1, 2, 3, 4, 5]
    assert numbers(hsd, {2: waveform(1), 1: waveform(1)}) == [3, 5]
    found = hsd.get({1: waveform(1, 0)})
    assert found is not None
    assert [int(samples[0]) for samples in found.samples] == [0, 1]


@pytest.mark.parametrize("channel", [1, "peak"])
def test_a_channel_that_the_configuration_does_not_know_is_an_error_and_no_other_channels(channel: Any) -> None:
    with pytest.raises(ComponentError, match=f"segment 2 of hsd has a channel {channel!r}"):
        source(Untold()).get({2: {0: np.zeros(4), channel: np.zeros(4)}})


def test_an_event_without_waveforms_has_none() -> None:
    assert source(Untold()).get({}) is None
    assert source(Untold()).get(None) is None
