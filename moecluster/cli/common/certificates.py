"""Makes a certificate authority of a cluster's own, and certificates of it."""

import datetime
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from moecluster.errors import ConfigError
from moecluster.rpc.tls.material import NAME

CA_DAYS = 3650
SLACK = datetime.timedelta(hours=1)  # clocks of hosts differ


@dataclass(frozen=True, kw_only=True)
class Authority:
    """A CA: its certificate and private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def make(cls, *, days: int = CA_DAYS) -> "Authority":
        """Makes a new one."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{NAME} CA")])
        builder = _builder(name, name, key.public_key(), days)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_usage(signs=True), critical=True)
        return cls(certificate=builder.sign(key, hashes.SHA256()), key=key)

    @classmethod
    def read(cls, certificate: bytes, key: bytes) -> "Authority":
        """Reads one that was made before. Raises ConfigError."""
        try:
            found = serialization.load_pem_private_key(key, password=None)
            authority = x509.load_pem_x509_certificate(certificate)
        except (ValueError, TypeError) as exc:
            raise ConfigError(f"holds no CA that moecluster certs made ({exc})") from exc
        if not isinstance(found, ec.EllipticCurvePrivateKey) or found.public_key() != authority.public_key():
            raise ConfigError("holds a key that is not its certificate's")
        return cls(certificate=authority, key=found)

    def certify(self, *, days: int, name: str = NAME) -> tuple[bytes, bytes]:
        """Makes a certificate for both ends of connections; returns it and its private key, in PEM. It ends no later
        than the CA's own."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = _builder(subject, self.certificate.subject, key.public_key(), days, self.certificate)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_usage(signs=False), critical=True)
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        builder = builder.add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        builder = builder.add_extension(issuer, critical=False)
        return _pem(builder.sign(self.key, hashes.SHA256())), _key_pem(key)

    @property
    def pem(self) -> tuple[bytes, bytes]:
        """Certificate and private key, in PEM."""
        return _pem(self.certificate), _key_pem(self.key)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    days: int,
    within: x509.Certificate | None = None,
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    end = now + datetime.timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end) - SLACK)
        .not_valid_after(end if within is None else min(end, within.not_valid_after_utc))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs, key_cert_sign=signs, crl_sign=signs, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
