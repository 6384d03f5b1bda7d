"""Promises of the signer as a process: real sockets, the kernel's word, signals, and its certificates at a service."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import pwd
import queue
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from certified import encode
from certified.blob import PublicBlob
from certified.ca import CA
from cryptography import x509
from fastapi import Depends, FastAPI
from typer.testing import CliRunner

from lclstream.security import http
from lclstream.security.authority import SiteAuthority
from lclstream.security.credentials import Credentials
from lclstream.security.errors import AuthenticationError, CredentialsError, ServiceError, UnreachableError
from lclstream.security.identity import Identity
from lclstream.security.server import peer_identity, server_for
from lclstream.signer.cli import app
from lclstream.signer.client import ask, remaining, request_certificate
from lclstream.signer.config import SignerConfig
from lclstream.signer.errors import RefusedError
from lclstream.signer.issuing import Authority
from lclstream.signer.server import listen, serve
from lclstream.signer.service import Signer
from lclstream.signer.store import Store
from lclstream.signer.wire import Answer, Check, List, Revoke, Revoked

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

ME = pwd.getpwuid(os.geteuid()).pw_name
#: A second login that every Unix has; without a shell or a home of its own.
OTHER = "daemon"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a second UNIX user")
#: Loads everything as root, because another user may not read this Python, then becomes him for good.
AS_ANOTHER = """
import os, pwd, sys
from lclstream.signer.cli import app
from lclstream.signer import client, wire
import encodings.idna, shutil, rich.traceback, typer.main
app_command = typer.main.get_command(app)
user = pwd.getpwnam(sys.argv[1])
os.setgroups([]); os.setgid(user.pw_gid); os.setuid(user.pw_uid)
assert os.getuid() == os.geteuid() == user.pw_uid != 0
app_command(args=sys.argv[2:])
"""


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user of the machine can enter, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp(prefix="signer-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def home(public: Path) -> SiteAuthority:
    site = SiteAuthority(public / "site", "s3df")
    site.member("api")
    return site


def settings_of(home: SiteAuthority, public: Path, **settings: Any) -> dict[str, Any]:
    return {
        "authority": str(home.folder / "authority"),
        "socket": str(public / "run" / "signer.sock"),
        "database": f"sqlite:///{public / 'table' / 'signer.sqlite'}",
        "allow_root": True,
        **settings,
    }


@pytest.fixture
def signer(home: SiteAuthority, public: Path) -> Iterator[Callable[..., Any]]:
    """Run a signer with the site's key in a thread; ``.socket`` of the result is its socket."""
    with contextlib.ExitStack() as stack:

        def run(**settings: Any) -> SimpleNamespace:
            config = SignerConfig.model_validate(settings_of(home, public, **settings))
            store = Store(config.database)
            stack.callback(store.close)
            served = Signer(config, Authority(config.authority), store)
            listening = listen(config.socket)
            ready: queue.Queue[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = queue.Queue()

            async def main() -> None:
                stop = asyncio.Event()
                ready.put((asyncio.get_running_loop(), stop))
                await serve(served, listening, stop=stop)

            thread = threading.Thread(target=lambda: asyncio.run(main()))
            thread.start()
            loop, event = ready.get(timeout=60)

            def end() -> None:
                if thread.is_alive():
                    loop.call_soon_threadsafe(event.set)
                thread.join(60)
                assert not thread.is_alive()

            stack.callback(end)
            return SimpleNamespace(socket=config.socket, stop=end)

        yield run


@pytest.fixture
def process(home: SiteAuthority, public: Path, start: Callable[..., Any]) -> Callable[..., Any]:
    """Start a signer as a process of its own."""

    def run(**settings: Any) -> Any:
        config = settings_of(home, public, **settings)
        file = public / "signer.yaml"
        file.write_text(yaml.safe_dump(config))
        child = start("lclstream", "signer", "serve", "--config", str(file), name="signer")
        child.wait_for_output("listening at")
        child.socket = Path(config["socket"])
        return child

    return run


@pytest.fixture
def service(home: SiteAuthority, wait_until: Callable[..., None]) -> Iterator[str]:
    app = FastAPI()

    @app.get("/who")
    def who(peer: Identity = Depends(peer_identity)) -> Identity:  # noqa: B008
        return peer

    server = server_for(app, host="127.0.0.1", port=0, credentials=home.member("api"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started, 60, "server started")
    yield f"https://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


def who(url: str, folder: Path) -> dict[str, Any]:
    with http.explained(url), http.client(url, Credentials(folder)) as client:
        answer: dict[str, Any] = client.get("/who").raise_for_status().json()
    return answer


def as_other(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", AS_ANOTHER, OTHER, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "HOME": "/"},
    )


def test_a_requested_certificate_opens_the_services_of_the_site(
    signer: Callable[..., Any], service: str, public: Path
) -> None:
    running = signer(services={"api": service})
    installed = request_certificate(running.socket, public / "me")
    assert installed.login == ME
    answer = who(service, public / "me")
    assert (answer["login"], answer["serial"]) == (ME, installed.serial)
    assert "O=s3df" in answer["issuer"]
    assert stat.S_IMODE((public / "me/id.key").stat().st_mode) == 0o600
    assert stat.S_IMODE((public / "me").stat().st_mode) == 0o700
    assert [path.name for path in installed.services] == ["api.yaml"]
    assert not list((public / "me").rglob(".id.*"))


def test_a_revoked_certificate_is_refused_by_the_service_at_once(
    signer: Callable[..., Any], service: str, home: SiteAuthority, public: Path
) -> None:
    running = signer(revoked_files=[str(home.folder / "api" / "revoked.yaml")])
    installed = request_certificate(running.socket, public / "me")
    url = service
    with http.client(url, Credentials(public / "me")) as client:
        assert client.get("/who").status_code == 200
        ask(running.socket, Revoke(serial=installed.serial, reason="laptop lost"))
        refused = client.get("/who")
    assert refused.status_code == 401
    assert "laptop lost" in refused.json()["detail"]
    with pytest.raises(ServiceError, match="laptop lost"):
        who(url, public / "me")
    # Another one of the same user is not concerned.
    request_certificate(running.socket, public / "me")
    assert who(url, public / "me")["login"] == ME


@needs_root
def test_the_kernel_says_who_asks_and_nobody_else(signer: Callable[..., Any], service: str, public: Path) -> None:
    running = signer(allow_root=False)
    with pytest.raises(RefusedError, match="root gets no certificate"):
        request_certificate(running.socket, public / "root")
    folder = public / "other"
    folder.mkdir(mode=0o700)
    os.chown(folder, pwd.getpwnam(OTHER).pw_uid, pwd.getpwnam(OTHER).pw_gid)
    done = as_other("request", "--folder", str(folder), "--socket", str(running.socket))
    assert done.returncode == 0, done.stderr
    assert who(service, folder)["login"] == OTHER
    for name in ("id.key", "id.crt"):
        assert (folder / name).stat().st_uid == pwd.getpwnam(OTHER).pw_uid
    assert stat.S_IMODE((folder / "id.key").stat().st_mode) == 0o600
    row = ask(running.socket, List(all=True)).signatures[0]
    assert (row.login, row.uid) == (OTHER, pwd.getpwnam(OTHER).pw_uid)


@needs_root
def test_another_user_can_neither_revoke_nor_see_what_is_not_his(signer: Callable[..., Any], public: Path) -> None:
    running = signer()
    mine = request_certificate(running.socket, public / "me")
    at = ("--socket", str(running.socket))
    refused = as_other("revoke", mine.serial, *at)
    assert refused.returncode == 1
    assert "no certificate of yours" in refused.stderr
    assert as_other("revoke", "--login", ME, *at).returncode == 1
    assert as_other("list", "--all", *at).returncode == 1
    assert yaml.safe_load(as_other("list", *at).stdout) == []
    assert as_other("check", mine.serial, *at).returncode == 0
    assert ask(running.socket, Revoked()).revoked == []


@needs_root
def test_another_user_cannot_pose_as_the_signer(public: Path) -> None:
    """Somebody else's socket in root's folder, as after a mistake in permissions."""
    folder = public / "run"
    folder.mkdir()
    folder.chmod(0o777)
    code = (
        "import os, pwd, socket, sys, time\nu = pwd.getpwnam(sys.argv[1])\nos.setgid(u.pw_gid); os.setuid(u.pw_uid)\n"
        "s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[2]); s.listen(); print('ready', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, OTHER, str(folder / "signer.sock")], stdout=subprocess.PIPE, text=True
    ) as impostor:
        try:
            assert impostor.stdout is not None
            assert impostor.stdout.readline() == "ready\n"
            with pytest.raises(AuthenticationError, match="others can write"):
                request_certificate(folder / "signer.sock", public / "me")
            folder.chmod(0o755)
            with pytest.raises(AuthenticationError, match="not trusted"):
                request_certificate(folder / "signer.sock", public / "me")
        finally:
            impostor.kill()
    assert not (public / "me/id.key").exists()


def test_the_command_requests_lists_checks_revokes_and_exports(signer: Callable[..., Any], public: Path) -> None:
    running = signer()

    def command(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, [*words, "--socket", str(running.socket)])
        return done.exit_code, done.output

    code, text = command("request", "--folder", str(public / "me"), "--hours", "2")
    assert code == 0, text
    rows = yaml.safe_load(command("list")[1])
    serial = rows[0]["serial"]
    assert serial in text
    assert rows[0]["form"] == "request"
    end = datetime.datetime.fromisoformat(rows[0]["not_after"]) - datetime.datetime.fromisoformat(rows[0]["signed"])
    assert end <= datetime.timedelta(hours=2)
    assert command("request", "--folder", str(public / "me"), "--unless-valid-for", "1")[1].count("nothing to do") == 1
    assert len(yaml.safe_load(command("list")[1])) == 1
    assert command("check", serial)[0] == 0
    assert command("check", "12")[0] == 1
    assert command("check", "nonsense")[0] == 2
    code, text = command("revoke", serial, "--reason", "lost")
    assert code == 0
    assert "1 revoked" in text
    code, text = command("check", serial)
    assert code == 1
    assert "revoked since" in text
    assert "lost" in text
    assert command("revoked", "--output", str(public / "revoked.yaml"))[0] == 0
    assert yaml.safe_load((public / "revoked.yaml").read_text())[0]["serial"] == serial
    assert command("revoked", "--output", str(public / "no/revoked.yaml"))[0] == 1
    assert command("revoke")[0] == 2
    assert command("request", "--folder", str(public / "me"), "--hours", "99")[0] == 1
    running.stop()
    code, text = command("list")
    assert code == 3
    assert "Is it running" in text


def test_renewing_keeps_the_key_and_a_new_key_is_made_only_on_demand(signer: Callable[..., Any], public: Path) -> None:
    running, folder = signer(), public / "me"
    first = request_certificate(running.socket, folder)
    key = (folder / "id.key").read_bytes()
    second = request_certificate(running.socket, folder)
    assert first.serial != second.serial
    assert (folder / "id.key").read_bytes() == key
    request_certificate(running.socket, folder, new_key=True)
    assert (folder / "id.key").read_bytes() != key
    assert remaining(folder) > datetime.timedelta(hours=11)
    assert stat.S_IMODE((folder / "id.key").stat().st_mode) == 0o600


def test_a_folder_of_another_site_keeps_its_certificate_and_gets_an_introduction(
    signer: Callable[..., Any], service: str, public: Path
) -> None:
    running = signer(services={"s3df": service})
    folder = SiteAuthority(public / "away", "away").member("me").folder
    before = (folder / "id.crt").read_bytes()
    installed = request_certificate(running.socket, folder)
    assert (folder / "id.crt").read_bytes() == before
    assert installed.certificate.parent == folder / "id"
    answer = who(service, folder)
    assert answer["login"] == ME
    assert "O=s3df" in answer["issuer"]
    with pytest.raises(CredentialsError, match="introductions belong to the present key"):
        request_certificate(running.socket, folder, new_key=True)


def test_services_may_have_another_issuer_than_users(
    signer: Callable[..., Any], home: SiteAuthority, service: str, public: Path
) -> None:
    users = public / "users"
    users.mkdir()
    CA.new(encode.org_name("s3df", "users")).save(users / "CA")
    known = home.member("api").folder / "known_clients" / "users.crt"
    known.write_bytes((users / "CA.crt").read_bytes())
    (public / "services.crt").write_bytes(home.certificate_pem)
    running = signer(authority=str(users), services={"api": service}, services_issuer=str(public / "services.crt"))
    request_certificate(running.socket, public / "me")
    assert who(service, public / "me")["issuer"] == "OU=users,O=s3df"


def test_a_user_certificate_cannot_pose_as_a_service(
    signer: Callable[..., Any], home: SiteAuthority, public: Path, wait_until: Callable[..., None]
) -> None:
    running = signer()
    folder = public / "me"
    request_certificate(running.socket, folder)
    (folder / "known_clients").mkdir()
    (folder / "known_clients/org.crt").write_bytes(home.certificate_pem)
    server = server_for(FastAPI(), host="127.0.0.1", port=0, credentials=Credentials(folder))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started, 60, "server started")
        url = f"https://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        with pytest.raises(AuthenticationError, match="we do not trust its certificate"):
            who(url, home.member("ada").folder)
    finally:
        server.should_exit = True
        thread.join(60)


def test_what_the_signer_answers_is_checked_before_anything_is_changed(public: Path) -> None:
    """A signer gone wrong that always hands out one certificate, of another key."""
    folder, path = public / "run", public / "run/signer.sock"
    folder.mkdir()
    authority = CA.new(encode.org_name("wrong", "users"))
    leaf = authority.leaf_cert(encode.person_name(ME, uname=ME), encode.SAN(hosts=["localhost"]))
    answer = Answer(
        ok=True,
        certificate=PublicBlob(leaf.certificate).bytes().decode(),
        issuer=PublicBlob(authority.certificate).bytes().decode(),
    ).line()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()

        def once() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=once)
        thread.start()
        with pytest.raises(CredentialsError, match="another key than ours; nothing was changed"):
            request_certificate(path, public / "me")
        thread.join(60)
    assert not (public / "me/id.key").exists()
    assert not (public / "me/id.crt").exists()


def test_noise_slow_and_silent_peers_do_not_keep_others_waiting(signer: Callable[..., Any], public: Path) -> None:
    running = signer()
    idle = []
    try:
        for _ in range(7):
            peer = socket.socket(socket.AF_UNIX)
            peer.connect(str(running.socket))
            peer.sendall(b'{"do": "li')
            idle.append(peer)
        for noise in (b"\xff" * 1000 + b"\n", b"x" * 100_000, b"\n", b""):
            with socket.socket(socket.AF_UNIX) as peer:
                peer.settimeout(60)
                peer.connect(str(running.socket))
                try:
                    peer.sendall(noise)
                    peer.shutdown(socket.SHUT_WR)
                    answer = peer.recv(65536)
                except (BrokenPipeError, ConnectionResetError):
                    continue
                assert answer == b"" or b"certificate" not in answer
        assert ask(running.socket, List()).ok
    finally:
        for peer in idle:
            peer.close()


def test_one_user_cannot_hold_more_than_a_few_connections(signer: Callable[..., Any]) -> None:
    running = signer()
    peers = []
    try:
        for _ in range(9):
            peer = socket.socket(socket.AF_UNIX)
            peer.settimeout(60)
            peer.connect(str(running.socket))
            peers.append(peer)
        # The ninth is closed at once.
        assert peers[-1].recv(1) == b""
    finally:
        for peer in peers:
            peer.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_signer_and_removes_its_socket(process: Callable[..., Any], number: int) -> None:
    running = process()
    assert stat.S_IMODE(running.socket.stat().st_mode) == 0o666
    running.signal(number)
    assert running.wait() == 0
    assert not running.socket.exists()


def test_a_killed_signer_is_succeeded_by_another_with_the_same_table(
    process: Callable[..., Any], signer: Callable[..., Any], public: Path
) -> None:
    first = process()
    installed = request_certificate(first.socket, public / "me")
    first.signal(signal.SIGKILL)
    first.wait()
    assert first.socket.exists()
    second = signer()
    assert ask(second.socket, Check(serial=installed.serial)).signatures[0].login == ME


def test_two_signers_cannot_have_one_socket(signer: Callable[..., Any], home: SiteAuthority, public: Path) -> None:
    running = signer()
    (public / "signer.yaml").write_text(yaml.safe_dump(settings_of(home, public)))
    second = CliRunner().invoke(app, ["serve", "--config", str(public / "signer.yaml")])
    assert second.exit_code == 3
    assert "another signer listens there" in second.output
    assert ask(running.socket, List()).ok


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"authority": "/nowhere"}, 2, "certified init"),
        ({"validity_h": 99}, 2, "validity_h"),
        ({"services_issuer": "/nowhere"}, 2, "services_issuer"),
        ({"database": "sqlite:////proc/nowhere/signer.sqlite"}, 3, "database cannot be opened"),
        ({"database": "nonsense"}, 3, "database cannot be opened"),
    ],
)
def test_a_signer_that_cannot_work_says_why_and_ends(
    home: SiteAuthority, public: Path, change: dict[str, Any], code: int, words: str
) -> None:
    config = {
        "authority": str(home.folder / "authority"),
        "socket": str(public / "run/signer.sock"),
        "database": f"sqlite:///{public / 'signer.sqlite'}",
        **change,
    }
    (public / "signer.yaml").write_text(yaml.safe_dump(config))
    done = CliRunner().invoke(app, ["serve", "--config", str(public / "signer.yaml")])
    assert done.exit_code == code
    assert words in done.output


def test_a_socket_folder_others_can_write_to_is_refused(home: SiteAuthority, public: Path) -> None:
    (public / "open").mkdir()
    (public / "open").chmod(0o777)
    options = {
        "authority": home.folder / "authority",
        "socket": public / "open/signer.sock",
        "database": f"sqlite:///{public / 'signer.sqlite'}",
    }
    done = CliRunner().invoke(app, ["serve", *(f"--{key}={value}" for key, value in options.items())])
    assert done.exit_code == 2
    assert "others can write there" in done.output


def test_nobody_at_the_socket_is_said(public: Path) -> None:
    with pytest.raises(UnreachableError, match="lclstream signer serve"):
        ask(public / "nothing.sock", List())


def test_the_private_key_is_in_no_log_and_no_answer(process: Callable[..., Any], public: Path) -> None:
    running = process()
    request_certificate(running.socket, public / "me")
    secret = (public / "me/id.key").read_text().splitlines()[1]
    running.stop()
    assert secret not in running.output()
    for path in (public / "table").iterdir():
        assert secret.encode() not in path.read_bytes()
    certificate = x509.load_pem_x509_certificate((public / "me/id.crt").read_bytes())
    assert f"{certificate.serial_number:x}" in running.output()
