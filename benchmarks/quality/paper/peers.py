"""LoRA and full fine-tuning, by TRL's SFTTrainer over the same rows with the same loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState
from trl import SFTTrainer

from benchmarks.quality.paper.cost import Shapes
from benchmarks.quality.paper.pace import Pace
from benchmarks.quality.paper.task import Facts, Task, device, load_base, peaks
from leanlift.data.dataset import load_rows, to_examples
from leanlift.data.tokenizer import load_tokenizer
from leanlift.errors import OutOfMemoryError, UserError, first_line
from leanlift.measure import MemoryMeter, is_out_of_memory
from leanlift.training import LiftSFTConfig


@dataclass(frozen=True)
class Lora:
    """PEFT's LoRA; over a quantized base it is QLoRA. Adapters are in fp32, as PEFT has them by
    itself: TRL would have those over a quantized base in bf16.

    Attributes:
        kind: see `Method`.
        targets: last names of the Linears.
        rank: None: as many parameters as the suite's budget.
        alpha: None: twice the rank.
        scaled: rank-stabilized.
        autocast: whether the base computes under bf16 autocast, as the suite's loop has it.
    """

    kind: str
    targets: tuple[str, ...] | list[str]
    rank: int | None = None
    alpha: int | None = None
    scaled: bool = False
    autocast: bool = True

    def _config(self, task: Task) -> LoraConfig:
        rank = self.rank or task.mask["rank_budget"]
        return LoraConfig(
            r=rank,
            lora_alpha=self.alpha or 2 * rank,
            lora_dropout=0.0,
            use_rslora=self.scaled,
            target_modules=list(self.targets),
            task_type="CAUSAL_LM",
        )

    def _loop(self) -> dict[str, Any]:
        return {} if self.autocast else {"bf16": False}

    def settings(self, task: Task) -> dict[str, Any]:
        config = self._config(task)
        own = {"rank": config.r, "alpha": config.lora_alpha, "rslora": self.scaled}
        return {
            "kind": self.kind, "targets": list(self.targets), **own, **task.settings(self._loop())
        }  # fmt: skip

    def train(self, task: Task) -> Facts:
        return _train_peer(task, self.kind, self._loop(), self._config(task))

    def load(self, task: Task) -> Any:
        return PeftModel.from_pretrained(load_base(task.model, self.kind), str(task.run))

    def operations(self, task: Task, shapes: Shapes) -> int:
        again = task.settings({}).get("gradient_checkpointing", True)
        rank = self.rank or task.mask["rank_budget"]
        each = 2 * rank * sum(m + n for m, n in shapes.of_targets(self.targets))
        return shapes.passes(task.rows, again) + (3 + again) * each * task.rows.tokens

    def needs(self, shapes: Shapes) -> int:
        return 0


@dataclass(frozen=True)
class Full:
    """Every weight, in the base's dtype, moments too.

    Attributes:
        loop: fields of LiftSFTConfig that differ from the suite's.
        autocast: see `Lora`.
    """

    loop: Mapping[str, Any] = field(default_factory=dict)
    autocast: bool = True
    kind: str = "16bit"

    def _loop(self) -> dict[str, Any]:
        return {**self.loop, **({} if self.autocast else {"bf16": False})}

    def settings(self, task: Task) -> dict[str, Any]:
        return {"kind": self.kind, **task.settings(self._loop())}

    def train(self, task: Task) -> Facts:
        return _train_peer(task, self.kind, self._loop(), None)

    def load(self, task: Task) -> Any:
        return load_base(str(task.run), self.kind)

    def operations(self, task: Task, shapes: Shapes) -> int:
        again = task.settings({}).get("gradient_checkpointing", True)
        matrices = shapes.head + sum(m * n for _, m, n in shapes.linears)
        return shapes.passes(task.rows, again) + 2 * task.rows.tokens * matrices

    def needs(self, shapes: Shapes) -> int:
        return 4 * 2 * shapes.parameters  # weights, gradients and two moments in 16 bits


# --- training ------------------------------------------------------------------------------


class _Paced(TrainerCallback):
    """Tells the pace of each step."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pace.at(state.global_step, state.max_steps)


def _train_peer(task: Task, kind: str, loop: Mapping[str, Any], lora: LoraConfig | None) -> Facts:
    """Train with TRL's trainer, from its last checkpoint if there is one.

    Raises:
        OutOfMemoryError: the device is too small.
    """
    meter, pace = MemoryMeter(device()), task.pace()
    sft = LiftSFTConfig(output_dir=str(task.run), **task.settings(loop))
    with in_a_sentence(), meter.phase("load"):
        model = load_base(task.model, kind)
        tokenizer = load_tokenizer(task.model)
        chat = getattr(tokenizer, "chat_template", None) is not None
        trainer = SFTTrainer(
            model=model,
            args=sft,
            train_dataset=to_examples(load_rows(str(task.data)), chat),
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=[_Paced(pace)],
        )
        trained = [each for each in trainer.model.parameters() if each.requires_grad]
        if lora is not None:
            for parameter in trained:
                parameter.data = parameter.data.float()
    with in_a_sentence(), meter.phase("train"):
        trainer.train(resume_from_checkpoint=last_peer_checkpoint(task.run))
    trainer.save_model()
    return {**pace.facts(), **peaks(meter.report), "trained": sum(each.numel() for each in trained)}


def last_peer_checkpoint(directory: Path) -> str | None:
    """The last checkpoint of HF Trainer that is whole: its state is what it writes last."""
    found = [path for path in directory.glob("checkpoint-*") if _is_whole(path)]
    return str(max(found, key=lambda path: int(path.name.rpartition("-")[2]))) if found else None


def _is_whole(checkpoint: Path) -> bool:
    try:
        TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    except (OSError, ValueError, TypeError):
        return False
    return checkpoint.name.rpartition("-")[2].isdecimal()


@contextmanager
def in_a_sentence() -> Iterator[None]:
    """Memory that ran out, as leanlift's own runs say it."""
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(f"out of memory: {first_line(error)}") from error
