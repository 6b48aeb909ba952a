"""What a card's libraries take beside a step's tensors: cuBLAS' workspaces, attention's sums."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import config_of
from torch import nn

from leanlift import LiftConfig, PlanSettings, plan_memory
from leanlift.layers.lm_head import Objective
from leanlift.measure.live import LiveBytes
from leanlift.plan.base import FakeBase
from leanlift.plan.blas import VARIABLE, workspace_nbytes
from leanlift.plan.fake import fake_tensors
from leanlift.plan.keeping import key_of
from leanlift.plan.stand_ins import fused_attention

MIB = 2**20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    config_of("llama").save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("capability", "config", "nbytes"),
    [
        ((8, 0), None, 8 * MIB + 128 * 1024),
        ((8, 9), "", 8 * MIB + 128 * 1024),
        ((9, 0), None, 32 * MIB),
        ((10, 0), None, 32 * MIB),
        ((12, 0), None, 32 * MIB),
        (None, None, 32 * MIB),
        ((9, 0), ":4096:8", 32 * MIB),
        ((9, 0), ":4096:2:16:8", 8 * MIB + 128 * 1024),
        ((8, 0), ":16:8", 128 * 1024),
        ((8, 0), ":0:0", 0),
        ((8, 0), "all of it", 8 * MIB + 128 * 1024),
    ],
)
def test_a_workspace_is_as_large_as_torch_makes_it(
    capability: tuple[int, int] | None, config: str | None, nbytes: int
) -> None:
    assert workspace_nbytes(capability, config) == nbytes


@pytest.mark.parametrize("cuda", [True, False])
def test_a_plan_has_two_of_them_on_a_card(
    cuda: bool, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = PlanSettings(max_length=16, per_device_train_batch_size=1, cuda=cuda)

    def phases(config: str) -> dict[str, int]:
        monkeypatch.setenv(VARIABLE, config)
        return plan_memory(model, LiftConfig(approx_rank=8, refresh_interval=2), settings).phases

    none, some = phases(":0:0"), phases(":1024:3")
    more = {name: (some[name] - none[name]) // MIB for name in none}
    expected = {"load": 0, "select": 3, "train": 6, "export": 0, "refresh": 6}
    assert more == (expected if cuda else dict.fromkeys(expected, 0))


def test_a_kept_plan_is_for_the_workspace_that_there_was(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, config = FakeBase.of(model / "config.json"), LiftConfig()

    def key(said: str, cuda: bool) -> str | None:
        monkeypatch.setenv(VARIABLE, said)
        return key_of(base, config, PlanSettings(cuda=cuda), Objective(), "sft")

    assert key(":16:8", True) != key(":4096:8", True)
    assert key(":16:8", True) == key(":16:8", True)
    assert key(":16:8", False) == key(":4096:8", False)


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"),
    [
        (torch.bfloat16, (1, 4, 256, 64), 4 * 4 * 256 * 64),
        (torch.float16, (2, 3, 200, 80), 4 * 2 * 3 * 256 * 96),
        (torch.float32, (1, 4, 256, 64), 0),
    ],
)
def test_attention_goes_backward_beside_an_fp32_sum(
    dtype: torch.dtype, shape: tuple[int, ...], nbytes: int
) -> None:
    def peak(cuda: bool) -> tuple[int, int]:
        with fake_tensors(), fused_attention(cuda):
            q, k, v = (torch.empty(shape, dtype=dtype, requires_grad=True) for _ in range(3))
            with LiveBytes() as live:
                out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
                forward = live.peak
                torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
            return forward, live.peak

    (forward, more), (plain_forward, plain) = peak(True), peak(False)
    assert forward == plain_forward
    assert more - plain == nbytes
