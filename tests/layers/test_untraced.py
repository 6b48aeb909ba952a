"""torch.compile of a model with our layers compiles what is between them, and leaves them alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
from sweeps import swept
from tiny import load, make_checkpoint
from transformers.models.llama import modeling_llama

from leanlift import LiftConfig, get_lift_model
from leanlift.layers.fused_glu import use_fused_glu, use_stock_glu
from leanlift.layers.tiled_mlp import use_tiled_mlp
from leanlift.model import lift_layers

LIFT = LiftConfig(density=0.05, approx_rank=4)
WAYS = {"stock": use_stock_glu, "fused": use_fused_glu, "in pieces": lambda m: use_tiled_mlp(m, 8)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("compiled"), tied=False)


@pytest.fixture
def rotates_as_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The family's own rotary embedding: what tells attentions with fused kernels apart stays in
    its place once any model of it has had them."""
    now: Any = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", getattr(now, "stock", now))


def gradients(model: Any, call: Any) -> dict[str, torch.Tensor]:
    ids = torch.arange(24).view(2, 12)
    call(input_ids=ids, labels=ids).loss.backward()
    return {name: layer.values.grad for name, layer in lift_layers(model).items()}


@pytest.mark.usefixtures("rotates_as_stock")
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo's own
@pytest.mark.parametrize("way", swept(list(WAYS), "fused"))
def test_a_compiled_model_has_the_same_gradients_and_no_layer_in_its_graphs(
    checkpoint: Path, way: str
) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = get_lift_model(load(checkpoint), LIFT, progress=False)
    WAYS[way](model)
    wanted = gradients(model, model)
    model.zero_grad()
    dynamo.reset()
    try:
        got = gradients(model, torch.compile(model, backend=backend))
    finally:
        dynamo.reset()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, wanted[name])
    nodes = [node for graph in graphs for node in graph.graph.nodes]
    # where an operation is written: a norm's forward is called by one of ours
    traces = [(node.meta.get("stack_trace") or "").rpartition('File "')[2] for node in nodes]
    assert any("modeling_llama" in trace for trace in traces)
    if way != "in pieces":
        assert any("hidden_states.pow(2)" in trace for trace in traces), "norms are compiled"
    assert not [trace for trace in traces if "leanlift/layers/" in trace]
