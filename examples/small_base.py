"""Make a small base model from instruction rows, to try `leanlift train` without a download.

    python examples/small_base.py ROWS.json OUT [--steps 300]

Trains a byte-level BPE tokenizer on the rows' text and a Llama of a few million parameters on the
*questions* alone, so that fine-tuning on the answers has something to build on and something to
learn. Writes an ordinary bf16 checkpoint with its tokenizer. A few minutes on a CPU.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 2048


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the texts, with an end and a padding token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, help="JSON list with instruction, input, output")
    parser.add_argument("out", type=Path, help="directory for the checkpoint")
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    torch.manual_seed(0)

    rows = json.loads(options.rows.read_text(encoding="utf-8"))
    tokenizer = make_tokenizer([f"{row['instruction']}\n{row['output']}" for row in rows])
    stream: list[int] = []
    for row in rows:
        stream += [*tokenizer(row["instruction"])["input_ids"], tokenizer.eos_token_id]
    data = torch.tensor(stream)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=options.steps)
    bar = trange(options.steps, desc="Pretraining on the questions")
    for _ in bar:
        starts = torch.randint(0, len(data) - 128, (16,))
        batch = torch.stack([data[start : start + 128] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"Wrote {options.out}: {sum(p.numel() for p in model.parameters()):,} parameters.")


if __name__ == "__main__":
    main()
