"""The Triton kernels on a machine without a GPU: interpreted, and compiled ahead of time."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from processes import run_python
from sweeps import swept

from leanlift import UserError
from leanlift.ops import tile_ops

HERE = Path(__file__).parent
TRITON = pytest.importorskip("triton", reason="Triton has no build for this platform")


def refused_by_numpy(version: str, interpreter: str) -> bool:
    """Whether an interpreter of Triton's, by its source, makes ints of arrays of one entry, which
    numpy no longer does from 2.4 on."""
    major, minor = map(int, version.split(".")[:2])
    return (major, minor) >= (2, 4) and "int(self.handle.data)" in interpreter


def interpreter_source() -> str:
    file = Path(TRITON.__file__).parent / "runtime" / "interpreter.py"
    return file.read_text(encoding="utf-8") if file.is_file() else ""


@pytest.mark.skipif(
    refused_by_numpy(numpy.__version__, interpreter_source()),
    reason="this Triton's interpreter makes ints of arrays, which this numpy refuses",
)
@pytest.mark.parametrize("which", swept(["not thorough", "thorough"], "not thorough"))
def test_kernels_do_what_the_reference_does_in_the_interpreter(which: str) -> None:
    """In a process of its own, since the interpreter is chosen when Triton is imported."""
    files = [str(HERE / name) for name in ("interpreted_kernels.py", "interpreted_strips.py")]
    done = run_python("-m", "pytest", "-q", "-x", "-m", which, *files, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("capability", swept([80, 86, 89, 90, 100, 120], 90))
def test_kernels_compile_ahead_of_time(capability: int) -> None:
    done = run_python(str(HERE / "compile_kernels.py"), str(capability))
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize(
    ("version", "source", "refused"),
    [
        ("2.3.5", "tensor.__index__ = lambda self: int(self.handle.data)", False),
        ("2.4.6", "tensor.__index__ = lambda self: int(self.handle.data)", True),
        ("3.0.0rc1", "tensor.__index__ = lambda self: int(self.handle.data)", True),
        ("2.5.0", "lambda self: int(self.handle.data.squeeze())", False),
    ],
)
def test_an_interpreter_that_numpy_refuses_is_known(
    version: str, source: str, refused: bool
) -> None:
    assert refused_by_numpy(version, source) == refused


def test_an_explicit_choice_never_falls_back() -> None:
    with pytest.raises(UserError, match="ops=triton needs a CUDA device, but the model is on cpu"):
        tile_ops("triton", torch.device("cpu"))


def test_without_triton_auto_is_torch_and_an_explicit_choice_an_error() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\nfrom leanlift import ops\nfrom leanlift.errors import UserError\n"
        "assert ops.tile_ops('auto', torch.device('cuda', 0)).name == 'torch'\n"
        "try:\n    ops.tile_ops('triton', torch.device('cuda', 0))\n"
        "except UserError as error:\n    assert 'install leanlift[triton]' in str(error)\n"
        "else:\n    raise AssertionError\n"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
