"""Frozen weights as rows: any range is bit-equal to the whole, and the whole is right.

The oracle decodes bitsandbytes' bytes by hand, in fp64 and entry by entry, with the published
code tables; it shares nothing with the code under test.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from itertools import product

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from helpers import (
    examples,
    make_dense,
    make_linear4bit,
    make_linear8bit,
    random_weight,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from leanlift.errors import UserError
from leanlift.tiles import RowTiles
from leanlift.weights.places import weight_tensors
from leanlift.weights.quantized import (
    FrozenWeight,
    WeightFormat,
    dtype_of,
    embedding_rows,
    frozen_weight,
    requantize,
)

SHAPES = [(96, 80), (128, 256), (65, 48), (33, 257), (130, 1000)]
"""Aligned to the block, and not; 33x257 has an odd number of entries, 130x1000 several nested
blocks."""

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = list(product(("nf4", "fp4"), (True, False), (64, 128)))


def _format_id(fmt: tuple[str, bool, int]) -> str:
    return f"{fmt[0]}-{'double' if fmt[1] else 'single'}-{fmt[2]}"


def _shape_id(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


each_format = pytest.mark.parametrize("fmt", FORMATS, ids=_format_id)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=_shape_id)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# QLoRA (arXiv 2305.14314), appendix E; FP4 (1 sign, 2 exponent, 1 mantissa bit) as in
# bitsandbytes: the sign is the highest of the four bits.
NF4 = [
    *(-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
]
FP4 = [0.0, 0.0052083333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25]


@cache
def _module_4bit(
    fmt: tuple[str, bool, int], shape: tuple[int, int], dtype: torch.dtype
) -> Linear4bit:
    kind, double, block = fmt
    return make_linear4bit(*shape, kind, double, block, dtype=dtype)


@cache
def _other_module(kind: str, shape: tuple[int, int]) -> nn.Linear:
    return make_linear8bit(*shape) if kind == "int8" else make_dense(*shape, dtype_of(kind))


def _whole(weight: RowTiles) -> Tensor:
    return weight.rows(0, weight.shape[0])


def _oracle_4bit(module: Linear4bit) -> Tensor:
    """fp64 [m, n] from the packed bytes: high nibble first, one absmax per block."""
    state = module.weight.quant_state
    m, n = state.shape
    packed = module.weight.data.reshape(-1).view(torch.uint8)
    nibbles = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[: m * n].long()
    absmax = state.absmax.double()
    if state.nested:
        codes, inner = state.absmax.long(), state.state2
        outer = inner.absmax.double().repeat_interleave(inner.blocksize)[: codes.numel()]
        absmax = inner.code.double()[codes] * outer + state.offset.double()
    scale = absmax.repeat_interleave(state.blocksize)[: m * n]
    return (state.code.double()[nibbles] * scale).view(m, n)


def _assert_range_is_slice(weight: FrozenWeight, data: st.DataObject) -> None:
    m, n = weight.shape
    start = data.draw(st.integers(0, m), "start")
    stop = data.draw(st.integers(start, m), "stop")
    rows = weight.rows(start, stop)
    assert rows.shape == (stop - start, n)
    assert rows.dtype == weight.dtype
    assert torch.equal(rows, _whole(weight)[start:stop])


@each_format
@each_shape
@examples(20)
@given(data=st.data())
def test_any_4bit_row_range_is_bit_equal_to_the_whole(
    fmt: tuple[str, bool, int], shape: tuple[int, int], data: st.DataObject
) -> None:
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    _assert_range_is_slice(frozen_weight(_module_4bit(fmt, shape, dtype)), data)


@pytest.mark.parametrize("kind", ["int8", "float32", "bfloat16", "float16"])
@each_shape
@examples(15)
@given(data=st.data())
def test_any_other_row_range_is_bit_equal_to_the_whole(
    kind: str, shape: tuple[int, int], data: st.DataObject
) -> None:
    _assert_range_is_slice(frozen_weight(_other_module(kind, shape)), data)


@each_format
@each_shape
@each_dtype
def test_4bit_rows_are_what_the_bytes_say(
    fmt: tuple[str, bool, int], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """fp32 to 1e-6; 16-bit results to half a unit in the last place of that dtype."""
    module = _module_4bit(fmt, shape, dtype)
    truth = _oracle_4bit(module)
    got = _whole(frozen_weight(module)).double()
    tolerance = 1e-6 if dtype == torch.float32 else 0.505 * torch.finfo(dtype).eps
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert bool(((got - truth).abs() <= tolerance * truth.abs() + smallest).all())


@pytest.mark.parametrize("fmt", FORMATS, ids=_format_id)
def test_4bit_rows_resemble_the_weight_that_was_quantized(fmt: tuple[str, bool, int]) -> None:
    """An oracle that decoded in the wrong order would agree with nothing."""
    weight = random_weight(130, 1000)
    got = _whole(frozen_weight(_module_4bit(fmt, (130, 1000), torch.float32)))
    assert float((got - weight).norm() / weight.norm()) < (0.12 if fmt[0] == "nf4" else 0.2)


@pytest.mark.parametrize(("kind", "table"), [("nf4", NF4), ("fp4", FP4 + [-x for x in FP4])])
def test_code_tables_are_the_published_ones(kind: str, table: list[float]) -> None:
    code = make_linear4bit(8, 64, kind).weight.quant_state.code
    torch.testing.assert_close(code, torch.tensor(table), rtol=0, atol=1e-6)


@each_shape
def test_int8_rows_are_codes_times_row_scale_over_127(shape: tuple[int, int]) -> None:
    module = make_linear8bit(*shape)
    truth = module.weight.CB.double() * module.weight.SCB.double()[:, None] / 127
    got = _whole(frozen_weight(module))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), truth, rtol=1e-6, atol=0)
    torch.testing.assert_close(got, random_weight(*shape), rtol=0, atol=0.02)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_int8_rows_survive_a_forward_pass_of_the_stock_module() -> None:
    """bitsandbytes moves codes and scales from the weight to the module's state."""
    module = make_linear8bit(96, 80)
    before = _whole(frozen_weight(module)).clone()
    module(torch.randn(2, 80))
    assert torch.equal(_whole(frozen_weight(module)), before)


@each_dtype
def test_dense_rows_are_the_weight_itself(dtype: torch.dtype) -> None:
    module = make_dense(65, 48, dtype)
    rows = frozen_weight(module).rows(3, 9)
    assert torch.equal(rows, module.weight[3:9])
    assert rows.data_ptr() == module.weight[3].data_ptr()
    assert not rows.requires_grad


@each_format
@each_shape
def test_4bit_bytes_from_the_shape_are_those_of_the_tensors(
    fmt: tuple[str, bool, int], shape: tuple[int, int]
) -> None:
    module = _module_4bit(fmt, shape, torch.float32)
    weight, state = frozen_weight(module), module.weight.quant_state
    held = module.weight.data.nbytes + state.absmax.nbytes
    tables = state.code.nbytes
    if fmt[1]:
        held += state.state2.absmax.nbytes + state.offset.nbytes
        tables += state.state2.code.nbytes
    assert weight.format == WeightFormat(fmt[0], "float32", fmt[2], fmt[1])
    assert weight.format.nbytes(shape) == held
    assert weight.format.tables_nbytes == tables
    held += tables
    assert sum(tensor.nbytes for tensor in weight_tensors(module)) == held
    assert weight.format.held_nbytes(shape) == held


@each_shape
@pytest.mark.parametrize("kind", ["int8", "float32", "bfloat16", "float16"])
def test_other_bytes_from_the_shape_are_those_of_the_tensors(
    kind: str, shape: tuple[int, int]
) -> None:
    module = _other_module(kind, shape)
    storages = {tensor.data_ptr(): tensor.nbytes for tensor in weight_tensors(module)}
    found = frozen_weight(module).format
    assert found.nbytes(shape) == found.held_nbytes(shape) == sum(storages.values())


@each_format
def test_requantizing_gives_the_rows_of_the_stock_module(fmt: tuple[str, bool, int]) -> None:
    weight = random_weight(65, 48).bfloat16()
    kind, double, block = fmt
    stock = frozen_weight(
        make_linear4bit(65, 48, kind, double, block, dtype=torch.bfloat16, weight=weight)
    )
    again = requantize(weight, stock.format, torch.device("cpu"))
    assert torch.equal(_whole(again), _whole(stock))


@each_format
def test_quantizing_tile_by_tile_is_quantizing_the_whole(
    fmt: tuple[str, bool, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, double, block = fmt
    weight, cpu = random_weight(2 * block + 5, 48), torch.device("cpu")
    weight[block:] *= 3  # scales differ from tile to tile
    form = WeightFormat(kind, "float32", block, double)
    whole = requantize(weight, form, cpu)
    int8 = requantize(weight, WeightFormat("int8", "float32"), cpu)
    monkeypatch.setattr(
        "leanlift.weights.bnb.linear.QUANTIZED_AT_ONCE", 7 * 48
    )  # three tiles of 4-bit rows
    assert torch.equal(_whole(requantize(weight, form, cpu)), _whole(whole))
    tiled = requantize(weight, WeightFormat("int8", "float32"), cpu)
    assert torch.equal(_whole(tiled), _whole(int8))
    stock = frozen_weight(make_linear4bit(*weight.shape, kind, double, block, weight=weight))
    assert torch.equal(_whole(whole), _whole(stock))


def test_requantizing_int8_and_dense() -> None:
    weight, cpu = random_weight(65, 48).bfloat16(), torch.device("cpu")
    int8 = requantize(weight, WeightFormat("int8", "float32"), cpu)
    assert torch.equal(_whole(int8), _whole(frozen_weight(make_linear8bit(65, 48, weight=weight))))
    dense = requantize(weight, WeightFormat("dense", "float16"), cpu)
    assert torch.equal(_whole(dense), weight.half())


def _repacked() -> Linear4bit:
    module = make_linear4bit(64, 64)
    module.weight.quant_state.packing_format_for_cpu = True
    return module


def _was_another() -> Linear4bit:
    module = make_linear4bit(64, 64)
    module.source_cls = nn.Bilinear
    return module


def _integers() -> nn.Linear:
    module = nn.Linear(4, 4)
    module.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int32), requires_grad=False)
    return module


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (partial(Linear4bit, 64, 64), "not quantized yet"),
        (_repacked, "repacked"),
        (_was_another, "was a Bilinear"),
        (partial(Linear8bitLt, 8, 8, has_fp16_weights=False), "holds no INT8 weight yet"),
        (partial(nn.Conv1d, 8, 4, 1), "is a Conv1d"),
        (_integers, "torch.int32"),
        (partial(nn.Linear, 4, 4, dtype=torch.float64), "torch.float64"),
        (partial(nn.Linear, 4, 4, device="meta"), "meta device"),
        (partial(nn.Embedding, 4, 4), "is a Embedding"),
        (nn.ReLU, "is a ReLU"),
    ],
    ids=[
        *("unquantized-4bit", "repacked", "from-another", "unquantized-8bit", "conv1d"),
        *("integer", "fp64", "meta", "embedding", "no-weight"),
    ],
)
def test_a_weight_that_cannot_be_read_is_refused_by_name(
    build: Callable[[], nn.Module], reason: str
) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        frozen_weight(build(), "model.layers.3.mlp.up_proj")
    assert str(caught.value).startswith("model.layers.3.mlp.up_proj ")


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(UserError, match="got 'int8'"):
        dtype_of("int8")


class Elsewhere:
    """Scales on another device than this machine has."""

    def __init__(self, scales: torch.Tensor) -> None:
        self.scales, self.moved = scales, 0
        self.device, self.dtype = torch.device("cuda"), scales.dtype

    def to(self, device: torch.device) -> torch.Tensor:
        self.moved += 1
        return self.scales.to(device)


@pytest.mark.parametrize("forwarded", [False, True], ids=["weight", "state"])
def test_int8_scales_follow_the_codes_wherever_torch_moves_them(forwarded: bool) -> None:
    """torch gives the weight other data; what bitsandbytes hung beside it stays where it was."""
    module = make_linear8bit(96, 64)
    expected = frozen_weight(module).rows(0, 96)
    codes, away = module.weight.data, Elsewhere(module.weight.SCB)
    place = module.weight
    if forwarded:
        module.weight.CB = module.weight.SCB = None
        place = module.state
    place.CB, place.SCB = torch.zeros_like(codes), away  # what was left behind
    for _ in range(2):
        assert torch.equal(frozen_weight(module).rows(0, 96), expected)
        ids = torch.tensor([[3, 95], [0, 3]])
        assert torch.equal(embedding_rows(module, ids), expected[ids])
    assert away.moved == 1
    assert place.CB.data_ptr() == codes.data_ptr()
    assert place.SCB.device == codes.device
