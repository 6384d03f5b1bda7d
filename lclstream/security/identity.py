"""Who the peer of a connection is, by its certificate and nothing else."""

from __future__ import annotations

from cryptography import x509
from cryptography.x509.oid import NameOID
from pydantic import BaseModel, ConfigDict


class Identity(BaseModel):
    """A peer: the login its certificate names, and who vouches for it.

    Attributes:
        login: the user id (UID) of the certificate's subject, else its common name.
        issuer: the issuing authority's name (RFC 4514).
        subject: the whole subject (RFC 4514), for logs and messages.
        serial: the certificate's serial number, in hexadecimal.
    """

    model_config = ConfigDict(frozen=True)

    login: str
    issuer: str
    subject: str
    serial: str

    @classmethod
    def of_certificate(cls, der: bytes) -> Identity:
        """Read the identity from a peer's certificate (DER).

        Raises:
            ValueError: the bytes are no certificate, or its subject names nobody.
        """
        certificate = x509.load_der_x509_certificate(der)
        for attribute in (NameOID.USER_ID, NameOID.COMMON_NAME):
            values = certificate.subject.get_attributes_for_oid(attribute)
            if values:
                return cls(
                    login=str(values[0].value),
                    issuer=certificate.issuer.rfc4514_string(),
                    subject=certificate.subject.rfc4514_string(),
                    serial=f"{certificate.serial_number:x}",
                )
        raise ValueError(f"certificate subject {certificate.subject.rfc4514_string()!r} has neither UID nor CN")
