"""Every language model that transformers registers: trained, saved, merged, loaded again.

Causal language models, or with `--others` those of images or sound and text. For each class a tiny
random model in a process of its own, over NF4: attach with the default targets, a training step
against a dense oracle (the same model with D(Q) as plain Linears, and torch's own gradients), a
short training, save, load, merge, and the merged checkpoint in stock transformers. What is found is
one of

    ok         everything agrees
    note       likewise, and something was said (what is not trained, for one)
    refused    one sentence, before anything was trained
    no model   stock transformers makes or trains no tiny model of the kind here
    FAILED     anything else

Of a model that sees or hears, the language model is trained on text, and the merge has the whole.

    python -m benchmarks.families [family …] [--jobs 2] [--others]
"""

from __future__ import annotations

import argparse
import csv
import logging
import multiprocessing
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import RESULTS, environment
from benchmarks.tiny_families import LENGTH, NOT_ALONE, tiny_config
from benchmarks.tiny_others import NOT_OF_TEXT, tiny_whole
from benchmarks.whole import check_whole
from leanlift import LiftConfig, UserError, get_lift_model, load_adapter, merge_adapter, plan_memory
from leanlift.io.tensors import replacing
from leanlift.layers import FrozenLinear
from leanlift.model import lift_layers, lifted, weights_of
from leanlift.model.stacks import named_parts
from leanlift.plan import Batch, PlanSettings
from leanlift.plan.loss import output_over_text
from leanlift.weights.kinds import is_turned_linear, matrix_of

LIMIT = 90
# --- one family -----------------------------------------------------------------------------


def make(family: str, place: Path, whole: bool) -> Any:
    """A tiny checkpoint with weights that are no two alike, `whole` or of text; its class."""
    from transformers import AutoTokenizer

    from leanlift.demo.run import BASE
    from leanlift.plan.auto import auto_class

    torch.manual_seed(0)
    config = tiny_whole(family) if whole else tiny_config(family)
    model = auto_class(config, family, images=whole).from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    for module in model.modules():  # some families load the row of what pads as zeros
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            module.weight.data[module.padding_idx] = 0
    model.config.use_cache = False
    for key, value in (("eos", 1), ("bos", None), ("pad", 0)):
        setattr(model.generation_config, f"{key}_token_id", value)
    if auto_class(config, family) is auto_class(config, family, images=whole):
        model.eval()(**batch())  # what stock transformers cannot run is not ours to train
    model.save_pretrained(place)
    loaded = load(place, quantized=False)
    loaded.eval()(**batch())
    ends = (each.get_input_embeddings().weight for each in (loaded, model))
    off = torch.zeros(1)
    if type(loaded) is type(model):
        off = (logits(loaded) - logits(model)).abs()
    # where few logits are off, a router chose between equals
    if float((off > 1e-4).float().mean()) > 0.5 or not torch.equal(*ends):
        raise ValueError("stock transformers loads another model than it has saved")
    AutoTokenizer.from_pretrained(BASE).save_pretrained(place)
    return type(model)


def batch(labels: bool = True) -> dict[str, Tensor]:
    ids = torch.randint(3, 40, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, **({"labels": ids} if labels else {})}


def load(place: Path, quantized: bool = True) -> Any:
    from transformers import AutoConfig, BitsAndBytesConfig

    from leanlift.plan.auto import auto_class

    kind = auto_class(AutoConfig.from_pretrained(place), str(place))
    form = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                              bnb_4bit_compute_dtype=torch.float32)  # fmt: skip
    return kind.from_pretrained(
        place, dtype=torch.float32, quantization_config=form if quantized else None
    )


def dense_twin(model: Any, place: Path) -> Any:
    """The stock model with the attached one's frozen weights, all of them dense."""
    twin = load(place, quantized=False)
    modules = named_parts(twin)
    for name, layer in lifted(model).named_modules():
        if isinstance(layer, FrozenLinear):
            weight = layer.weight_tiles.rows(0, layer.weight_tiles.shape[0]).float()
            own = matrix_of(modules[name])
            own.copy_(weight.view_as(own))
        elif type(layer) is torch.nn.Linear and name in modules:  # what its parent reads
            modules[name].weight.data.copy_(layer.weight)
    return twin


def check_step(model: Any, place: Path) -> tuple[float, float]:
    """Loss and gradients against the oracle: the largest differences, of the loss and, as a share
    of the largest entry of a matrix's gradient, of a gradient."""
    twin = dense_twin(model, place)
    torch.manual_seed(0)  # some hash at random
    expected = output_over_text(twin.train(), batch()).loss
    expected.backward()
    torch.manual_seed(0)
    loss = output_over_text(model.train(), batch()).loss
    loss.backward()
    worst, modules = 0.0, named_parts(twin)
    for name, layer in lift_layers(model).items():
        dense = modules[name].weight.grad
        dense = torch.zeros_like(modules[name].weight) if dense is None else dense
        dense = dense.T if is_turned_linear(modules[name]) else dense
        wanted = dense.reshape(-1)[layer.index.to_flat()]
        found = torch.zeros_like(wanted) if layer.values.grad is None else layer.values.grad
        size = float(dense.abs().max())
        worst = max(worst, float((wanted - found).abs().max()) / max(size, 1e-6))
        layer.values.grad = None
    return float((loss - expected).detach().abs()), worst


def trainer_for(model: Any, output: Path) -> Any:
    """A trainer for two steps."""
    from leanlift import LiftSFTConfig, LiftTrainer

    rows = [{"input_ids": ids, "labels": ids} for ids in batch()["input_ids"].tolist()]
    args = LiftSFTConfig(
        str(output), max_steps=2, per_device_train_batch_size=2, use_cpu=True, bf16=False,
        learning_rate=1e-2, report_to=[], save_strategy="steps", save_steps=1, save_total_limit=1,
        gradient_checkpointing=False,
        logging_steps=1, disable_tqdm=True, max_length=LENGTH,
    )  # fmt: skip
    return LiftTrainer(model=model, args=args, train_dataset=rows)


def next_token_loss(model: Any) -> tuple[float, float]:
    """The model's own loss, and the cost of the next tokens from its own logits: most are that."""
    with torch.no_grad():
        out = model.eval()(**batch())
    states, wanted = out.logits[:, :-1].float(), batch()["labels"][:, 1:]
    cost = torch.nn.functional.cross_entropy(states.flatten(0, 1), wanted.flatten())
    return float(out.loss), float(cost)


def planned_gib(base: Path, checkpointing: bool) -> float:
    """What a run of this configuration is said to need."""
    settings = PlanSettings(
        largest=Batch(rows=2, tokens=LENGTH), cuda=False, gradient_checkpointing=checkpointing
    )
    return plan_memory(base, LiftConfig(density=0.1, approx_rank=8), settings).peak / 2**30


def logits(model: Any) -> Tensor:
    torch.manual_seed(0)  # some hash at random
    with torch.no_grad():
        out: Tensor = model.eval()(**batch(labels=False)).logits
    return out


def one(family: str, whole: bool = False) -> dict[str, Any]:
    """What becomes of a family; see the module's docstring."""
    heard, logger = Heard(), logging.getLogger("leanlift")
    logger.addHandler(heard)
    try:
        row = {"family": family, "found": "FAILED", "stage": "model", "said": ""}
        row |= walked(family, whole)
    finally:
        logger.removeHandler(heard)
    if row["found"] == "ok":
        wrong = [key for key, most in BOUNDS.items() if not row[key] <= most]  # NaN is wrong too
        row["said"] = " ".join(dict.fromkeys(heard.lines))[:400]
        row["stage"] = ", ".join(wrong)
        row["found"] = "FAILED" if wrong else "note" if row["said"] else "ok"
    return row


def walked(family: str, whole: bool) -> dict[str, Any]:
    """The walk, and where it ends; "ok" where it goes to its end, whatever was measured."""
    row: dict[str, Any] = {"stage": "model"}
    reasons = NOT_OF_TEXT if whole else NOT_ALONE
    with tempfile.TemporaryDirectory() as place:
        base = Path(place) / "base"
        try:
            row["class"] = make(family, base, whole).__name__
            row["stage"] = "stock"
            stock = load(base)
        except Exception as error:
            known = isinstance(error, UserError) and family not in reasons
            said = str(error) if known else reasons.get(family, _first(error))
            return {**row, "found": "refused" if known else "no model", "said": said}
        try:
            walk(row, stock, base, Path(place))
            if whole:
                row["stage"] = "whole"
                off = check_whole(base, Path(place), load, logits)
                row["merge_off"] = max(row["merge_off"], off)
        except UserError as error:
            early = row["stage"] in ("attach", "trainer")
            return {**row, "found": "refused" if early else "FAILED", "said": str(error)[:400]}
        except Exception as error:
            traceback.print_exc()
            return {**row, "said": _first(error)}
    return {**row, "found": "ok"}


BOUNDS = {"loss_off": 1e-4, "gradient_off": 1e-3, "trained_loss_off": 2e-3, "reload_off": 1e-5,
          "merge_off": 1e-3}  # fmt: skip


def walk(row: dict[str, Any], stock: Any, base: Path, place: Path) -> None:
    """Everything that a user does with a model; what is measured goes into `row`."""
    output = place / "run"
    row["stage"] = "attach"
    model = get_lift_model(stock, LiftConfig(density=0.1, approx_rank=8), progress=False)
    row["targets"] = len(lift_layers(model))
    row["trained_share"] = round(weights_of(model)[0] / weights_of(model)[1], 4)
    row["stage"] = "trainer"
    trainer = trainer_for(model, output)
    row["stage"] = "step"
    row["loss_off"], row["gradient_off"] = check_step(model, base)
    row["stage"] = "train"
    own, expected = next_token_loss(model)
    trainer.train()
    row["trained_loss_off"] = abs(trainer.state.log_history[0]["loss"] - expected)
    if abs(own - expected) > 1e-3:
        row["own_loss"] = f"its own loss is another ({own:.4f}, next tokens {expected:.4f})"
    trainer.save_model()
    row["stage"] = "reload"
    again = load_adapter(load(base), output)
    row["reload_off"] = float((logits(again) - logits(model)).abs().max())
    row["stage"] = "merge"
    merge_adapter(output, place / "merged", onto="quantized", dtype="float32", progress=False)
    merged = load(place / "merged", quantized=False)
    row["merge_off"] = float((logits(merged) - logits(model)).abs().max())
    row["stage"] = "plan"
    try:
        row["plan_gib"] = round(planned_gib(base, model.supports_gradient_checkpointing), 4)
    except UserError as error:  # one sentence; a run goes on without a plan
        logging.getLogger("leanlift").warning("%s", error)


class Heard(logging.Handler):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _first(error: Exception) -> str:
    said = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {said[0]}"[:300]


# --- all of them ----------------------------------------------------------------------------

PROCESSES = multiprocessing.get_context("forkserver")
"""A process for each family that begins with everything imported."""
PRELOADED = ["benchmarks.families", "leanlift.training.trainer", "leanlift.demo.run",
             "transformers.models.auto.modeling_auto", "bitsandbytes"]  # fmt: skip


def _send(family: str, whole: bool, answer: Any) -> None:
    torch.set_num_threads(1)
    answer.send(one(family, whole))


def in_a_process(family: str, whole: bool = False) -> dict[str, Any]:
    ours, theirs = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_send, args=(family, whole, theirs), daemon=True)
    process.start()
    theirs.close()
    said = f"took more than {LIMIT} s"
    try:
        if ours.poll(LIMIT):
            found: dict[str, Any] = ours.recv()
            return found
    except EOFError:
        process.join(10)
        said = f"the process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()
    return {"family": family, "found": "FAILED", "stage": "process", "said": said}


COLUMNS = ("family", "class", "found", "stage", "targets", "trained_share", "loss_off",
           "gradient_off", "trained_loss_off", "reload_off", "merge_off", "plan_gib",
           "own_loss", "said")  # fmt: skip


def main() -> None:
    from transformers.models.auto import modeling_auto

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--others", action="store_true")
    args = parser.parse_args()
    PROCESSES.set_forkserver_preload(PRELOADED)
    table = "MULTIMODAL_LM" if args.others else "CAUSAL_LM"
    families = args.families or list(getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES"))
    name = "families_others.csv" if args.others else "families.csv"
    with ThreadPoolExecutor(args.jobs) as pool:
        for found in pool.map(partial(in_a_process, whole=args.others), families):
            print(
                *(str(found.get(key)) for key in ("family", "found", "stage", "said")), flush=True
            )
            put(found, RESULTS / name)


def put(found: dict[str, Any], path: Path) -> None:
    """Put a family's row into the results, in the place of its earlier one."""
    rows = {}
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            rows = {row["family"]: row for row in csv.DictReader(file)}
    new = {key: found.get(key, "") for key in COLUMNS}
    rows[found["family"]] = {**new, **environment()}
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[found["family"]]))
        writer.writeheader()
        writer.writerows(rows[family] for family in sorted(rows))


if __name__ == "__main__":
    main()
