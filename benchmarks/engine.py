"""How fast the engine is: ours, and on request the original, on the same frames to the same sink.

    python benchmarks/engine.py --reference CHECKOUT_OF_THE_ORIGINAL [--reference-packages DIR] [--ranks 1,2] [--quick]

Every run streams a pool of frames that lie in memory (so that no detector or random numbers are measured) as HDF5 over
ZeroMQ on loopback TCP to a sink that checks every message and takes little of the processor (`pull_sink.py`; it is
the same for both). The rate is that of the raw frames at the sink, from the end of the warm-up (4 messages a rank; 100
of tiny ones) to the last message; CPU seconds are those of the engine's processes alone, after as many events. Ours and
the original take turns, medians are told. The limit of a row is the smallest of what was measured in the same run:
copying memory, libzmq pushing one buffer of that size again and again (`copy=False`) to the same sink, and for
compressed rows the codec on all cores.

The original's own requirements (`stream`, `cbor`, `bitshuffle`) must be importable, or lie in `--reference-packages`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pull_sink import sink
from stopping import stop_on_signals

POOL = 8
HERE = Path(__file__).resolve()


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    frame: tuple[int, ...]
    dtype: str
    batch_size: int
    compression: str | None

    @property
    def nbytes(self) -> int:
        """Bytes of an event."""
        return int(np.prod(self.frame)) * np.dtype(self.dtype).itemsize

    @property
    def warm(self) -> int:
        """Messages a rank sends before the clock starts: all memory has been used once by then."""
        return 100 if self.nbytes < 1000 else 4

    def events(self, quick: bool, ranks: int) -> int:
        """How many events a run has: the warm-up and some seconds to measure."""
        step = ranks * self.batch_size
        if self.nbytes < 1000:
            return step * self.warm + (100_000 if quick else 500_000)
        volume = (2e9 if quick else 5e9) / (2 if self.compression else 1)
        return step * (self.warm + max(3, int(volume / self.nbytes / step)))


CASES = [
    Case((1024, 1024), "uint16", 10, None),
    Case((1024, 1024), "uint16", 10, "bitshuffle_with_lz4"),
    Case((2048, 2048), "float32", 1, None),
    Case((2048, 2048), "float32", 10, None),
    Case((2,), "float64", 100, None),
]


def pool(case: Case) -> np.ndarray[Any, Any]:
    """Frames like a detector's: a dark level with noise and a few photons; they compress about 1.6 times."""
    random = np.random.default_rng(11)
    shape = (POOL, *case.frame)
    frames = 2800 + random.normal(0, 9, shape) + 40 * random.poisson(0.3, shape)
    return frames.astype(case.dtype)


# ------------------------------------------------------------------------------------------------------------ a child


def child(which: str, reference: str, packages: str, config: str, frames: str, report: str, warm: str) -> None:
    """Run one engine on the pool, as its command does, and write how many CPU seconds that took after `warm` events."""
    from itertools import count, cycle

    if packages:
        sys.path.append(packages)
    begun: list[float] = []
    given, number, last = cycle(list(np.load(frames))), count(), int(warm)

    def frame(self: Any, event: Any) -> Any:
        if next(number) == last:
            begun.append(time.process_time())
        return next(given)

    if which == "ours":
        from lclstreamer.cli import main
        from lclstreamer.sources.generic import GenericRandomNumpyArray

        GenericRandomNumpyArray.get = frame  # type: ignore[method-assign]
        sys.argv[1:] = ["--config", config]
    else:
        sys.path.insert(0, str(Path(reference) / "src"))
        from lclstreamer.cmd.lclstreamer import app as main  # type: ignore[attr-defined, no-redef]
        from lclstreamer.event_data_sources.generic.data_sources import (  # type: ignore[import-not-found]
            GenericRandomNumpyArray as Original,
        )

        Original.get_data = frame
        sys.argv[1:] = ["--config", config]
    try:
        main()
    finally:
        rank = os.environ.get("PMI_RANK", "0")
        Path(f"{report}.{rank}").write_text(str(time.process_time() - begun[0] if begun else 0.0))


# -------------------------------------------------------------------------------------------------------------- runs


def configuration(case: Case, events: int, url: str) -> dict[str, Any]:
    """The engine configuration of a run, understood by both."""
    return {
        "source_identifier": "benchmark",
        "skip_incomplete_events": False,
        "event_source": {"type": "InternalEventSource", "number_of_events_to_generate": events},
        "data_sources": {
            "frames": {
                "type": "GenericRandomNumpyArray",
                "array_shape": ",".join(map(str, case.frame)),
                "array_dtype": case.dtype,
            }
        },
        "processing_pipeline": {"type": "BatchProcessingPipeline", "batch_size": case.batch_size},
        "data_serializer": {
            "type": "HDF5BinarySerializer",
            "compression": case.compression,
            "fields": {"frames": "/data/frames"},
        },
        "data_handlers": [
            {"type": "BinaryDataStreamingDataHandler", "urls": [url], "role": "client", "library": "zmq"}
        ],
    }


def run(which: str, case: Case, ranks: int, arguments: argparse.Namespace, folder: Path) -> tuple[float, float, float]:
    """One run: GB/s, events/s, CPU seconds per GB."""
    events, warm = case.events(arguments.quick, ranks), case.warm * ranks
    url = f"ipc://{folder}/sink" if arguments.transport == "ipc" else f"tcp://127.0.0.1:{_free_port()}"
    # The original makes its number of events on every rank.
    content = configuration(case, events if which == "ours" else -(-events // ranks), url)
    config, report = folder / "run.yaml", folder / f"cpu-{which}"
    config.write_text(yaml.safe_dump(content))
    for old in folder.glob("cpu-*"):
        old.unlink()
    frames = str(folder / f"{'x'.join(map(str, case.frame))}-{case.dtype}.npy")
    if not Path(frames).exists():
        np.save(frames, pool(case))
    mine, other = multiprocessing.Pipe()
    puller = multiprocessing.Process(target=sink, args=(url, frames, warm, other), daemon=True)
    puller.start()
    mine.recv()
    mpi = [] if ranks == 1 else [str(Path(sys.executable).parent / "mpiexec"), "-n", str(ranks)]
    packages = arguments.reference_packages or ""
    done = subprocess.run(
        [
            *mpi,
            sys.executable,
            str(HERE),
            "--child",
            which,
            arguments.reference or "",
            packages,
            config,
            frames,
            report,
            str(case.warm * case.batch_size),
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    mine.send("end")
    measured, seconds, received, wrong = mine.recv()
    puller.join(10)
    if done.returncode or wrong:
        raise SystemExit(f"{which} failed ({wrong} wrong messages):\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    if which == "ours" and received != events:
        raise SystemExit(f"ours lost events: {received} of {events} arrived")
    cpu = sum(float(path.read_text()) for path in folder.glob(f"cpu-{which}.*"))
    rate = measured / seconds
    return rate * case.nbytes / 1e9, rate, cpu / ((events - warm * case.batch_size) * case.nbytes / 1e9)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ------------------------------------------------------------------------------------------------------------ limits


def memcpy_gbs() -> float:
    """Copying into reused memory."""
    source, target = (np.full(64_000_000, value, np.uint8) for value in (1, 2))
    times = []
    for _ in range(8):
        began = time.perf_counter()
        target[:] = source
        times.append(time.perf_counter() - began)
    return source.nbytes / min(times) / 1e9


def codec_gbs(case: Case) -> float:
    """The codec on all cores."""
    from concurrent.futures import ThreadPoolExecutor

    from lclstreamer import models
    from lclstreamer.serializers.codecs import codec_for

    settings = models.HDF5BinarySerializer(type="HDF5BinarySerializer", fields={}, compression=case.compression)
    codec = codec_for(settings, case.frame, np.dtype(case.dtype))
    assert codec is not None
    frames = pool(case)
    cores = len(os.sched_getaffinity(0))
    rooms = [memoryview(bytearray(codec.room)) for _ in range(POOL)]
    with ThreadPoolExecutor(cores) as threads:
        began = time.perf_counter()
        rounds = 6
        list(
            threads.map(lambda number: codec.encode(frames[number % POOL], rooms[number % POOL]), range(rounds * POOL))
        )
    return rounds * frames.nbytes / (time.perf_counter() - began) / 1e9


def _push(url: str, size: int, count: int) -> None:
    import zmq

    context = zmq.Context()
    socket = context.socket(zmq.PUSH)
    socket.SNDHWM = 4
    socket.connect(url)
    content = bytearray(size)
    for _ in range(count):
        socket.send(content, copy=False)
    socket.close(-1)
    context.term()


def zmq_gbs(size: int, volume: float) -> float:
    """One buffer pushed again and again by libzmq to the sink of the runs."""
    count, warm = max(20, int(volume / size)), 3
    url = f"tcp://127.0.0.1:{_free_port()}"
    mine, other = multiprocessing.Pipe()
    puller = multiprocessing.Process(target=sink, args=(url, "", warm, other), daemon=True)
    puller.start()
    mine.recv()
    pusher = multiprocessing.Process(target=_push, args=(url, size, count + warm), daemon=True)
    pusher.start()
    pusher.join()
    mine.send("end")
    measured, seconds, *_ = mine.recv()
    puller.join()
    return measured * size / seconds / 1e9


# -------------------------------------------------------------------------------------------------------------- main


def _line(words: list[str]) -> str:
    widths = (12, 8, 5, 20, 5, 7, 9, 8, 6, 8, 6, 6)
    return " ".join(f"{word:>{width}}" for word, width in zip(words, widths, strict=True))


def _table_line(row: dict[str, Any]) -> str:
    theirs = row["reference_gbs"]
    return _line(
        [
            "x".join(map(str, row["frame"])),
            row["dtype"],
            str(row["batch_size"]),
            row["compression"] or "-",
            str(row["ranks"]),
            f"{row['ours_gbs']:.3f}",
            f"{row['ours_events_s']:.0f}",
            f"{theirs:.3f}" if theirs else "-",
            f"{row['ratio']:.2f}" if theirs else "-",
            f"{row['ours_cpu_s_per_gb']:.2f}",
            f"{row['limit_gbs']:.2f}",
            f"{row['share_of_limit']:.2f}",
        ]
    )


def main() -> None:
    """Run all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", metavar="DIR", help="a checkout of the original engine, measured as well")
    parser.add_argument("--reference-packages", metavar="DIR", help="where its own requirements are, if not installed")
    parser.add_argument("--ranks", default="1", help="numbers of ranks, e.g. 1,2 (default 1)")
    parser.add_argument("--quick", action="store_true", help="less data, one round: under 50 s with one rank")
    parser.add_argument("--rounds", type=int, help="rounds of ours and the original in turn (default 3, quick 1)")
    parser.add_argument("--transport", choices=["tcp", "ipc"], default="tcp")
    parser.add_argument("--only", type=int, action="append", help="only the case of this number, from 0")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures for programs as well")
    arguments = parser.parse_args()
    ranks_list = [int(word) for word in arguments.ranks.split(",")]
    rounds = arguments.rounds or (1 if arguments.quick else 3)
    kinds = ["ours", *(["reference"] if arguments.reference else [])]
    copying = memcpy_gbs()
    rows = []
    print(_line(["frame", "dtype", "batch", "codec", "ranks", "ours", "events/s", "original", "ratio", "CPU-s/GB",
                 "limit", "share"]), "  (GB/s)")  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, case in enumerate(CASES):
            if arguments.only and number not in arguments.only:
                continue
            message = case.nbytes * case.batch_size
            limit = min(copying, zmq_gbs(message, 0.5e9 if arguments.quick else 2e9) if message > 10_000 else copying)
            if case.compression:
                limit = min(limit, codec_gbs(case))
            for ranks in ranks_list:
                found: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in kinds}
                for _ in range(rounds):
                    for kind in kinds:
                        found[kind].append(run(kind, case, ranks, arguments, folder))
                ours, rate, cpu = (statistics.median(column) for column in zip(*found["ours"], strict=True))
                theirs = statistics.median(one[0] for one in found["reference"]) if "reference" in found else None
                row = {
                    "frame": list(case.frame),
                    "dtype": case.dtype,
                    "batch_size": case.batch_size,
                    "compression": case.compression,
                    "ranks": ranks,
                    "ours_gbs": ours,
                    "ours_events_s": rate,
                    "reference_gbs": theirs,
                    "ratio": ours / theirs if theirs else None,
                    "ours_cpu_s_per_gb": cpu,
                    "limit_gbs": limit,
                    "share_of_limit": ours / limit,
                }
                rows.append(row)
                print(_table_line(row), flush=True)
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.processor() or platform.machine(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "memcpy_gbs": copying,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:9])
    else:
        stop_on_signals()
        main()
