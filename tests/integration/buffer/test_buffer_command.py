"""The `nngstream` command: options, exit codes, signals, status, summary."""

from __future__ import annotations

import json
import logging
import re
import signal
import socket
import ssl
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nngstream.cli import app
from nngstream.status import metrics

pytestmark = pytest.mark.integration


def _urls(child) -> dict[str, str]:
    child.wait_for_output("status http")
    return dict(line.split() for line in child.output().splitlines() if line.split()[0] in ("in", "out", "status"))


def _get(url: str, context: ssl.SSLContext | None = None) -> str:
    with urllib.request.urlopen(url, timeout=60, context=context) as answer:
        return answer.read().decode()


def test_from_start_to_end_of_stream(start, tmp_path, zmq_push, zmq_pull, wait_until):
    summary = tmp_path / "summary.json"
    child = start(
        "nngstream", "--in", "tcp://127.0.0.1:0", "--out", "tcp://127.0.0.1:0", "--status", "http://127.0.0.1:0",
        "--summary", str(summary), "--name", "run7", "--grace", "0", "--capacity", "64MiB", "--sentinel", "2",
    )  # fmt: skip
    urls = _urls(child)
    status = json.loads(_get(urls["status"] + "/status"))
    assert (status["name"], status["state"], status["capacity_bytes"]) == ("run7", "waiting", 64 << 20)
    assert (status["in"], status["out"]) == ([urls["in"]], [urls["out"]])
    push = zmq_push(urls["in"])
    push.send(b"hello")
    wait_until(lambda: json.loads(_get(urls["status"] + "/status"))["held"]["messages"] == 1, 60, "message")
    metrics = _get(urls["status"] + "/metrics").splitlines()
    assert 'nngstream_held_bytes{buffer="run7"} 5' in metrics
    assert 'nngstream_state{buffer="run7",state="streaming"} 1' in metrics
    assert [line.rpartition(" ")[2] for line in metrics if line.startswith("nngstream_peer_bytes{")] == ["5"]
    with pytest.raises(urllib.error.HTTPError, match="404"):
        _get(urls["status"] + "/")
    pull = zmq_pull(urls["out"])
    assert pull.recv() == b"hello"
    push.close()
    assert child.wait() == 0
    assert [pull.recv(), pull.recv()] == [b"", b""]
    final = json.loads(summary.read_text())
    assert (final["state"], final["sent"], final["lost"]["messages"]) == ("done", {"messages": 1, "bytes": 5}, 0)
    assert "received 1 messages (5 bytes), sent 1 (5 bytes), lost 0" in child.output()
    assert list(tmp_path.glob(".summary*")) == [], "nothing half written is left"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_says_what_was_dropped(start, tmp_path, zmq_push, wait_until, number, code):
    child = start(
        "nngstream", "--in", "tcp://127.0.0.1:0", "--out", f"ipc://{tmp_path}/out", "--status", "http://127.0.0.1:0",
        "--drain", "0.2", "--summary", str(tmp_path / "summary.json"),
    )  # fmt: skip
    urls = _urls(child)
    push = zmq_push(urls["in"])
    push.send(b"x" * 100)
    wait_until(lambda: json.loads(_get(urls["status"] + "/status"))["held"]["messages"] == 1, 60, "message")
    child.signal(number)
    assert child.wait() == code
    assert "dropped 1 messages (100 bytes)" in child.output()
    final = json.loads((tmp_path / "summary.json").read_text())
    assert (final["state"], final["lost"]) == ("failed", {"messages": 1, "bytes": 100})
    assert not (tmp_path / "out").exists()


def test_a_signal_to_an_empty_buffer_is_no_failure(start):
    child = start(
        "nngstream", "--in", "tcp://127.0.0.1:0", "--out", "tcp://127.0.0.1:0", "--status", "http://127.0.0.1:0"
    )
    _urls(child)
    child.signal(signal.SIGTERM)
    assert child.wait() == 0


@pytest.mark.parametrize("option", ["--in", "--out", "--status"])
def test_a_port_in_use_is_a_clear_message_and_exit_3(start, option):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        urls = {"--in": "tcp://127.0.0.1:0", "--out": "tcp://127.0.0.1:0", "--status": "http://127.0.0.1:0"}
        urls[option] = urls[option][:-1] + str(port)
        child = start("nngstream", *(word for pair in urls.items() for word in pair))
        assert child.wait() == 3
        output = child.output()
    assert f"cannot listen at {urls[option]}" in output
    assert "Choose another" in output
    assert "Traceback" not in output


def test_an_ipc_path_left_by_a_killed_buffer_is_taken_over_and_one_in_use_is_not(start, tmp_path):
    words = [
        "nngstream",
        "--in",
        f"ipc://{tmp_path}/in",
        "--out",
        f"ipc://{tmp_path}/out",
        "--status",
        "http://127.0.0.1:0",
    ]
    first = start(*words)
    _urls(first)
    second = start(*words)
    assert second.wait() == 3
    assert f"ipc://{tmp_path}/in" in second.output()
    first.signal(signal.SIGKILL)
    first.process.wait(60)
    assert (tmp_path / "in").exists()
    third = start(*words)
    _urls(third)


CERTIFICATES = ["--tls-certificate", "c", "--tls-key", "k", "--tls-ca", "a"]
WHO_MAY = [*CERTIFICATES, "--tls-producer", "engine", "--tls-consumer", "ada"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--in and --out are needed"),
        (["--in", "tcp://127.0.0.1:0"], "--in and --out are needed"),
        (["--in", "udp://x:1", "--out", "tcp://127.0.0.1:0"], "'udp://x:1' is no address"),
        (["--in", "tcp://127.0.0.1:0", "--out", "tcp://127.0.0.1:0", "--capacity", "8Gb"], "'8Gb' is no size"),
        (["--in", "tcp://127.0.0.1:0", "--out", "tcp://127.0.0.1:0", "--producers", "-1"], "producers"),
        (["--in", "tcp://127.0.0.1:0", "--out", "tcp://127.0.0.1:0", "--status", "http://0.0.0.0:1"], "https://"),
        (["--in", "tls+tcp://127.0.0.1:0", "--out", "tcp://127.0.0.1:0"], "--tls-certificate"),
        (
            ["--in", "tls+tcp://127.0.0.1:0", "--out", "tcp://127.0.0.1:0", *WHO_MAY],
            "tls.consumers says who may come, but tcp://127.0.0.1:0 asks nobody",
        ),
        (
            ["--in", "tcp://127.0.0.1:0", "--out", "tls+tcp://127.0.0.1:0", *WHO_MAY],
            "tls.producers says who may come, but tcp://127.0.0.1:0 asks nobody",
        ),
        (["--in", "ipc://relative", "--out", "tcp://127.0.0.1:0"], "absolute path"),
        (
            ["--in", "tcp://127.0.0.1:0", "--out", "tcp://127.0.0.1:0", "--summary", "/no/where"],
            "there is no folder /no",
        ),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml: No such file"),
        (["--in", "tcp://127.0.0.1:0", "--out", "tcp://127.0.0.1:0", "--log-level", "loud"], "'loud'"),
        (["--frobnicate"], "No such option"),
    ],
)
def test_wrong_options_are_explained_with_exit_2(words, message):
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        result = CliRunner().invoke(app, words)
    finally:  # the command logs to the output that the runner has closed
        root.handlers[:], root.level = handlers, level
    assert result.exit_code == 2
    assert message in result.output


def test_a_wrong_option_shows_no_traceback(start):
    child = start("nngstream", "--in", "tcp://127.0.0.1:0", "--out", "nowhere")
    assert child.wait() == 2
    assert child.output().startswith("options: out.0: 'nowhere' is no address")
    assert "Traceback" not in child.output()


def test_options_come_from_a_file_and_are_overridden_on_the_command_line(start, tmp_path):
    path = tmp_path / "buffer.yaml"
    path.write_text(
        "in: [tcp://127.0.0.1:0]\nout: [tcp://127.0.0.1:0]\nstatus: http://127.0.0.1:0\nname: a\ncapacity: 2MiB\n"
    )
    child = start("nngstream", "--config", str(path), "--name", "b")
    status = json.loads(_get(_urls(child)["status"] + "/status"))
    assert (status["name"], status["capacity_bytes"]) == ("b", 2 << 20)
    path.write_text(path.read_text() + "capacitty: 3\n")
    wrong = start("nngstream", "--config", str(path))
    assert wrong.wait() == 2
    assert f"{path}: capacitty: Extra inputs are not permitted (given: 3)" in wrong.output()


def test_the_example_files_in_the_documentation_are_valid():
    from nngstream.config import checked, load

    examples = sorted((Path(__file__).parents[3] / "docs" / "examples").glob("buffer-*.yaml"))
    assert examples
    for path in examples:
        checked(load(path), str(path))


def test_the_status_over_https_wants_a_certificate_of_ours(start, sites):
    server, client = sites["s3df"].member("buffer"), sites["s3df"].member("monitor")
    child = start(
        "nngstream", "--in", "tcp://127.0.0.1:0", "--out", "tcp://127.0.0.1:0", "--status", "https://127.0.0.1:0",
        "--tls-certificate", str(server.certificate), "--tls-key", str(server.key),
        "--tls-ca", str(server.folder / "known_clients" / "org.crt"),
    )  # fmt: skip
    url = _urls(child)["status"] + "/status"
    assert json.loads(_get(url, client.client_context(url)))["state"] == "waiting"
    nobody = ssl.create_default_context(cafile=str(client.folder / "known_servers" / "org.crt"))
    with pytest.raises((urllib.error.URLError, ssl.SSLError, ConnectionError)):
        _get(url, nobody)
    stranger = sites["olcf"].member("monitor")
    context = ssl.create_default_context(cafile=str(client.folder / "known_servers" / "org.crt"))
    context.load_cert_chain(stranger.certificate, stranger.key)
    with pytest.raises((urllib.error.URLError, ssl.SSLError, ConnectionError)):
        _get(url, context)
    assert json.loads(_get(url, client.client_context(url)))["state"] == "waiting", "the others go on"


def test_a_status_client_that_says_nothing_holds_nobody_up(start):
    child = start(
        "nngstream", "--in", "tcp://127.0.0.1:0", "--out", "tcp://127.0.0.1:0", "--status", "http://127.0.0.1:0"
    )
    url = _urls(child)["status"]
    port = int(url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)), socket.create_connection(("127.0.0.1", port)) as half:
        half.sendall(b"GET /sta")
        assert json.loads(_get(url + "/status"))["state"] == "waiting"
        child.signal(signal.SIGTERM)
        assert child.wait() == 0


def test_top_shows_a_running_buffer_and_ends_with_it(start, zmq_push, wait_until):
    child = start(
        "nngstream", "--in", "tcp://127.0.0.1:0", "--out", "tcp://127.0.0.1:0", "--status", "http://127.0.0.1:0",
        "--name", "run9", "--drain", "0",
    )  # fmt: skip
    urls = _urls(child)
    zmq_push(urls["in"]).send(b"x" * 5000)
    wait_until(lambda: json.loads(_get(urls["status"] + "/status"))["held"]["messages"] == 1, 60, "message")
    once = start("nngstream", "top", urls["status"], "--once", env={"COLUMNS": "150"})
    assert once.wait() == 0
    for text in ("run9", "streaming", "5 kB held of 1.07 GB", "received 1 (5 kB)", "waits for: a consumer", "zmq"):
        assert text in once.output()
    live = start("nngstream", "top", urls["status"], "--interval", "0.1", env={"COLUMNS": "150"})
    live.wait_for_output("run9")
    child.signal(signal.SIGTERM)
    assert child.wait() == 143
    assert live.wait() == 0
    gone = start("nngstream", "top", urls["status"])
    assert gone.wait() == 3
    assert "refused" in gone.output()


def test_top_reads_an_encrypted_status(start, sites):
    server, client = sites["s3df"].member("buffer"), sites["s3df"].member("monitor")
    child = start(
        "nngstream", "--in", "tcp://127.0.0.1:0", "--out", "tcp://127.0.0.1:0", "--status", "https://127.0.0.1:0",
        "--tls-certificate", str(server.certificate), "--tls-key", str(server.key),
        "--tls-ca", str(server.folder / "known_clients" / "org.crt"),
    )  # fmt: skip
    url = _urls(child)["status"]
    files = ["--tls-certificate", str(client.certificate), "--tls-key", str(client.key)]
    files += ["--tls-ca", str(client.folder / "known_servers" / "org.crt")]
    once = start("nngstream", "top", url, "--once", *files)
    assert once.wait() == 0
    assert "waits for: the first producer" in once.output()
    without = start("nngstream", "top", url, "--once")
    assert without.wait() == 2
    assert "--tls-certificate" in without.output()


def test_every_metric_of_the_dashboard_is_one_the_buffer_has(run_buffer, zmq_push, wait_until):
    running = run_buffer()
    zmq_push(running.inp)
    wait_until(lambda: running.status()["producers"] == 1, 60, "producer")
    known = set(re.findall(r"^(nngstream_\w+)\{", metrics(running.status()), re.MULTILINE))
    dashboard = (Path(__file__).parents[3] / "docs" / "examples" / "buffer-grafana.json").read_text()
    panels = json.loads(dashboard)["panels"]
    used = {
        name for panel in panels for each in panel["targets"] for name in re.findall(r"nngstream_\w+", each["expr"])
    }
    assert len(panels) > 5
    assert used <= known


def test_peers_go_on_when_a_killed_buffer_is_started_again(start, free_port, zmq_push, zmq_pull, collect, wait_until):
    ports = [free_port(), free_port()]
    words = ["--in", f"tcp://127.0.0.1:{ports[0]}", "--out", f"tcp://127.0.0.1:{ports[1]}", "--sentinel", "1"]
    words = ["nngstream", *words, "--status", "http://127.0.0.1:0"]
    first = start(*words)
    _urls(first)
    push, pull = zmq_push(f"tcp://127.0.0.1:{ports[0]}"), zmq_pull(f"tcp://127.0.0.1:{ports[1]}", timeout_s=0.5)
    collector = collect(pull.recv, sentinel=True)
    stop = threading.Event()
    sent = []

    def produce() -> None:
        while not stop.is_set():
            push.send(b"%d " % len(sent) + bytes(1000 * (len(sent) % 300)))
            sent.append(None)

    thread = threading.Thread(target=produce)
    thread.start()
    wait_until(lambda: len(collector.messages) > 50, 60, "messages")
    first.signal(signal.SIGKILL)
    first.process.wait(60)
    before = len(collector.messages)
    second = start(*words)
    _urls(second)
    wait_until(lambda: len(collector.messages) > before + 50, 60, "messages through the second buffer")
    stop.set()
    thread.join(60)
    push.close()
    assert second.wait() == 0
    numbers = [int(message.split(b" ", 1)[0]) for message in collector.finish()]
    assert numbers == sorted(set(numbers)), "nothing comes twice, nothing out of order"
    assert numbers[-1] == len(sent) - 1
