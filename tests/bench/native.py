"""C sources beside the benchmarks, compiled on demand with the system's C compiler and loaded with ctypes."""
from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CORE = HERE.parents[1] / "csrc"


def _cache_dir() -> Path:
    """Where the libraries go: build/ beside the sources, or a private temporary directory if that is read-only."""
    path = HERE / "build"
    try:
        path.mkdir(exist_ok=True)
        (path / ".gitignore").write_text("*\n")
        return path
    except OSError:
        return Path(tempfile.mkdtemp(prefix="zquant-bench-"))


def _build(source: Path, headers: tuple[Path, ...]) -> Path:
    """The compiled source, made unless it is there for these very files."""
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in (source, *headers))).hexdigest()[:16]
    cache = _cache_dir()
    target = cache / f"{source.stem}-{digest}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache) as tmp:
            out = Path(tmp) / "out.so"
            cc = shlex.split(os.environ.get("CC", "cc"))
            subprocess.run([*cc, "-std=c11", "-O2", "-Wall", "-Wextra", "-shared", "-fPIC", "-pthread", f"-I{CORE}",
                            str(source), "-o", str(out)], check=True)
            os.replace(out, target)
    return target


def library(name: str, *headers: str) -> ctypes.CDLL:
    """The library of a source in this folder; ``headers``: what it includes of csrc/."""
    return ctypes.CDLL(str(_build(HERE / name, tuple(CORE / header for header in headers))))
