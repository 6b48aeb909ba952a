"""What a plan makes of a model's logits is what a run finds: by following them, without numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import settings
from sweeps import swept
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.initialization import no_init_weights

from leanlift import LiftConfig, PlanSettings, get_lift_model, plan_memory
from leanlift.layers.frozen_head import FrozenHead
from leanlift.layers.lm_head import Finish
from leanlift.model import output_head
from leanlift.plan.fake import attach_fake, fake_tensors
from leanlift.plan.logits import SOME, planned_finish
from leanlift.plan.pieces import first_pieces
from leanlift.training.loss import TiledLoss, WholeLoss, training_loss
from leanlift.training.own_loss import compared
from leanlift.weights.quantized import WeightFormat

NF4 = WeightFormat("nf4", "float32", 64, True)

SIZES: dict[str, Any] = {
    "vocab_size": 211, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
OPT = {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0}
LLAMA4 = {"num_local_experts": 2, "intermediate_size_mlp": 96, "attention_chunk_size": 32}
RECURRENT = {"block_types": ["recurrent", "attention"], "lru_width": 64,
             "attention_window_size": 16}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any], Finish | None]] = {
    "plain": ("llama", {}, Finish()),
    "scaled": ("granite", {"logits_scaling": 13.0}, Finish(1 / 13)),
    "scaled otherwise": ("cohere", {"logit_scale": 0.0625}, Finish(0.0625)),
    "capped": ("gemma2", {}, Finish(softcap=30.0)),
    "capped by another name": ("recurrent_gemma", RECURRENT, Finish(softcap=30.0)),
    "a transform before the head": ("bert", {"is_decoder": True}, None),
    "a norm before the head": ("modernbert-decoder", {}, None),
    "a part of the base is asked": ("opt", OPT, Finish()),
    "its base has another name": ("llama4_text", LLAMA4, Finish()),
    "a bias": ("phi", {}, Finish()),
}


def config_of(kind: str, **more: Any) -> Any:
    family, changes, _ = KINDS[kind]
    return AutoConfig.for_model(family, **{**SIZES, **changes, **more})


def made(kind: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(kind, **more), dtype=dtype)


def planned(kind: str, dtype: torch.dtype = torch.float32) -> Finish | None:
    with fake_tensors(), no_init_weights():
        return planned_finish(made(kind, dtype))


def like(finish: Finish | None) -> Finish | None:
    """What of it a plan tells apart."""
    if finish is None:
        return None
    return Finish(softcap=None if finish.softcap is None else SOME, rows=finish.rows)


@pytest.mark.parametrize("kind", swept(KINDS, *list(KINDS)[::2]))
def test_a_plan_follows_what_a_run_measures(kind: str) -> None:
    model, wanted = made(kind), KINDS[kind][2]
    assert compared(model, output_head(model)).finish == wanted
    assert planned(kind) == like(wanted)


FORWARDS: dict[str, tuple[Callable[[Any], Any], Finish | None]] = {
    "scaled, then capped": (lambda z: 50 * torch.tanh(z * 0.25 / 50), Finish(0.25, 50.0)),
    "capped where most are": (lambda z: 15 * torch.tanh(z * 400 / 15), Finish(400.0, 15.0)),
    "divided by a share of the width": (lambda z: z / (64 / 12), Finish(12 / 64)),
    "cut": (lambda z: z[..., :190], Finish(rows=190)),
    "cut and scaled": (lambda z: z[..., :190] * 4, Finish(4.0, rows=190)),
    "a factor that nothing says": (lambda z: z * 0.7, None),
    "shifted": (lambda z: z + torch.arange(211.0), None),
    "a factor for each": (lambda z: z * torch.linspace(0.5, 1, 211), None),
    "capped by clamping": (lambda z: z.clamp(-0.5, 0.5), None),
}
UNSEEN = "a factor that nothing says"
"""A plan sees that it is a factor, not that a run does not know it."""


@pytest.mark.parametrize("case", swept(FORWARDS, "scaled, then capped", "cut", "shifted", UNSEEN))
@pytest.mark.parametrize("dtype", swept([torch.float32, torch.bfloat16], torch.float32), ids=str)
def test_whatever_a_family_makes_of_them(
    case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, wanted = FORWARDS[case]
    stock = LlamaForCausalLM.forward

    def forward(self: Any, **inputs: Any) -> Any:
        out = stock(self, **{**inputs, "labels": None})
        out.logits = change(out.logits).to(dtype)
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    numbers = {"factor": 0.25, "a_cap": 50.0, "share": 12, "four": 4, "many": 400, "low": 15.0}
    model = made("plain", dtype, **numbers)
    assert compared(model, output_head(model)).finish == wanted
    if case != UNSEEN:
        assert planned("plain", dtype) == like(wanted)


def test_the_numbers_that_are_measured_are_those_of_the_configuration() -> None:
    """To the bit, after a step too: a run that goes on from a checkpoint computes as before."""
    model = made("scaled")
    for _ in range(3):
        assert compared(model, output_head(model)).finish == Finish(1 / 13)
        for parameter in model.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize("kind", swept(KINDS, "a transform before the head"))
def test_whole_logits_are_planned_where_they_are_made(kind: str, tmp_path: Path) -> None:
    model = get_lift_model(
        made(kind), LiftConfig(selector="magnitude", density=0.2), progress=False
    )
    loss = training_loss(model, settings(tmp_path), None)
    config_of(kind, vocab_size=100_000, max_position_embeddings=512).save_pretrained(tmp_path)
    plan = plan_memory(
        tmp_path,
        LiftConfig(selector="magnitude", density=0.2),
        PlanSettings(
            per_device_train_batch_size=1, max_length=512, load_in_4bit=False, cuda=False,
            optim="sparse_adamw",
        ),
    )  # fmt: skip
    whole = 512 * 100_000 * 4
    assert (plan.step["loss"] > 1.5 * whole) == (type(loss) is WholeLoss)
    assert type(loss) is (TiledLoss if KINDS[kind][2] is not None else WholeLoss)


@pytest.mark.parametrize("quantized", [False, True], ids=["16 bits", "INT8"])
@pytest.mark.parametrize("stands_for", ["cpu", "cuda"])
def test_a_planned_head_stands_for_the_device_that_the_layers_do(
    stands_for: str, quantized: bool
) -> None:
    """Which decides what it multiplies with, in the loss and for whole logits."""
    config = LiftConfig(approx_rank=8, quantize_embeddings=quantized)
    with fake_tensors(), no_init_weights():
        model = made("plain")
        attach_fake(model, config, NF4, workspace=first_pieces(stands_for))
        head, module = output_head(model), model.get_output_embeddings()
    assert head is not None
    assert head.on_cpu == (stands_for == "cpu")
    assert isinstance(module, FrozenHead) == quantized
    assert getattr(module, "stands_for", stands_for) == stands_for
