"""Certificates are proven before they are used, each mistake has its own line, and changes are followed."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from moecluster.cli.common.certificates import Authority
from moecluster.errors import ConfigError
from moecluster.rpc.tls.material import LOOK_EVERY_S, FollowedMaterial, TlsFiles, read_material
from tests.support.certificates import write_certificates, write_files

OURS, THEIRS = Authority.make(), Authority.make()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_certificates(tmp_path / "tls", OURS)


def encrypted(key: bytes) -> bytes:
    loaded = serialization.load_pem_private_key(key, password=None)
    return loaded.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
    )


def test_certificates_that_fit_are_read_whole(folder: Path) -> None:
    material = read_material(TlsFiles.in_folder(folder))
    assert material.certificate == (folder / "tls.crt").read_bytes() and material.ca == OURS.pem[0]
    assert "PRIVATE" not in repr(material) and str(material.key) not in f"{material}"
    of_server = read_material(TlsFiles(certificate=folder / "tls.crt", key=folder / "tls.key"))
    assert not of_server.ca and of_server.expires_s == material.expires_s


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        (lambda: {"tls.key": OURS.certify(days=1)[1]}, r"tls\.key: is not the key of the certificate .*tls\.crt"),
        (lambda: {"ca.crt": THEIRS.pem[0]}, r"tls\.crt: the certificate is not signed by .*ca\.crt"),
        (lambda: dict(zip(("tls.crt", "tls.key"), OURS.certify(days=-1), strict=True)), "has expired; make a new one"),
        (
            lambda: dict(zip(("tls.crt", "tls.key"), OURS.certify(days=1, name="node-7"), strict=True)),
            "is not for the DNS name moecluster",
        ),
        (lambda: {"ca.crt": b"no PEM"}, r"ca\.crt: holds no certificate in PEM"),
        (lambda: {"tls.crt": b"no PEM"}, r"tls\.crt: holds no certificate in PEM"),
        (lambda: {"tls.crt": "ü".encode()}, r"tls\.crt: holds no certificate in PEM"),
        (lambda: {"tls.key": b"no PEM"}, r"tls\.key: is no private key in PEM"),
        (lambda: {"tls.key": b""}, r"tls\.key: holds 0 bytes"),
        (lambda: {"tls.crt": b"x" * 300_000}, r"tls\.crt: holds 262145 bytes or more, expected PEM of at most"),
        (lambda: {"tls.key": encrypted(OURS.pem[1])}, r"tls\.key: is encrypted"),
    ],
)
def test_each_mistake_is_one_line_that_names_the_file(folder: Path, changed: Callable, complaint: str) -> None:
    write_files(folder, changed())
    with pytest.raises(ConfigError, match=complaint) as caught:
        read_material(TlsFiles.in_folder(folder))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    with pytest.raises(ConfigError, match=complaint):
        FollowedMaterial(TlsFiles.in_folder(folder))


@pytest.mark.parametrize("name", ["ca.crt", "tls.crt", "tls.key"])
def test_a_missing_file_is_named_with_what_makes_it(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=rf"{name}: cannot be read \(No such file.*moecluster certs {folder}"):
        read_material(TlsFiles.in_folder(folder))
    os.mkfifo(folder / name, 0o600)
    with pytest.raises(ConfigError, match=rf"{name}: is no file"):
        read_material(TlsFiles.in_folder(folder))


@pytest.mark.parametrize(("mode", "is_refused"), [(0o604, True), (0o644, True), (0o640, False), (0o400, False)])
def test_a_key_that_everybody_may_read_is_refused(folder: Path, mode: int, is_refused: bool) -> None:
    (folder / "tls.key").chmod(mode)
    if not is_refused:
        read_material(TlsFiles.in_folder(folder))
        return
    with pytest.raises(ConfigError, match=r"everybody may read this private key: chmod 600 .*tls\.key"):
        read_material(TlsFiles.in_folder(folder))


def test_an_expired_certificate_of_an_https_server_is_refused_too(tmp_path: Path) -> None:
    folder = write_certificates(tmp_path, OURS, days=-1)
    with pytest.raises(ConfigError, match=r"tls\.crt: the certificate has expired$"):
        read_material(TlsFiles(certificate=folder / "tls.crt", key=folder / "tls.key"))


def test_one_that_expires_soon_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_material(TlsFiles.in_folder(write_certificates(tmp_path, OURS, days=30)))
    assert not caplog.records
    read_material(TlsFiles.in_folder(write_certificates(tmp_path, OURS, days=3)))
    assert "expires within 3.0 days" in caplog.text


def test_a_change_is_followed_and_a_wrong_one_is_not(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    now_s = [0.0]
    followed = FollowedMaterial(TlsFiles.in_folder(folder), clock=lambda: now_s[0])
    first = followed.current()
    write_certificates(folder, OURS)
    assert followed.current() is first, "it looks once a second"
    now_s[0] += LOOK_EVERY_S
    second = followed.current()
    assert second.certificate == (folder / "tls.crt").read_bytes() != first.certificate
    now_s[0] += LOOK_EVERY_S
    assert followed.current() is second

    caplog.clear()
    certificate, key = OURS.certify(days=30)
    write_files(folder, {"tls.crt": certificate})  # as between the two steps of a renewal
    for _ in range(3):
        now_s[0] += LOOK_EVERY_S
        assert followed.current() is second
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "the certificate read before stays in use: " in warnings[0].message
    write_files(folder, {"tls.key": key})
    now_s[0] += LOOK_EVERY_S
    assert followed.current().certificate == certificate

    caplog.clear()
    (folder / "tls.key").unlink()
    for _ in range(3):
        now_s[0] += LOOK_EVERY_S
        assert followed.current().certificate == certificate
    assert len(caplog.records) == 1 and "No such file" in caplog.text


def test_a_folder_that_is_swapped_whole_is_followed(tmp_path: Path) -> None:
    """As Kubernetes does it: the files are links through one link, which is replaced."""
    for name in ("one", "two"):
        write_certificates(tmp_path / name, OURS)
    (tmp_path / "..data").symlink_to("one")
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    for name in ("ca.crt", "tls.crt", "tls.key"):
        (mounted / name).symlink_to(f"../..data/{name}")
    now_s = [0.0]
    followed = FollowedMaterial(TlsFiles.in_folder(mounted), clock=lambda: now_s[0])
    (tmp_path / "..new").symlink_to("two")
    (tmp_path / "..new").rename(tmp_path / "..data")
    now_s[0] += LOOK_EVERY_S
    assert followed.current().certificate == (tmp_path / "two" / "tls.crt").read_bytes()
