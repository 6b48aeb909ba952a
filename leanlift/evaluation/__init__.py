"""What a model answers: loss and greedy match on rows; a merged checkpoint against its parts."""

from leanlift.evaluation.evaluate import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
