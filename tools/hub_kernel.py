"""Lays out the kernel that Hugging Face's kernel-builder builds, of simdiff_kernels and csrc.

    python tools/hub_kernel.py kernel --repo-id OWNER/simdiff-kernels
    python tools/hub_kernel.py kernel --repo-id OWNER/simdiff-kernels --compiled
    python tools/hub_kernel.py kernel --repo-id OWNER/simdiff-kernels --local cuda

The first has Triton kernels and plain PyTorch, for which nothing is compiled; the second has the
C++ and CUDA kernels too, in torch's stable ABI. In the folder, a git repository of its own, run
`kernel-builder build-and-upload`. The third also makes `build/torch-cuda`, which is what the
builder makes of a kernel without compiled code, so that it can be tried without it:
`kernels.get_local_kernel(Path("kernel"))`, `kernels benchmark kernel`.

The Python files are copied as they are: their imports are relative, and only `_ops.py`, which names
the namespace of the operators, is left to the builder.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib
import importlib.util
import json
import pkgutil
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "simdiff_kernels"
TEMPLATES = ROOT / "hub"

# Not for users of a kernel: the builder's own file, the command, and what tests compare with.
LEFT_OUT = ("_ops.py", "__main__.py", "testing")

# The oldest torch that the builder makes stable-ABI builds for; ours begins at 2.10.
STABLE_ABI = "2.11"

BACKENDS = {False: ("cpu", "cuda", "rocm"), True: ("cpu", "cuda")}
"""What is built for, without and with compiled code."""

SOURCES = {
    "cpu": ("common/*.h", "cpu/*", "torch/*.h", "torch/operators.cpp", "torch/module.cpp"),
    "cuda": ("common/*.h", "cuda/*", "torch/*.h", "torch/cuda_*.cpp"),
}
"""Of the module of each backend, as setup.py has them."""

FLAGS = (
    "-O3",
    "-fno-math-errno",
    "-DSIMDIFF_NAMESPACE=TORCH_EXTENSION_NAME",
    "-DSIMDIFF_EXTENSION_NAME=TORCH_EXTENSION_NAME",
)

# In a build the compiled module has the builder's name, and is that of one backend.
MODULE = '''"""The compiled module of a build for {backend}; in any other build there is none."""

from importlib import import_module

from ._ops import add_op_namespace_prefix

_name = add_op_namespace_prefix("").removesuffix("::")
_module = import_module("." + _name, __package__)
if not hasattr(_module, "{function}"):
    raise ModuleNotFoundError(f"{{_name}} is a build for another backend", name=__name__)
globals().update({{key: value for key, value in vars(_module).items() if key[0] != "_"}})
'''
MODULES = {
    "_C.py": MODULE.format(backend="the CPU", function="select_instruction_set"),
    "_C_cuda.py": MODULE.format(backend="CUDA", function="compiled_architectures"),
}


def sources(backend: str) -> list[str]:
    """The files that the module of a backend is compiled of, relative to the root."""
    files = [path for pattern in SOURCES[backend] for path in (ROOT / "csrc").glob(pattern)]
    return sorted(path.relative_to(ROOT).as_posix() for path in files if path.is_file())


def build_toml(repo_id: str, compiled: bool) -> str:
    """What kernel-builder reads, edition 5."""
    backends = BACKENDS[compiled]
    lines = ["[general]", 'name = "simdiff-kernels"', f"version = {major_version()}", "edition = 5"]
    lines += ['license = "Apache-2.0"', f"backends = {_array(backends)}", ""]
    lines += ["[general.hub]", f'repo-id = "{repo_id}"', ""]
    if not compiled:
        return "\n".join([*lines, "[torch-noarch]", ""])
    lines += ["[torch]", "src = []", "", "[torch.stable-abi]"]
    lines += [f'{backend} = "{STABLE_ABI}"' for backend in backends]
    for backend in backends:
        lines += ["", f"[kernel.simdiff_{backend}]", f'backend = "{backend}"']
        lines += ['depends = ["torch"]', f"cxx-flags = {_array(FLAGS)}"]
        lines += ["src = [", *(f'  "{path}",' for path in sources(backend)), "]"]
    return "\n".join([*lines, ""])


def _array(values: Sequence[str]) -> str:
    return "[" + ", ".join(f'"{value}"' for value in values) + "]"


def major_version() -> int:
    """Of the distribution: the version of the kernel, which is the name of its branch."""
    found = re.search(r'^version = "(\d+)\.', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def lay_out(folder: Path, repo_id: str, *, compiled: bool = False) -> None:
    """Write the tree of the kernel into a folder that holds none.

    Args:
        folder: is made; an existing one may hold nothing but what git and Nix keep.
        repo_id: OWNER/NAME of the repository that the kernel is published in.
        compiled: with the C++ and CUDA kernels.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise SystemExit(f"--repo-id must be OWNER/NAME, got {repo_id!r}")
    if folder.exists() and any(p.name not in (".git", "flake.lock") for p in folder.iterdir()):
        raise SystemExit(f"{folder} must not hold files yet, apart from .git and flake.lock")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.toml").write_text(build_toml(repo_id, compiled))
    for template in ("CARD.md", "flake.nix", "benchmarks/benchmark.py"):
        (folder / template).parent.mkdir(exist_ok=True)
        shutil.copyfile(TEMPLATES / template, folder / template)
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
    (folder / ".gitignore").write_text("__pycache__/\nbuild/\n")
    package = folder / "torch-ext" / PACKAGE.name
    left_out = shutil.ignore_patterns(*LEFT_OUT, "__pycache__", "*.so")
    shutil.copytree(PACKAGE, package, ignore=left_out)
    if compiled:
        for name, text in MODULES.items():
            (package / name).write_text(text)
        for path in {path for backend in BACKENDS[True] for path in sources(backend)}:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, folder / path)


def build_local(folder: Path, backend: str, build: str = "local") -> Path:
    """Make what kernel-builder makes of a tree without compiled code; returns its folder.

    Args:
        folder: with a tree that `lay_out` wrote.
        backend: "cpu", "cuda" or "rocm".
        build: identifies the build: its operators are in a namespace that ends in it.
    """
    variant, identifier = (
        folder / "build" / f"torch-{backend}",
        f"_{PACKAGE.name}_{backend}_{build}",
    )
    shutil.copytree(folder / "torch-ext" / PACKAGE.name, variant)
    named = 'NAMESPACE = "simdiff_kernels"'
    ours = (PACKAGE / "_ops.py").read_text()
    assert named in ours
    (variant / "_ops.py").write_text(ours.replace(named, f'NAMESPACE = "{identifier}"'))
    paths = [path for path in variant.rglob("*") if path.is_file()]
    files = {path.relative_to(variant).as_posix(): path for path in paths}
    metadata = {
        "id": identifier,
        "name": "simdiff-kernels",
        "version": major_version(),
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {name: _digest(path) for name, path in sorted(files.items())},
        },
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return variant


def _digest(path: Path) -> str:
    return base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()


def load(variant: Path) -> ModuleType:
    """Import a build under the name that its metadata gives it, as the package `kernels` does."""
    name = json.loads((variant / "metadata.json").read_text())["id"]
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stand_in(variant: Path) -> None:
    """For tests: let `simdiff_kernels` be a build from now on, in every import of it.

    The installed package is loaded first and stays so, under no name. What tests compare with is no
    part of a build and is taken from the source, as a part of the build.
    """
    importlib.import_module(f"{PACKAGE.name}.ops")
    build = load(variant)
    for module in pkgutil.walk_packages(build.__path__, f"{build.__name__}."):
        if not module.name.rpartition(".")[2].startswith("_"):  # compiled ones are loaded already
            importlib.import_module(module.name)
    build.__path__.append(str(PACKAGE))
    importlib.import_module(f"{build.__name__}.testing")
    del build.__path__[-1]
    modules = dict(sys.modules)
    for key in modules:
        if key.split(".")[0] == PACKAGE.name:
            del sys.modules[key]
    for key, found in modules.items():
        if key.split(".")[0] == build.__name__:
            sys.modules[PACKAGE.name + key.removeprefix(build.__name__)] = found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repo-id", required=True, help="OWNER/NAME, where it will be published")
    parser.add_argument("--compiled", action="store_true", help="with the C++ and CUDA kernels")
    parser.add_argument("--local", choices=BACKENDS[False], help="also build for this backend")
    options = parser.parse_args()
    if options.compiled and options.local:
        parser.error("--local: only kernel-builder can build compiled code")
    lay_out(options.folder, options.repo_id, compiled=options.compiled)
    if options.local:
        build_local(options.folder, options.local)


if __name__ == "__main__":
    main()
