"""The plumbing of the quality benchmark, on a model that learns nothing."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

from benchmarks.quality.__main__ import run
from benchmarks.quality.base import load, pretrained
from benchmarks.quality.change import change
from benchmarks.quality.domain import IGNORED, Rows
from benchmarks.quality.loop import held_bytes
from benchmarks.quality.methods import Method, lift, lora
from benchmarks.quality.presets import TINY, methods
from benchmarks.quality.residual import onto_original
from benchmarks.quality.run import Results, Runner, best_lr, final_rows
from benchmarks.quality.score import score
from benchmarks.quality.shared import Work, run_jobs
from benchmarks.quality.skills import SOURCE, TARGET, make_rows, skills, split_of
from benchmarks.quality.table import _kept_at, update_readme
from benchmarks.quality.text import text
from leanlift.model import lift_layers

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings(
        "ignore:Sparse invariant checks"
    ),  # PEFT SHiRA forms a sparse tensor
]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def domain():
    return skills(TINY.train_rows, TINY.test_rows, TINY.pretraining_batch)


@pytest.fixture(scope="module")
def base(domain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained(domain, TINY.size, tmp_path_factory.mktemp("quality"), CPU)


def test_the_skills_are_what_they_say() -> None:
    assert [rule("abzde") for _, rule in (SOURCE[n] for n in ("Copy", "Reverse", "Turn"))] == [
        "abzde",
        "edzba",
        "bzdea",
    ]
    assert SOURCE["Next"][1]("abz") == "bca"
    assert [SOURCE["Add"][1](text) for text in ("0129", "0999", "9999")] == ["0130", "1000", "0000"]
    assert SOURCE["Mirror"][1]("0129") == "9870"
    assert TARGET["Shift"][1]("abz") == "acb"
    assert [TARGET["Difference"][1](text) for text in ("0101", "0001")] == ["0099", "9999"]
    assert TARGET["Wrap"][1]("abcde") == "badce"
    assert len({name[0] for name in (*SOURCE, *TARGET)}) == len(SOURCE) + len(TARGET)
    assert {split_of(str(i)) for i in range(100)} == {"train", "valid", "test"}


def test_rows_train_the_completions_alone() -> None:
    rows = Rows.of([([5, 6], [7, 1]), ([5], [7, 8, 9, 1])])
    assert rows.ids.tolist() == [[5, 6, 7, 1, 0], [5, 7, 8, 9, 1]]
    assert rows.labels[0].tolist() == [IGNORED, IGNORED, 7, 1, IGNORED]
    assert rows.batch(torch.tensor([0]))["input_ids"].shape == (1, 4)


@pytest.mark.thorough
def test_one_pass_tells_what_generation_would(domain, base: Path) -> None:
    """Rows whose reference is what the model generates are all right, and changed ones are not."""
    model = load(base, "dense", CPU).eval()
    prompts = [prompt for prompt, _ in make_rows("Copy", SOURCE["Copy"], 12, "test")]
    pairs = []
    for prompt in prompts:
        made = model.generate(
            torch.tensor([prompt]), max_new_tokens=4, do_sample=False, eos_token_id=None
        )
        pairs.append((prompt, made[0, len(prompt) :].tolist()))
    assert score(model, Rows.of(pairs)).exact == 1.0
    other = [(p, [*c[:-1], (c[-1] + 1) % 100]) for p, c in pairs[:6]]
    assert score(model, Rows.of([*other, *pairs[6:]])).exact == 0.5


@pytest.mark.thorough
def test_the_whole_table_is_made_once_and_shown(
    tmp_path: Path, domain, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = Results(tmp_path / "results.csv")
    preset = replace(TINY, seeds=1)
    monkeypatch.setattr("benchmarks.quality.run.EXTENSIONS", 0)
    run(domain, preset, list(methods(preset)), base, results, Work())
    rows = results.rows()
    assert {row["method"] for row in rows} == {method.name for method in methods(preset)}
    for row in rows:
        assert float(row["end_test_loss"]) > 0
        assert int(row["trained"]) > 0
        assert float(row["peak_mib"]) > 0
        assert 0 < float(row["change"]) < float("inf")
        assert float(row["rank"]) >= 1
    run(domain, preset, list(methods(preset)), base, results, Work())
    assert len(results.rows()) == len(rows)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- tiny -->\nold\n<!-- /tiny -->\nafter\n")
    update_readme("tiny", rows, readme, tmp_path)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert all(method.name in text for method in methods(preset))
    assert (tmp_path / "tiny_skills_headline.png").is_file()


@pytest.mark.thorough
def test_a_sweep_goes_on_where_the_best_is_at_an_end(
    domain, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method that is better the nearer its learning rate is to 1e-4."""
    results = Results(tmp_path / "results.csv")
    runner = Runner(domain, base, TINY.schedule, 2, results, CPU, lambda line: None)

    def pretend(method: Method, lr: float, seed: int) -> None:
        if results.find("skills", method.name, lr, seed) is None:
            far = abs(torch.log10(torch.tensor(lr / 1e-4)).item())
            results.add(
                {"domain": "skills", "method": method.name, "lr": f"{lr:.2e}", "seed": seed,
                 "end_valid_exact": 0.0, "end_valid_loss": far}
            )  # fmt: skip

    monkeypatch.setattr(runner, "_run", pretend)
    runner.method(Method("any", "headline", lora("dense", 1), lrs=(1e-3, 1e-2)))
    assert [(row["lr"], row["seed"]) for row in results.rows()] == [
        ("1.00e-03", "0"),
        ("1.00e-02", "0"),
        ("3.16e-04", "0"),
        ("1.00e-04", "0"),
        ("3.16e-05", "0"),
        ("1.00e-04", "1"),
    ]


def test_a_piece_of_work_is_done_by_one_process(tmp_path: Path) -> None:
    one, other = Work(tmp_path), Work(tmp_path)
    assert one.claim("QLoRA, 1/2")
    assert not other.claim("QLoRA, 1/2")
    one.finish("QLoRA, 1/2")
    other.wait(["QLoRA, 1/2"])
    assert all(Work().claim("alone") for _ in range(2))
    with pytest.raises(SystemExit, match="1"):
        run_jobs(2, "no_such_module_of_anybody", [])


@pytest.mark.thorough
def test_how_large_a_change_is(domain, base: Path) -> None:
    model = lift("nf4", 2, approx_rank=2)(base, domain, 0, CPU).model
    layers = lift_layers(model)
    for layer in layers.values():
        flat = torch.arange(layer.index.count) * 5  # somewhere, in several rows
        layer.change_mask(flat)
        layer.values.data.copy_(torch.randn(layer.index.count))
    got = change(model, {})
    sizes, ranks = [], []
    for layer in layers.values():
        m, n = layer.out_features, layer.in_features
        delta = torch.zeros(m * n).index_add(0, layer.index.to_flat(), layer.values.detach())
        weight = layer.weight_tiles.rows(0, m).double()
        values = torch.linalg.svdvals(delta.view(m, n).double())
        sizes.append(float(values[0] / torch.linalg.svdvals(weight)[0]))
        ranks.append(float((values**2).sum() / values[0] ** 2))
    assert got["change"] == pytest.approx(sum(sizes) / len(sizes), rel=1e-3)
    assert got["rank"] == pytest.approx(sum(ranks) / len(ranks), rel=1e-2)


def test_what_is_kept_is_compared_where_as_much_is_learned() -> None:
    points = [(1e-3, 0.2, 0.9), (1e-2, 0.8, 0.3), (1e-1, 0.7, 0.0)]
    rows = [
        {"lr": str(lr), "end_test_exact": str(exact), "end_kept_exact": str(kept)}
        for lr, exact, kept in points
    ]
    assert _kept_at(rows, 0.5) == pytest.approx(0.6)
    assert _kept_at(rows, 0.9) is None
    rows = [{"lr": lr, "end_test_loss": lr * -100 + 2, "end_kept_loss": lr} for lr in (1e-3, 1e-2)]
    assert _kept_at(rows, 1.45, "loss") == pytest.approx(5.5e-3)


def test_the_reported_rate_is_the_best_in_the_mean_over_seeds() -> None:
    found = {("1.00e-02", 0): 0.9, ("1.00e-02", 1): 0.3, ("5.62e-03", 0): 0.8, ("5.62e-03", 1): 0.7,
             ("3.16e-02", 0): 1.0}  # fmt: skip
    rows = [
        {"lr": lr, "seed": str(seed), "end_valid_exact": exact, "end_valid_loss": 1.0}
        for (lr, seed), exact in found.items()
    ]
    assert {row["lr"] for row in final_rows(rows)} == {"5.62e-03"}
    assert best_lr(rows) == 10**-1.5
    assert best_lr([row for row in rows if row["lr"] == "1.00e-02" or row["seed"] == "1"]) == 1e-2


@pytest.mark.parametrize("start", ["residual", "taken out"])
def test_exact_starts_make_the_selected_weights_exact(domain, base: Path, start: str) -> None:
    prepared = lift("nf4", 2, approx_rank=2, start=start)(base, domain, 0, CPU)
    dense = load(base, "dense", CPU)
    for name, layer in lift_layers(prepared.model).items():
        flat = layer.index.to_flat()
        got = layer.effective.rows(0, layer.out_features).flatten()[flat]
        wanted = dense.get_submodule(name).weight.detach().flatten()[flat]
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
    untrained = onto_original(prepared.model, base, prepared.start, CPU)
    for a, b in zip(untrained.parameters(), dense.parameters(), strict=True):
        assert torch.equal(a, b)


def test_peft_over_nf4_computes_as_over_the_dequantized_base(domain, base: Path) -> None:
    """In the mode that the benchmark measures in, before and after a pass without gradients."""
    ours = lift("nf4", 2, approx_rank=2)(base, domain, 0, CPU).model
    theirs = lora("nf4", 2)(base, domain, 0, CPU).model.train()
    for _ in range(2):
        a, b = score(ours, domain.test), score(theirs, domain.test)
        assert abs(a.loss - b.loss) < 1e-5


def test_a_quantized_base_holds_fewer_bytes(domain, base: Path) -> None:
    dense, nf4 = (lora(kind, 2)(base, domain, 0, CPU).model for kind in ("dense", "nf4"))
    assert held_bytes(nf4) < held_bytes(dense)


@pytest.mark.thorough
def test_real_text_is_judged_by_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    for name in ("questions", "sums"):
        rows = []
        for _ in range(60):
            a, b = rng.randrange(100), rng.randrange(100)
            rows.append({"instruction": f"{a} and {b}?", "input": "", "output": f"It is {a + b}."})
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    source, data = tmp_path / "questions.json", tmp_path / "sums.json"
    domain = text(source, data, vocabulary=300, longest=64, batch=8, test=6, generated=3,
                  new_tokens=2)  # fmt: skip
    assert len(domain.train) == 48
    base = pretrained(domain, TINY.size, tmp_path, CPU)
    results = Results(tmp_path / "results.csv")
    runner = Runner(domain, base, TINY.schedule, 1, results, CPU)
    monkeypatch.setattr("benchmarks.quality.run.EXTENSIONS", 0)
    runner.method(Method("any", "headline", lora("nf4", 1), lrs=(1e-3, 1e-2)))
    (first, second) = results.rows()
    assert all(0 <= float(row["answers"]) <= 1 for row in (first, second))
    better = min(first, second, key=lambda row: float(row["end_valid_loss"]))
    assert best_lr([first, second]) == float(better["lr"])
    (tmp_path / "README.md").write_text("")
    update_readme("tiny", results.rows(), tmp_path / "README.md", tmp_path)
    assert "target loss / source loss" in (tmp_path / "README.md").read_text()
