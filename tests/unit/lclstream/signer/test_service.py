"""Promises about what the signer answers to whom."""

from __future__ import annotations

import json
import logging
import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import SQLAlchemyError

from lclstream.config_file import ConfigError
from lclstream.security.rate import Rate
from lclstream.security.revocation import load
from lclstream.signer import config as configuration
from lclstream.signer.peer import Peer
from lclstream.signer.service import Signer
from lclstream.signer.store import Store
from lclstream.signer.wire import Answer

from .conftest import Clock, peer


def new_key() -> str:
    key = ed25519.Ed25519PrivateKey.generate().public_key()
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def ask(signer: Signer, who: str, do: str, /, **fields: Any) -> Answer:
    return signer.answer(peer(who), json.dumps({"do": do, **fields}).encode() + b"\n")


def sign(signer: Signer, login: str, **fields: Any) -> str:
    answer = ask(signer, login, "sign", **{"key": new_key(), **fields})
    assert answer.ok, answer.detail
    return answer.signatures[0].serial


def test_a_user_gets_a_certificate_for_his_own_login_for_half_a_day(
    signer: Callable[..., Signer], clock: Clock
) -> None:
    answer = ask(signer(), "ada", "sign", key=new_key())
    certificate = x509.load_pem_x509_certificate(answer.certificate.encode())
    assert "UID=ada" in certificate.subject.rfc4514_string()
    assert (certificate.not_valid_after_utc - clock.now).total_seconds() == 12 * 3600
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(answer.issuer.encode()))


@pytest.mark.parametrize("extra", [{"login": "root"}, {"subject": "UID=root"}, {"uid": 0}])
def test_no_request_can_name_another_login(signer: Callable[..., Signer], store: Store, extra: dict[str, Any]) -> None:
    answer = ask(signer(), "mallory", "sign", key=new_key(), **extra)
    assert (answer.ok, answer.rule) == (False, "form")
    assert store.count() == 0


def test_root_is_refused_unless_it_is_configured(signer: Callable[..., Signer]) -> None:
    refused = ask(signer(), "root", "sign", key=new_key())
    assert (refused.ok, refused.rule) == (False, "root")
    assert ask(signer(allow_root=True), "root", "sign", key=new_key()).ok


def test_a_refused_login_gets_nothing(signer: Callable[..., Signer]) -> None:
    assert ask(signer(refused=["mallory"]), "mallory", "sign", key=new_key()).rule == "refused"


def test_the_hours_are_bounded(signer: Callable[..., Signer]) -> None:
    one = signer(max_validity_h=24)
    assert ask(one, "ada", "sign", key=new_key(), hours=24).ok
    refused = ask(one, "ada", "sign", key=new_key(), hours=24.1)
    assert refused.rule == "validity"
    assert "at most 24 h" in refused.detail
    for hours in (0, -1, "1e999", None.__class__.__name__):
        assert not ask(one, "ada", "sign", key=new_key(), hours=hours).ok


def test_every_signature_is_in_the_table_with_who_asked(
    signer: Callable[..., Signer], store: Store, clock: Clock
) -> None:
    serial = sign(signer(), "ada")
    found = store.find(serial)
    assert found is not None
    assert (found.login, found.uid, found.pid, found.form, found.signed) == ("ada", 1001, 4711, "key", clock.now)


def test_nothing_is_handed_out_when_the_table_cannot_be_written(
    signer: Callable[..., Signer], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_signature: object) -> None:
        raise SQLAlchemyError("disk full")

    monkeypatch.setattr(store, "add", full)
    answer = ask(signer(), "ada", "sign", key=new_key())
    assert (answer.ok, answer.rule, answer.certificate) == (False, "table", "")


def test_a_key_belongs_to_one_login_only(signer: Callable[..., Signer]) -> None:
    one, key = signer(), new_key()
    assert ask(one, "ada", "sign", key=key).ok
    assert ask(one, "ada", "sign", key=key).ok
    refused = ask(one, "bob", "sign", key=key)
    assert (refused.ok, refused.rule) == (False, "key")
    assert "ada" not in refused.detail


def test_a_user_who_asks_too_often_is_told_to_wait_and_others_are_not(signer: Callable[..., Signer]) -> None:
    one = signer(rate=Rate(per_s=0.01, burst=2))
    assert [ask(one, "ada", "sign", key=new_key()).ok for _ in range(3)] == [True, True, False]
    assert ask(one, "bob", "sign", key=new_key()).ok
    assert ask(one, "ada", "check", serial="1").ok


# --- revocation


def test_a_user_revokes_his_own_and_nobody_elses(signer: Callable[..., Signer], store: Store) -> None:
    one = signer()
    mine, other = sign(one, "ada"), sign(one, "bob")
    assert ask(one, "ada", "revoke", serial=mine, reason="lost").ok
    refused = ask(one, "ada", "revoke", serial=other)
    unknown = ask(one, "ada", "revoke", serial="abc")
    assert (refused.ok, refused.rule) == (unknown.ok, unknown.rule) == (False, "owner")
    # What exists and what does not look the same to others.
    assert refused.detail.replace(other, "") == unknown.detail.replace("abc", "")
    assert ask(one, "ada", "revoke", login="bob").rule == "operators"
    assert [entry.serial for entry in ask(one, "bob", "revoked").revoked] == [mine]
    found = store.find(other)
    assert found is not None
    assert found.revoked is None


@pytest.mark.parametrize("who", ["oscar", "root"])
def test_operators_and_root_revoke_all_certificates_of_a_login(signer: Callable[..., Signer], who: str) -> None:
    one = signer(operators=["oscar"])
    serials = [sign(one, "ada") for _ in range(3)]
    sign(one, "bob")
    answer = ask(one, who, "revoke", login="ada", reason="account closed")
    assert sorted(entry.serial for entry in answer.revoked) == sorted(serials)
    assert {entry.reason for entry in answer.revoked} == {"account closed"}


def test_revoking_twice_keeps_the_first_time_and_reason(signer: Callable[..., Signer], clock: Clock) -> None:
    one = signer()
    serial = sign(one, "ada")
    first = ask(one, "ada", "revoke", serial=serial, reason="lost").revoked[0]
    clock.advance(hours=1)
    again = ask(one, "ada", "revoke", serial=serial, reason="found")
    assert again.ok
    assert again.revoked == [first]


def test_the_list_forgets_what_has_expired_and_the_table_does_not(
    signer: Callable[..., Signer], store: Store, clock: Clock
) -> None:
    one = signer()
    serial = sign(one, "ada")
    ask(one, "ada", "revoke", serial=serial)
    clock.advance(hours=13)
    assert ask(one, "ada", "revoked").revoked == []
    found = ask(one, "bob", "check", serial=serial).signatures[0]
    assert found.revoked is not None


def test_a_check_knows_every_way_to_write_a_serial_number(signer: Callable[..., Signer]) -> None:
    one = signer()
    serial = sign(one, "ada")
    written = "0" * (len(serial) % 2) + serial.upper()
    colons = ":".join(written[i : i + 2] for i in range(0, len(written), 2))
    assert ask(one, "bob", "check", serial=colons).signatures[0].serial == serial
    assert ask(one, "bob", "check", serial="1234").signatures == []


def test_everybody_sees_his_own_signatures_and_operators_all(signer: Callable[..., Signer]) -> None:
    one = signer(operators=["oscar"])
    mine = [sign(one, "ada"), sign(one, "ada")]
    sign(one, "bob")
    assert [row.serial for row in ask(one, "ada", "list").signatures] == mine[::-1]
    assert [row.serial for row in ask(one, "ada", "list", limit=1).signatures] == mine[1:]
    assert ask(one, "ada", "list", all=True).rule == "operators"
    assert len(ask(one, "oscar", "list", all=True).signatures) == 3


def test_lists_on_this_machine_are_written_in_the_form_services_read(
    signer: Callable[..., Signer], tmp_path: Path, store: Store
) -> None:
    file = tmp_path / "api" / "revoked.yaml"
    file.parent.mkdir()
    one = signer(revoked_files=[file])
    serial = sign(one, "ada")
    answer = ask(one, "ada", "revoke", serial=serial, reason="lost")
    assert answer.unwritten == []
    assert load(file) == answer.revoked
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    # Somebody's change does not last.
    file.write_text("[]")
    assert one.publish() == []
    assert load(file) == answer.revoked
    before = file.stat().st_ino
    one.publish()
    assert file.stat().st_ino == before
    assert list(file.parent.glob(".*")) == []


def test_a_list_that_cannot_be_written_is_said_and_the_certificate_is_revoked_all_the_same(
    signer: Callable[..., Signer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "nowhere" / "revoked.yaml"
    one = signer(revoked_files=[file])
    serial = sign(one, "ada")
    with caplog.at_level(logging.ERROR):
        answer = ask(one, "ada", "revoke", serial=serial)
    assert answer.ok
    assert answer.unwritten == [str(file)]
    assert [entry.serial for entry in answer.revoked] == [serial]
    assert "cannot be written" in caplog.text


# --- requests


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\n",
        b"null\n",
        b"[]\n",
        b'{"do": "become root"}\n',
        b'{"do": "sign"}\n',
        b'{"do": "sign", "key": 17}\n',
        b'{"do": "check", "serial": 17}\n',
        b'{"do": "check", "serial": "xyz"}\n',
        b'{"do": "revoke"}\n',
        b'{"do": "revoke", "serial": "1", "login": "ada"}\n',
        b'{"do": "list", "limit": 1000000}\n',
        b"\xff\xfe\n",
        b"[" * 30000 + b"\n",
    ],
)
def test_what_is_no_request_is_refused_with_the_place(signer: Callable[..., Signer], line: bytes) -> None:
    answer = signer().answer(peer("ada"), line)
    assert (answer.ok, answer.rule) == (False, "form")
    assert answer.detail


def test_a_refusal_does_not_repeat_what_was_sent(
    signer: Callable[..., Signer], caplog: pytest.LogCaptureFixture
) -> None:
    secret = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIA==\n"
    with caplog.at_level(logging.DEBUG):
        answers = [
            ask(signer(), "ada", "sign", key=secret),
            ask(signer(), "ada", "sign", key=[secret]),
            ask(signer(), "ada", "sign", keys=secret),
        ]
    assert all("MC4CAQ" not in answer.detail for answer in answers)
    assert "MC4CAQ" not in caplog.text


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["do", "key", "hours", "serial", "login", "reason", "all", "limit"]) | st.text(max_size=5),
            inner | st.sampled_from(["sign", "revoke", "check", "revoked", "list"]),
            max_size=5,
        )
    ),
    max_leaves=10,
)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(line=st.binary(max_size=300) | _JSON.map(lambda document: json.dumps(document).encode()))
def test_any_bytes_get_an_answer(signer: Callable[..., Signer], line: bytes) -> None:
    answer = signer().answer(peer("mallory"), line + b"\n")
    assert Answer.model_validate_json(answer.line()) == answer
    assert answer.certificate == ""
    assert answer.rule != "internal"


def test_a_failure_of_one_request_is_an_answer_and_in_the_log(
    signer: Callable[..., Signer], store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_serial: str) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(store, "find", broken)
    with caplog.at_level(logging.ERROR):
        answer = ask(signer(), "ada", "check", serial="1")
    assert (answer.ok, answer.rule) == (False, "internal")
    assert "mistake" not in answer.detail
    assert "a mistake of ours" in caplog.text


def test_users_without_a_login_here_are_refused(signer: Callable[..., Signer]) -> None:
    for uid in (65534, 4_000_000):
        answer = signer().answer(Peer(pid=1, uid=uid, gid=1), b'{"do": "list"}\n')
        assert (answer.ok, answer.rule) == (False, "login")


# --- the table


def test_the_table_cannot_be_read_by_others_and_is_written_through(tmp_path: Path) -> None:
    path = tmp_path / "new" / "signer.sqlite"
    store = Store(f"sqlite:///{path}")
    try:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with store._engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
            assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
    finally:
        store.close()


def test_signatures_outlive_the_signer(signer: Callable[..., Signer], store: Store, tmp_path: Path) -> None:
    serial = sign(signer(), "ada")
    store.close()
    connection = sqlite3.connect(tmp_path / "signer.sqlite")
    try:
        assert connection.execute("SELECT serial, login FROM signatures").fetchall() == [(serial, "ada")]
    finally:
        connection.close()


# --- configuration


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("validity_h: 12", r"authority: is missing: the folder with CA.crt and CA.key \(--authority\)"),
        ("authority: x\nvalidity_h: 48", r"validity_h \(48\) is more than max_validity_h \(24\)"),
        ("authority: x\nvalidity_h: 0", "validity_h"),
        ("authority: x\nmax_validity_h: 1000", "max_validity_h"),
        ("authority: x\nallow_everything: true", "allow_everything"),
        ("authority: x\nservices: {api: http://x}", r"services\.api"),
        ("authority: x\nservices: {../api: https://x}", "services"),
        ("- 1", "keys to values"),
        ("authority: [", "no YAML"),
    ],
)
def test_a_wrong_configuration_is_refused_with_the_place(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "signer.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        configuration.load(path)


def test_options_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "signer.yaml"
    path.write_text("authority: /a\nsocket: /s")
    settings_ = configuration.load(path, authority=Path("/b"), database=None)
    assert (settings_.authority, settings_.socket, settings_.validity_h) == (Path("/b"), Path("/s"), 12)
