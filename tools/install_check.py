"""Checks an installed simdiff_kernels beside the torch of its environment; prints JSON.

Run by tools/install_matrix.py with the Python of each environment, outside the source tree.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

OPCHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
VARIANTS = [
    {"kernel": "row_sums", "element": "bf16", "masked": True, "nested": True}
    | {"hidden_size": 4096, "aligned": True},
    {"kernel": "fold", "kinds": "u8", "apart": True},
    {"kernel": "token_metrics", "element": "fp32"},
]


def check_import() -> None:
    """The module is that of the wheel, and its CPU kernels are what CPU tensors get."""
    import simdiff_kernels
    from simdiff_kernels import backends, default_backend

    assert "site-packages" in simdiff_kernels.__file__, simdiff_kernels.__file__
    assert default_backend("cpu") == "cpu"
    assert backends.load_extension().__file__.endswith("_C.abi3.so")
    assert backends.load_cuda_extension().compiled_architectures()


def check_operators() -> None:
    """What every operator of the CPU backend gives equals what the reference gives."""
    import torch

    import simdiff_kernels as sk

    def near(got: torch.Tensor, wanted: torch.Tensor) -> None:
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)

    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        states = [torch.randn(2, 9, 96).to(dtype) for _ in range(4)]
        mask = torch.rand(2, 9) > 0.3
        for got, wanted in zip(
            sk.token_metrics(*states[:2], backend="cpu"),
            sk.token_metrics(*states[:2], backend="reference"),
            strict=True,
        ):
            near(got, wanted)
        sums = [sk.row_sums(*states[:2], backend=name) for name in ("cpu", "reference")]
        near(*sums)
        layers = [sk.RunningScores(3, backend=name) for name in ("cpu", "reference")]
        blocks = [sk.RunningBlockScores(3, backend=name) for name in ("cpu", "reference")]
        for scores in layers:
            for layer in range(3):
                scores.update(layer, states[layer], states[layer + 1], mask)
        for scores in blocks:
            scores.update(states, mask)
        for pair in (layers, blocks):
            found = [_numbers(scores.finish()) for scores in pair]
            assert len(found[0]) > 10
            near(*(torch.tensor(numbers, dtype=torch.float64) for numbers in found))


def _numbers(value: object) -> list[float]:
    """All numbers in nested results, in order."""
    import dataclasses

    import torch

    if isinstance(value, torch.Tensor):
        return [float(x) for x in value.flatten()]
    if isinstance(value, bool | int | float):
        return [float(value)]
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [number for item in value for number in _numbers(item)]
    return []


def check_compile() -> None:
    """What is compiled without a break of the graph gives the same bits."""
    import torch

    from simdiff_kernels import token_metrics

    before, after = torch.randn(2, 3, 5, 64)
    compiled = torch.compile(token_metrics, fullgraph=True)(before, after)
    for got, wanted in zip(compiled, token_metrics(before, after), strict=True):
        assert torch.equal(got, wanted)


def check_opcheck() -> None:
    """Torch's own test of an operator."""
    import torch

    import simdiff_kernels.ops  # noqa: F401

    before, after = torch.randn(2, 2, 3, 40)
    results = torch.library.opcheck(
        torch.ops.simdiff_kernels.token_metrics.cpu, (before, after), test_utils=OPCHECKS
    )
    assert set(results.values()) == {"SUCCESS"}, results


def check_command() -> None:
    """`python -m simdiff_kernels` tells that the CPU kernels work."""
    run = [sys.executable, "-m", "simdiff_kernels"]
    text = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    assert "\ncpu       works" in text, text


def check_triton() -> None:
    """Triton compiles the kernels for an A100, which need not be there."""
    tool = Path(__file__).with_name("triton_compile.py")
    with tempfile.TemporaryDirectory() as folder:
        save = ["--target", "cuda:80", "--save", folder, json.dumps(VARIANTS)]
        subprocess.run([sys.executable, str(tool), *save], check=True, capture_output=True)
        assert len(list(Path(folder).glob("*.ptx"))) == len(VARIANTS)


CHECKS: dict[str, Callable[[], None]] = {
    "import": check_import,
    "operators": check_operators,
    "torch.compile": check_compile,
    "opcheck": check_opcheck,
    "command": check_command,
    "triton": check_triton,
}


def main() -> None:
    problems = {}
    for name, check in CHECKS.items():
        try:
            check()
        except Exception:
            problems[name] = traceback.format_exc()[-1000:]
    import torch

    found = {"python": platform.python_version(), "torch": torch.__version__}
    found["triton"] = metadata.version("triton")
    print(json.dumps(found | {"checks": list(CHECKS), "problems": problems}))
    if problems and "--strict" in sys.argv:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
