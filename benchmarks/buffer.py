r"""How fast is the buffer, beside any other one and beside what the machine can do?

    python benchmarks/buffer.py --quick
    python benchmarks/buffer.py --sustained 60 --sizes 4k,1M,8M
    python benchmarks/buffer.py --topology 1x1,2x2 --sizes 4k,1M,32M --json buffer.json \
        --peer './run-other-buffer {IN} {OUT}'

Load comes from `buffer_load.py`: plain sockets that speak ZeroMQ's protocol, a process each. Buffers are measured in
turn (ours, peer, ours, ...), each round with fresh processes; medians are printed. A peer is any command; {IN} and
{OUT} become ``tcp://`` URLs at which it must listen, for PUSH and PULL sockets.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import shlex
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from buffer_load import BLOCK, READ, check, clock, connect, consume, exactly, fork, produce, produce_at, started, wait
from stopping import stop_on_signals

from nngstream.wire import zmtp

WARM_UP_S = 3.0
_UNITS = {"k": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def size_of(text: str) -> int:
    """Bytes of ``4k``, ``1M``, ``160M``."""
    return int(text[:-1]) * _UNITS[text[-1]] if text[-1] in _UNITS else int(text)


def size_name(size: int) -> str:
    """``4k``, ``1M``."""
    for unit, factor in reversed(_UNITS.items()):
        if size >= factor:
            return f"{size / factor:g}{unit}"
    return str(size)


# -- buffers


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(command: str, tls: dict[str, str] | None) -> Iterator[tuple[str, str, psutil.Process]]:
    """Start a buffer; yields its URLs and its process."""
    scheme = "tls+tcp" if tls and "nngstream" in command else "tcp"
    urls = [f"{scheme}://127.0.0.1:{_free_port()}" for _ in range(2)]
    words = [word.replace("{IN}", urls[0]).replace("{OUT}", urls[1]) for word in shlex.split(command)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
        try:
            yield urls[0], urls[1], psutil.Process(process.pid)
            if process.poll() is not None:
                log.seek(0)
                raise SystemExit(f"{command!r} ended with {process.returncode}:\n{log.read().decode()[-2000:]}")
        finally:
            process.kill()
            process.wait()


def capacity_for(size: int, producers: int) -> int:
    """Bytes that our buffer gets: room for some messages of every producer."""
    return max(256 << 20, 8 * size * producers)


def ours_command(capacity: str, tls: dict[str, str] | None) -> str:
    """Our buffer, as a user starts it."""
    program = Path(sys.executable).parent / "nngstream"
    words = [str(program), "--in", "{IN}", "--out", "{OUT}", "--capacity", capacity, "--log-level", "error"]
    if tls:
        words += ["--tls-certificate", tls["certificate"], "--tls-key", tls["key"], "--tls-ca", tls["ca"]]
    return shlex.join(words)


def raw_relay(inp: int, out: int, splice: bool) -> None:
    """What a relay costs that does nothing but move bytes, one connection a side, one thread.

    It reads and writes, as whoever stores must; or it lets the kernel move its pages (splice), which a store cannot.
    """
    servers = [socket.create_server(("127.0.0.1", port)) for port in (inp, out)]
    sockets = []
    for server, kind in zip(servers, ("PULL", "PUSH"), strict=True):
        sock, _ = server.accept()
        exactly(sock, zmtp.GREETING_SIZE)
        exactly(sock, exactly(sock, 2)[1])
        sock.sendall(zmtp.greeting() + zmtp.ready(kind))
        sockets.append(sock)
    if splice:
        source, target = sockets[0].fileno(), sockets[1].fileno()
        reader, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, READ)
        while count := os.splice(source, writer, READ):
            while count:
                count -= os.splice(reader, target, count)
    buffer = memoryview(bytearray(BLOCK))
    while count := sockets[0].recv_into(buffer):
        sockets[1].sendall(buffer[:count])


# -- measuring


def throughput(
    urls: tuple[str, str], process: psutil.Process | None, size: int, shape: tuple[int, int], seconds: float, tls: Any
) -> tuple[float, float, float]:
    """GB/s that arrive, and CPU seconds for a GB: of the buffer, and of producers and consumers."""
    counters = [fork.Value("Q", 0, lock=False) for _ in range(shape[1])]
    loads = [fork.Process(target=consume, args=(urls[1], size, tls, counter), daemon=True) for counter in counters]
    loads += [fork.Process(target=produce, args=(urls[0], size, tls, 0), daemon=True) for _ in range(shape[0])]
    with started(loads):
        wait(lambda: sum(counter.value for counter in counters) > size)
        _warm_up(counters, 2 * capacity_for(size, shape[0]))
        peers = [psutil.Process(load.pid) for load in loads]
        begin, before = time.monotonic(), sum(counter.value for counter in counters)
        cpu, load_cpu = _cpu(process), sum(map(_cpu, peers))
        time.sleep(seconds)
        after, end = sum(counter.value for counter in counters), time.monotonic()
        cpu, load_cpu = _cpu(process) - cpu, sum(map(_cpu, peers)) - load_cpu
    gigabytes = max(1, after - before) / 1e9
    return gigabytes / (end - begin), cpu / gigabytes, load_cpu / gigabytes


def latency(urls: tuple[str, str], size: int, shape: tuple[int, int], seconds: float, tls: Any) -> list[float]:
    """Milliseconds from the first byte's departure to the last one's arrival, at 0.2 GB/s or 500 a second."""
    interval = max(0.002, size / 2e8) * shape[0]
    seconds = max(seconds, 20 * interval / shape[0])
    with tempfile.NamedTemporaryFile() as file:
        loads = [fork.Process(target=clock, args=(urls[1], size, tls, file.name), daemon=True) for _ in range(shape[1])]
        with started(loads):
            time.sleep(0.3)
            producers = [
                fork.Process(target=produce, args=(urls[0], size, tls, interval), daemon=True) for _ in range(shape[0])
            ]
            with started(producers):
                wait(lambda: Path(file.name).stat().st_size > 0)
                time.sleep(seconds)
        data = file.read()
    times = [1000 * each[0] for each in struct.iter_unpack("d", data)]
    return times[len(times) // 10 :]


def idle(urls: tuple[str, str], process: psutil.Process, seconds: float, tls: Any) -> float:
    """Share of one core that the buffer takes with a peer on each side and nothing to do, in percent."""
    with connect(urls[0], "PUSH", tls), connect(urls[1], "PULL", tls):
        time.sleep(0.5)
        before = _cpu(process)
        time.sleep(seconds)
        return 100 * (_cpu(process) - before) / seconds


def sustained(urls: tuple[str, str], size: int, rate: float, seconds: float, late_s: float) -> dict[str, Any]:
    """Send messages at a rate (a second) for so long, one producer and one consumer; says what came, and how late."""
    found, behind = fork.Array("d", 4, lock=False), fork.Value("d", 0, lock=False)
    consumer = fork.Process(target=check, args=(urls[1], size, None, late_s, found), daemon=True)
    producer = fork.Process(target=produce_at, args=(urls[0], size, None, rate, seconds, behind), daemon=True)
    with started([consumer, producer]):
        producer.join(2 * seconds + late_s + 10)
        ended, end = not producer.is_alive(), time.monotonic() + late_s
        together = max(1, BLOCK // (size + len(zmtp.ZMTP.header(size, False))))
        sent = -(-int(rate * seconds) // together) * together
        while time.monotonic() < end and found[0] < sent:
            time.sleep(0.02)
    return {
        "lost": sent - int(found[0]) if ended else None,
        "out_of_order": int(found[1]),
        "late": int(found[2]),
        "max_age_s": found[3],
        "clean": ended and found[0] == sent and not found[1] and not found[2] and behind.value <= late_s,
    }


def highest_clean_rate(options: argparse.Namespace, size: int) -> dict[str, Any]:
    """The highest rate at which no message is lost, and none arrives later than `--late` after it was due."""
    command = ours_command(f"{capacity_for(size, 1)}B", None)
    with running(command, None) as (inp, out, process):
        most = throughput((inp, out), process, size, (1, 1), options.seconds, None)[0]
    trial: dict[str, Any] = {"clean": False}
    for percent in range(90, 0, -10):
        rate = most * 1e9 / size * percent / 100
        for seconds in (min(5.0, options.sustained), options.sustained):
            with running(f"{command} --grace 3600", None) as (inp, out, _):
                trial = sustained((inp, out), size, rate, seconds, options.late)
            if not trial["clean"]:
                break
        if trial["clean"]:
            break
    return {
        "case": "sustained",
        "size": size,
        "producers": 1,
        "consumers": 1,
        "seconds": options.sustained,
        "late_s": options.late,
        "ours_gbs": rate * size / 1e9,
        "ours_messages_s": rate,
        "share_of_throughput": percent / 100,
        **trial,
    }


def _warm_up(counters: list[Any], nbytes: int) -> None:
    """Until the buffer has used all its memory once: pages that were never touched are slow, and not what lasts."""
    deadline = time.monotonic() + WARM_UP_S
    while time.monotonic() < deadline and sum(counter.value for counter in counters) < nbytes:
        time.sleep(0.02)
    time.sleep(0.2)


def _cpu(process: psutil.Process | None) -> float:
    if process is None:
        return 0.0
    times = process.cpu_times()
    return float(times.user + times.system)


def machine_limits(seconds: float) -> dict[str, float]:
    """Memory copies, one TCP stream and a raw relay, in GB/s."""
    source, target = bytearray(64 << 20), bytearray(64 << 20)
    copies = []
    for _ in range(5):
        begin = time.perf_counter()
        memoryview(target)[:] = source
        copies.append(len(source) / (time.perf_counter() - begin) / 1e9)
    limits = {"memcpy_gbs": statistics.median(copies[1:])}
    with socket.create_server(("127.0.0.1", 0)) as server:
        counter = fork.Value("Q", 0, lock=False)
        port = server.getsockname()[1]

        def pour() -> None:
            with socket.create_connection(("127.0.0.1", port)) as sock:
                block = bytes(4 << 20)
                with suppress(ConnectionError):
                    while True:
                        sock.sendall(block)

        def drink() -> None:
            sock, _ = server.accept()
            buffer = memoryview(bytearray(READ))
            total = 0
            while True:
                total += sock.recv_into(buffer)
                counter.value = total

        with started([fork.Process(target=drink, daemon=True), fork.Process(target=pour, daemon=True)]):
            wait(lambda: counter.value > 0)
            before = counter.value
            time.sleep(seconds)
            limits["tcp_stream_gbs"] = (counter.value - before) / seconds / 1e9
    return limits


def relay_rate(size: int, seconds: float, *, splice: bool = False) -> float:
    """GB/s of the raw relay with messages of this size."""
    ports = _free_port(), _free_port()
    with started([fork.Process(target=raw_relay, args=(*ports, splice), daemon=True)]):
        # It accepts the producer first.
        counter = fork.Value("Q", 0, lock=False)
        urls = [f"tcp://127.0.0.1:{port}" for port in ports]
        loads = [
            fork.Process(target=produce, args=(urls[0], size, None, 0), daemon=True),
            fork.Process(target=consume, args=(urls[1], size, None, counter), daemon=True),
        ]
        with started(loads):
            wait(lambda: counter.value > size)
            time.sleep(0.4)
            before = counter.value
            time.sleep(seconds)
            return float(counter.value - before) / seconds / 1e9


def measure(options: argparse.Namespace, size: int, shape: tuple[int, int], tls: Any) -> dict[str, Any]:
    """One row of the table."""
    commands = {"ours": ours_command(f"{capacity_for(size, shape[0])}B", tls)}
    if options.peer and not tls:
        commands["peer"] = options.peer
    rates: dict[str, list[float]] = {name: [] for name in commands}
    costs: dict[str, list[float]] = {name: [] for name in commands}
    loads: list[float] = []
    for _ in range(options.rounds):
        for name, command in commands.items():
            with running(command, tls) as (inp, out, process):
                rate, cost, load = throughput((inp, out), process, size, shape, options.seconds, tls)
            rates[name].append(rate)
            costs[name].append(cost)
            if name == "ours":
                loads.append(load)
    row: dict[str, Any] = {"size": size, "producers": shape[0], "consumers": shape[1], "tls": tls is not None}
    row["ours_gbs"] = statistics.median(rates["ours"])
    row["ours_messages_s"] = row["ours_gbs"] * 1e9 / size
    row["cpu_s_per_gb"] = statistics.median(costs["ours"])
    row["load_cpu_s_per_gb"] = statistics.median(loads)
    row["cores_busy"] = row["ours_gbs"] * (row["cpu_s_per_gb"] + row["load_cpu_s_per_gb"])
    row["peer_gbs"] = statistics.median(rates["peer"]) if "peer" in rates else None
    row["peer_cpu_s_per_gb"] = statistics.median(costs["peer"]) if "peer" in rates else None
    row["ratio"] = row["ours_gbs"] / row["peer_gbs"] if row["peer_gbs"] else None
    row["rounds"] = rates
    with running(commands["ours"], tls) as (inp, out, process):
        times = latency((inp, out), size, shape, options.seconds, tls)
    with running(commands["ours"], tls) as (inp, out, process):
        row["idle_cpu"] = idle((inp, out), process, options.seconds, tls)
    quantiles = statistics.quantiles(times, n=100) if len(times) > 1 else [float("nan")] * 99
    row["p50_ms"], row["p99_ms"] = quantiles[49], quantiles[98]
    alone = shape == (1, 1) and not tls
    row["raw_relay_gbs"] = relay_rate(size, options.seconds) if alone else None
    row["splice_relay_gbs"] = relay_rate(size, options.seconds, splice=True) if alone else None
    return row


def certificates(folder: Path) -> dict[str, str]:
    """A P-256 certificate for this machine that signs itself, as options of the buffer."""
    files = {"certificate": str(folder / "c.pem"), "key": str(folder / "k.pem"), "ca": str(folder / "c.pem")}
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=benchmark"
    words = [
        *command.split(),
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-keyout",
        files["key"],
        "-out",
        files["certificate"],
    ]
    subprocess.run(words, check=True, capture_output=True)
    Path(files["key"]).chmod(0o600)
    return files


def print_row(row: dict[str, Any]) -> None:
    """One line for people."""

    def number(key: str, form: str) -> str:
        return "-" if row[key] is None else format(row[key], form)

    print(
        f"{size_name(row['size']):>6} {row['producers']}x{row['consumers']}{' tls' if row['tls'] else '    '} "
        f"{number('ours_gbs', '6.2f')} GB/s {number('ours_messages_s', '9,.0f')}/s  peer {number('peer_gbs', '5.2f')}  "
        f"ratio {number('ratio', '5.2f')}  relay {number('raw_relay_gbs', '5.2f')} (splice "
        f"{number('splice_relay_gbs', '.2f')})  cpu {number('cpu_s_per_gb', '5.2f')} s/GB (peer "
        f"{number('peer_cpu_s_per_gb', '.2f')}, load {number('load_cpu_s_per_gb', '.2f')})  "
        f"p50 {number('p50_ms', '7.2f')} p99 {number('p99_ms', '7.2f')} ms  idle {number('idle_cpu', '.2f')} %",
        flush=True,
    )


def main() -> None:
    """Read options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", metavar="COMMAND", help="another buffer, with {IN} and {OUT}")
    parser.add_argument("--topology", default="1x1", help="producers x consumers, separated by commas [1x1]")
    parser.add_argument("--sizes", default="4k,64k,1M,8M,32M,160M", help="sizes of messages [%(default)s]")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one measurement [3]")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each buffer [3]")
    parser.add_argument("--tls", action="store_true", help="also measure ours with TLS on both sides")
    parser.add_argument(
        "--sustained", type=float, metavar="S", help="instead: the highest rate without a lost or late message for S s"
    )
    parser.add_argument("--late", type=float, default=1.0, metavar="S", help="a message is late after that [1]")
    parser.add_argument("--quick", action="store_true", help="1x1, three sizes, short: under 50 s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same for programs")
    options = parser.parse_args()
    if options.quick:
        options.topology, options.sizes, options.seconds, options.rounds = "1x1", "4k,1M,8M", 1.0, 2
    shapes = [(int(a), int(b)) for a, b in (each.split("x") for each in options.topology.split(","))]
    machine = {
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
        **machine_limits(options.seconds),
    }
    print(
        f"{machine['cores']} cores, load {machine['load_before']:.1f}, memcpy {machine['memcpy_gbs']:.1f} GB/s, "
        f"one TCP stream {machine['tcp_stream_gbs']:.2f} GB/s",
        flush=True,
    )
    rows = []
    with ExitStack() as stack:
        modes: list[Any] = [None]
        if options.tls:
            modes.append(certificates(Path(stack.enter_context(tempfile.TemporaryDirectory()))))
        for tls in modes:
            for shape in shapes if options.sustained is None else []:
                for size in map(size_of, options.sizes.split(",")):
                    rows.append(measure(options, size, shape, tls))
                    print_row(rows[-1])
    for size in map(size_of, options.sizes.split(",")) if options.sustained is not None else []:
        rows.append(highest_clean_rate(options, size))
        print(
            {key: round(value, 3) if isinstance(value, float) else value for key, value in rows[-1].items()}, flush=True
        )
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "peer": options.peer, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    stop_on_signals()
    main()
