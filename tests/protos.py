"""Makes the stubs and the gateway's descriptors from the protos, and checks that they are current.

`python -m tests.protos generate` writes them; `check` lints the protos, fails on a change that breaks
clients of the baseline, and fails when what is committed is not what would be generated. `baseline`
makes the protos as they are now the promise that later ones must not break.
"""

import filecmp
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROTOS = ROOT / "protos"
BASELINE = PROTOS / "baseline.binpb"
DESCRIPTORS = ROOT / "gateway" / "descriptors.binpb"
# The plug-ins and buf lie beside the interpreter of the virtual environment.
BIN = Path(sys.executable).parent
_GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def generate(stubs: Path, descriptors: Path) -> None:
    """Write the stubs below one folder, and the descriptors to a file."""
    sources = sorted(str(path.relative_to(PROTOS)) for path in (PROTOS / "doorward").rglob("*.proto"))
    plugins = [f"--plugin={name}={BIN / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
    outputs = [f"--{kind}_out={stubs}" for kind in ("python", "grpc_python")]
    outputs += [f"--{kind}_out=quiet:{stubs}" for kind in ("mypy", "mypy_grpc")]
    _run(sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}", *plugins, *outputs, *sources)
    _buf("build", "--as-file-descriptor-set", "--exclude-source-info", "--output", str(descriptors))


def check() -> int:
    """Print what is wrong; returns the exit code."""
    _buf("lint")
    _buf("format", "--diff", "--exit-code")
    _buf("breaking", "--against", str(BASELINE))
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        generate(fresh, fresh / DESCRIPTORS.name)
        stale = [path for path in _generated(PROTOS) if path not in _generated(fresh)]
        stale += [path for path in _generated(fresh) if not _same(fresh / path, PROTOS / path)]
        if not _same(fresh / DESCRIPTORS.name, DESCRIPTORS):
            stale.append(DESCRIPTORS.relative_to(ROOT))
    for path in stale:
        print(f"{path} is not what the protos give: run `make generate`", file=sys.stderr)
    return 1 if stale else 0


def _generated(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for pattern in _GENERATED for path in folder.rglob(pattern)}


def _same(one: Path, other: Path) -> bool:
    return one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False)


def _buf(*arguments: str) -> None:
    _run(str(BIN / "buf"), *arguments)


def _run(*command: str) -> None:
    if (code := subprocess.run(command, cwd=ROOT, check=False).returncode) != 0:
        sys.exit(code)


if __name__ == "__main__":
    if sys.argv[1:] == ["generate"]:
        generate(PROTOS, DESCRIPTORS)
    elif sys.argv[1:] == ["check"]:
        sys.exit(check())
    elif sys.argv[1:] == ["baseline"]:
        _buf("build", "--exclude-source-info", "--output", str(BASELINE))
    else:
        sys.exit("usage: python -m tests.protos generate|check|baseline")
