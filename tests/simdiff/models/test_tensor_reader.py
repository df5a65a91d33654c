"""Reading tensors: as they are, cast on the way, in pieces of any size."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from simdiff.io.safetensors_header import read_header
from simdiff.models import tensor_reader
from simdiff.models.tensor_reader import TensorReader

SHAPES = {"a": (3, 5), "b": (1,), "c": (0, 4), "d": (257,), "e": (33, 31), "f": ()}


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("piece", [16 << 20, 512])
def test_tensors_are_read_and_cast(
    tmp_path: Path, monkeypatch, stored: torch.dtype, piece: int
) -> None:
    monkeypatch.setattr(tensor_reader, "_PIECE_BYTES", piece)
    monkeypatch.setattr(tensor_reader, "_CAST_BYTES", 256)
    monkeypatch.setattr(tensor_reader, "_CAST_ELEMENTS", 48)
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: torch.randn(shape, generator=generator).to(stored) for name, shape in SHAPES.items()
    }
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path)
    wanted = {"a": torch.float16, "d": torch.bfloat16, "e": torch.float32, "f": torch.float64}
    reader = TensorReader([path], dtypes=wanted)
    for times in (1, 2, 3):
        found = reader.read(read_header(path)[1])
        for name, tensor in tensors.items():
            cast = tensor.to(wanted.get(name, stored))
            assert found[name].dtype == cast.dtype
            assert torch.equal(found[name].double(), cast.double()), name
            if name in wanted and wanted[name] != stored:  # where new memory would begin
                assert found[name].data_ptr() % 64 == 0
        assert reader.bytes_read == times * sum(map(torch.Tensor.nbytes.__get__, tensors.values()))
