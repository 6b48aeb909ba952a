"""Every causal language model that transformers registers: trained, saved, merged, loaded again.

For each class a tiny random model in a process of its own, over NF4: attach with the default
targets, a training step against a dense oracle (the same model with D(Q) as plain Linears, and
torch's own gradients), a short training, save, load, merge, and the merged checkpoint in stock
transformers. What is found is one of

    ok         everything agrees
    note       likewise, and something was said (what is not trained, for one)
    refused    one sentence, before anything was trained
    no model   stock transformers makes or trains no tiny model of the kind here
    FAILED     anything else

    python -m benchmarks.families [family …] [--jobs 2]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import write_rows

VOCABULARY, LENGTH, LIMIT = 64, 24, 240
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "d_model": 64, "n_embd": 64, "n_embed": 64,
    "intermediate_size": 128, "ffn_dim": 128, "d_ff": 128, "n_inner": 128, "ffn_hidden_size": 128,
    "mlp_dim": 128, "expert_ffn_hidden_size": 64, "decoder_ffn_dim": 128, "encoder_ffn_dim": 128,
    "num_hidden_layers": 4, "n_layer": 4, "n_layers": 4, "num_layers": 4, "decoder_layers": 2,
    "encoder_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "global_head_dim": 16, "max_position_embeddings": 128, "n_positions": 128,
    "max_seq_len": 128, "max_sequence_length": 128, "seq_length": 128, "n_ctx": 128,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_topk": 2,
    "moe_k": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "sliding_window": 16, "rotary_dim": 8, "state_size": 16, "ssm_state_size": 16,
    "mamba_d_state": 16, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_num_heads": 8,
    "mamba_head_dim": 16, "mamba_n_groups": 1, "n_groups": 1, "mamba_chunk_size": 8,
    "chunk_size": 8, "mamba_d_ssm": 128, "mamba_dt_rank": 8, "time_step_rank": 8, "num_heads": 4,
    "lru_width": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "embedding_size": 64, "embed_dim": 64,
    "input_embedding_size": 64, "rnn_hidden_size": 64, "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16, "laurel_rank": 8, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": 1, "attention_hidden_size": 64, "index_n_heads": 2, "index_head_dim": 16,
    "index_topk": 8, "adapter_rank": 8, "expert_hidden_size": 64,
    "dense_attention_every_n_layers": 2,
    "attention_window_size": 16, "axial_pos_shape": [4, 6], "axial_pos_embds_dim": [32, 32],
    "num_buckets": 4, "attention_head_size": 16, "conv_L_cache": 3, "max_source_positions": 32,
    "max_target_positions": 128, "num_mel_bins": 16, "word_embed_proj_dim": 64,
}  # fmt: skip
"""Whatever a configuration may call its sizes."""


# --- one family -----------------------------------------------------------------------------


def tiny_config(family: str) -> Any:
    """The configuration of a tiny model of a family."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    config = kind()
    for part in (config, *(getattr(config, name) for name in getattr(config, "sub_configs", {}))):
        known = {key: value for key, value in SMALL.items() if hasattr(part, key)}
        for key, value in known.items():
            with suppress(Exception):  # a field that follows from others
                setattr(part, key, value)
        if hasattr(part, "qk_rope_head_dim") and hasattr(part, "head_dim"):
            part.head_dim = part.qk_rope_head_dim  # what the rotation of these goes by
        layers = getattr(part, "num_hidden_layers", 4)
        for key in ("layer_types", "layers_block_type", "block_types", "mlp_layer_types"):
            found = getattr(part, key, None)
            if isinstance(found, list) and found and isinstance(layers, int):
                with suppress(Exception):
                    setattr(part, key, _all_kinds(found, layers))
    return config


def _all_kinds(layers: list[str], count: int) -> list[str]:
    """A few layers that have every kind among them."""
    kinds = list(dict.fromkeys(layers))
    return [kinds[i % len(kinds)] for i in range(count)]


def make(family: str, place: Path) -> Any:
    """A tiny checkpoint with weights that are no two alike; the class of the model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from leanlift.demo.run import BASE

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    model.config.use_cache = False
    for key, value in (("eos", 1), ("bos", None), ("pad", 0)):
        setattr(model.generation_config, f"{key}_token_id", value)
    model.eval()(**batch())  # what stock transformers cannot run is not ours to train
    model.save_pretrained(place)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(place)
    return type(model)


def batch(labels: bool = True) -> dict[str, Tensor]:
    ids = torch.randint(3, 40, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, **({"labels": ids} if labels else {})}


def load(place: Path, quantized: bool = True) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    form = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                              bnb_4bit_compute_dtype=torch.float32)  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(
        place, dtype=torch.float32, quantization_config=form if quantized else None
    )


def dense_twin(model: Any, place: Path) -> Any:
    """The stock model with the attached one's frozen weights, all of them dense."""
    from leanlift.layers import FrozenLinear
    from leanlift.model.stacks import named_parts

    twin = load(place, quantized=False)
    modules = named_parts(twin)
    for name, layer in model.named_modules():
        if isinstance(layer, FrozenLinear):
            weight = layer.weight_tiles.rows(0, layer.weight_tiles.shape[0]).float()
            modules[name].weight.data.copy_(weight.view_as(modules[name].weight))
    return twin


def check_step(model: Any, place: Path) -> tuple[float, float]:
    """Loss and gradients against the oracle: the largest differences, of the loss and, as a share
    of the largest entry of a matrix's gradient, of a gradient."""
    from leanlift.model import lift_layers
    from leanlift.model.stacks import named_parts

    twin = dense_twin(model, place)
    expected = twin.eval()(**batch()).loss  # without dropout
    expected.backward()
    loss = model.eval()(**batch()).loss
    loss.backward()
    worst, modules = 0.0, named_parts(twin)
    for name, layer in lift_layers(model).items():
        dense = modules[name].weight.grad
        dense = torch.zeros_like(modules[name].weight) if dense is None else dense
        wanted = dense.reshape(-1)[layer.index.to_flat()]
        found = torch.zeros_like(wanted) if layer.values.grad is None else layer.values.grad
        size = float(dense.abs().max())
        worst = max(worst, float((wanted - found).abs().max()) / max(size, 1e-6))
        layer.values.grad = None
    return float((loss - expected).abs()), worst


def train(model: Any, output: Path) -> Any:
    """Two steps of the trainer; the model's own first loss beside the trainer's."""
    from leanlift import LiftSFTConfig, LiftTrainer

    rows = [{"input_ids": ids, "labels": ids} for ids in batch()["input_ids"].tolist()]
    args = LiftSFTConfig(
        str(output), max_steps=2, per_device_train_batch_size=2, use_cpu=True, bf16=False,
        learning_rate=1e-2, report_to=[], save_strategy="no", gradient_checkpointing=False,
        logging_steps=1, disable_tqdm=True, max_length=LENGTH,
    )  # fmt: skip
    trainer = LiftTrainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    return trainer


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(**batch(labels=False)).logits
    return out


def one(family: str) -> dict[str, Any]:
    """What becomes of a family; see the module's docstring."""
    from leanlift import LiftConfig, UserError, get_lift_model, load_adapter, merge_adapter
    from leanlift.model import lift_layers, weights_of

    row: dict[str, Any] = {"family": family, "found": "FAILED", "stage": "model", "said": ""}
    with tempfile.TemporaryDirectory() as place:
        base, output = Path(place) / "base", Path(place) / "run"
        try:
            row["class"] = make(family, base).__name__
            row["stage"] = "stock"
            stock = load(base)
        except Exception as error:
            return {**row, "found": "no model", "said": _first(error)}
        try:
            row["stage"] = "attach"
            model = get_lift_model(stock, LiftConfig(density=0.1, approx_rank=8), progress=False)
            row["targets"] = len(lift_layers(model))
            row["trained_share"] = round(weights_of(model)[0] / weights_of(model)[1], 4)
            row["stage"] = "step"
            row["loss_off"], row["gradient_off"] = check_step(model, base)
            row["stage"] = "train"
            trainer = train(model, output)
            trainer.save_model()
            row["stage"] = "reload"
            again = load_adapter(load(base), output)
            row["reload_off"] = float((logits(again) - logits(model)).abs().max())
            row["stage"] = "merge"
            merge_adapter(output, Path(place) / "merged", onto="quantized", dtype="float32",
                          progress=False)  # fmt: skip
            merged = load(Path(place) / "merged", quantized=False)
            row["merge_off"] = float((logits(merged) - logits(model)).abs().max())
        except UserError as error:
            early = row["stage"] in ("attach",)
            return {**row, "found": "refused" if early else "FAILED", "said": str(error)[:300]}
        except Exception as error:
            traceback.print_exc()
            return {**row, "said": _first(error)}
        row["stage"] = ""
        right = (
            row["loss_off"] < 1e-4
            and row["gradient_off"] < 1e-3
            and row["reload_off"] < 1e-5
            and row["merge_off"] < 1e-3
        )
        return {**row, "found": "ok" if right else "FAILED"}


def _first(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[
        :300
    ]


# --- all of them ----------------------------------------------------------------------------


def in_a_process(family: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.families", family, "--one"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {"family": family, "found": "FAILED", "said": f"took more than {LIMIT} s"}
    for line in reversed(done.stdout.splitlines()):
        with suppress(ValueError):
            found: dict[str, Any] = json.loads(line)
            return found
    return {"family": family, "found": "FAILED", "said": done.stderr.strip()[-300:]}


COLUMNS = ("family", "class", "found", "stage", "targets", "trained_share", "loss_off",
           "gradient_off", "reload_off", "merge_off", "said")  # fmt: skip


def main() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--one", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one:
        print(json.dumps(one(args.families[0])))
        return
    families = args.families or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    rows = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for found in pool.map(in_a_process, families):
            rows.append({key: found.get(key, "") for key in COLUMNS})
            print(*(str(rows[-1][key]) for key in ("family", "found", "stage", "said")), flush=True)
    if not args.families:
        write_rows("families", rows)


if __name__ == "__main__":
    main()
