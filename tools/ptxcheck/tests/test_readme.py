"""The kernel of the README runs as it says, and without its bound it is reported as it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ptxcheck import FaultError

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
SCALE = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry scale(.param .u64 y, .param .u64 x, .param .u32 n, .param .f32 a)
{
    .reg .pred %p<2>;
    .reg .f32 %f<3>;
    .reg .b32 %r<6>;
    .reg .b64 %d<4>;
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ntid.x;
    mov.u32 %r3, %tid.x;
    mad.lo.s32 %r4, %r1, %r2, %r3;
    ld.param.u32 %r5, [n];
    setp.ge.s32 %p1, %r4, %r5;
    @%p1 bra DONE;
    ld.param.u64 %d1, [x];
    mad.wide.s32 %d1, %r4, 4, %d1;
    ld.global.f32 %f1, [%d1];
    ld.param.f32 %f2, [a];
    mul.f32 %f1, %f1, %f2;
    ld.param.u64 %d2, [y];
    mad.wide.s32 %d2, %r4, 4, %d2;
    st.global.f32 [%d2], %f1;
DONE:
    ret;
}
"""


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("scale.ptx").write_text(SCALE)
    exec(example, {})
    Path("scale.ptx").write_text(SCALE.replace("@%p1 bra DONE;", ""))
    with pytest.raises(FaultError) as caught:
        exec(example, {})
    loaded = next(fault for fault in caught.value.faults if "ld.global" in fault.text)
    told = "; CTA (3, 0, 0), thread (232, 0, 0); 24 in all]"
    assert str(loaded).startswith("out of bounds at 0x")
    assert str(loaded).endswith(told)
    assert told in README
