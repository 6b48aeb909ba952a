"""The paper's runs and PEFT's method comparison, for whoever has a GPU, the weights and the data.

    python -m benchmarks.quality --preset paper --suite math --model Llama-2-7b \\
        --data math_10k.json --tests tests/ --output runs/paper
    python -m benchmarks.quality --preset paper --suite metamath --model Llama-3.2-3B \\
        --data MetaMathQA-395K.json --tests gsm8k/ --text finewiki.jsonl

Everything is given by path, and nothing is downloaded; what is missing is said before anything
slow. What it will cost is counted from the shapes and the rows, and printed first. A run goes on
where it was stopped: what is trained is not trained again, what is measured is not measured again,
and what was killed in between goes on from its last checkpoint.

`suites` says what is run, `given` what the user gives, `rows` what becomes of it, `lift` and
`peers` how a `task` is trained and loaded, `cost` what that takes, `stages` what is done, `table`
what comes out.
"""

from benchmarks.quality.paper.given import Given
from benchmarks.quality.paper.run import paper
from benchmarks.quality.paper.suites import BASES, SUITES

__all__ = ["BASES", "SUITES", "Given", "paper"]
