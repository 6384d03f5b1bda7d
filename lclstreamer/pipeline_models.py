"""The pydantic models of the processing pipelines' sections."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lclstreamer.section import Section


class BatchProcessingPipeline(Section):
    """Puts `batch_size` events into each message; a last partial batch is sent."""

    type: Literal["BatchProcessingPipeline"]
    batch_size: int = Field(ge=1)


class PeaknetPreprocessingPipeline(Section):
    """Pads images (two axes) to one size with zeros, adds a channel axis, and batches."""

    type: Literal["PeaknetPreprocessingPipeline"]
    batch_size: int = Field(ge=1)
    target_height: int = Field(ge=1)
    target_width: int = Field(ge=1)
    pad_style: Literal["center", "bottom-right"] = "center"
    add_channel_dim: bool = True
    num_channels: int = Field(1, ge=1)


class _Reduction(Section):
    data_source: str = Field(description="name of the data source it works on")

    @property
    def makes(self) -> list[str]:
        """Names that events have after it in place of the data source, none where that stays."""
        return []

    @property
    def makes_ragged(self) -> list[str]:
        """Those of them of which every event may have another number of values."""
        return []


class CropPipeline(_Reduction):
    """Keeps a part of every image: rows and columns of the last two axes."""

    type: Literal["CropPipeline"]
    rows: Annotated[list[int], Field(min_length=2, max_length=2)] = Field(description="first, and one past the last")
    columns: Annotated[list[int], Field(min_length=2, max_length=2)] = Field(description="first, and one past the last")

    @field_validator("rows", "columns")
    @classmethod
    def _ordered(cls, value: list[int]) -> list[int]:
        if not 0 <= value[0] < value[1]:
            raise ValueError("a range is [first, one past the last] with 0 <= first < last, e.g. [0, 512]")
        return value


class BinningPipeline(_Reduction):
    """Joins pixels of the last two axes; rows and columns that do not fill a bin are left out."""

    type: Literal["BinningPipeline"]
    rows: int = Field(ge=1, description="pixels joined along the last axis but one")
    columns: int = Field(ge=1, description="pixels joined along the last axis")
    operation: Literal["sum", "mean"] = Field("sum", description="sum: 64-bit integers or floats · mean: float32 or 64")


class MaskPipeline(_Reduction):
    """Puts one value where a mask is not zero (bad pixels)."""

    type: Literal["MaskPipeline"]
    mask: Path = Field(description="a .npy file with the shape of an event, or of its last axes")
    value: float = 0.0


class ThresholdPipeline(_Reduction):
    """Zero suppression: what is below the threshold becomes zero, which compresses well."""

    type: Literal["ThresholdPipeline"]
    threshold: float
    value: float = 0.0


class HitFilterPipeline(_Reduction):
    """Keeps events with enough peaks, or enough signal in a region; drops the others."""

    type: Literal["HitFilterPipeline"]
    minimum_peaks: int | None = Field(None, ge=1, description="local maxima above `peak_threshold` an event must have")
    peak_threshold: float | None = None
    minimum_sum: float | None = Field(None, description="sum of the region an event must have")
    rows: Annotated[list[int], Field(min_length=2, max_length=2)] | None = Field(
        None, description="region for both; default: all"
    )
    columns: Annotated[list[int], Field(min_length=2, max_length=2)] | None = None

    @model_validator(mode="after")
    def _one_criterion(self) -> HitFilterPipeline:
        if self.minimum_peaks is None and self.minimum_sum is None:
            raise ValueError("minimum_peaks or minimum_sum is needed: without one every event is kept")
        if (self.minimum_peaks is None) != (self.peak_threshold is None):
            raise ValueError("minimum_peaks and peak_threshold belong together")
        return self


class FexPipeline(_Reduction):
    """Feature extraction of digitizer waveforms, e.g. electron time of flight.

    In place of the data source NAME, an event then has, each of another length in every event,

    * `form: waveform`: NAME_samples, NAME_lengths, NAME_channels;
    * `form: pieces`, what is above the threshold: NAME_samples, NAME_starts, NAME_lengths, NAME_channels;
    * `form: times`: NAME_times, NAME_heights, NAME_channels.
    """

    type: Literal["FexPipeline"]
    form: Literal["waveform", "pieces", "times"]
    threshold: float | None = Field(None, description="above the baseline, in the waveform's units")
    baseline: float | Literal["median"] = Field("median", description="level without signal; median: of each waveform")
    polarity: Literal["positive", "negative"] = "positive"
    margin: int = Field(0, ge=0, description="samples kept on each side of a piece")
    minimum_width: int = Field(1, ge=1, description="samples a piece must be above the threshold")
    time: Literal["peak", "edge"] = Field(
        "peak",
        description="peak: top of a parabola through the three highest samples · edge: where the rise reaches"
        " `fraction` of the height, by linear interpolation",
    )
    fraction: float = Field(0.5, gt=0, lt=1)
    sample_period: float = Field(1.0, gt=0, description="time between samples; times have its unit")

    @model_validator(mode="after")
    def _threshold(self) -> FexPipeline:
        if (self.form == "waveform") == (self.threshold is not None):
            raise ValueError("threshold is needed for the forms pieces and times, and has no meaning for waveform")
        return self

    @property
    def makes(self) -> list[str]:
        """Names that events have after it."""
        parts = {
            "waveform": ("samples", "lengths", "channels"),
            "pieces": ("samples", "starts", "lengths", "channels"),
            "times": ("times", "heights", "channels"),
        }
        return [f"{self.data_source}_{part}" for part in parts[self.form]]

    @property
    def makes_ragged(self) -> list[str]:
        """All of them."""
        return self.makes


class ElectronCountingPipeline(_Reduction):
    """Counts electrons on frames with `stempy`.

    In place of the data source NAME, an event then has NAME_electrons (pixel numbers), NAME_frame and NAME_sectors.
    Frames that come in sectors are put together first; those of which sectors are missing are counted when
    more than `maximum_open_frames` wait, or at the end.
    """

    type: Literal["ElectronCountingPipeline"]
    background_threshold: float = Field(description="a pixel counts from here, after the dark reference is subtracted")
    xray_threshold: float = Field(description="from here it is an X-ray and does not count")
    dark_reference: Path | None = Field(None, description="a .npy file with the shape of a frame")
    sectors: int = Field(1, ge=1, description="sectors of a frame; each event has one")
    frame_number: str | None = Field(None, description="data source with the number of the frame, for sectors > 1")
    sector_number: str | None = Field(None, description="data source with the number of the sector, from 0")
    maximum_open_frames: int = Field(
        100,
        ge=1,
        description="frames that may wait for sectors at a time; with one more the oldest is counted without them",
    )

    @model_validator(mode="after")
    def _numbers(self) -> ElectronCountingPipeline:
        if self.sectors > 1 and (self.frame_number is None or self.sector_number is None):
            raise ValueError("frames in sectors need frame_number and sector_number: which data sources say them")
        return self

    @property
    def makes(self) -> list[str]:
        """Names that events have after it."""
        return [f"{self.data_source}_{part}" for part in ("electrons", "frame", "sectors")]

    @property
    def makes_ragged(self) -> list[str]:
        """The electrons."""
        return self.makes[:1]
