"""A chain of verbs: done once, gone on with, done again only where something changed, and checked before it begins."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

import moetools
from moetools.errors import CheckpointError, GateError, MoetoolsError, UserError
from moetools.verbs.quantize import verb as quantize_module
from moetools.verbs.run.recipe import load_recipe, recipe_text
from moetools.verbs.run.recipe_file import read_recipe
from moetools.verbs.run.state import FILE_NAME

RECIPE = """
about: a chain
variables: {model: null, text: null, out: null, kept: '0,1,2,3', scheme: w8a16}
out: ${out}
options: {verify: false, device: cpu}
steps:
  - {name: pruned, verb: prune-experts, model: "${model}", options: {experts: "${kept}"}}
  - name: packed
    verb: quantize
    model: ${pruned}
    options: {method: rtn, scheme: "${scheme}", group_size: 8}
report: {reference: "${model}", data: "code=${text}", seq_len: 16, html: "${out}/report.html"}
"""


@pytest.fixture
def chain(tiny, tmp_path):
    """Carry out RECIPE, with changes to its text."""
    shutil.copytree(tiny("mixtral", num_hidden_layers=1), tmp_path / "model")
    ids = torch.randint(2, 128, (4, 16), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, tmp_path / "text.safetensors")
    given = [f"{name}={tmp_path / file}" for name, file in (("model", "model"), ("text", "text.safetensors"))]

    def run(*more, text=RECIPE, **options):
        (tmp_path / "recipe.yaml").write_text(text)
        return moetools.run(tmp_path / "recipe.yaml", set=[*given, f"out={tmp_path / 'out'}", *more], **options)

    return run


def states(report):
    return [step.state for step in report.steps]


def test_a_chain_is_what_its_commands_are_one_after_the_other(chain, tmp_path):
    report = chain()
    same = {"verify": False, "device": "cpu"}
    moetools.prune_experts(tmp_path / "model", tmp_path / "first", experts="0,1,2,3", **same)
    moetools.quantize(tmp_path / "first", tmp_path / "second", method="rtn", scheme="w8a16", group_size=8, **same)
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == [FILE_NAME, "packed", "report.html"]
    weights = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "out/packed", tmp_path / "second")]
    assert weights[0] == weights[1]
    found = report.to_json()["comparison"]["models"]
    judged = moetools.evaluate(
        tmp_path / "second", reference=tmp_path / "model", data=f"code={tmp_path}/text.safetensors", seq_len=16
    ).to_json()["models"]
    assert [model["name"] for model in found] == ["model", "pruned", "packed"]
    assert found[2]["kl"] == judged[1]["agreement"]["kl"]
    assert found[1]["nbytes"] == (tmp_path / "first/model.safetensors").stat().st_size
    assert report.tables()[0].rows[0][-1] == "cleaned"
    command = json.loads((tmp_path / "out/packed/moetools.json").read_text())["command"]
    assert command.startswith(f"moetools.quantize('{tmp_path}/out/pruned', '{tmp_path}/out/packed', verify=False")


def test_only_what_changed_is_done_again(chain, tmp_path):
    first = chain()
    again = chain()
    assert states(again) == ["unchanged", "unchanged"]
    assert again.comparison.state == "unchanged"
    assert again.tables() == [again.tables()[0], *first.tables()[1:]]
    kept = RECIPE[: RECIPE.index("report:")].replace('model: "${model}"', 'model: "${model}", keep: true')
    # The first step's output is gone and needed again.
    assert states(chain(text=kept)) == ["done", "unchanged"]
    assert (tmp_path / "out/pruned").is_dir()
    assert states(chain("scheme=w4a16", text=kept)) == ["unchanged", "done"]
    assert states(chain("scheme=w4a16", "kept=0,1,2", text=kept)) == ["done", "done"]
    other = tmp_path / "model/config.json"
    other.write_text(json.dumps({**json.loads(other.read_text()), "eos_token_id": 1}))
    assert states(chain("scheme=w4a16", "kept=0,1,2", text=kept, dry_run=True)) == ["would run", "would run"]


def test_a_run_goes_on_where_it_was_interrupted(chain, tmp_path, monkeypatch):
    asked = []
    carry_out = quantize_module.carry_out

    def fail(work, out, how):
        if not how.dry_run:
            raise KeyboardInterrupt
        return carry_out(work, out, how)

    def watch(work, out, how):
        asked.append((how.dry_run, how.resume, how.overwrite))
        return carry_out(work, out, how)

    monkeypatch.setattr(quantize_module, "carry_out", fail)
    with pytest.raises(KeyboardInterrupt):
        chain()
    monkeypatch.setattr(quantize_module, "carry_out", watch)
    assert states(chain()) == ["unchanged", "done"]
    assert asked == [(True, False, False), (False, True, False)]


def test_what_the_run_did_not_make_is_never_replaced(chain, tmp_path):
    chain()
    config = tmp_path / "out/packed/config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(UserError, match=r"'packed' writes .* not what this run made"):
        chain()
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").touch()
    with pytest.raises(UserError, match="holds other things than a run"):
        chain()


def test_what_a_run_that_was_killed_left_of_its_check_goes(chain, tmp_path):
    left = tmp_path / ".out.moetools-dry-run"
    (left / "pruned-outline").mkdir(parents=True)
    (left / "pruned-outline/config.json").touch()
    chain(dry_run=True)
    assert not left.exists()
    (tmp_path / "victim").mkdir()
    left.symlink_to(tmp_path / "victim")
    with pytest.raises(CheckpointError, match="is a link"):
        chain()
    assert (tmp_path / "victim").exists()


def test_two_runs_do_not_share_a_folder(chain, tmp_path, monkeypatch):
    carry_out = quantize_module.carry_out

    def again(work, out, how):
        if not how.dry_run:
            with pytest.raises(UserError, match="another moetools run is writing"):
                chain()
            assert states(chain(dry_run=True)) == ["unchanged", "would run"]
        return carry_out(work, out, how)

    monkeypatch.setattr(quantize_module, "carry_out", again)
    assert states(chain()) == ["done", "done"]


def test_a_step_that_fails_says_how_the_run_goes_on(chain, monkeypatch):
    def fail(work, out, how):
        if not how.dry_run:
            raise MoetoolsError("the disk is full", hint="run again with `resume`: finished layers are kept")

    monkeypatch.setattr(quantize_module, "carry_out", fail)
    with pytest.raises(MoetoolsError, match="step 'packed': the disk is full") as caught:
        chain()
    assert caught.value.hint == "run the recipe again: what is finished is kept"


def test_a_dry_run_checks_all_and_writes_nothing(chain, tmp_path):
    (tmp_path / "recipe.yaml").touch()
    before = sorted(tmp_path.iterdir())
    planned = chain(dry_run=True)
    assert sorted(tmp_path.iterdir()) == before
    assert states(planned) == ["would run", "would run"]
    sizes = [step.nbytes for step in planned.steps]
    assert sizes == [step.nbytes for step in chain().steps]
    assert str(tmp_path / "out/packed") in planned.steps[1].tables[0].title
    assert states(chain(dry_run=True)) == ["unchanged", "unchanged"]


def test_a_step_that_cannot_work_is_refused_before_the_first_begins(chain, tmp_path):
    with pytest.raises(UserError, match="step 'packed': group size 7 does not divide") as caught:
        chain(text=RECIPE.replace("group_size: 8", "group_size: 7"))
    assert "group_size" in caught.value.hint
    assert not (tmp_path / "out").exists()
    with pytest.raises(MoetoolsError, match=r"step 'report': no such data: nowhere.jsonl"):
        chain(text=RECIPE.replace("code=${text}", "nowhere.jsonl"))
    assert not (tmp_path / "out").exists()


def test_a_gate_that_is_missed_ends_the_run_and_keeps_what_is_done(chain):
    gate = '  - {name: judged, verb: evaluate, models: ["${packed}"], options: {reference: "${model}", data: "${text}"'
    text = RECIPE.replace("report:", f"{gate}, seq_len: 16, gate: kl<=0}}}}\nreport:")
    with pytest.raises(GateError, match="step 'judged': packed: kl<=0 is missed"):
        chain(text=text)
    assert states(chain(text=text.replace("kl<=0", "kl<=100"))) == ["unchanged", "unchanged", "done"]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("verb: quantize", "verb: quantise", "step 'packed': unknown verb 'quantise'; legal: inspect, .*"),
        ("verb: quantize", "verb: {a: 1}", "step 'packed': unknown verb .*; legal: inspect, .*"),
        ("verb: quantize", "verb: demo", "step 'packed': unknown verb 'demo'"),
        ('scheme: "${scheme}"', "schema: x", "step 'packed': unknown option of quantize 'schema'"),
        ("group_size: 8", "group_size: [8]", r"step 'packed': `group_size=\[8\]` is of type list; legal: int, None"),
        ("group_size: 8", "resume: true", "step 'packed': `resume` is not for a step: the run decides it"),
        ("device: cpu", "devise: cpu", "unknown option of all steps 'devise'"),
        ("model: ${pruned}", "model: ${prunned}", "step 'packed': unknown variable 'prunned'; legal: model, text"),
        ("model: ${pruned}", "modell: ${pruned}", "step 'packed': unknown key 'modell'"),
        ("name: packed", "name: pruned", "step 'pruned' is called as another step or a variable"),
        ("name: packed", "name: a/b", "`name` of a step is 'a/b'"),
        ("about: a chain", "abuot: a chain", "unknown key of the recipe 'abuot'"),
        ("about: a chain", "about: a\nabout: b", "line 3: 'about' occurs twice"),
        ("about: a chain", "about: [", "line 4: "),
        ("model: null", "modl: null", "unknown variable 'model'; legal: modl"),
        ("kept: '0,1,2,3'", "kept: null", "step 'pruned': the variable 'kept' has no value"),
        ('html: "${out}/report.html"', "html: 3", "report: `html=3` is of type int; legal: path, None"),
        ("steps:", "steps: 3\nothers:", "unknown key of the recipe 'others'"),
    ],
)
def test_what_is_wrong_with_a_recipe(chain, before, after, message, tmp_path):
    text = RECIPE.replace(before, after, 1)
    with pytest.raises(UserError, match=message) as caught:
        chain(text=text)
    assert "\n" not in caught.value.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["model"], r"`set=model` is not NAME=VALUE"),
        (["modle=x"], "unknown variable 'modle'; legal: model"),
    ],
)
def test_what_is_wrong_with_a_variable(given, message):
    with pytest.raises(UserError, match=message):
        moetools.run("gguf", set=given)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 5_000,
        b"out: 2020-99-99",
        b"out: " + b"9" * 6_000,
        b"\xff\xfe\x00",
        b"!!python/object/apply:os.system [x]",
        b"? [a]\n: b",
        b"? {a: b}\n: c",
        b'out: "\\ud800"',
        b'out: "\\0"',
        b"a: &a [*a]",
        b"a: &a [1, 2]\nb: [*a, *a]",
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(text, tmp_path):
    """What YAML or Python refuses, and references, which make a document endless or larger than memory."""
    (tmp_path / "recipe.yaml").write_bytes(text)
    with pytest.raises(UserError, match=r"recipe\.yaml: ") as caught:
        read_recipe(tmp_path / "recipe.yaml")
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 1_000


def test_an_unknown_recipe():
    with pytest.raises(UserError, match=r"no recipe 'nowhere.yaml'") as caught:
        moetools.run("nowhere.yaml")
    assert "half-and-4-bits" in caught.value.hint


def test_values_get_the_type_of_their_option(tmp_path):
    text = """
variables: {many: null, data: null, flag: false}
out: out
steps:
  - name: one
    verb: prune-experts
    model: m
    options: {keep: "${many}", data: [x.txt, "${data}"], sequential: "${flag}", heal_data: {a: b.txt}}
"""
    (tmp_path / "r.yaml").write_text(text)
    given = ["many=4", "data=a=1.txt", "data=b=2.txt", "flag=true"]
    (step,) = load_recipe(tmp_path / "r.yaml", given).steps
    assert step.options == {
        "keep": 4,
        "data": ["x.txt", "a=1.txt", "b=2.txt"],
        "sequential": True,
        "heal_data": ["a=b.txt"],
    }
    assert step.out == Path("out/one")


def test_a_recipe_is_written_as_it_is_read(tmp_path):
    (tmp_path / "one.yaml").write_text(RECIPE)
    given = ["model=M", "text=T", "out=O"]
    recipe = load_recipe(tmp_path / "one.yaml", given)
    (tmp_path / "two.yaml").write_text(recipe_text(recipe, {"model": "M"}))
    assert yaml.safe_load((tmp_path / "two.yaml").read_text())["steps"][1]["model"] == "${pruned}"
    assert load_recipe(tmp_path / "two.yaml", []) == recipe
    assert load_recipe(tmp_path / "two.yaml", ["model=N"]).steps[0].places == {"model": Path("N")}


def test_a_damaged_record_is_refused(chain, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / FILE_NAME).write_text('{"steps": {"pruned": {"kee": 1}}}')
    with pytest.raises(MoetoolsError, match="not what a run writes"):
        chain()
