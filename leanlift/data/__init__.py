"""From rows to tokens: tokenizers, chat templates, lengths, datasets that are ready for a trainer.

What a row may look like is `leanlift.rows`', which knows no tokenizer.
"""
