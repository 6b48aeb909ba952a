"""A whole model: attach, refresh; save, load, switch and scale adapters."""

from leanlift.model.adapters import (
    load_adapter,
    restore_adapter,
    save_adapter,
    scale_adapter,
    unload_adapter,
)
from leanlift.model.attach import lift, use_ops
from leanlift.model.embeddings import embedding_to_cpu, ends_that_wait, output_head
from leanlift.model.refresh import RefreshReport, refresh_mask
from leanlift.model.resize_embeddings import embedding_size, grow_embedding
from leanlift.model.stacks import quantize_experts
from leanlift.model.state import LiftState, lift_layers, lift_state, lifted, weights_of
from leanlift.model.strangers import claim, release
from leanlift.model.streaming import stream_base
from leanlift.model.surgery import freeze_quantized
from leanlift.model.tiled import fused_elementwise, tiled_mlp

__all__ = [
    "LiftState",
    "RefreshReport",
    "claim",
    "embedding_size",
    "embedding_to_cpu",
    "ends_that_wait",
    "freeze_quantized",
    "fused_elementwise",
    "grow_embedding",
    "lift",
    "lift_layers",
    "lift_state",
    "lifted",
    "load_adapter",
    "output_head",
    "quantize_experts",
    "refresh_mask",
    "release",
    "restore_adapter",
    "save_adapter",
    "scale_adapter",
    "stream_base",
    "tiled_mlp",
    "unload_adapter",
    "use_ops",
    "weights_of",
]
