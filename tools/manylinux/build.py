"""The wheel that is published: `make wheel`, or `make wheel MACHINE=aarch64`.

One wheel serves CPython 3.10 and later, torch 2.10 and later, and every Linux with glibc 2.28 or
later. It is built with the torch and the compilers of this machine, linked against the symbols of
glibc 2.28 (tools/manylinux/cxx), tagged by auditwheel, checked by abi3audit, and lies in dist/. For
another machine than this one a cross compiler is used (Debian: g++-aarch64-linux-gnu), without
CUDA, and nothing of the wheel runs here.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
MOST_BYTES = 15_000_000
# What torch brings: never copied into the wheel.
OF_TORCH = ("libtorch*", "libc10*")


def run(*command: object, **variables: str) -> None:
    """Run a command with the programs of this environment first on the path."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    words = [str(word) for word in command]
    subprocess.run(words, check=True, cwd=ROOT, env=os.environ | {"PATH": path} | variables)


def stand_ins(machine: str, folder: Path) -> Path:
    """Empty libraries with the names of torch's, to link for a machine whose torch is not here."""
    folder.mkdir(parents=True)
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", f"{machine}-linux-gnu.2.28"]
    for name in ("torch", "torch_cpu", "c10"):
        file = f"lib{name}.so"
        options = ["-shared", "-nostdlib", f"-Wl,-soname,{file}", "-o", folder / file]
        run(*zig, *options, "-xc", os.devnull)
    return folder


def build(machine: str = platform.machine()) -> Path:
    """Build, tag and check the wheel of a machine.

    Raises:
        subprocess.CalledProcessError: a step failed.
        SystemExit: the wheel is too large, or names a folder of this machine.
    """
    work = ROOT / "build" / f"wheel-{machine}"
    shutil.rmtree(work, ignore_errors=True)
    variables = {
        "CXX": str(ROOT / "tools" / "manylinux" / "cxx"),
        "SIMDIFF_MACHINE": machine,
        "SIMDIFF_CPU": "1",
        "SIMDIFF_CUDA": "1",
    }
    if machine != platform.machine():
        variables |= {
            "SIMDIFF_CUDA": "0",
            "LDFLAGS": f"-Wl,--no-as-needed -L{stand_ins(machine, work / 'torch')}",
            "_PYTHON_HOST_PLATFORM": f"linux-{machine}",
        }
    for leftovers in (ROOT / "build").glob("lib.*"):  # setuptools puts what lies there in
        shutil.rmtree(leftovers)
    raw, out = work / "raw", work / "tagged"
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    run(*pip, "--quiet", "--disable-pip-version-check", "-w", raw, ROOT, **variables)
    (wheel,) = raw.glob("*.whl")
    platforms = f"manylinux_2_28_{machine}"
    excluded = [f"--exclude={pattern}" for pattern in OF_TORCH]
    run("auditwheel", "repair", "--plat", "auto", *excluded, "-w", out, wheel)
    (wheel,) = out.glob("*.whl")
    found = [int(minor) for minor in re.findall(r"manylinux_2_(\d+)_", wheel.name)]
    if not found or min(found) > 28:
        raise SystemExit(f"{wheel.name}: must run with glibc 2.28")
    run(sys.executable, "-m", "wheel", "tags", "--remove", "--platform-tag", platforms, wheel)
    (wheel,) = out.glob("*.whl")
    check(wheel)
    (ROOT / "dist").mkdir(exist_ok=True)
    return Path(shutil.copy2(wheel, ROOT / "dist"))


def check(wheel: Path) -> None:
    """Refuse a wheel that is too large, uses too new libraries, or tells of this machine.

    Raises:
        subprocess.CalledProcessError: abi3audit found more than the limited API.
        SystemExit: all else.
    """
    run("abi3audit", "--strict", wheel)
    if wheel.stat().st_size > MOST_BYTES:
        raise SystemExit(f"{wheel.name} must have {MOST_BYTES} bytes at most, got {wheel.stat()}")
    with zipfile.ZipFile(wheel) as archive, tempfile.NamedTemporaryFile() as copy:
        for name in archive.namelist():
            if name.endswith(".so"):
                copy.seek(0)
                copy.write(archive.read(name))
                copy.flush()
                check_symbols(name, Path(copy.name))
            for folder in (ROOT, BIN.parent):
                if str(folder).encode() in archive.read(name):
                    raise SystemExit(f"{wheel.name}: {name} must not name {folder}")


def check_symbols(name: str, module: Path) -> None:
    """Refuse symbols of the C++ library without a version: auditwheel does not see them.

    Raises:
        SystemExit: the first of them.
    """
    command = ["nm", "-D", "--undefined-only", str(module)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for symbol in re.findall(r"^ +[Uw] (_ZN?K?St\S+)$", text, re.MULTILINE):
        if "@" not in symbol:
            raise SystemExit(f"{name}: {symbol} must come from an older libstdc++")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", default=platform.machine(), choices=("x86_64", "aarch64"))
    wheel = build(parser.parse_args().machine)
    print(f"{wheel.relative_to(ROOT)}, {wheel.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
