"""What `leanlift train --log_format json` writes."""

from __future__ import annotations

EVENTS = {
    "phase": {"what", "state", "took"},
    "progress": {"what", "done", "total", "seconds_left"},
    "first_row": {"parts", "tokens", "trained"},
    "header": {
        "model", "entries", "weights", "matrices", "rows", "tokens", "longest", "steps", "begun",
        "epochs", "batch", "accumulate", "planned", "room", "place",
    },
    "step": {
        "step", "steps", "epoch", "loss", "learning_rate", "tokens_per_second", "seconds_left",
        "memory",
    },
    "refresh": {"step", "churn", "retired", "held_back", "following", "took"},
    "evaluation": {"step", "loss", "took"},
    "note": {"text"},
    "stopped": {"step", "steps", "checkpoint", "command"},
    "summary": {
        "steps", "begun", "in_all", "tokens", "first_loss", "last_loss", "before", "after",
        "eval_rows", "memory", "refreshes", "refresh_seconds", "churn", "places", "commands",
        "kept", "took",
    },
}  # fmt: skip
"""The keys of each event beside `event` and `seconds`: programs read them, so a new one is a
reviewed change."""
INSIDE = {
    "memory": {"now", "peak", "planned", "process"},
    "places": {"what", "path", "nbytes"},
    "kept": {"name", "rows", "tokens", "before", "after", "change", "error"},
    "parts": {"text", "trained"},
}
