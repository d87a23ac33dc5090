"""The best mix for a number of bytes: never above it, none better left out, written as it was measured."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moetools
from moetools.checkpoint.reader import open_checkpoint
from moetools.errors import CheckpointError, UserError
from moetools.forward.options import ForwardOptions
from moetools.forward.streaming import StreamedModel
from moetools.passes.sequential import SequentialPass
from moetools.verbs.compress import building
from moetools.verbs.compress import verb as compress_module
from moetools.verbs.compress.candidates import Sizes

CPU = ForwardOptions(device="cpu")
SHAPE = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64}


@pytest.fixture(scope="module")
def inputs(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for seed, name in enumerate(("data", "test")):
        ids = torch.randint(2, 128, (20, 16), generator=torch.Generator().manual_seed(seed))
        save_file({"input_ids": ids}, folder / f"{name}.safetensors")
    model = tiny("mixtral", **SHAPE)
    return model, {
        "data": f"code={folder}/data.safetensors",
        "test": f"code={folder}/test.safetensors",
        "seq_len": 16,
        "device": "cpu",
    }


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize("target", ["transformers", "vllm", "packed"])
@pytest.mark.parametrize("share", [0.6, 0.35])
def test_what_fits_is_the_frontier(target, share, tiny):
    sizes = Sizes(tiny("mixtral", **SHAPE), CPU, target, 1)
    budget = int(share * sizes.file_bytes)
    found = sizes.fitting(budget)
    everything = [one for one in sizes._all(budget) if one.nbytes <= budget]
    assert {one.method for one in everything} == {"none", "prune", "merge"} or share < 0.5
    assert not any(one.beats(other) for one, other in itertools.permutations(found, 2))
    for one in everything:
        assert one in found or any(better.beats(one) for better in found)


def test_a_tiny_budget_names_the_smallest_plan(tiny):
    sizes = Sizes(tiny("mixtral", **SHAPE), CPU, "transformers", 4)
    with pytest.raises(UserError, match="no plan for transformers fits into 1,000 bytes; the smallest takes") as caught:
        sizes.fitting(1000)
    assert "`target=packed`" in caught.value.hint
    least = int(caught.value.message.rpartition(" ")[2].replace(",", ""))
    assert min(one.nbytes for one in sizes.fitting(least)) == least
    assert {one.experts for one in sizes.fitting(least)} == {4}


def test_the_best_of_the_built_is_the_output(inputs, tmp_path):
    model, asked = inputs
    out = tmp_path / "out"
    how = {"target_size": "45%", "checks": 2, "min_experts": 7, "probe_tokens": 320, "verify": False}
    report = moetools.compress(model, out, **how, **asked)
    assert sorted(tmp_path.iterdir()) == [out]
    budget = int(0.45 * weight_bytes(model))
    built = [one for one in report.plans if one.measured is not None]
    assert len(built) == 2
    (chosen,) = [one for one in report.plans if one.chosen]
    assert chosen.measured == min(one.measured for one in built)
    assert all(one.file_bytes <= one.plan.nbytes <= budget for one in built)
    assert weight_bytes(out) == chosen.file_bytes
    test = {"data": asked["test"], "seq_len": 16, "device": "cpu"}
    judged = moetools.evaluate(out, reference=model, **test).to_json()["models"][1]
    assert judged["agreement"]["kl"] == pytest.approx(chosen.measured, rel=1e-5)
    predicted = [one.predicted for one in report.plans]
    assert predicted == sorted(predicted)
    assert AutoModelForCausalLM.from_pretrained(out).config.num_local_experts == chosen.plan.experts
    record = json.loads((out / "moetools.json").read_text())
    assert record["compress"]["budget"] == budget
    assert record["out"] == str(out)
    assert record["command"].startswith("moetools.compress(")
    with pytest.raises(UserError, match="exists"):
        moetools.compress(model, out, target_size="45%", **asked)


def test_the_best_is_healed(inputs, tmp_path):
    model, asked = inputs
    out = tmp_path / "out"
    how = {
        "target_size": "45%",
        "min_experts": 7,
        "checks": 1,
        "probe_tokens": 224,
        "heal_minutes": 0.02,
        "verify": False,
    }
    report = moetools.compress(model, out, **how, **asked)
    before, after = (one for one in report.plans if one.measured is not None)
    assert (before.healed, after.healed) == (False, True)
    assert before.plan == after.plan
    assert "healed" in after.words()
    assert after.file_bytes <= report.budget
    chosen = min((before, after), key=lambda one: one.measured)
    assert [one for one in report.plans if one.chosen] == [chosen]
    assert weight_bytes(out) == chosen.file_bytes
    commands = [step["command"].partition("(")[0] for step in json.loads((out / "moetools.json").read_text())["steps"]]
    reduced = ["moetools.prune_experts" if chosen.plan.method == "prune" else "moetools.merge_experts"]
    expected = (reduced if chosen.plan.method != "none" else []) + ["moetools.quantize"]
    if chosen.healed:
        expected.insert(1, "moetools.distill")
    assert commands == expected


def test_commands_leave_room_for_the_judge(inputs, tmp_path, monkeypatch):
    """The original's embeddings and head stay while they run, within the memory that was given."""
    model, asked = inputs
    seen, call = [], building.Verb.call

    def watched(self, places, values, **more):
        seen.append(values.get("memory_budget"))
        return call(self, places, values, **more)

    monkeypatch.setattr(building.Verb, "call", watched)
    how = {"target_size": "60%", "plan_only": True, "probe_tokens": 224, "memory_budget": 10**9, **asked}
    moetools.compress(model, tmp_path / "out", target="vllm", **how)
    own = StreamedModel(open_checkpoint(model), ForwardOptions(device="cpu"))
    assert {*seen} - {10**9} == {10**9 - own.rest_bytes()}


def test_what_was_built_is_not_built_again(inputs, tmp_path, monkeypatch):
    model, asked = inputs
    called, judged = [], []
    call, kl = building.Verb.call, building.Judge.kl

    def counted(self, places, values, **more):
        if Path(places[1]).parent != tmp_path:
            called.append(Path(places[1]))
        return call(self, places, values, **more)

    def interrupted(self, path):
        judged.append(path)
        if path.parent.name == "1" and judged.count(path) == 1:
            raise KeyboardInterrupt
        return kl(self, path)

    monkeypatch.setattr(building.Verb, "call", counted)
    monkeypatch.setattr(building.Judge, "kl", interrupted)
    how = {"target_size": "45%", "checks": 2, "min_experts": 7, "probe_tokens": 224, "verify": False, **asked}
    with pytest.raises(KeyboardInterrupt):
        moetools.compress(model, tmp_path / "out", **how)
    assert {path.parent.name for path in called} >= {"0", "1"}
    called.clear()
    report = moetools.compress(model, tmp_path / "out", resume=True, **how)
    assert not called
    assert sum(one.measured is not None for one in report.plans) == 2


def test_planning_takes_three_passes(tiny, tmp_path, monkeypatch):
    """Counted: tokens through every layer, and through the new blocks of a reduction, over those of two layers."""
    ids = torch.randint(2, 128, (700, 16), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, tmp_path / "all.safetensors")
    seen = []
    run_layer, finish = StreamedModel.run_layer, SequentialPass._finish

    def counted(self, layer, batch, hidden):
        seen.append(batch.num_tokens)
        return run_layer(self, layer, batch, hidden)

    def finished(self, index, tensors):
        seen.append(self.data.num_tokens)
        return finish(self, index, tensors)

    monkeypatch.setattr(StreamedModel, "run_layer", counted)
    monkeypatch.setattr(SequentialPass, "_finish", finished)
    text = {"data": f"code={tmp_path}/all.safetensors", "seq_len": 16, "samples": "all", "device": "cpu"}
    report = moetools.compress(
        tiny("mixtral", **{**SHAPE, "num_hidden_layers": 2}),
        tmp_path / "out",
        target_size="45%",
        target="vllm",
        plan_only=True,
        **text,
    )
    assert report.probes > 5
    calibration = 2 * 16 * 560
    assert 1 < sum(seen) / calibration < 3
    assert report.passes == pytest.approx(sum(seen) / calibration, rel=0.25)


def test_tasks_that_do_not_count_are_left_out(inputs, tmp_path, monkeypatch):
    model, asked = inputs
    monkeypatch.setattr(building.Measurements, "kl", law)
    named = {name: [asked[name], asked[name].replace("code=", "prose=")] for name in ("data", "test")}
    how = {**asked, **named, "target_size": "40%", "plan_only": True}
    planned = moetools.compress(model, tmp_path / "out", keep_tasks=["prose"], **how)
    recipe = yaml.safe_load(planned.plan_file.read_text())
    assert [step["options"]["data"] for step in recipe["steps"]] == [[named["data"][1]]] * len(recipe["steps"])
    assert recipe["report"]["data"] == [named["test"][1]]
    with pytest.raises(UserError, match="unknown task of `data` 'french'; legal: code, prose"):
        moetools.compress(model, tmp_path / "out", keep_tasks=["french"], **how)
    with pytest.raises(UserError, match="unknown task of `test` 'prose'"):
        moetools.compress(model, tmp_path / "out", keep_tasks=["prose"], **{**how, "test": asked["test"]})


def test_keys_and_values_are_taken_off_the_size(inputs, tmp_path):
    model, asked = inputs
    same = {"target_size": "60%", "dry_run": True, **asked}
    whole = moetools.compress(model, tmp_path / "out", **same)
    less = moetools.compress(model, tmp_path / "out", context=100, batch=3, **same)
    config = json.loads((model / "config.json").read_text())
    head = config["hidden_size"] // config["num_attention_heads"]
    each = 2 * config["num_key_value_heads"] * head * 2 * config["num_hidden_layers"]
    assert less.cache == 3 * 100 * each
    assert (whole.cache, whole.budget - less.budget) == (0, less.cache)
    assert all(one.plan.nbytes <= less.budget for one in less.plans)
    assert "left for keys and values" in less.tables()[0].note
    with pytest.raises(UserError, match="keys and values of 1 x 100000000 tokens"):
        moetools.compress(model, tmp_path / "out", context=10**8, **same)
    with pytest.raises(UserError, match="`batch=2` is for `context`"):
        moetools.compress(model, tmp_path / "out", batch=2, **same)


def law(self, probe, builder):
    """A loss that prefers merging a little over fewer bits."""
    fewer = {"none": 0.0, "prune": 0.02, "merge": 0.01}[probe.method] * (8 - probe.experts)
    return fewer + 2.0 ** -probe.bits.widths()[0]


def test_a_plan_is_a_recipe(inputs, tmp_path, monkeypatch):
    model, asked = inputs
    monkeypatch.setattr(building.Measurements, "kl", law)
    out = tmp_path / "out"
    page, plots = tmp_path / "plans.html", tmp_path / "plots"
    shown = {"html": page, "plots": plots}
    planned = moetools.compress(model, out, target_size="40%", target="vllm", plan_only=True, **shown, **asked)
    (picture,) = plots.glob("*.svg")
    assert picture.read_text().count("<circle") == len(planned.plans)
    assert not out.exists()
    assert page.read_text().count("<circle") == len(planned.plans) > 2
    assert f">{planned.plans[0].plan.words()}, predicted</text>" in page.read_text()
    page.unlink()
    shutil.rmtree(plots)
    assert planned.plan_file == tmp_path / "out-plan.yaml"
    assert set(tmp_path.iterdir()) == {planned.plan_file}
    recipe = yaml.safe_load(planned.plan_file.read_text())
    assert recipe["variables"] == {"model": str(model), "out": str(out)}
    assert [step["model"] for step in recipe["steps"]] == ["${model}", "${reduced}"]
    with pytest.raises(UserError, match=r"the plan .* exists"):
        moetools.compress(model, out, target_size="40%", plan_only=True, **asked)
    assert recipe["steps"][1]["options"]["target"] == "vllm"
    done = moetools.run(planned.plan_file)
    plan = planned.plans[0].plan
    last = done.steps[-1].out
    assert weight_bytes(last) <= plan.nbytes <= planned.budget
    assert json.loads((last / "config.json").read_text())["num_local_experts"] == plan.experts
    assert done.to_json()["comparison"]["models"][-1]["kl"] > 0


def test_a_run_goes_on_with_what_it_measured(inputs, tmp_path, monkeypatch):
    model, asked = inputs
    measured = []

    def build(self, plan, out, **more):
        shutil.copytree(self.model, out, dirs_exist_ok=True)

    def kl(self, path):
        measured.append(path.name)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return 1 / len(measured)

    monkeypatch.setattr(compress_module.Builder, "build", build)
    monkeypatch.setattr(compress_module.Judge, "kl", kl)
    options = {"target_size": "25%", "plan_only": True, **asked}
    with pytest.raises(KeyboardInterrupt):
        moetools.compress(model, tmp_path / "out", **options)
    with pytest.raises(UserError, match="interrupted run left its measurements") as caught:
        moetools.compress(model, tmp_path / "out", **options)
    assert "`resume`" in caught.value.hint
    assert len(measured) == 3
    resumed = moetools.compress(model, tmp_path / "out", resume=True, **options)
    whole = len(measured) - 1
    assert not (tmp_path / ".out.moetools-compress").exists()
    measured[:] = [""] * 3
    moetools.compress(model, tmp_path / "other", **options)
    assert len(measured) - 3 == whole
    assert resumed.probes == whole


def test_what_an_interrupted_run_left_half_removed_is_no_obstacle(inputs, tmp_path, monkeypatch):
    """Killed while it threw a measured checkpoint away, its folder has neither config.json nor moetools.json."""
    model, asked = inputs
    rmtree, seen = shutil.rmtree, []

    def half(path, *args, **options):
        if Path(path).name == "probe" and not seen:
            seen.append(path)
            (path / "config.json").unlink()
            (path / "moetools.json").unlink()
            raise KeyboardInterrupt
        rmtree(path, *args, **options)

    monkeypatch.setattr(building.shutil, "rmtree", half)
    options = {"target_size": "25%", "probe_tokens": 64, "checks": 1, **asked}
    with pytest.raises(KeyboardInterrupt):
        moetools.compress(model, tmp_path / "out", **options)
    # Another kind of probe was under way: nothing was measured yet, or it may go on.
    assert moetools.compress(model, tmp_path / "out", overwrite=True, resume=True, **options).plans


def test_a_model_that_changes_between_two_builds_is_refused(inputs, tmp_path, monkeypatch):
    model, asked = inputs
    own, kl = shutil.copytree(model, tmp_path / "own"), compress_module.Judge.kl

    def changed(self, path):
        found = kl(self, path)
        if path.name != "probe":
            file = own / "model.safetensors"
            save_file({name: one * 2 for name, one in load_file(file).items()}, file, metadata={"format": "pt"})
        return found

    monkeypatch.setattr(compress_module.Judge, "kl", changed)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        moetools.compress(own, tmp_path / "out", target_size="25%", probe_tokens=64, checks=1, verify=False, **asked)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_knows_the_sizes_alone(inputs, tmp_path):
    model, asked = inputs
    found = moetools.compress(model, tmp_path / "out", target_size="45%", dry_run=True, **asked)
    assert not list(tmp_path.iterdir())
    assert found.plans
    assert all(one.predicted is None and one.plan.nbytes <= found.budget for one in found.plans)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "how large may the result be?"),
        ({"target_size": "0%"}, "`target_size=0%` is not between 0 and 100 %"),
        ({"target_size": "many"}, "'many' is not a memory size"),
        ({"target_size": "100%"}, "bytes and fits already"),
        ({"target_size": "50%", "target": "vlm"}, "unknown target 'vlm'"),
        ({"target_size": "50%", "checks": 0}, "`checks=0` is below 1"),
        ({"target_size": "50%", "heal_minutes": 0.0}, "`heal_minutes=0` is not above 0"),
        ({"target_size": "50%", "data": []}, "plans are measured on text"),
    ],
)
def test_what_is_refused_before_anything_is_read(inputs, tmp_path, options, message):
    model, asked = inputs
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        moetools.compress(model, tmp_path / "out", **{**asked, **options})
    assert not list(tmp_path.iterdir())


def test_token_files_hold_the_text(inputs, tmp_path):
    from moetools.formats.reader import open_model
    from moetools.text.options import DataOptions, load_tokens
    from moetools.verbs.compress.building import as_options, some_of

    model, asked = inputs
    tokens = load_tokens(DataOptions(data=[asked["data"]], seq_len=16), open_model(model), 128)
    little = some_of(tokens, 240)
    assert little.num_tokens == 240
    assert some_of(tokens, 16).num_tokens == 16
    assert some_of(tokens, 16, least=14).num_tokens == 14 * 16
    stored = as_options(little, tmp_path)
    given = load_file(asked["data"].partition("=")[2])["input_ids"]
    assert torch.equal(load_file(tmp_path / "code.safetensors")["input_ids"], given[:15])
    again = load_tokens(DataOptions(**stored), open_model(model), 128)
    assert again.num_tokens == 240
