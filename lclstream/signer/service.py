"""What the signer answers to whom. No sockets: a peer and a line come in, an answer goes out.

==========  =========================================================================================
sign        every login for itself; not root unless `allow_root`, not those in `refused`
revoke      one's own; operators and root everybody's
list        one's own; operators and root everybody's
check       everybody, any serial number
revoked     everybody
==========  =========================================================================================

One thread owns a service.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable

from cryptography.hazmat.primitives.serialization import Encoding
from sqlalchemy.exc import SQLAlchemyError

from lclstream.security.rate import TokenBuckets
from lclstream.security.revocation import write
from lclstream.signer.config import SignerConfig
from lclstream.signer.errors import RefusedError
from lclstream.signer.issuing import Authority, read_certificate, read_key
from lclstream.signer.peer import Peer
from lclstream.signer.store import Store
from lclstream.signer.wire import Answer, Check, List, Revoke, Revoked, Sign, Signature, parse

log = logging.getLogger(__name__)

_NOTE = "Written by `lclstream signer`: changes made here are lost."


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


class Signer:
    """The signer.

    Args:
        config: its rules.
        authority: its key.
        store: its table.
        clock: the time, with a zone.

    Raises:
        ConfigError: the certificate `services_issuer` cannot be read.
    """

    def __init__(
        self, config: SignerConfig, authority: Authority, store: Store, clock: Callable[[], datetime.datetime] = _now
    ) -> None:
        self._config = config
        self._authority = authority
        self._store = store
        self._clock = clock
        self._services_issuer = authority.pem
        if config.services_issuer is not None:
            self._services_issuer = read_certificate(config.services_issuer)
        self._buckets = TokenBuckets(config.rate)

    def answer(self, peer: Peer, line: bytes) -> Answer:
        """Answer one request; what cannot be done is an answer, too."""
        login = "?"
        try:
            login = peer.login()
            request = parse(line)
            match request:
                case Sign():
                    return self._sign(peer, login, request)
                case Revoke():
                    return self._revoke(peer, login, request)
                case Check():
                    found = self._store.find(request.serial)
                    return Answer(ok=True, signatures=[] if found is None else [found])
                case Revoked():
                    return Answer(ok=True, revoked=self._store.revoked(self._clock()))
                case List():
                    if request.all and not self._is_operator(peer, login):
                        raise RefusedError("operators", "only operators and root may see everybody's signatures")
                    return Answer(ok=True, signatures=self._store.newest(None if request.all else login, request.limit))
        except RefusedError as error:
            log.warning("%s (uid %d, pid %d) refused: %s (rule: %s)", login, peer.uid, peer.pid, error, error.rule)
            return Answer(ok=False, rule=error.rule, detail=str(error))
        except SQLAlchemyError as error:
            log.error("the table of signatures cannot be used: %s", error)
            return Answer(ok=False, rule="table", detail="the signer's table cannot be used now: nothing was signed")
        except Exception:
            # One request must not end the others; what it was is in the log and not in the answer.
            log.exception("%s (uid %d, pid %d): the signer failed", login, peer.uid, peer.pid)
            return Answer(ok=False, rule="internal", detail="the signer failed: its log says why")

    def _sign(self, peer: Peer, login: str, request: Sign) -> Answer:
        config = self._config
        if peer.uid == 0 and not config.allow_root:
            raise RefusedError(
                "root", "root gets no certificate here: ask as the user who needs it (`allow_root` forbids)"
            )
        if login in config.refused:
            raise RefusedError("refused", f"{login} gets no certificate here: ask the signer's operators")
        wait = self._buckets.take(peer.uid)
        if wait > 0:
            raise RefusedError("rate", f"you ask too often: come back in {wait:.0f} s")
        hours = config.validity_h if request.hours is None else request.hours
        if hours > config.max_validity_h:
            raise RefusedError("validity", f"{hours:g} h are too long: at most {config.max_validity_h:g} h are given")
        sent = read_key(request.key)
        owner = self._store.owner_of_key(sent.sha256)
        if owner not in (None, login):
            # Two people with one key could not be told apart by what they sign.
            raise RefusedError("key", "this key was signed for another login: make a key of your own")
        now = self._clock()
        certificate = self._authority.sign(sent, login, hours, now=now)
        signature = Signature(
            serial=f"{certificate.serial_number:x}",
            login=login,
            uid=peer.uid,
            pid=peer.pid,
            issuer=self._authority.name,
            key_sha256=sent.sha256,
            form=sent.form,
            signed=now,
            not_before=certificate.not_valid_before_utc,
            not_after=certificate.not_valid_after_utc,
        )
        # Before it is handed out: there is no certificate that the table does not know.
        self._store.add(signature)
        log.info(
            "signed %s for %s (uid %d) until %s", signature.serial, login, peer.uid, signature.not_after.isoformat()
        )
        return Answer(
            ok=True,
            certificate=certificate.public_bytes(Encoding.PEM).decode(),
            issuer=self._authority.pem,
            services=config.services,
            services_issuer=self._services_issuer,
            signatures=[signature],
        )

    def _revoke(self, peer: Peer, login: str, request: Revoke) -> Answer:
        now = self._clock()
        operator = self._is_operator(peer, login)
        if (request.serial is None) == (request.login is None):
            raise RefusedError("form", "name a serial number or a login, and not both")
        if request.serial is not None:
            found = self._store.find(request.serial)
            if found is None or not (operator or found.login == login):
                whose = "" if operator else " of yours"
                raise RefusedError(
                    "owner", f"no certificate{whose} with serial number {request.serial} was signed here"
                )
            serials = [found.serial]
        else:
            if not operator and request.login != login:
                raise RefusedError("operators", "only operators and root may revoke others' certificates")
            serials = [signature.serial for signature in self._store.valid(request.login or "", now)]
        fresh = self._store.revoke(serials, now, request.reason, login)
        log.info("%s revoked %d certificates: %s", login, fresh, ", ".join(serials) or "none was valid")
        return Answer(
            ok=True,
            detail=f"{fresh} revoked",
            revoked=[entry for entry in self._store.revoked(now) if entry.serial in serials],
            unwritten=self.publish(),
        )

    def _is_operator(self, peer: Peer, login: str) -> bool:
        return peer.uid == 0 or login in self._config.operators

    def publish(self) -> list[str]:
        """Bring the lists in `revoked_files` up to date; returns those that could not be written."""
        if not self._config.revoked_files:
            return []
        try:
            entries = self._store.revoked(self._clock())
        except SQLAlchemyError as error:
            log.error("the table of signatures cannot be used: %s", error)
            return [str(path) for path in self._config.revoked_files]
        unwritten = []
        for path in self._config.revoked_files:
            try:
                write(path, entries, note=_NOTE)
            except OSError as error:
                log.error("%s cannot be written: %s", path, error)
                unwritten.append(str(path))
        return unwritten
