"""Kernels by class: names as an H100's profile had them, and the classes of the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.card import Span
from benchmarks.gpu_profile import CLASSES, GRADIENTS, by_class, class_of, marked, modelled_step
from benchmarks.step_model import counted, measured, ours, qlora
from benchmarks.trainee import Scale, Trainee, lifted


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_192x192_64x4_1x2_h_bz_coopB_TNT", "products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>", "products"),
        ("ampere_bf16_s1688gemm_bf16_128x128_ldg8_f2f_stages_32x1_nn", "products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "products"),
        ("pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<cutlass>", "attention"),
        ("effective_rows_kernel", "dequantize and patch"),
        ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", "dequantize and patch"),
        ("gather_kernel", "gather"),
        ("void at::native::vectorized_gather_kernel<16, long>", "elementwise"),
        ("adamw_kernel", "optimizer"),
        ("void kOptimizerStatic8bit2StateBlockwise<__nv_bfloat16, 0, 256, 1>", "optimizer"),
        ("multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>", "optimizer"),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "elementwise"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>", "elementwise"),
        ("_rms_norm_forward_kernel", "elementwise"),
        ("_swiglu_backward_kernel", "elementwise"),
        ("_triton_rope", "elementwise"),
        ("Memcpy DtoD (Device -> Device)", "elementwise"),
        ("Memcpy HtoD (Pinned -> Device)", "over the bus"),
        ("what nobody knows", "other"),
    ],
)
def test_a_kernel_s_class(kernel: str, kind: str) -> None:
    assert class_of(kernel) == kind


def test_what_lies_in_a_mark_is_of_its_class_but_for_the_gather() -> None:
    spans = [
        Span("gemm", 0, 1000),
        Span(GRADIENTS, 1000, 4500, is_mark=True),
        Span("gemm", 1000, 4000),
        Span("gather_kernel", 4000, 4500),
        Span("gemm", 4500, 5000),
        Span("another mark", 0, 9000, is_mark=True),
    ]
    assert by_class(spans) == {"products": 1.5, GRADIENTS: 3.0, "gather": 0.5}


def test_the_classes_are_the_model_s() -> None:
    work = counted()
    for classes in (ours(*work), qlora(*work)):
        assert {*classes} == {*CLASSES, GRADIENTS} - {"over the bus"}


def test_a_profile_stands_beside_the_model_line_by_line(tmp_path: Path) -> None:
    rows = {"default, products, ms": 5, f"default, {GRADIENTS}, ms": 2, "default, host ms": 9}
    rows |= {"QLoRA r=64, products, ms": 6, "QLoRA r=64, step s": 8}
    path, kinds = tmp_path / "profile.csv", ["products", GRADIENTS, "gather"]
    path.write_text("what,value\n" + "".join(f'"{k}",{v}\n' for k, v in rows.items()))
    assert measured("leanlift", kinds, path) == {"products": 5, GRADIENTS: 2}
    assert measured("QLoRA, r = 64", kinds, path) == {"products": 6}
    assert measured("leanlift", kinds, tmp_path / "absent.csv") == {}
    path.write_text('what,value\n"comfortable, elementwise and reductions, ms",7\n')
    assert measured("leanlift", ["elementwise"], path) == {"elementwise": 7}


def test_without_a_card_nothing_is_modelled() -> None:
    if not torch.cuda.is_available():
        assert modelled_step(Scale(torch.device("cpu"), small=True), "leanlift") == {}


def test_every_layer_s_gradient_is_formed_in_a_mark() -> None:
    """By the CPU's own time line, where marks are too."""
    scale = Scale(torch.device("cpu"), small=True)
    trainee = Trainee(scale, lambda: lifted(scale, "default", "magnitude"))
    activities = [torch.profiler.ProfilerActivity.CPU]
    with marked(), torch.profiler.profile(activities=activities) as profiler:
        trainee.once()
    marks = [event for event in profiler.events() if event.name == GRADIENTS]
    assert len(marks) == 14
    trainee.once()  # and not once more afterwards
    assert all(mark.time_range.elapsed_us() > 0 for mark in marks)
