r"""How fast is the buffer, beside any other one and beside what the machine can do?

    python benchmarks/buffer.py --quick
    python benchmarks/buffer.py --topology 1x1,2x2 --sizes 4k,1M,32M --json buffer.json \
        --peer './run-other-buffer {IN} {OUT}'

Load comes from plain sockets that speak ZeroMQ's protocol, a process each: they write prepared bytes and count what
arrives, so that neither library nor parsing of theirs is measured. Buffers are measured in turn (ours, peer, ours,
...), each round with fresh processes; medians are printed. A peer is any command; {IN} and {OUT} become ``tcp://``
URLs at which it must listen, for PUSH and PULL sockets.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shlex
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import psutil

from nngstream.wire import zmtp

fork = multiprocessing.get_context("fork")
Counter = "Synchronized[int]"
BLOCK = 256 * 1024
READ = 1 << 20
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


# -- load


def _connect(url: str, kind: str, tls: dict[str, str] | None) -> socket.socket:
    """A connection after the handshake of a PUSH or PULL socket."""
    deadline = time.monotonic() + 15
    host, _, port = url.rpartition("://")[2].rpartition(":")
    while True:
        try:
            sock = socket.create_connection((host, int(port)), timeout=10)
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if tls is not None:
        context = ssl.create_default_context(cafile=tls["ca"])
        context.load_cert_chain(tls["certificate"], tls["key"])
        sock = context.wrap_socket(sock, server_hostname=host)
    sock.sendall(zmtp.greeting() + zmtp.ready(kind))
    _exactly(sock, zmtp.GREETING_SIZE)
    _exactly(sock, _exactly(sock, 2)[1])
    sock.settimeout(None)
    return sock


def _exactly(sock: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = sock.recv_into(view)
        if not count:
            raise ConnectionError("closed")
        view = view[count:]
    return data


def produce(url: str, size: int, tls: dict[str, str] | None, interval_s: float) -> None:
    """Send messages of `size` bytes for ever, as fast as they are taken, or one every `interval_s`."""
    sock = _connect(url, "PUSH", tls)
    with suppress(ConnectionError):  # the buffer was stopped
        _produce(sock, size, interval_s)


def _produce(sock: socket.socket, size: int, interval_s: float) -> None:
    header = zmtp.ZMTP.header(size, False)
    if interval_s:
        message = bytearray(header + bytes(size))
        due = time.monotonic()
        while True:
            due += interval_s
            time.sleep(max(0.0, due - time.monotonic()))
            struct.pack_into("d", message, len(header), time.monotonic())
            sock.sendall(message)
    block = memoryview((header + os.urandom(min(size, 1 << 20)) * max(1, size >> 20))[: len(header) + size])
    if len(block) < BLOCK:
        block = memoryview(bytes(block) * (BLOCK // len(block)))
    while True:
        sock.sendall(block)


def consume(url: str, size: int, tls: dict[str, str] | None, counter: Synchronized[int]) -> None:
    """Count the bytes that arrive, for ever."""
    sock = _connect(url, "PULL", tls)
    buffer = memoryview(bytearray(READ))
    total = 0
    while True:
        count = sock.recv_into(buffer)
        if not count:
            return
        total += count
        counter.value = total


def clock(url: str, size: int, tls: dict[str, str] | None, path: str) -> None:
    """Note how old each message is when its last byte has arrived, in a file of doubles, for ever."""
    sock = _connect(url, "PULL", tls)
    header = len(zmtp.ZMTP.header(size, False))
    with Path(path).open("ab", buffering=0) as file:
        while True:
            message = _exactly(sock, header + size)
            file.write(struct.pack("d", time.monotonic() - struct.unpack_from("d", message, header)[0]))


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


def raw_relay(inp: int, out: int) -> None:
    """What a relay costs that does nothing but move bytes, one connection a side, one thread."""
    servers = [socket.create_server(("127.0.0.1", port)) for port in (inp, out)]
    sockets = []
    for server, kind in zip(servers, ("PULL", "PUSH"), strict=True):
        sock, _ = server.accept()
        _exactly(sock, zmtp.GREETING_SIZE)
        _exactly(sock, _exactly(sock, 2)[1])
        sock.sendall(zmtp.greeting() + zmtp.ready(kind))
        sockets.append(sock)
    buffer = memoryview(bytearray(BLOCK))
    while count := sockets[0].recv_into(buffer):
        sockets[1].sendall(buffer[:count])


# -- measuring


def throughput(
    urls: tuple[str, str], process: psutil.Process | None, size: int, shape: tuple[int, int], seconds: float, tls: Any
) -> tuple[float, float]:
    """GB/s that arrive, and CPU seconds of the buffer for a GB."""
    counters = [fork.Value("Q", 0, lock=False) for _ in range(shape[1])]
    loads = [fork.Process(target=consume, args=(urls[1], size, tls, counter), daemon=True) for counter in counters]
    loads += [fork.Process(target=produce, args=(urls[0], size, tls, 0), daemon=True) for _ in range(shape[0])]
    with _started(loads):
        _wait(lambda: sum(counter.value for counter in counters) > size)
        _warm_up(counters, 2 * capacity_for(size, shape[0]))
        begin, before, cpu = time.monotonic(), sum(counter.value for counter in counters), _cpu(process)
        # Large messages arrive in bursts: end when a burst has, not in the middle of a silence.
        time.sleep(seconds)
        after, end = sum(counter.value for counter in counters), time.monotonic()
        used = _cpu(process) - cpu
    gigabytes = (after - before) / 1e9
    return gigabytes / (end - begin), used / gigabytes if gigabytes else float("nan")


def latency(urls: tuple[str, str], size: int, shape: tuple[int, int], seconds: float, tls: Any) -> list[float]:
    """Milliseconds from the first byte's departure to the last one's arrival, at 0.2 GB/s or 500 a second."""
    interval = max(0.002, size / 2e8) * shape[0]
    seconds = max(seconds, 20 * interval)
    with tempfile.NamedTemporaryFile() as file:
        loads = [fork.Process(target=clock, args=(urls[1], size, tls, file.name), daemon=True) for _ in range(shape[1])]
        with _started(loads):
            time.sleep(0.3)
            producers = [
                fork.Process(target=produce, args=(urls[0], size, tls, interval), daemon=True) for _ in range(shape[0])
            ]
            with _started(producers):
                _wait(lambda: Path(file.name).stat().st_size > 0)
                time.sleep(seconds)
        data = file.read()
    times = [1000 * each[0] for each in struct.iter_unpack("d", data)]
    return times[len(times) // 10 :]


def idle(urls: tuple[str, str], process: psutil.Process, seconds: float, tls: Any) -> float:
    """Share of one core that the buffer takes with a peer on each side and nothing to do, in percent."""
    with _connect(urls[0], "PUSH", tls), _connect(urls[1], "PULL", tls):
        time.sleep(0.5)
        before = _cpu(process)
        time.sleep(seconds)
        return 100 * (_cpu(process) - before) / seconds


def _warm_up(counters: list[Any], nbytes: int) -> None:
    """Until the buffer has used all its memory once: pages that were never touched are slow, and not what lasts."""
    deadline = time.monotonic() + WARM_UP_S
    while time.monotonic() < deadline and sum(counter.value for counter in counters) < nbytes:
        time.sleep(0.02)
    time.sleep(0.2)


@contextmanager
def _started(processes: list[Any]) -> Iterator[None]:
    for process in processes:
        process.start()
    try:
        yield
        for process in processes:
            if process.exitcode:
                raise SystemExit(f"a load process ended with {process.exitcode}")
    finally:
        for process in processes:
            process.kill()
            process.join()


def _cpu(process: psutil.Process | None) -> float:
    if process is None:
        return 0.0
    times = process.cpu_times()
    return float(times.user + times.system)


def _wait(condition: Callable[[], bool], timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("nothing arrived within 30 s")
        time.sleep(0.01)


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

        with _started([fork.Process(target=drink, daemon=True), fork.Process(target=pour, daemon=True)]):
            _wait(lambda: counter.value > 0)
            before = counter.value
            time.sleep(seconds)
            limits["tcp_stream_gbs"] = (counter.value - before) / seconds / 1e9
    return limits


def relay_rate(size: int, seconds: float) -> float:
    """GB/s of the raw relay with messages of this size."""
    ports = _free_port(), _free_port()
    with _started([fork.Process(target=raw_relay, args=ports, daemon=True)]):
        # It accepts the producer first.
        counter = fork.Value("Q", 0, lock=False)
        urls = [f"tcp://127.0.0.1:{port}" for port in ports]
        loads = [
            fork.Process(target=produce, args=(urls[0], size, None, 0), daemon=True),
            fork.Process(target=consume, args=(urls[1], size, None, counter), daemon=True),
        ]
        with _started(loads):
            _wait(lambda: counter.value > size)
            time.sleep(0.4)
            before = counter.value
            time.sleep(seconds)
            return (counter.value - before) / seconds / 1e9


def measure(options: argparse.Namespace, size: int, shape: tuple[int, int], tls: Any) -> dict[str, Any]:
    """One row of the table."""
    commands = {"ours": ours_command(f"{capacity_for(size, shape[0])}B", tls)}
    if options.peer and not tls:
        commands["peer"] = options.peer
    rates: dict[str, list[float]] = {name: [] for name in commands}
    costs: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(options.rounds):
        for name, command in commands.items():
            with running(command, tls) as (inp, out, process):
                rate, cost = throughput((inp, out), process, size, shape, options.seconds, tls)
            rates[name].append(rate)
            costs[name].append(cost)
    row: dict[str, Any] = {"size": size, "producers": shape[0], "consumers": shape[1], "tls": tls is not None}
    row["ours_gbs"] = statistics.median(rates["ours"])
    row["ours_messages_s"] = row["ours_gbs"] * 1e9 / size
    row["cpu_s_per_gb"] = statistics.median(costs["ours"])
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
    row["raw_relay_gbs"] = relay_rate(size, options.seconds) if shape == (1, 1) and not tls else None
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
        f"ratio {number('ratio', '5.2f')}  relay {number('raw_relay_gbs', '5.2f')}  "
        f"cpu {number('cpu_s_per_gb', '5.2f')} s/GB (peer {number('peer_cpu_s_per_gb', '.2f')})  "
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
            for shape in shapes:
                for size in map(size_of, options.sizes.split(",")):
                    rows.append(measure(options, size, shape, tls))
                    print_row(rows[-1])
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "peer": options.peer, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
