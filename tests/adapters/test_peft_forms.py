"""PEFT's forms held against PEFT itself: written and loaded there, trained there and taken here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command import complaint
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    ShiraConfig,
    SupertuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from sweeps import swept
from tiny import load, make_checkpoint
from trained import KINDS, dense_offsets, logits, trained

from leanlift import (
    LiftConfig,
    UserError,
    combine_adapters,
    export_peft,
    get_lift_model,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from leanlift.adapters import FORMS
from leanlift.cli import main
from leanlift.io.places import PEFT_TYPES
from leanlift.model import lift_layers

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # PEFT's own

SUPER = FORMS["super-tuning"]
TARGETS = ["q_proj", "down_proj"]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CONFIGS: dict[str, Any] = {
    "shira": lambda **more: ShiraConfig(r=2, **{"target_modules": TARGETS, **more}),
    "super-tuning": lambda **more: SupertuningConfig(
        sparsity=0.95, **{"target_modules": TARGETS, **more}
    ),
}


def by_peft(base: Path, directory: Path, form: str, seed: int = 0, **more: Any) -> Any:
    """A model that stock PEFT has trained, as far as its offsets tell, and its saved adapter."""
    model = get_peft_model(load(base, "dense"), CONFIGS[form](**more))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0].endswith(FORMS[form].offsets):
            parameter.data.normal_(std=0.05)
    model.save_pretrained(directory)
    return model.eval()


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_a_form_is_known_by_its_type_wherever_one_is_looked_at() -> None:
    assert {form.peft_type: form.words for form in FORMS.values()} == PEFT_TYPES


# --- written here, loaded there ------------------------------------------------------------


@pytest.mark.parametrize("values", swept(["float32", "bfloat16"], "float32"))
def test_stock_peft_computes_a_super_tuning_export(base: Path, tmp_path: Path, values: str) -> None:
    model = trained(base, tmp_path / "adapter", "dense", values_dtype=values)
    done = export_peft(tmp_path / "adapter", tmp_path / "peft", False, form="super-tuning")
    assert (done.form, done.rank, done.only_plain) == ("super-tuning", None, None)
    stock = PeftModel.from_pretrained(load(base, "dense"), tmp_path / "peft").eval()
    assert_close(logits(stock), logits(model))
    assert (logits(stock) - logits(load(base, "dense"))).abs().max() > 0.01
    alone = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft", dtype=torch.float32)
    assert torch.equal(logits(alone), logits(stock))
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype="float32", progress=False)
    assert_close(logits(stock.merge_and_unload()), logits(load(tmp_path / "merged", "dense")))


@pytest.mark.parametrize("kind", swept(KINDS, "nf4+double"))
def test_super_tuning_there_and_back_keeps_every_entry(
    base: Path, tmp_path: Path, kind: str
) -> None:
    trained(base, tmp_path / "adapter", kind)
    done = export_peft(tmp_path / "adapter", tmp_path / "peft", False, form="super-tuning")
    assert done.only_plain == (None if kind == "dense" else kind)
    save_adapter(load_adapter(load(base, kind), tmp_path / "peft"), tmp_path / "back")
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "adapter" / name).read_bytes() == (tmp_path / "back" / name).read_bytes()


def test_one_density_needs_no_padding_and_retired_entries_do(base: Path, tmp_path: Path) -> None:
    for density in (0.01, 0.05, 1 / 3):
        config = LiftConfig(density=density, selector="magnitude")
        save_adapter(get_lift_model(load(base), config, progress=False), tmp_path / "own")
        done = export_peft(tmp_path / "own", tmp_path / "peft", False, form="super-tuning")
        assert done.padding == 0
        tensors = load_file(tmp_path / "peft" / WEIGHTS)
        assert done.nbytes == 8 * done.entries == sum(t.nbytes for t in tensors.values())
        shutil.rmtree(tmp_path / "peft")
    trained(base, tmp_path / "adapter")
    done = export_peft(tmp_path / "adapter", tmp_path / "peft", False, form="super-tuning")
    tensors = load_file(tmp_path / "peft" / WEIGHTS)
    held = sum(t.numel() for key, t in tensors.items() if key.endswith(SUPER.offsets))
    assert held == done.entries + done.padding
    assert done.padding > 0
    ours, theirs = (dense_offsets(tmp_path / name) for name in ("adapter", "peft"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("seed", range(40))
def test_the_sparsity_leaves_room_in_every_matrix_and_not_one_entry_less_would(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    side = 10 ** draw(1, 5) // 3
    shapes = {str(i): (draw(1, side), draw(1, side)) for i in range(4)}
    entries = {name: draw(0, m * n + 1) // 10 ** draw(0, 9) for name, (m, n) in shapes.items()}
    settings = SUPER.settings(shapes, entries)
    room = {name: SUPER.room(settings, shape) for name, shape in shapes.items()}
    stock = SupertuningConfig(sparsity=settings["sparsity"])
    for name, (m, n) in shapes.items():
        assert room[name] == int(m * n * (1 - stock.sparsity)) >= max(1, entries[name])
    assert any(room[name] == max(1, entries[name]) for name in shapes)


def test_positions_beyond_32_bits_are_refused_before_anything_is_written() -> None:
    SUPER.settings({"a": (2**16, 2**15)}, {"a": 1})
    with pytest.raises(UserError, match=r"a is 65536x32769, more than the 2\^31 positions"):
        SUPER.settings({"a": (2**16, 2**15 + 1)}, {"a": 1})


@pytest.mark.parametrize("form", swept(FORMS, "super-tuning"))
def test_what_is_trained_whole_has_no_place_in_a_form(
    base: Path, tmp_path: Path, form: str
) -> None:
    config = LiftConfig(selector="magnitude", modules_to_save=("down_proj",))
    save_adapter(get_lift_model(load(base), config, progress=False), tmp_path / "adapter")
    with pytest.raises(UserError, match=f"the whole of model.*{FORMS[form].words} has no place"):
        export_peft(tmp_path / "adapter", tmp_path / "peft", False, form=form)
    assert not (tmp_path / "peft").exists()


def test_a_form_that_there_is_not_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected form to be one of shira, super-tuning"):
        export_peft(tmp_path / "adapter", tmp_path / "peft", form="lora")


# --- trained there, taken here -------------------------------------------------------------


@pytest.mark.parametrize("form", swept(FORMS, "super-tuning"))
def test_what_peft_has_trained_is_loaded_merged_and_turned_into_the_other_form(
    base: Path, tmp_path: Path, form: str
) -> None:
    stock = by_peft(base, tmp_path / "peft", form)
    expected = logits(stock)
    model = load_adapter(load(base, "dense"), tmp_path / "peft").eval()
    assert len(lift_layers(model)) == 4
    assert_close(logits(model), expected)
    merge_adapter(tmp_path / "peft", tmp_path / "merged", dtype="float32", progress=False)
    assert_close(logits(load(tmp_path / "merged", "dense").eval()), expected)
    for other in FORMS:
        export_peft(tmp_path / "peft", tmp_path / other, False, form=other)
        again = PeftModel.from_pretrained(load(base, "dense"), tmp_path / other).eval()
        assert_close(logits(again), expected)
        assert_close(logits(load_adapter(model, tmp_path / other)), expected)


@pytest.mark.parametrize("kind", swept(["float32", "bfloat16"], "bfloat16"))
def test_adapters_of_both_kinds_combine(tmp_path: Path, kind: str) -> None:
    dtype = getattr(torch, kind)
    base = make_checkpoint(tmp_path / "base", dtype=dtype, biased=True)
    by_peft(base, tmp_path / "peft", "super-tuning")
    save_adapter(load_adapter(load(base, "dense", dtype), tmp_path / "peft"), tmp_path / "own")
    combine_adapters([tmp_path / "peft", tmp_path / "own"], tmp_path / "both", progress=False)
    twice = dense_offsets(tmp_path / "both")
    assert all(torch.equal(twice[n], 2 * one) for n, one in dense_offsets(tmp_path / "own").items())


@pytest.mark.parametrize("form", swept(FORMS, "super-tuning"))
def test_the_commands_take_what_peft_has_trained(
    base: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*argv: Any) -> str:
        assert main([str(arg) for arg in argv]) == 0
        return capsys.readouterr().out

    expected = logits(by_peft(base, tmp_path / "a", form))
    by_peft(base, tmp_path / "b", form, seed=1)
    found = json.loads(run("info", tmp_path / "a", "--json"))
    assert (found["form"], found["base"], found["base_formats"]) == (form, str(base), ["float32"])
    assert f"a {FORMS[form].words} adapter of PEFT's" in run("info", tmp_path / "a")
    run("combine", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "both")
    assert json.loads(run("info", tmp_path / "both", "--json"))["form"] == "leanlift"
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "one and ", "completion": "two"}\n' * 2)
    told = run("export", tmp_path / "a", tmp_path / "merged", "--dtype", "float32", "--verify",
               "--data", rows)  # fmt: skip
    assert "Verified: logits differ by" in told
    assert_close(logits(load(tmp_path / "merged", "dense").eval()), expected)
    data = json.loads(run("eval", "--adapter", tmp_path / "a", "--merged", tmp_path / "merged",
                          "--data", rows, "--json"))  # fmt: skip
    ours, merged = (model["loss"] for model in data["models"])
    assert ours == pytest.approx(merged, rel=1e-5)
    told = run("export", tmp_path / "a", tmp_path / "other", "--format", "super-tuning")
    assert "a Super-Tuning adapter with sparsity=" in told


def test_a_base_that_has_moved_is_named(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = shutil.copytree(base, tmp_path / "base")
    expected = logits(by_peft(moved, tmp_path / "peft", "super-tuning"))
    moved = moved.rename(tmp_path / "moved")
    for name in (str(tmp_path / "base"), "someone/else", None, "x" * 5000, "a." * 500, "~no/a", 7):
        data = json.loads((tmp_path / "peft" / CONFIG).read_text())
        data["base_model_name_or_path"] = name
        (tmp_path / "peft" / CONFIG).write_text(json.dumps(data))
        with pytest.raises(UserError, match="nothing else says what exactly its base is"):
            merge_adapter(tmp_path / "peft", tmp_path / "merged", progress=False)
        with pytest.raises(UserError, match="nothing else says"):
            export_peft(tmp_path / "peft", tmp_path / "merged", False)
        assert "nothing else says" in complaint(capsys, "info", str(tmp_path / "peft"))
        assert not (tmp_path / "merged").exists()
    peft, merged = str(tmp_path / "peft"), str(tmp_path / "merged")
    options = ["--base", str(moved), "--dtype", "float32"]
    assert main(["export", peft, merged, *options]) == 0
    assert_close(logits(load(tmp_path / "merged", "dense").eval()), expected)
    assert main(["export", peft, str(tmp_path / "s"), "--format", "peft", *options[:2]]) == 0
    assert_close(logits(PeftModel.from_pretrained(load(moved, "dense"), tmp_path / "s")), expected)
    shown = complaint(capsys, "export", str(tmp_path / "s"), str(tmp_path / "t"), "--format",
                      "super-tuning", *options[:2])  # fmt: skip
    assert "--base cannot go with --format super-tuning" in shown


# --- what is refused -----------------------------------------------------------------------

WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "low rank": ("super-tuning", {"r": 2}, r"a low-rank part beside its offsets \(r=2\)"),
    "no positions": ("super-tuning", {"save_precomputed_indices": False}, "hold its positions"),
    "another head": ("super-tuning", {"modules_to_save": ["lm_head"]}, "no part of a Super-Tuning"),
    "another head, shira": ("shira", {"modules_to_save": ["lm_head"]}, "no part of a SHiRA"),
}
LIES: dict[str, tuple[dict[str, Any], str]] = {
    "sparsity of text": ({"sparsity": "0.9"}, "sparsity='0.9'; expected 0 or more"),
    "no sparsity": ({"sparsity": None}, "expected 0 or more and less than 1"),
    "all of it": ({"sparsity": 1.0}, "expected 0 or more and less than 1"),
    "no number": ({"sparsity": float("nan")}, "expected 0 or more and less than 1"),
    "another sparsity": ({"sparsity": 0.9}, "entries, but (409|1228) by its"),
    "a rank": ({"r": [1]}, "a low-rank part"),
}


@pytest.mark.filterwarnings("ignore:save_precomputed_indices=False:UserWarning")  # PEFT's own
@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings:UserWarning")  # likewise
@pytest.mark.parametrize("case", swept(WRONG, "low rank", "no positions", "another head"))
def test_what_peft_has_and_leanlift_has_not_is_refused(
    base: Path, tmp_path: Path, case: str
) -> None:
    form, settings, words = WRONG[case]
    by_peft(base, tmp_path / "peft", form, **settings)
    refused(base, tmp_path, words)


@pytest.mark.parametrize("case", swept(LIES, "no number", "another sparsity"))
def test_a_configuration_that_lies_is_refused(base: Path, tmp_path: Path, case: str) -> None:
    change, words = LIES[case]
    by_peft(base, tmp_path / "peft", "super-tuning")
    data = json.loads((tmp_path / "peft" / CONFIG).read_text())
    (tmp_path / "peft" / CONFIG).write_text(json.dumps({**data, **change}))
    refused(base, tmp_path, words)


def refused(base: Path, work: Path, words: str) -> None:
    """Over a live model, over the base on disk, and with nothing left behind."""
    model = load(base, "dense")
    with pytest.raises(UserError, match=words):
        load_adapter(model, work / "peft")
    assert not lift_layers(model)
    with pytest.raises(UserError, match=words):
        merge_adapter(work / "peft", work / "merged", progress=False)
    with pytest.raises(UserError, match=words):
        combine_adapters([work / "peft"], work / "merged", progress=False)
    with pytest.raises(UserError, match=words):
        export_peft(work / "peft", work / "merged", False)
    assert not (work / "merged").exists()


@pytest.mark.filterwarnings("ignore:save_precomputed_indices=False:UserWarning")  # PEFT's own
def test_positions_that_were_not_saved_are_had_back_as_the_message_says(
    base: Path, tmp_path: Path
) -> None:
    stock = by_peft(base, tmp_path / "peft", "super-tuning", save_precomputed_indices=False)
    data = json.loads((tmp_path / "peft" / CONFIG).read_text())
    data["save_precomputed_indices"] = True
    (tmp_path / "peft" / CONFIG).write_text(json.dumps(data))
    with pytest.warns(UserWarning, match="missing adapter keys"):
        again = PeftModel.from_pretrained(load(base, "dense"), tmp_path / "peft")
    again.save_pretrained(tmp_path / "whole")
    assert_close(logits(load_adapter(load(base, "dense"), tmp_path / "whole")), logits(stock))


def test_an_adapter_of_packed_codes_is_no_adapter_of_their_matrix(
    base: Path, tmp_path: Path
) -> None:
    """Over NF4, PEFT takes the packed bytes for the weight, of which there are half as many."""
    stock = get_peft_model(load(base, "nf4"), CONFIGS["super-tuning"]())
    stock.save_pretrained(tmp_path / "peft")
    refused(base, tmp_path, "trained over another base, or over a quantized one")


def test_the_sum_of_a_position_that_occurs_twice_is_its_offset(base: Path, tmp_path: Path) -> None:
    by_peft(base, tmp_path / "peft", "super-tuning")
    tensors = load_file(tmp_path / "peft" / WEIGHTS)
    for key, tensor in tensors.items():
        if key.endswith(SUPER.positions):
            tensor[1] = tensor[0]
    save_file(tensors, tmp_path / "peft" / WEIGHTS)
    stock = PeftModel.from_pretrained(load(base, "dense"), tmp_path / "peft")
    assert_close(logits(load_adapter(load(base, "dense"), tmp_path / "peft")), logits(stock))
