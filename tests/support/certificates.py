"""Folders of certificates for tests, as security.tls_dir names them."""

from pathlib import Path

from moecluster.cli.common.certificates import Authority


def write_certificates(folder: Path, authority: Authority, *, days: int = 30, trusts: bytes = b"") -> Path:
    """Writes ca.crt, tls.crt and tls.key, each in one step; returns the folder.

    authority: signs the certificate. trusts: the content of ca.crt, by default the authority's own certificate.
    """
    certificate, key = authority.certify(days=days)
    return write_files(folder, {"ca.crt": trusts or authority.pem[0], "tls.crt": certificate, "tls.key": key})


def write_files(folder: Path, contents: dict[str, bytes]) -> Path:
    """Writes files that only their owner reads; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        aside = folder / f"{name}.new"
        aside.touch(mode=0o600)
        aside.write_bytes(content)
        aside.rename(folder / name)
    return folder
