"""The picture of a run: ``result.png``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lclstream.client.statistics import in_units
from lclstream.consumers.run_summary import RunSummary
from lclstream.consumers.summary_file import ResultDocument

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]
_GAP = 8
_INK, _BLUE, _ORANGE, _GREY = "#1b1f24", "#2166ac", "#d6604d", "#8c959f"
_PERCENTILES = (1.0, 99.9)


def arranged(image: Array) -> tuple[Array, Array]:
    """Panels laid out as one picture.

    Args:
        image: (…, rows, columns).

    Returns:
        The picture, float64 with NaN between panels, in about 3:2, and an int64 array (panels, 2) of the row and column
        at which each panel begins. Without a geometry panels lie in the order of the data, not as in the instrument.
    """
    panels = image.reshape(-1, *image.shape[-2:])
    count, height, width = panels.shape
    across = min(range(1, count + 1), key=lambda n: abs(np.log(n * width / (-(-count // n) * height) / 1.5)))
    down = -(-count // across)
    picture = np.full((down * (height + _GAP) - _GAP, across * (width + _GAP) - _GAP), np.nan)
    begins = np.empty((count, 2), np.int64)
    for number, panel in enumerate(panels):
        row, column = (number // across) * (height + _GAP), (number % across) * (width + _GAP)
        picture[row : row + height, column : column + width] = panel
        begins[number] = row, column
    return picture, begins


def draw(summary: RunSummary, result: ResultDocument, path: Path) -> None:
    """Draw the figure and write it as PNG; the file appears complete or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    style: dict[Any, Any] = {
        "font.size": 10,
        "axes.edgecolor": _GREY,
        "axes.labelcolor": _INK,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": _INK,
        "ytick.color": _INK,
    }
    with matplotlib.rc_context(style):
        figure = Figure(
            figsize=(14, 10), dpi=130, layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08, rect=(0, 0, 1, 0.925))
        )
        _title(figure, result)
        rows = figure.add_gridspec(3, 1, height_ratios=(1.3, 0.85, 0.85))
        top = rows[0].subgridspec(1, 2)
        if summary.sum_image is not None and summary.sum_image.ndim == 1:
            _trace(figure.add_subplot(rows[0]), summary)
        elif summary.sum_image is not None:
            _image(figure, figure.add_subplot(top[0]), summary, summed=True)
            _image(figure, figure.add_subplot(top[1]), summary, summed=False)
        else:
            _nothing(figure.add_subplot(rows[0]), "no detector in this stream")
        middle = rows[1].subgridspec(1, 2)
        _peak_counts(figure.add_subplot(middle[0]), summary)
        _energies(figure.add_subplot(middle[1]), summary)
        _course(figure.add_subplot(rows[2]), summary)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        figure.savefig(beside, format="png")
    os.replace(beside, path)


def _title(figure: Figure, result: ResultDocument) -> None:
    run = "" if result.run is None else f" · run {result.run}"
    plural = "" if result.messages == 1 else "s"
    facts = [f"{result.events} events in {result.messages} message{plural}", f"{in_units(result.bytes)}B"]
    if result.rate_events_s:
        facts.append(f"{result.rate_events_s:.0f} events/s")
    if result.events_unique is not None and result.events_unique != result.events:
        facts.append(f"ONLY {result.events_unique} DIFFERENT EVENTS")
    if result.gain_bits is not None:
        facts.append(f"raw detector values, gain bits {result.gain_bits}")
    figure.text(
        0.5,
        0.968,
        f"{result.experiment or 'unnamed experiment'}{run}{'' if result.complete else '  —  INCOMPLETE'}",
        ha="center",
        va="center",
        fontsize=18,
        fontweight="bold",
        color=_INK if result.complete else "#b2182b",
    )
    figure.text(0.5, 0.938, " · ".join(facts), ha="center", va="center", fontsize=10.5, color="#57606a")


def _image(figure: Figure, axes: Axes, summary: RunSummary, *, summed: bool) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    source = summary.sum_image if summed else summary.max_image
    assert source is not None
    picture, begins = arranged(source)
    positive = picture[np.isfinite(picture) & (picture > 0)]
    low, high = np.percentile(positive, _PERCENTILES) if positive.size else (1.0, 10.0)
    colours = colormaps["inferno" if summed else "viridis"].with_extremes(bad="#eaeef2")
    shown = axes.imshow(
        np.where(picture > 0, picture, np.where(np.isnan(picture), np.nan, low)),
        norm=LogNorm(low, max(high, low * 1.0001)),
        cmap=colours,
        interpolation="nearest",
        origin="upper",
    )
    what = f"Sum of {summary.image_events} events" if summed else "Brightest value of each pixel"
    strongest = summary.strongest
    if summed and len(strongest.row):
        begin = begins[strongest.panel]
        axes.scatter(
            strongest.column + begin[:, 1],
            strongest.row + begin[:, 0],
            s=30,
            facecolors="none",
            edgecolors="#7fe7ff",
            linewidths=0.8,
            alpha=0.9,
        )
        what += f", {len(strongest.row)} strongest of {summary.peaks_total} peaks circled"
    axes.set(title=what, xlabel="column (pixels)", ylabel="row (pixels)")
    axes.spines[:].set_visible(False)
    # An inset is as tall as the image whatever its aspect; a colour bar beside the axes is not.
    bar = figure.colorbar(
        shown, cax=axes.inset_axes((1.015, 0.0, 0.022, 1.0)), extend="both", label=summary.image_units
    )
    bar.ax.yaxis.set_major_locator(FixedLocator(np.geomspace(low, max(high, low * 1.0001), 5).tolist()))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: in_units(value).strip()))
    bar.ax.yaxis.set_minor_locator(NullLocator())


def _trace(axes: Axes, summary: RunSummary) -> None:
    assert summary.sum_image is not None
    mean = summary.sum_image / max(1, summary.image_events)
    axes.plot(mean, color=_BLUE, linewidth=1.2, label="mean")
    if summary.max_image is not None:
        axes.plot(summary.max_image, color=_ORANGE, linewidth=0.8, alpha=0.8, label="highest value")
    axes.set(
        title=f"Mean trace of {summary.image_events} events", xlabel="sample", ylabel=summary.image_units, xmargin=0
    )
    axes.legend(frameon=False, loc="upper right")


def _nothing(axes: Axes, why: str) -> None:
    axes.text(0.5, 0.5, why, ha="center", va="center", color=_GREY, transform=axes.transAxes)
    axes.set_axis_off()


def _bars(axes: Axes, edges: Array, entries: Array, colour: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.stairs(entries, edges, fill=True, color=colour, alpha=0.35)
    axes.stairs(entries, edges, color=colour, linewidth=1.2)
    axes.set_ylabel("events")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)


def _note(axes: Axes, text: str) -> None:
    """Numbers beside the title, where no bar can hide them."""
    axes.set_title(text, loc="right", fontsize=9.5, fontweight="normal", color="#57606a")


def _peak_counts(axes: Axes, summary: RunSummary) -> None:
    edges, entries, _ = summary.peaks.shown(60)
    if not entries.size:
        _nothing(axes, "no images, no peaks")
        return
    _bars(axes, edges, entries, _BLUE)
    least = summary.settings.hit_peaks
    axes.axvline(least, color=_ORANGE, linewidth=1.2, linestyle=(0, (4, 3)))
    shots = max(1, summary.image_events)
    _note(
        axes,
        f"{summary.hits} of {shots} are hits, {least} peaks or more ({summary.hits / shots:.0%}) · "
        f"mean {summary.peaks_total / shots:.1f}",
    )
    axes.set(
        title="Peaks in each event",
        xlabel=f"peaks above {summary.settings.threshold:g} $\\sigma$ of the local background",
    )


def _energies(axes: Axes, summary: RunSummary) -> None:
    # About as many bins as the square root of the entries: fewer leave gaps that mean nothing.
    edges, entries, _ = summary.energy.shown(int(np.clip(2 * np.sqrt(summary.scalar_events), 12, 80)))
    if not entries.size or summary.fields is None or summary.fields.scalar is None:
        _nothing(axes, "no scalar (pulse energy) in this stream")
        return
    _bars(axes, edges, entries, _ORANGE)
    mean = summary.scalar_sum / max(1, summary.scalar_events)
    axes.axvline(mean, color=_INK, linewidth=1)
    _note(axes, f"mean {mean:.4g} {summary.scalar_units}")
    name = summary.fields.scalar.rsplit("/", 1)[-1]
    axes.set(title="Pulse energy", xlabel=f"{name} ({summary.scalar_units})")


def _course(axes: Axes, summary: RunSummary) -> None:
    edges, events, sums = summary.course.shown(120)
    if not events.size:
        _nothing(axes, "no events")
        return
    centres = (edges[:-1] + edges[1:]) / 2
    lines = []
    with np.errstate(invalid="ignore", divide="ignore"):
        peaks, hits, energy = (
            np.where(sums[below] > 0, sums[name] / sums[below], np.nan)
            for name, below in (("peaks", "imaged"), ("hits", "imaged"), ("energy", "measured"))
        )
    exact = summary.fields is not None and summary.fields.timestamp is not None
    axes.set(
        title="Course of the run",
        xlabel="time since the first event (s)" if exact else "time since the first event arrived (s)",
        xmargin=0.01,
    )
    if np.isfinite(peaks).any():
        lines += axes.plot(centres, peaks, color=_BLUE, linewidth=1.2, marker=".", markersize=4, label="peaks an event")
        axes.set_ylabel("peaks an event", color=_BLUE)
        axes.set_ylim(0, 1.15 * max(1.0, float(np.nanmax(peaks))))
        rate = axes.twinx()
        rate.fill_between(centres, 100 * np.nan_to_num(hits), step="mid", color=_GREY, alpha=0.22, linewidth=0)
        rate.set_ylim(0, 115)
        rate.set_axis_off()
        for value, label in ((0, "0 %"), (100, "100 %")):
            rate.text(1.004, value, label, transform=rate.get_yaxis_transform(), color=_GREY, fontsize=8, va="center")
        from matplotlib.patches import Patch

        lines.append(Patch(color=_GREY, alpha=0.22, label="hit rate (0 to 100 %)"))  # type: ignore[arg-type]
    if np.isfinite(energy).any():
        right = axes.twinx()
        right.spines["right"].set_visible(True)
        right.spines["right"].set_position(("outward", 34))
        lines += right.plot(
            centres, energy, color=_ORANGE, linewidth=1.2, marker=".", markersize=4, label="pulse energy"
        )
        right.set_ylabel(f"pulse energy ({summary.scalar_units})", color=_ORANGE)
        right.set_ylim(0, 1.25 * float(np.nanmax(energy)) if np.nanmax(energy) > 0 else None)
    axes.legend(handles=lines, frameon=False, loc="upper right", ncols=3)
