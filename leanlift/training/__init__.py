"""Training with TRL and HF Trainer: data formats, the trainer, its callbacks."""

from leanlift.training.data import load_rows, to_examples
from leanlift.training.trainer import LiftTrainer, last_whole_checkpoint

__all__ = ["LiftTrainer", "last_whole_checkpoint", "load_rows", "to_examples"]
