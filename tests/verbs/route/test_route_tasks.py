"""route-tasks from a folder on disk to a folder of verified checkpoints."""

import dataclasses
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moetools.checkpoint.writer import CheckpointWriter
from moetools.errors import DataError, UserError
from moetools.forward.options import ForwardOptions
from moetools.pipeline.options import Writing
from moetools.text.options import DataOptions
from moetools.verbs.route.html import heat_map
from moetools.verbs.route.options import RouteOptions
from moetools.verbs.route.report import RouteReport
from moetools.verbs.route.verb import route_tasks
from tests.families import make_tiny

CPU = ForwardOptions(device="cpu")
TASKS = ("low", "mid", "high")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("mixtral", tmp_path_factory.mktemp("model") / "mixtral")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three tasks, each with a part of the vocabulary of its own."""
    folder, generator = tmp_path_factory.mktemp("tokens"), torch.Generator().manual_seed(3)
    for number, task in enumerate(TASKS):
        low = 2 + 42 * number
        ids = torch.randint(low, low + 42, (30, 16), generator=generator)
        save_file({"input_ids": ids}, folder / f"{task}.safetensors")
    return [f"{task}={folder / task}.safetensors" for task in TASKS]


def run(model: Path, out: Path, tokens: list[str], **options: object) -> RouteReport:
    names = ("overwrite", "resume", "dry_run", "verify")
    writing = Writing(**{name: options.pop(name) for name in names if name in options})
    chosen = RouteOptions(**{"refit": "none", "keep": 4, "prefix": 8, **options})
    data = DataOptions(data=tokens, seq_len=16, batch_size=8)
    return route_tasks(model, out, chosen, data, CPU, writing, command="moetools test")


@pytest.fixture(scope="module")
def done(model: Path, tokens: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[RouteReport, Path]:
    out = tmp_path_factory.mktemp("done") / "out"
    levels = ["sentence", "sequence"]
    return run(model, out, tokens, union=["low+high"], level=levels, pool=["mean-probs", "seq-topk"]), out


@torch.no_grad()
def stock_perplexity(path: Path, ids: torch.Tensor) -> float:
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    log_probs = loaded(input_ids=ids, use_cache=False).logits[:, :-1].double().log_softmax(2)
    return (-log_probs.gather(2, ids[:, 1:, None]).mean()).exp().item()


def test_the_output_is_complete(done: tuple[RouteReport, Path]) -> None:
    report, out = done
    names = {"low", "mid", "high", "low+high", "README.md", "moetools.json", "report.html"}
    assert {entry.name for entry in out.iterdir()} == names | {"task_routing.json", "task_classifier.safetensors"}
    assert sorted(entry.name for entry in out.parent.iterdir()) == ["out"]
    for task in TASKS:
        config = json.loads((out / task / "config.json").read_text())
        assert config["num_local_experts"] == 4
        assert json.loads((out / task / "moetools.json").read_text())["out"] == str(out / task)
    stored = json.loads((out / "moetools.json").read_text())
    assert stored == json.loads(json.dumps(report.to_json()))
    assert stored["versions"]["moetools"]


def test_experts_are_sliced_from_the_full_checkpoint(done: tuple[RouteReport, Path], model: Path) -> None:
    _, out = done
    full = load_file(model / "model.safetensors")
    routing = json.loads((out / "task_routing.json").read_text())["tasks"]
    for task in TASKS:
        small = load_file(out / task / "model.safetensors")
        for layer, experts in routing[task].items():
            block = f"model.layers.{layer}.block_sparse_moe"
            assert torch.equal(small[f"{block}.gate.weight"], full[f"{block}.gate.weight"][experts])
            for new, old in enumerate(experts):
                for part in ("w1", "w2", "w3"):
                    name = f"{block}.experts.{{}}.{part}.weight"
                    assert torch.equal(small[name.format(new)], full[name.format(old)])


def test_perplexities_are_those_of_stock_transformers(
    done: tuple[RouteReport, Path], model: Path, tokens: list[str]
) -> None:
    """The last fifth of each task is held out: 6 of 30 sequences."""
    report, out = done
    for value in tokens:
        task, _, file = value.partition("=")
        held_out = load_file(file)["input_ids"][-6:].long()
        assert report.full is not None
        assert report.full.tasks[task].perplexity == pytest.approx(stock_perplexity(model, held_out), rel=1e-4)
        for output in report.outputs:
            found = output.metrics.tasks[task].perplexity
            assert found == pytest.approx(stock_perplexity(out / output.sets.name, held_out), rel=1e-4)


def test_sets_are_those_of_the_highest_scores(done: tuple[RouteReport, Path]) -> None:
    report, _ = done
    for number, output in enumerate(report.outputs[:3]):
        for layer, rows in report.scores.items():
            best = sorted(sorted(range(8), key=lambda expert: -rows[number][expert])[:4])
            assert list(output.sets.experts[layer]) == best
            share = sum(rows[number][expert] for expert in best) / sum(rows[number])
            assert output.sets.share[layer] == pytest.approx(share)


def test_a_union_holds_both_tasks_experts(done: tuple[RouteReport, Path]) -> None:
    report, out = done
    low, _, high, union = report.outputs
    most = 0
    for layer, experts in union.sets.experts.items():
        both = set(low.sets.experts[layer]) | set(high.sets.experts[layer])
        assert both <= set(experts)
        assert (union.sets.needed or {})[layer] == len(both)
        most = max(most, len(both))
    assert union.sets.keep == most
    assert json.loads((out / "low+high" / "config.json").read_text())["num_local_experts"] == most


def test_overlap_is_jaccard_beside_a_null(done: tuple[RouteReport, Path]) -> None:
    overlap = done[0].overlap
    assert overlap is not None
    for layer, matrix in overlap.layers.items():
        sets = [set(output.sets.experts[layer]) for output in done[0].outputs[:3]]
        for row, one in enumerate(sets):
            for column, other in enumerate(sets):
                assert matrix[row][column] == pytest.approx(len(one & other) / len(one | other))
    # The tasks' tokens differ, so do their experts: more than those of sequences dealt out at random.
    assert overlap.null_low <= overlap.null_mean <= 1
    assert overlap.mean < overlap.null_mean


def test_levels_say_what_looks_ahead(done: tuple[RouteReport, Path]) -> None:
    report, _ = done
    sequences = [one for one in report.levels if one.level.level == "sequence"]
    sentences = [one for one in report.levels if one.level.level == "sentence"]
    # mean-probs: two weights times two reaches, seq-topk: two reaches.
    assert len(sequences) == 6
    # The model has no tokenizer, so nobody knows where a sentence ends.
    assert all(one.metrics is None and "sentence ends" in one.refused for one in sentences)
    (table,) = [table for table in report.tables() if table.title == "routing level"]
    assert {row[1] for row in table.rows} == {"causal", "LOOKS AHEAD"}
    for one in sequences:
        assert one.metrics is not None
        assert one.metrics.agreement is not None
        assert one.metrics.agreement.kl > 0


def test_the_page_is_one_file_with_pictures(done: tuple[RouteReport, Path]) -> None:
    _, out = done
    page = (out / "report.html").read_text()
    assert not re.search(r"https?://|<link|src=", page)
    assert page.count("<script") == 1
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    for picture in pictures:
        ElementTree.fromstring(picture)
    # Quality, overlap and scores of three layers, memory.
    assert len(pictures) == 1 + 3 + 3 + 1
    HTMLParser().feed(page)


def test_heat_maps_mark_and_scale() -> None:
    picture = ElementTree.fromstring(
        heat_map("t", ["a<b"], ["x", "y"], [[0.0, 2.0]], marked=[[False, True]], text=lambda value: f"{value:.1f}")
    )
    cells = picture.findall("rect")
    assert [cell.get("fill") for cell in cells] == ["#f7fbff", "#08306b"]
    assert [cell.get("stroke") for cell in cells] == [None, "#111"]
    assert [cell.findtext("title") for cell in cells] == ["a<b, x: 0", "a<b, y: 2"]


def test_keeping_all_experts_is_the_identity(model: Path, tokens: list[str], tmp_path: Path) -> None:
    report = run(model, tmp_path / "out", tokens, keep=8, classifier="none", report=False)
    before = load_file(model / "model.safetensors")
    for output in report.outputs:
        after = load_file(tmp_path / "out" / output.sets.name / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert all(task.agreement is not None and task.agreement.kl == 0 for task in output.metrics.tasks.values())


@pytest.mark.parametrize("score", ["gate", "easy-ep"])
def test_top_p_keeps_its_share_in_every_layer(score: str, model: Path, tokens: list[str], tmp_path: Path) -> None:
    options = {"keep": None, "top_p": 0.8, "classifier": "none", "report": False, "verify": False}
    report = run(model, tmp_path / "out", tokens, score=score, **options)
    for number, output in enumerate(report.outputs):
        needed = output.sets.needed or {}
        assert output.sets.keep == max(needed.values())
        assert min(output.sets.share.values()) >= 0.8
        for layer, rows in report.scores.items():
            ranked = sorted(rows[number], reverse=True)
            assert sum(ranked[: needed[layer]]) >= 0.8 * sum(ranked) > sum(ranked[: needed[layer] - 1])
    (table,) = [table for table in report.tables() if "80 % of the score" in table.title]
    assert "most demanding layer" in table.note


def test_groups_keep_equally_many(tokens: list[str], tmp_path: Path) -> None:
    model = make_tiny("deepseek_v3", tmp_path / "model")
    with pytest.raises(UserError, match="breaks the router's 2 groups"):
        run(model, tmp_path / "out", tokens, keep=7)
    report = run(model, tmp_path / "out", tokens, keep=None, top_p=0.5, report=False, classifier="none", union=["all"])
    for output in report.outputs:
        for experts in output.sets.experts.values():
            assert sum(expert < 4 for expert in experts) * 2 == len(experts) == output.sets.keep
    assert [point.experts for point in report.curve] == [6, 8]


def test_a_refit_on_the_tasks_own_text_comes_closer(model: Path, tokens: list[str], tmp_path: Path) -> None:
    settings = {"classifier": "none", "report": False}
    plain = run(model, tmp_path / "plain", tokens[:2], verify=False, **settings)
    refitted = run(model, tmp_path / "refitted", tokens[:2], refit="joint", **settings)
    assert json.loads((tmp_path / "refitted" / "task_routing.json").read_text())["refitted"] == list(TASKS[:2])
    for one, other in zip(plain.outputs, refitted.outputs, strict=True):
        assert one.sets.experts == other.sets.experts
        task = one.sets.name
        kl = [found.metrics.tasks[task].agreement for found in (one, other)]
        assert kl[0] is not None
        assert kl[1] is not None
        assert kl[1].kl < kl[0].kl


def test_tuned_routers_serve_the_full_checkpoint_as_well(model: Path, tokens: list[str], tmp_path: Path) -> None:
    import moetools.hf  # noqa: F401

    out = tmp_path / "out"
    report = run(model, out, tokens[:2], tune_router=6, classifier="none", report=False)
    ids = torch.randint(2, 128, (2, 10), generator=torch.Generator().manual_seed(4))
    full = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    full.load_task_routing(out)
    for output in report.outputs:
        assert output.tuned is not None
        assert min(kl for _, kl in output.tuned) <= output.tuned[0][1]
        small = AutoModelForCausalLM.from_pretrained(out / output.sets.name, dtype=torch.float32).eval()
        full.set_task(output.sets.name)
        with torch.no_grad():
            assert torch.equal(full(input_ids=ids).logits, small(input_ids=ids).logits)
    stored = json.loads((out / "low" / "moetools.json").read_text())
    assert stored["healing"]["curve"] == [list(point) for point in report.outputs[0].tuned or ()]
    untuned = load_file(model / "model.safetensors")["model.layers.0.block_sparse_moe.gate.weight"]
    rows = report.outputs[0].sets.experts[0]
    tuned = load_file(out / "low" / "model.safetensors")["model.layers.0.block_sparse_moe.gate.weight"]
    assert report.outputs[0].tuned is not None
    assert not torch.equal(tuned, untuned[list(rows)])


def test_a_dry_run_writes_nothing(model: Path, tokens: list[str], tmp_path: Path) -> None:
    report = run(model, tmp_path / "out", tokens, dry_run=True)
    assert list(tmp_path.iterdir()) == []
    assert report.tokens == {"calibration": dict.fromkeys(TASKS, 384), "test": dict.fromkeys(TASKS, 96)}
    assert "dry run" in report.tables()[0].title


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": None}, "give either `keep` or `top_p`"),
        ({"top_p": 0.5}, "give either `keep` or `top_p`"),
        ({"keep": None, "top_p": 1.5}, "`top_p=1.5` is not above 0"),
        ({"keep": 1}, "`keep=1` is below top-k: every token uses 2"),
        ({"keep": 9}, "between 1 and the model's 8"),
        ({"score": "gait"}, "unknown score 'gait'"),
        ({"union": ["low+hihg"]}, "unknown task 'hihg'"),
        ({"union": ["low"]}, "does not name two or more"),
        ({"union": ["low+low"]}, "does not name two or more"),
        ({"union": ["low+high", "high+low"]}, "given twice"),
        ({"refit": "some"}, "unknown refit 'some'"),
        ({"level": ["word"]}, "unknown level 'word'"),
        ({"pool": ["max"]}, "unknown pool 'max'"),
        ({"classifier": "bert"}, "`classifier=bert` is unknown"),
        ({"threshold": 2.0}, "`threshold=2.0` is not between"),
        ({"prefix": 0}, "`prefix=0` is below 1"),
        ({"tune_router": -1}, "`tune_router=-1` is below 0"),
    ],
)
def test_unusable_options(
    options: dict, message: str, model: Path, tokens: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moetools.forward.stock.StockModel.read_layer", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(UserError, match=re.escape(message)):
        run(model, tmp_path / "out", tokens, **options)
    assert list(tmp_path.iterdir()) == []


def test_unusable_data(model: Path, tokens: list[str], tmp_path: Path) -> None:
    file = tokens[0].partition("=")[2]
    with pytest.raises(UserError, match=r"one task only \('low'\)"):
        run(model, tmp_path / "out", tokens[:1])
    for name in ("..", ".hidden", "moetools.json"):
        with pytest.raises(UserError, match="cannot be a folder"):
            run(model, tmp_path / "out", [f"{name}={file}", *tokens[1:]])
    with pytest.raises(UserError, match="differ in case only"):
        run(model, tmp_path / "out", [*tokens, f"LOW={file}"])
    with pytest.raises(UserError, match="'low' and 'again' share their data"):
        run(model, tmp_path / "out", [*tokens, f"again={file}"])
    copy = tmp_path / "copy.safetensors"
    ids = load_file(file)["input_ids"]
    save_file(
        {
            "input_ids": torch.cat(
                [torch.randint(2, 128, (20, 16), generator=torch.Generator().manual_seed(4)), ids[:3]]
            )
        },
        copy,
    )
    with pytest.raises(UserError, match="'low' and 'copy' share 3 sequences"):
        run(model, tmp_path / "out", [*tokens, f"copy={copy}"])
    with pytest.raises(UserError, match="`test` is for the tasks copy"):
        run(model, tmp_path / "out", tokens, test=[f"copy={copy}"])
    save_file({"input_ids": torch.randint(2, 128, (9, 16), generator=torch.Generator().manual_seed(4))}, copy)
    message = r"'copy' has 112 tokens to choose its experts on: 28 slots for each of 8 experts at top-2, fewer than 32"
    with pytest.raises(DataError, match=message):
        run(model, tmp_path / "out", [*tokens, f"copy={copy}"])


def test_tasks_that_share_documents_are_refused(model: Path, tmp_path: Path) -> None:
    for name, words in (("a", ["one", "two", "three"]), ("b", ["four", "two", "one"])):
        lines = "\n".join(json.dumps({"text": word}) for word in words)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    with pytest.raises(UserError, match="tasks 'a' and 'b' share 2 documents"):
        run(model, tmp_path / "out", [f"a={tmp_path / 'a.jsonl'}", f"b={tmp_path / 'b.jsonl'}"])


def test_an_interrupted_run_resumes(
    model: Path, tokens: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"classifier": "none", "report": False}
    run(model, tmp_path / "whole", tokens, **settings)
    write_unit, written = CheckpointWriter.write_unit, []

    def interrupted(self: CheckpointWriter, unit: str, *args: object) -> None:
        written.append((self.staging.name, unit))
        if written[-1] == (".mid.moetools-staging", "layer-00001"):
            raise KeyboardInterrupt
        write_unit(self, unit, *args)

    monkeypatch.setattr(CheckpointWriter, "write_unit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "out", tokens, **settings)
    assert not (tmp_path / "out").exists()
    written.clear()
    monkeypatch.setattr(CheckpointWriter, "write_unit", lambda *args: (written.append(args[1]), write_unit(*args)))
    with pytest.raises(UserError, match="other settings"):
        run(model, tmp_path / "out", tokens, keep=5, resume=True, **settings)
    run(model, tmp_path / "out", tokens, resume=True, **settings)
    # The first task was finished, the second had two units.
    assert len(written) == 2 + 4
    for task in TASKS:
        one, other = (tmp_path / name / task / "model.safetensors" for name in ("whole", "out"))
        assert one.read_bytes() == other.read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "whole"]


def test_an_output_is_replaced_only_when_asked(model: Path, tokens: list[str], tmp_path: Path) -> None:
    settings = {"classifier": "none", "report": False, "verify": False}
    run(model, tmp_path / "out", tokens, **settings)
    with pytest.raises(UserError, match="exists"):
        run(model, tmp_path / "out", tokens, **settings)
    report = run(model, tmp_path / "out", tokens, **settings, overwrite=True)
    assert dataclasses.asdict(report)["verified"] is False
