"""Rows as they are in their file, and the examples that are made of them: no model, no tokenizer,
nothing heavy but `datasets` where a `Dataset` is asked for."""
