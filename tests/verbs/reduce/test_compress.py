"""prune-experts and merge-experts from a folder on disk to a verified folder on disk."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moetools.checkpoint.reader import open_checkpoint
from moetools.errors import CheckpointError, MoetoolsError, StatisticsError, UserError, VerificationError
from moetools.forward.stock import StockModel
from moetools.forward.streaming import StreamedModel
from moetools.text.options import DataOptions
from moetools.text.tokens import TokenBatch
from moetools.verbs.reduce.report import ReduceReport
from tests.families import FAMILIES, make_tiny
from tests.verbs.reduce.reducing import CPU, reduce

STOCK_CHECK = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM
transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()
torch.set_num_threads(1)
ids = torch.tensor(json.loads(sys.argv[1]))
for path in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    bad = {key: str(value) for key, value in info.items() if value and key.endswith(("_keys", "_msgs"))}
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, use_cache=False).logits
    torch.save(logits, path + "/stock_logits.pt")
    print(path, "BAD" if bad else "good", bad)
assert "moetools" not in sys.modules
"""


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save_file({"input_ids": torch.randint(2, 128, (24, 16), generator=torch.Generator().manual_seed(3))}, file)
    return file


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    return make_tiny("mixtral", tmp_path / "mixtral")


def data(tokens: Path) -> DataOptions:
    return DataOptions(data=[f"random={tokens}"], seq_len=16, batch_size=6)


def run(verb: str, model: Path, out: Path, tokens: Path | None, **options: object) -> ReduceReport:
    settings = {"method": "reap" if verb == "prune" else "hc-smoe", **options}
    return reduce(verb, model, out, data(tokens) if tokens else None, **settings)


def streamed_logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    model = StreamedModel(open_checkpoint(path), CPU)
    batch = TokenBatch(input_ids=ids, attention_mask=None, task=torch.zeros(len(ids), dtype=torch.int64))
    with torch.inference_mode():
        hidden = model.skeleton.enter(batch)[0]
        for layer in model.layers():
            hidden = model.run_layer(layer, batch, hidden)
        return model.skeleton.logits(batch, hidden).clone()


def test_every_family_loads_in_stock_transformers(tmp_path: Path, tokens: Path) -> None:
    outputs = []
    for family in FAMILIES:
        model = make_tiny(family, tmp_path / family)
        for verb, target in (("prune", 6), ("merge", 6)):
            out = tmp_path / f"{family}-{verb}"
            run(verb, model, out, tokens, target=target)
            outputs.append(out)
    ids = torch.randint(2, 128, (2, 12), generator=torch.Generator().manual_seed(4))
    check = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STOCK_CHECK, json.dumps(ids.tolist()), *map(str, outputs)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert check.returncode == 0, check.stderr
    assert check.stdout.count(" good ") == len(outputs), check.stdout
    for out in outputs:
        assert torch.equal(torch.load(out / "stock_logits.pt"), streamed_logits(out, ids)), out.name


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss", "granitemoe", "deepseek_v2", "ernie4_5_moe"])
def test_merging_to_one_expert_gives_a_working_model(family: str, tmp_path: Path, tokens: Path) -> None:
    model = make_tiny(family, tmp_path / "model")
    report = run("merge", model, tmp_path / "out", tokens, target=1)
    assert report.after["experts"] == 1
    assert report.verified
    logits = streamed_logits(
        tmp_path / "out", torch.randint(2, 128, (1, 8), generator=torch.Generator().manual_seed(4))
    )
    assert logits.isfinite().all()


@pytest.mark.parametrize("verb", ["prune", "merge"])
def test_keeping_every_expert_is_the_identity(verb: str, mixtral: Path, tmp_path: Path, tokens: Path) -> None:
    run(verb, mixtral, tmp_path / "out", tokens, target=8)
    before, after = load_file(mixtral / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (mixtral / "config.json").read_bytes().split() == (tmp_path / "out" / "config.json").read_bytes().split()


def test_only_the_keys_that_must_change_change_in_config_json(tmp_path: Path, tokens: Path) -> None:
    model = make_tiny("deepseek_v3", tmp_path / "model")
    run("prune", model, tmp_path / "out", tokens, target=6)
    before = json.loads((model / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: value for key, value in after.items() if before.get(key) != value} == {"n_routed_experts": 6}
    assert list(before) == list(after)


def test_everything_untouched_is_carried_over(mixtral: Path, tmp_path: Path, tokens: Path) -> None:
    (mixtral / "chat_template.jinja").write_text("{{ messages }}")
    (mixtral / "tokenizer.json").write_bytes(b'{"odd":  "spacing"}')
    weights = load_file(mixtral / "model.safetensors")
    weights["model.layers.3.mtp.weight"] = torch.randn(3, 5, generator=torch.Generator().manual_seed(4))
    save_file(weights, mixtral / "model.safetensors", metadata={"format": "pt"})
    run("prune", mixtral, tmp_path / "out", tokens, target=4)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b'{"odd":  "spacing"}'
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name in written:
        if "block_sparse_moe" not in name:
            assert torch.equal(written[name], weights[name]), name


def test_the_report_tells_what_was_done(mixtral: Path, tmp_path: Path, tokens: Path) -> None:
    report = run("prune", mixtral, tmp_path / "out", tokens, target=4)
    stored = json.loads((tmp_path / "out" / "moetools.json").read_text())
    assert stored == json.loads(json.dumps(report.to_json()))
    assert stored["before"]["experts"] == 8
    assert stored["after"]["bytes"] == open_checkpoint(tmp_path / "out").total_bytes
    assert stored["input_fingerprint"] == open_checkpoint(mixtral).fingerprint()
    assert len(stored["layers"]["0"]["clusters"]) == 4
    assert "moetools test" in (tmp_path / "out" / "README.md").read_text()
    assert [table.title for table in report.tables()][1] == "decisions"


def test_reap_keeps_the_most_salient_experts(mixtral: Path, tmp_path: Path, tokens: Path) -> None:
    report = run("prune", mixtral, tmp_path / "out", tokens, target=3)
    for decision in report.layers.values():
        scores = decision.details["scores"]
        best = sorted(sorted(range(8), key=lambda expert: -scores[expert])[:3])
        assert [cluster[0] for cluster in decision.clusters] == best


def test_saved_statistics_give_the_same_output(mixtral: Path, tmp_path: Path, tokens: Path) -> None:
    stats = tmp_path / "stats.safetensors"
    run("merge", mixtral, tmp_path / "first", tokens, target=4, save_stats=stats)
    run("merge", mixtral, tmp_path / "second", None, target=4, stats=stats)
    first, second = (tmp_path / name / "model.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_stale_statistics_are_refused(mixtral: Path, tmp_path: Path, tokens: Path) -> None:
    stats = tmp_path / "stats.safetensors"
    run("prune", mixtral, tmp_path / "first", tokens, target=4, save_stats=stats)
    other = make_tiny("mixtral", tmp_path / "other", seed=9)
    with pytest.raises(StatisticsError, match="another model"):
        run("prune", other, tmp_path / "out", None, target=4, stats=stats)
    with pytest.raises(StatisticsError, match="lack mean_output"):
        run("merge", mixtral, tmp_path / "out", None, target=4, stats=stats)
    different = tmp_path / "different.safetensors"
    save_file({"input_ids": torch.randint(2, 128, (24, 16), generator=torch.Generator().manual_seed(4))}, different)
    with pytest.raises(StatisticsError, match="other tokens"):
        run("prune", mixtral, tmp_path / "out", different, target=4, stats=stats)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing(mixtral: Path, tmp_path: Path, tokens: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    report = run("prune", mixtral, tmp_path / "out", tokens, target=4, dry_run=True)
    assert sorted(tmp_path.rglob("*")) == before
    real = run("prune", mixtral, tmp_path / "out", tokens, target=4)
    assert report.after["experts"] == 4
    assert report.after["bytes"] == pytest.approx(real.after["bytes"], rel=0.02)
    assert report.seconds["expected"] >= 0


def test_a_wrong_tensor_on_disk_is_found_and_not_published(
    mixtral: Path, tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = StockModel.disk_tensors

    def swapped(self: StockModel, *args: object) -> dict[str, torch.Tensor]:
        tensors = right(self, *args)
        one, two = (f"model.layers.1.block_sparse_moe.experts.{expert}.w1.weight" for expert in (0, 1))
        if one in tensors:
            tensors[one], tensors[two] = tensors[two], tensors[one]
        return tensors

    monkeypatch.setattr(StockModel, "disk_tensors", swapped)
    with pytest.raises(VerificationError, match=r"layer 1: 'mlp.experts.gate_up_proj' does not load"):
        run("prune", mixtral, tmp_path / "out", tokens, target=4)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 1, "method": "reap"}, None),
        ({"target": 0}, "between 1 and the model's 8"),
        ({"target": 9}, "between 1 and the model's 8"),
        ({"target": 4, "ratio": 0.5}, "give either `keep` or `ratio`"),
        ({}, "give either `keep` or `ratio`"),
        ({"ratio": 1.0}, "not between 0 and 1"),
        ({"ratio": 0.5, "method": "raep"}, "unknown prune method 'raep'"),
        ({"ratio": 0.5, "method": "aoto"}, r"unknown prune method 'aoto'; legal: .*explicit, auto"),
        ({"target": 4, "save_stats": Path("/nowhere/at/all.safetensors")}, "does not exist"),
    ],
)
def test_unusable_options(options: dict, message: str | None, mixtral: Path, tmp_path: Path, tokens: Path) -> None:
    if message is None:
        assert run("prune", mixtral, tmp_path / "out", tokens, **options).after["experts"] == 1
        return
    with pytest.raises(UserError, match=message):
        run("prune", mixtral, tmp_path / "out", tokens, **options)
    assert not (tmp_path / "out").exists()


def test_targets_below_top_k_and_broken_groups_are_refused(tmp_path: Path, tokens: Path) -> None:
    model = make_tiny("olmoe", tmp_path / "olmoe")
    with pytest.raises(UserError, match="below top-k: every token uses 3 experts"):
        run("prune", model, tmp_path / "out", tokens, target=2)
    grouped = make_tiny("deepseek_v3", tmp_path / "deepseek")
    with pytest.raises(UserError, match="breaks the router's 2 groups"):
        run("prune", grouped, tmp_path / "out", tokens, target=7)
    with pytest.raises(UserError, match="need at least 2 experts"):
        run("merge", grouped, tmp_path / "out", tokens, target=1)


def test_a_method_that_measures_needs_text(mixtral: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs text"):
        run("prune", mixtral, tmp_path / "out", None, target=4)
    assert run("prune", mixtral, tmp_path / "out", None, target=4, method="random").after["experts"] == 4


def test_the_output_must_not_touch_the_input(mixtral: Path, tmp_path: Path, tokens: Path) -> None:
    for out in (mixtral, mixtral / "inside"):
        with pytest.raises(UserError):
            run("prune", mixtral, out, tokens, target=4, overwrite=True)
    run("prune", mixtral, tmp_path / "out", tokens, target=4)
    with pytest.raises(UserError, match="exists"):
        run("prune", mixtral, tmp_path / "out", tokens, target=4)
    assert run("prune", mixtral, tmp_path / "out", tokens, target=5, overwrite=True).after["experts"] == 5


def test_a_damaged_input_is_refused_before_any_work(mixtral: Path, tmp_path: Path, tokens: Path) -> None:
    file = mixtral / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        run("prune", mixtral, tmp_path / "out", tokens, target=4)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_run_resumes_from_the_last_finished_layer(
    mixtral: Path, tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moetools.checkpoint.writer import CheckpointWriter

    run("prune", mixtral, tmp_path / "whole", tokens, target=4)
    write_unit = CheckpointWriter.write_unit
    written: list[str] = []

    def interrupted(self: CheckpointWriter, unit: str, *args: object) -> None:
        if unit == "layer-00002" and not written:
            raise KeyboardInterrupt
        write_unit(self, unit, *args)

    def counted(self: CheckpointWriter, unit: str, *args: object) -> None:
        written.append(unit)
        write_unit(self, unit, *args)

    monkeypatch.setattr(CheckpointWriter, "write_unit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("prune", mixtral, tmp_path / "out", tokens, target=4)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="other settings"):
        run("prune", mixtral, tmp_path / "out", tokens, target=5, resume=True)
    monkeypatch.setattr(CheckpointWriter, "write_unit", counted)
    run("prune", mixtral, tmp_path / "out", tokens, target=4, resume=True)
    assert written == ["layer-00002"]
    one, other = (tmp_path / name / "model.safetensors" for name in ("whole", "out"))
    assert one.read_bytes() == other.read_bytes()


def test_errors_are_one_line_with_an_exit_code(mixtral: Path, tmp_path: Path, tokens: Path) -> None:
    with pytest.raises(MoetoolsError) as caught:
        run("prune", mixtral, tmp_path / "out", tokens, target=4, method="frequncy")
    assert "\n" not in caught.value.message
    assert caught.value.hint == "did you mean 'frequency'?"
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("by_file", [False, True])
def test_an_explicit_list_is_kept(by_file: bool, mixtral: Path, tmp_path: Path) -> None:
    listed, text = {layer: [6, 0, 5] for layer in range(3)}, "6, 0,5"
    if by_file:
        listed[1] = [7, 2, 1]
        text = str(tmp_path / "experts.json")
        Path(text).write_text(json.dumps(listed))
    report = run("prune", mixtral, tmp_path / "out", None, method="explicit", experts=text)
    assert report.verified
    before, after = load_file(mixtral / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for layer, kept in listed.items():
        block = f"model.layers.{layer}.block_sparse_moe"
        assert torch.equal(after[f"{block}.gate.weight"], before[f"{block}.gate.weight"][sorted(kept)])
        for new, old in enumerate(sorted(kept)):
            name = f"{block}.experts.{{}}.w2.weight"
            assert torch.equal(after[name.format(new)], before[name.format(old)])


@pytest.mark.parametrize(
    ("experts", "options", "message"),
    [
        ("0,1,8", {}, "layer 0: no expert 8; legal: 0 to 7"),
        ("0,1,1", {}, "layer 0: expert 1 is listed more than once"),
        ("0,1,2", {"target": 4}, "layer 0: 3 experts listed, 4 wanted"),
        ("0,-1,2", {}, "'-1' is not the number of an expert"),
        ("0,,2", {}, "'' is not the number of an expert"),
        ("nowhere.json", {}, "nowhere.json`: No such file"),
        ({"0": [0, 1], "1": [0, 1, 2], "2": [0, 1]}, {}, "2 experts for layer 0 and 3 for layer 1"),
        ({"0": [0, 1], "1": [0, 1]}, {}, "lists nothing for layer 2"),
        ({"0": [0, 1], "1": [0, 1], "2": [1, 2], "9": [0, 1]}, {}, "lists layer 9, which has no routed experts"),
        ({"0": [0, True]}, {}, "layer 0: True is not the number of an expert"),
        ({}, {}, "holds neither a list nor an object"),
        ("0,1", {"method": "reap"}, "`method=reap` chooses them"),
        (None, {}, "`method=explicit` needs a list"),
    ],
)
def test_lists_that_cannot_be_kept_are_refused(
    experts: object, options: dict, message: str, mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StockModel, "read_layer", lambda *_: pytest.fail("a weight was read"))
    if isinstance(experts, dict):
        (tmp_path / "list.json").write_text(json.dumps(experts))
        experts = str(tmp_path / "list.json")
    with pytest.raises(UserError, match=message):
        run("prune", mixtral, tmp_path / "out", None, **{"method": "explicit", "experts": experts, **options})
    assert not (tmp_path / "out").exists()


def test_an_explicit_list_respects_router_groups(tmp_path: Path) -> None:
    model = make_tiny("deepseek_v3", tmp_path / "model")
    with pytest.raises(UserError, match="the router groups would keep 4, 2 experts"):
        run("prune", model, tmp_path / "out", None, method="explicit", experts="0,1,2,3,4,5")
    run("prune", model, tmp_path / "out", None, method="explicit", experts="0,1,2,4,5,6")
