"""Train the demo's base model from scratch and save it as an ordinary 16-bit checkpoint.

Run ``python -m leanlift.demo.make_base OUT`` or run this file itself. The result is a tiny Llama
that knows the source skills of `skills.py`, with a character-level tokenizer beside it.
"""

from __future__ import annotations

import argparse
import random
import string
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

if TYPE_CHECKING or __package__:
    from leanlift.demo.skills import MAX_LENGTH, SOURCE_SKILLS, Row, make_rows, rows
else:  # run as a plain file, with its own folder first on the import path
    from skills import MAX_LENGTH, SOURCE_SKILLS, Row, make_rows, rows

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
CHARACTERS = string.ascii_lowercase + string.digits + " :=->,."
IGNORED = -100  # the label that the loss leaves out
HELDOUT_ROWS = 500


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per character; it adds nothing to the text by itself."""
    vocab = {token: index for index, token in enumerate([PAD, EOS, UNK, *CHARACTERS])}
    core = Tokenizer(BPE(vocab=vocab, merges=[], unk_token=UNK))
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build the untrained model; every in_features is a multiple of 64, the NF4 block size."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=2 * MAX_LENGTH,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def collate(batch: list[Row], tokenizer: PreTrainedTokenizerFast) -> dict[str, torch.Tensor]:
    """Turn rows into one batch whose labels cover only the completions and the end token.

    The padding stands to the right, where causal attention never looks back at it.
    """
    prompts = tokenizer([row["prompt"] for row in batch])["input_ids"]
    answers = tokenizer([row["completion"] + EOS for row in batch])["input_ids"]
    width = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    input_ids = torch.full((len(batch), width), tokenizer.pad_token_id)
    labels = torch.full((len(batch), width), IGNORED)
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        input_ids[index, :end] = torch.tensor(prompt + answer)
        labels[index, len(prompt) : end] = torch.tensor(answer)
    return {"input_ids": input_ids, "labels": labels}


def mixed_batches(size: int, seed: int) -> Iterator[list[Row]]:
    """Draw fresh training rows of all source skills in equal shares, without end."""
    rng = random.Random(seed)
    sources = [rows(skill, split="train", seed=seed) for skill in SOURCE_SKILLS]
    while True:
        yield [next(rng.choice(sources)) for _ in range(size)]


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
) -> None:
    """Train every weight in float32 with AdamW, a short warm-up and a cosine schedule."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    batches = mixed_batches(batch_size, seed)
    model.train()
    with tqdm(range(steps), desc="training", unit="step") as bar:
        for _ in bar:
            loss = model(**collate(next(batches), tokenizer)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.4f}")
    model.eval()


@torch.no_grad()
def exact_match(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, test: list[Row]
) -> float:
    """Return the share of rows that greedy generation completes exactly."""
    inputs = tokenizer([row["prompt"] for row in test], padding=True, return_tensors="pt")
    start = inputs["input_ids"].shape[1]
    output = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False
    )
    answers = tokenizer.batch_decode(output[:, start:], skip_special_tokens=True)
    pairs = zip(answers, test, strict=True)
    return sum(answer == row["completion"] for answer, row in pairs) / len(test)


def main(argv: list[str] | None = None) -> None:
    """Train, save in bfloat16, load what was saved and print how much of each skill it knows."""
    parser = argparse.ArgumentParser(description="Train the demo's base model from scratch.")
    parser.add_argument("out", type=Path, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    train(
        model,
        tokenizer,
        steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
    )
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)

    saved = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    saved_tokenizer = AutoTokenizer.from_pretrained(args.out)
    for skill in SOURCE_SKILLS:
        test = make_rows(skill, HELDOUT_ROWS, split="heldout")
        print(f"{skill}: {exact_match(saved, saved_tokenizer, test):.1%} of {len(test)} held-out")


if __name__ == "__main__":
    main()
