"""A run whose base is streamed: the same adapter, and the memory that was planned."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import SIZES, config_of
from sweeps import swept
from tiny import make_checkpoint_of
from transformers import AutoModelForCausalLM, FalconH1Config
from transformers.integrations.bitsandbytes import Bnb4bitQuantize

from leanlift import UserError
from leanlift.model import lifted, stream_base
from leanlift.model.streaming import plain_in_pool
from leanlift.plan import MemoryPlan
from leanlift.streaming import nbytes_of
from leanlift.training import LiftSFTConfig, RunArguments, plan_of, run
from leanlift.training.base import load_model
from leanlift.training.on_the_host import quantizing_on
from leanlift.training.room import check_room
from leanlift.training.screens import QuietScreen
from leanlift.weights import stacks
from leanlift.weights.places import weight_tensors
from leanlift.weights.quantized import WeightFormat

CPU = torch.device("cpu")
FORMATS: dict[str, dict[str, bool]] = {
    "nf4": {},
    "int8": {"load_in_4bit": False, "load_in_8bit": True},
    "dense": {"load_in_4bit": False},
}

STATE = {"stream_state": True, "optim_in_backward": True, "quantize_embeddings": True}
SUMS = {**STATE, "gradient_accumulation_steps": 3}
LOOP = ("optim", "optim_in_backward", "gradient_accumulation_steps")

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return made(config_of("llama", num_hidden_layers=6, vocab_size=128), tmp_path_factory)


@pytest.fixture(scope="module")
def scanning(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model whose blocks compute with the weights of some Linears themselves."""
    config = FalconH1Config(
        **SIZES, head_dim=16, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8,
        mamba_chunk_size=16,
    )  # fmt: skip
    config.num_hidden_layers = 4
    return made(config, tmp_path_factory)


def made(config: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = make_checkpoint_of(config, tmp_path_factory.mktemp("base") / "base")
    rows = base.parent / "rows.jsonl"
    written = [{"prompt": f"{n} and {n} is ", "completion": str(2 * n)} for n in range(12)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in written))
    return base, rows


def told(places: tuple[Path, Path], output: Path, **args: Any) -> tuple[Any, Any]:
    loop = {key: args.pop(key) for key in LOOP if key in args}
    arguments = RunArguments(
        model_name_or_path=str(places[0]), dataset_name=str(places[1]), approx_rank=8,
        refresh_interval=2, values_dtype="bfloat16", **args,
    )  # fmt: skip
    sft = LiftSFTConfig(
        output_dir=str(output), use_cpu=True, bf16=False, max_steps=3, save_strategy="no",
        per_device_train_batch_size=2, learning_rate=1e-3, disable_tqdm=True, max_length=48,
        max_grad_norm=0.0, **{"optim": "sparse_adamw_8bit", **loop},
    )  # fmt: skip
    return arguments, sft


@pytest.mark.parametrize("form", swept(FORMATS, "nf4"))
@pytest.mark.parametrize(
    "more",
    swept([{}, {"optim_in_backward": True}, {"quantize_embeddings": True}, STATE, SUMS], {}, SUMS),
    ids=["plain", "updates in backward", "ends in INT8", "state too", "sums of gradients too"],
)
def test_a_streamed_run_is_the_same_and_as_planned(
    form: str, more: dict[str, Any], places: tuple[Path, Path], tmp_path: Path
) -> None:
    files = []
    for stream in (False, True):
        output = tmp_path / str(stream)
        changed = {**more, "stream_state": stream and more.get("stream_state", False)}
        args, sft = told(places, output, stream_base=stream, **FORMATS[form], **changed)
        plan = lambda batches, args=args, sft=sft: plan_of(args, sft, False, batches)  # noqa: E731
        report = run(args, sft, screen=QuietScreen(), plan=plan).memory
        files.append((output / "adapter_model.safetensors").read_bytes())
        planned = report.plan
        assert planned is not None
        exact = ["base weights", "embeddings and head", "norms and other", "index", "values"]
        for name in (*exact, "optimizer state"):
            assert report.categories[name] == planned["categories"][name], name
        full = {"retired entries", "streamed state"}  # a plan counts retired stores as full
        measured = sum(v for name, v in report.categories.items() if name not in full)
        held = sum(v for name, v in planned["categories"].items() if name in full)
        wanted = planned["phases"]["train"] - held
        assert measured == pytest.approx(wanted, rel=0.05)
    assert files[0] == files[1]
    assert planned["host"] > 0


PART = {"load_in_4bit": False, "target_modules": ["q_proj", "up_proj"]}


@pytest.mark.parametrize(
    "form", swept([{}, {"load_in_4bit": False}, PART], {}, PART), ids=["nf4", "dense", "some"]
)
@pytest.mark.parametrize("model", swept(["places", "scanning"], "scanning"))
def test_what_no_layer_of_ours_computes_is_there_or_brought(
    model: str, form: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """A device has what it computes with: a Linear without a layer of ours is brought by nobody."""
    places: tuple[Path, Path] = request.getfixturevalue(model)
    files = []
    for stream in (False, True):
        output = tmp_path / str(stream)
        args, sft = told(places, output, stream_base=stream, **form)
        plan = lambda batches, args=args, sft=sft: plan_of(args, sft, False, batches)  # noqa: E731
        done = run(args, sft, screen=QuietScreen(), plan=plan)
        report = done.memory
        files.append((output / "adapter_model.safetensors").read_bytes())
        assert report.plan is not None
        planned = report.plan["categories"]
        if stream:
            assert report.categories["base weights"] == planned["base weights"]
            assert not plain_in_pool(lifted(done.model))
    assert files[0] == files[1]


def test_sums_of_gradients_are_planned_to_the_byte(
    places: tuple[Path, Path], tmp_path: Path
) -> None:
    """Without a refresh, whose retired stores a plan takes for full."""
    held = []
    for more in (STATE, SUMS):
        args, sft = told(places, tmp_path / str(len(held)), stream_base=True, **more)
        args = dataclasses.replace(args, refresh_interval=0)
        plan = lambda batches, args=args, sft=sft: plan_of(args, sft, False, batches)  # noqa: E731
        report = run(args, sft, screen=QuietScreen(), plan=plan).memory
        assert report.plan is not None
        planned = report.plan["categories"]
        assert report.categories["streamed state"] == planned["streamed state"]
        assert planned["gradients"] == 0
        held.append(planned)
    assert held[1]["streamed state"] > held[0]["streamed state"]


def test_a_card_holds_two_blocks_and_the_host_all(
    places: tuple[Path, Path], tmp_path: Path
) -> None:
    """Planned for CUDA: what is not on the card is in `host`."""
    plans = [
        plan_of(*told(places, tmp_path, stream_base=stream), cuda=True) for stream in (False, True)
    ]
    resident, streamed = (plan.categories["base weights"] for plan in plans)
    fmt = WeightFormat("nf4", "bfloat16", 64, True)
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (192, 64), (192, 64), (64, 192)]
    sizes = [size for shape in shapes for size in fmt.tensor_sizes(shape)]
    assert streamed == resident - 6 * sum(sizes) + 2 * nbytes_of(sizes)
    assert plans[0].host == 0
    assert plans[1].host == 6 * nbytes_of(sizes)
    others = [{k: v for k, v in p.categories.items() if k != "base weights"} for p in plans]
    assert others[0] == others[1]
    assert plans[1].phases["load"] < plans[0].phases["load"]


def test_what_cannot_be_streamed_is_said_before_anything_is_loaded(
    places: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args, sft = told(places, tmp_path, stream_base=True)
    plan = MemoryPlan("base", {"index": 0, "values": 0, "retired entries": 0, "optimizer state": 0},
                      {"train": 0}, {}, 1, host=10 * 2**30)  # fmt: skip
    monkeypatch.setattr("leanlift.training.room.free_host_nbytes", lambda: 2**30)
    with pytest.raises(UserError, match=r"takes 10.0 GiB of the host's memory, of which 1.00 GiB"):
        check_room(args, sft, plan, [], tmp_path, None)
    monkeypatch.setattr("leanlift.training.room.free_host_nbytes", lambda: None)
    check_room(args, sft, plan, [], tmp_path, None)
    monkeypatch.setattr("leanlift.training.room.processes", lambda: 2)
    with pytest.raises(UserError, match=r"stream_base .* for one process, and 2"):
        check_room(args, sft, plan, [], tmp_path, None)


@pytest.mark.parametrize("lacking", ["stream_base", "optim_in_backward"])
def test_streamed_state_without_what_it_needs_is_refused_first(
    lacking: str, places: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **more: Any) -> None:
        raise AssertionError("rows are read")

    monkeypatch.setattr("leanlift.training.job.ready_rows", never)
    both = {"stream_base": True, "optim_in_backward": True, "stream_state": True, lacking: False}
    args, sft = told(places, tmp_path / "out", **both)
    with pytest.raises(UserError, match=r"stream_state updates .*stream_base, optim_in_backward"):
        run(args, sft, screen=QuietScreen())


@pytest.mark.parametrize("form", FORMATS)
def test_matrices_are_quantized_on_the_card_and_come_back(
    form: str, places: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card's part is played by the host itself."""
    args, _ = told(places, tmp_path, **FORMATS[form])
    wanted = load_model(args, CPU)
    went: list[str] = []
    load = AutoModelForCausalLM.from_pretrained

    def onto_the_host(*given: Any, **more: Any) -> Any:  # as where there is a card
        assert more["device_map"] is None
        return load(*given, **{**more, "device_map": {"": "cpu"}})

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", onto_the_host)
    on = "leanlift.training.on_the_host._on"
    monkeypatch.setattr(on, lambda value, device: went.append(str(device)) or value)
    stock, requantize = Bnb4bitQuantize.convert, stacks.requantize
    with quantizing_on(torch.device("cuda", 0)):
        assert Bnb4bitQuantize.convert is not stock
        found = load_model(args, CPU)
    assert Bnb4bitQuantize.convert is stock
    assert stacks.requantize is requantize
    matrices = 0 if form == "dense" else 7 * 6
    assert went == ["cuda:0", "cpu"] * matrices
    for (name, one), two in zip(wanted.named_modules(), found.modules(), strict=True):
        if name.endswith("_proj"):
            pairs = zip(weight_tensors(one), weight_tensors(two), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs), name
    assert len(stream_base(found, CPU).blocks) == 6
