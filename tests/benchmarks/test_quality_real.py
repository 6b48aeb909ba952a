"""The comparison on real weights: what it measures, what it compares, and how it goes on."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import config_of
from tiny import make_checkpoint, make_checkpoint_of

pytest.importorskip("peft")

from benchmarks.quality.real import candidates, main, plan
from benchmarks.quality.real.base import Base, open_base
from benchmarks.quality.real.compare import Bootstrap, Curve, Measured, forgotten, learned
from benchmarks.quality.real.measure import losses, token_nats
from benchmarks.quality.real.methods import Setting, as_batch, leanlift
from benchmarks.quality.real.plan import NF4, PRINCIPAL, Job, Preset
from benchmarks.quality.real.probes import KINDS, probes
from benchmarks.quality.real.run import Runner
from benchmarks.quality.real.steps import Schedule, order
from benchmarks.quality.real.store import Store, key_of
from benchmarks.quality.real.table import SETS, Results, tables
from benchmarks.quality.real.texts import Lengths, TokenRow, texts
from leanlift.model import lift_layers

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),
    pytest.mark.filterwarnings("ignore:.*save_precomputed_indices"),
]
CPU = torch.device("cpu")
TINY = Preset(
    Lengths(longest=192, valid=2, test=3, source=3, probes=1),
    Schedule(steps=2, batch=2),
    densities=(0.05,),
    seeds=2,
    resamples=50,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    directory = make_checkpoint(tmp_path_factory.mktemp("real") / "tiny")
    return open_base(directory, directory, CPU)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    rows = [{"instruction": f"{n}+{n}", "output": f"\nA: It is {n + n}."} for n in range(40)]
    path.write_text(json.dumps(rows))
    return path


def test_probes_ask_what_has_one_answer() -> None:
    made = probes(4)
    assert len(made) == len(set(made)) == 4 * len(KINDS)
    assert made == probes(4)
    assert ("capital", "France", "Paris") in [(k, w, a) for k in KINDS for w, a in KINDS[k].items()]
    for prompt, answer in made:
        shown = [line.split(": ") for line in prompt.split("\n")[:-1]]
        facts = next(facts for facts in KINDS.values() if dict(shown).items() <= facts.items()
                     and facts.get(prompt.split("\n")[-1][:-1]) == answer[1:])  # fmt: skip
        assert prompt.split("\n")[-1][:-1] not in dict(shown)
        assert len(facts) >= 4


def test_rows_are_held_out_and_the_same_each_time(base: Base, data: Path) -> None:
    one, two = (texts(base.tokenizer, data, TINY.lengths) for _ in range(2))
    assert one == two
    assert {len(one.asked[name]) for name in ("test", "prose", "code", "chat")} == {3}
    asked = [row.ids for name in ("valid", "test") for row in one.asked[name]]
    assert not [row for row in one.train if row.ids in asked]
    ends = [base.tokenizer.decode(row.ids[row.start :]) for row in one.train]
    assert all("It is" in text and "A:" not in text for text in ends)
    with pytest.raises(SystemExit, match="has 40 rows of at most 192 tokens; expected at"):
        texts(base.tokenizer, data, replace(TINY.lengths, test=98))


def test_losses_are_those_of_the_model_itself(base: Base) -> None:
    rows = [TokenRow([5, 6, 7, 8, 9, 10], 2), TokenRow([11, 12, 13], 1), TokenRow([4, 4, 4, 4], 3)]
    model = base.load("32")
    found = losses(model, rows, base)
    with base.autocast():
        wanted = [float(model(**as_batch([row], base)).loss.detach()) * row.counted for row in rows]
    assert found.nats == pytest.approx(wanted, rel=2e-2 if base.dtype == torch.bfloat16 else 1e-5)
    nats, _, row = token_nats(model, rows, base)
    assert row.tolist() == [0, 0, 0, 0, 1, 1, 2]
    assert len(nats) == 7


def test_each_seed_has_one_order_and_repeats_no_row_before_all_have_come() -> None:
    schedule = Schedule(steps=5, batch=4)
    assert order(10, schedule, 1) == order(10, schedule, 1) != order(10, schedule, 2)
    flat = [at for batch in order(10, schedule, 1) for at in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))


def test_a_bootstrap_gives_the_error_of_a_mean_and_pairs_rows() -> None:
    torch.manual_seed(0)
    n = 400
    hard = torch.randn(n, dtype=torch.float64) * 5
    tokens = {name: torch.ones(n, dtype=torch.float64) for name in SETS}
    noise = torch.randn(n, dtype=torch.float64) * 0.1
    a, b = ({name: x.unsqueeze(0) for name in tokens} for x in (hard + 1 + noise, hard))
    bootstrap = Bootstrap(tokens, 2000)
    zero = {name: torch.zeros(n, dtype=torch.float64) for name in tokens}
    one, other = (bootstrap.measure(Curve((1.0,), of, 0), zero) for of in (a, b))
    apart = learned(one, other)
    assert apart.value == pytest.approx(1 + float(noise.mean()), abs=1e-9)
    assert apart.error == pytest.approx(float(noise.std()) / math.sqrt(n), rel=0.1)
    assert apart.sure
    assert one.target[1:].std() == pytest.approx(float(hard.std()) / math.sqrt(n), rel=0.1)


def test_longer_rows_count_for_more() -> None:
    tokens = {name: torch.tensor([1.0, 3.0]).double() for name in SETS}
    mean = Bootstrap(tokens, 5).mean("test", torch.tensor([2.0, 3.0]).double())
    assert mean[0] == 5 / 4


def test_what_is_kept_is_compared_where_as_much_is_learned() -> None:
    def measured(target: list[float], rise: list[float]) -> Measured:
        rows = torch.tensor([target] * 3).double(), torch.tensor([rise] * 3).double()
        return Measured(*rows, torch.full((3,), 2.0).double(), len(target) - 1)

    # The level is 1.0, the best of the second; the first is there halfway from 1.5 to 0.5.
    one, other = measured([1.5, 0.5], [0.1, 0.3]), measured([1.6, 1.0], [0.0, 0.5])
    assert forgotten(one, other).value == pytest.approx(0.2 - 0.5)
    assert forgotten(other, one).value == pytest.approx(0.5 - 0.2)
    # On the way from the base, at a loss of 2, to its first learning rate.
    assert measured([1.0], [0.4]).increase_at(torch.full((3,), 1.5).double())[0] == pytest.approx(
        0.2
    )
    # Where the curve turns back before its best, the first time counts.
    back = measured([1.0, 1.7, 0.9], [0.2, 0.6, 0.8])
    assert back.increase_at(torch.full((3,), 1.5).double())[0] == pytest.approx(0.1)


def test_a_base_with_stacks_of_experts_is_refused(tmp_path: Path) -> None:
    path = make_checkpoint_of(config_of("qwen3, experts", vocab_size=128), tmp_path / "experts")
    with pytest.raises(SystemExit, match="has stacks of experts"):
        open_base(path, tmp_path, CPU)


def _masks(base: Base, choose: candidates.ChooseAll, data: Path) -> tuple[dict, Setting, object]:
    rows = texts(base.tokenizer, data, TINY.lengths).train
    setting = Setting(base, 2, 0, [rows[:2], rows[2:4]])
    model = base.load("nf4")
    live = candidates.stock_base(model, list(base.shapes))
    return choose(setting, live), setting, live


def test_candidates_choose_what_they_say(base: Base, data: Path) -> None:
    found = {
        name: _masks(base, choose, data)
        for name, choose in {
            "principal": candidates.each(candidates.principal),
            "product": candidates.each(candidates.times_gradient),
            "off": candidates.off_principal,
            "rows": candidates.rows,
            "budgets": candidates.by_gradient,
        }.items()
    }
    masks = {name: mask for name, (mask, _, _) in found.items()}
    _, setting, live = found["principal"]
    squares = candidates.squares(setting)
    for name, (m, n) in base.shapes.items():
        count = setting.r * (m + n)
        weight = live.weights[name].rows(0, m).float()
        low = candidates.Principal(candidates.RANK).prepare(live.weights[name], count, 2**20)
        scores = low.scores(0, m).view(-1)
        product = scores * squares[name].sqrt().view(-1)
        for wanted, mask in ((scores, masks["principal"]), (product, masks["product"])):
            assert torch.equal(
                wanted[mask[name]].sort().values, wanted.topk(count).values.sort()[0]
            )
        bound = weight.abs().view(-1).topk(count).values.min()
        assert bool((weight.abs().view(-1)[masks["off"][name]] <= bound).all())
        assert len(masks["off"][name]) == count
        per_row = torch.bincount(masks["rows"][name] // n, minlength=m)
        assert set(per_row.tolist()) <= {0, n}
        assert 0 <= count - len(masks["rows"][name]) < n or len(masks["rows"][name]) == n
    total = sum(setting.r * (m + n) for m, n in base.shapes.values())
    spent = sum(map(len, masks["budgets"].values()))
    assert total - len(base.shapes) <= spent <= total
    norms = {name: float(square.mean().sqrt()) for name, square in squares.items()}
    size = {name: math.prod(shape) * norms[name] for name, shape in base.shapes.items()}
    counts = {name: len(mask) for name, mask in masks["budgets"].items()}
    full = [n for n in counts if counts[n] == int(candidates.MOST * math.prod(base.shapes[n]))]
    left = total - sum(counts[name] for name in full)
    share = left / sum(size[name] for name in counts if name not in full)
    for name in counts.keys() - set(full):
        assert abs(counts[name] - share * size[name]) <= 1


def test_squares_are_those_of_autograd(base: Base, data: Path) -> None:
    rows = texts(base.tokenizer, data, TINY.lengths).train
    setting = Setting(base, 2, 0, [rows[:2], rows[2:4]])
    found = candidates.squares(setting)
    model, live = base.load("32"), candidates.stock_base(base.load("nf4"), list(base.shapes))
    wanted = {}
    for name in base.shapes:  # the same base, its weights as numbers
        parameter = model.get_submodule(name).weight
        parameter.data = live.weights[name].rows(0, len(parameter)).float()
        wanted[name] = torch.zeros_like(parameter)
    for batch in setting.calibration:
        model.zero_grad()
        with base.autocast():
            model(**as_batch(batch, base), use_cache=False).loss.backward()
        for name in wanted:
            wanted[name] += model.get_submodule(name).weight.grad.float() ** 2
    for name, square in found.items():
        apart = (square.sqrt() - wanted[name].sqrt()).norm() / wanted[name].sqrt().norm()
        assert apart < (0.05 if base.dtype == torch.bfloat16 else 1e-4), name


def test_learning_rates_follow_the_scale_of_a_matrix(base: Base, data: Path) -> None:
    rows = texts(base.tokenizer, data, TINY.lengths).train
    build = candidates.chosen(candidates.each(candidates.principal), scaled=True)
    prepared = build(Setting(base, 2, 0, [rows[:2]]))
    layers = lift_layers(prepared.model)
    assert set(prepared.lr_factors) == {f"{name}.values" for name in layers}
    assert set(prepared.lr_factors) <= {name for name, _ in prepared.model.named_parameters()}
    logs = [math.log(factor) for factor in prepared.lr_factors.values()]
    assert sum(logs) == pytest.approx(0, abs=1e-6)
    assert max(logs) > min(logs)


def _methods(*names: str) -> Preset:
    return replace(TINY, only=names)


def test_a_sweep_goes_on_at_its_ends_and_seeds_follow(
    base: Base, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method whose loss is least at 1.78e-4, and that of one which cannot be run."""
    store = Store(tmp_path / "results.csv")
    runner = Runner(base, texts(base.tokenizer, data, TINY.lengths), TINY, store, lambda _: None)
    asked = runner._ask(base.load("32"))

    def pretend(job: Job, step: int, seed: int) -> None:
        key = runner.key(job, step, seed)
        if store.find(key) is None:
            valid = "" if job.method.name == "none" else abs(step + 15)
            store.add(key, {"group": "headline", "valid": valid}, asked)

    monkeypatch.setattr(runner, "run", pretend)
    method = next(plan.methods())
    runner.job(Job(replace(method, name="any"), 0.05, (-6, -5), 2, True))
    runner.job(Job(replace(method, name="none"), 0.05, (-6, -5), 2, True))
    made = [(row["method"], row["lr"], row["seed"]) for row in store.runs()]
    half = ["1.00e-03", "3.16e-03", "3.16e-04", "1.00e-04", "3.16e-05"]
    assert made == [
        *(("any", lr, "0") for lr in [*half, "5.62e-05", "1.78e-04"]),
        ("any", "1.78e-04", "1"),
        *(("none", lr, "0") for lr in half[:2]),
    ]


def test_one_method_from_a_run_to_its_line(base: Base, data: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "results.csv")
    runner = Runner(base, texts(base.tokenizer, data, TINY.lengths), TINY, store, lambda _: None)
    runner.bases()
    method = replace(next(plan.methods()), build=leanlift(NF4, approx_rank=2))
    job = Job(method, 0.05, method.lrs, 1)
    for step in (-12, -10, -8):
        runner.run(job, step, 0)
    before = store.path.read_bytes(), store.rows_path.read_bytes()
    runner.bases()
    runner.run(job, -12, 0)
    assert (store.path.read_bytes(), store.rows_path.read_bytes()) == before
    row = store.find(key_of(0.05, PRINCIPAL, 1e-3, 0))
    r = base.rank(0.05)
    assert int(row["trained"]) == r * sum(m + n for m, n in base.shapes.values())
    line = Results(store, 50).lines["0.05"][PRINCIPAL]
    assert float(line.measured.target[0, 0]) == pytest.approx(float(row["test"]), abs=1e-3)
    before_source = float(store.find(key_of(0, "base, NF4", 0, 0))["source"])
    rise = float(row["source"]) - before_source
    assert float(line.measured.increase[0, 0]) == pytest.approx(rise, abs=1e-3)


@pytest.mark.thorough
def test_every_method_is_run_once_and_shown(
    base: Base, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.quality.real.run.EXTENSIONS", 0)
    monkeypatch.setattr(main, "RESULTS", tmp_path)
    preset = replace(TINY, seeds=1)
    arguments = (base.path, data, tmp_path, "tiny", preset)
    store = main.real(*arguments, processes=1, claims=None, given=[])
    runs = store.runs()
    assert {job.method.name for job in plan.jobs(preset)} <= {row["method"] for row in runs}
    assert not [row["note"] for row in runs if row["note"] and "blocks" not in row["note"]]
    main.real(*arguments, processes=1, claims=None, given=[])
    assert len(store.runs()) == len(runs)
    text = "\n".join(tables(Results(store, 50)))
    assert all(method.name in text for method in plan.methods())
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- tiny -->\nold\n<!-- /tiny -->\nafter\n")
    main.update_readme("tiny", preset, readme, tmp_path)
    assert "old" not in readme.read_text()
    assert (tmp_path / "tiny_0.05_headline.png").is_file()
