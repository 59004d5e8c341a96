"""certs."""

import os
import shlex
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from moecluster.cli.common.certificates import Authority
from moecluster.errors import ConfigError, ResourceError
from moecluster.rpc.tls.material import TlsFiles, read_material
from moecluster.whole_file import writing_whole


def certs(folder: Path, ca_folder: Path | None, days: int, renew: bool, console: Console) -> None:
    """Writes a certificate for a cluster's processes, and first a CA if there is none yet."""
    folder = Path(os.path.abspath(folder))
    ca_folder = Path(os.path.abspath(ca_folder)) if ca_folder is not None else folder.with_name(f"{folder.name}-ca")
    if ca_folder == folder or folder in ca_folder.parents:
        raise ConfigError(f"--ca-dir: {ca_folder} is in {folder}, whose copies go to every node; the CA's key must not")
    files = TlsFiles.in_folder(folder)
    _refuse_wrong_use(files, ca_folder, renew)
    authority = _authority(ca_folder)
    certificate, key = authority.certify(days=days)
    ca, _ = authority.pem
    _write(dict(zip(files.paths, (certificate, key, ca), strict=True)))
    until = time.strftime("%Y-%m-%d", time.gmtime(read_material(files).expires_s))
    for line in (
        f"{folder}: ca.crt, tls.crt and tls.key, good until {until}",
        f"{ca_folder}: the CA and its key, which make further certificates; keep them here, and private",
        f"next: copy {folder} to the same path on every node, and --set security.tls_dir={shlex.quote(str(folder))}",
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _refuse_wrong_use(files: TlsFiles, ca_folder: Path, renew: bool) -> None:
    there = [path for path in files.paths if path.exists()]
    if there and not renew:
        raise ConfigError(f"{there[0]}: is there already; --renew replaces it by a new one of the same CA")
    if renew and not there:
        raise ConfigError(f"--renew: there is no certificate in {files.certificate.parent}; leave --renew out")
    if renew and not (ca_folder / "ca.key").exists():
        raise ConfigError(
            f"{ca_folder / 'ca.key'}: is not there, and only the CA's key makes further certificates; --ca-dir says "
            "where it is"
        )


def _authority(folder: Path) -> Authority:
    """Returns the CA of a folder; makes one if there is none."""
    certificate, key = folder / "ca.crt", folder / "ca.key"
    if not key.exists():
        authority = Authority.make()
        _write(dict(zip((certificate, key), authority.pem, strict=True)))
        return authority
    try:
        return Authority.read(certificate.read_bytes(), key.read_bytes())
    except OSError as exc:
        raise ConfigError(f"{exc.filename}: cannot be read ({exc.strerror})") from exc
    except ConfigError as exc:
        raise ConfigError(f"{folder}: {exc}") from exc


def _write(contents: Mapping[Path, bytes]) -> None:
    """Writes files that only their owner reads, in folders that only their owner enters, in place of older ones: all,
    or none if one cannot be written."""
    try:
        with ExitStack() as writing:
            for path, content in contents.items():
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                writing.enter_context(writing_whole(path, mode=0o600)).write_bytes(content)
            # A process that reads in between finds a key that does not fit, and stays with what it has.
    except OSError as exc:
        raise ResourceError(f"{exc.filename}: cannot be written ({exc.strerror})") from exc
