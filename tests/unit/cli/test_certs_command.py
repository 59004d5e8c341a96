"""moecluster certs: a CA whose key stays apart, certificates that fit, renewal by the same CA."""

import stat
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from moecluster.cli.app import main
from moecluster.rpc.tls.material import TlsFiles, read_material

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs `moecluster certs`; returns its exit code and output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("moecluster.cli.app.end_by_signals", nullcontext)

    def run_command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moecluster", "certs", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        output = capsys.readouterr()
        return int(ended.value.code or 0), output.out, output.err

    return run_command


def test_it_makes_a_folder_for_the_nodes_and_a_ca_beside_it(run: Run, tmp_path: Path) -> None:
    code, out, err = run("tls")
    assert code == 0 and not err and f"--set security.tls_dir={tmp_path / 'tls'}" in out
    read_material(TlsFiles.in_folder(tmp_path / "tls"))
    assert {file.name for file in (tmp_path / "tls").iterdir()} == {"ca.crt", "tls.crt", "tls.key"}
    assert {file.name for file in (tmp_path / "tls-ca").iterdir()} == {"ca.crt", "ca.key"}
    for folder in ("tls", "tls-ca"):
        assert stat.S_IMODE((tmp_path / folder).stat().st_mode) == 0o700
        assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / folder).iterdir()} == {0o600}
    ca_key = (tmp_path / "tls-ca" / "ca.key").read_bytes()
    assert all(file.read_bytes() != ca_key for file in (tmp_path / "tls").iterdir())
    assert "PRIVATE KEY" not in out


def test_a_renewed_certificate_is_of_the_same_ca(run: Run, tmp_path: Path) -> None:
    run("tls")
    before = {file.name: file.read_bytes() for file in (tmp_path / "tls").iterdir()}
    assert run("tls", "--renew", "--days", "30")[0] == 0
    after = {file.name: file.read_bytes() for file in (tmp_path / "tls").iterdir()}
    assert after["ca.crt"] == before["ca.crt"]
    assert after["tls.crt"] != before["tls.crt"] and after["tls.key"] != before["tls.key"]
    read_material(TlsFiles.in_folder(tmp_path / "tls"))
    assert run("laptop", "--ca-dir", "tls-ca")[0] == 0
    assert (tmp_path / "laptop" / "ca.crt").read_bytes() == before["ca.crt"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("tls",), "tls.crt: is there already; --renew replaces it"),
        (("none", "--renew"), "--renew: there is no certificate in"),
        (("tls", "--renew", "--ca-dir", "none"), "ca.key: is not there, and only the CA's key"),
        (("tls", "--renew", "--ca-dir", "tls"), "whose copies go to every node"),
        (("tls", "--renew", "--ca-dir", "tls/ca"), "whose copies go to every node"),
        (("new", "--ca-dir", "broken"), "broken: holds no CA that moecluster certs made"),
        (("new", "--ca-dir", "swapped"), "swapped: holds a key that is not its certificate's"),
        (("tls", "--days", "0"), "--days"),
    ],
)
def test_mistakes_change_nothing(run: Run, tmp_path: Path, arguments: tuple[str, ...], complaint: str) -> None:
    run("tls")
    run("second")
    for folder, key in (("broken", b"no key"), ("swapped", (tmp_path / "second-ca" / "ca.key").read_bytes())):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "ca.crt").write_bytes((tmp_path / "tls-ca" / "ca.crt").read_bytes())
        (tmp_path / folder / "ca.key").write_bytes(key)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    code, out, err = run(*arguments)
    assert code == 2 and complaint in " ".join(err.split()) and not out
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
