"""Processing pipelines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from lclstreamer import models
from lclstreamer.events import Event
from lclstreamer.pipelines.base import Chain, Pipeline, make_chain
from lclstreamer.pipelines.peaknet import PeaknetPreprocessingPipeline


def peaknet(image: Any, **options: Any) -> np.ndarray[Any, Any]:
    settings = models.PeaknetPreprocessingPipeline(type="PeaknetPreprocessingPipeline", batch_size=1, **options)
    (event,) = PeaknetPreprocessingPipeline(settings).process(Event({"image": image}, 0))
    result: np.ndarray[Any, Any] = event.values["image"]
    return result


@pytest.mark.parametrize(("style", "place"), [("center", (1, 2)), ("bottom-right", (0, 0))])
def test_images_are_padded_with_zeros_at_the_asked_side(style: str, place: tuple[int, int]) -> None:
    image = np.arange(1, 13, dtype=np.uint16).reshape(3, 4)
    padded = peaknet(image, target_height=6, target_width=9, pad_style=style)
    assert padded.shape == (1, 6, 9)
    assert padded.dtype == np.uint16
    top, left = place
    assert np.array_equal(padded[0, top : top + 3, left : left + 4], image)
    assert padded.sum() == image.sum()


def test_images_larger_than_the_target_are_not_cut() -> None:
    image = np.ones((5, 2), dtype=np.float32)
    assert peaknet(image, target_height=3, target_width=4).shape == (1, 5, 4)


def test_channels_repeat_the_image() -> None:
    image = np.arange(4.0).reshape(2, 2)
    padded = peaknet(image, target_height=2, target_width=2, num_channels=3)
    assert padded.shape == (3, 2, 2)
    assert all(np.array_equal(channel, image) for channel in padded)


def test_without_a_channel_axis_images_keep_two_axes() -> None:
    assert peaknet(np.ones((2, 2)), target_height=4, target_width=4, add_channel_dim=False).shape == (4, 4)


def test_what_is_no_image_passes_peaknet_unchanged() -> None:
    settings = models.PeaknetPreprocessingPipeline(
        type="PeaknetPreprocessingPipeline", batch_size=2, target_height=4, target_width=4
    )
    values = {"time": np.array(3.0), "spectrum": np.ones(7), "cube": np.ones((2, 2, 2)), "none": None}
    (event,) = PeaknetPreprocessingPipeline(settings).process(Event(dict(values), 0))
    assert all(event.values[name] is value for name, value in values.items())


class _KeepsLast(Pipeline):
    """Gives an event only when the next one comes, and the last at the end."""

    held: Event | None = None

    def process(self, event: Event) -> Iterable[Event]:
        before, self.held = self.held, event
        return () if before is None else (before,)

    def finish(self) -> Iterable[Event]:
        return () if self.held is None else (self.held,)


class _Doubles(Pipeline):
    def process(self, event: Event) -> Iterable[Event]:
        return (event, event)


def test_what_a_pipeline_holds_back_passes_through_those_behind_it() -> None:
    chain = Chain([_KeepsLast(None), _Doubles(None), _KeepsLast(None)])
    out = [event.index for number in range(3) for event in chain.process(Event({}, number))]
    out += [event.index for event in chain.finish()]
    assert out == [0, 0, 1, 1, 2, 2]


def test_the_batch_size_is_that_of_the_pipeline_that_has_one() -> None:
    batch = models.BatchProcessingPipeline(type="BatchProcessingPipeline", batch_size=7)
    assert make_chain([batch]).batch_size == 7
    assert Chain([_Doubles(None)]).batch_size == 1
