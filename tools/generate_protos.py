"""Generates moecluster/proto from protos/, or with --check says whether what is committed is stale.

Run by `make protos` and `make check` in an environment with the oldest supported grpcio-tools: code of a newer one
refuses to run on older protobuf and grpcio.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "protos" / "moecluster" / "v1"
PACKAGE = Path("moecluster") / "proto"


def generate(output: Path) -> None:
    """Writes messages, services and .pyi stubs of both under output/moecluster/proto."""
    (output / PACKAGE).mkdir(parents=True, exist_ok=True)
    # The folder is mapped to the package's name, so that the generated imports need no rewriting.
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PACKAGE}={SOURCES}"]
    command += [f"--{kind}_out={output}" for kind in ("python", "pyi", "grpc_python")]
    command += [f"--mypy_grpc_out=quiet:{output}"]
    command += [f"--plugin=protoc-gen-mypy_grpc={Path(sys.executable).parent / 'protoc-gen-mypy_grpc'}"]
    command += [str(PACKAGE / source.name) for source in sorted(SOURCES.glob("*.proto"))]
    subprocess.run(command, check=True, cwd=ROOT)


def stale_files(fresh: Path) -> list[str]:
    """Names of files that differ between the committed package and a fresh generation."""
    committed = {p.name: p.read_bytes() for p in (ROOT / PACKAGE).glob("*_pb2*") if p.is_file()}
    generated = {p.name: p.read_bytes() for p in (fresh / PACKAGE).iterdir() if p.is_file()}
    return sorted(name for name in committed.keys() | generated.keys() if committed.get(name) != generated.get(name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the committed code is stale")
    if not parser.parse_args().check:
        generate(ROOT)
        return 0
    with tempfile.TemporaryDirectory() as fresh:
        generate(Path(fresh))
        stale = stale_files(Path(fresh))
    if stale:
        print(f"stale: {', '.join(stale)} in {PACKAGE}; run `make protos` and commit what it writes")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
