"""Task routing at run time on stock models, beside the checkpoints that `route-tasks` extracts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import moetools.hf
from moetools.errors import CheckpointError, UserError
from moetools.forward.options import ForwardOptions
from moetools.pipeline.options import Writing
from moetools.routing.classifier import load_classifier
from moetools.text.options import DataOptions
from moetools.verbs.route.verb import RouteOptions, route_tasks
from tests.families import FAMILIES, make_tiny

CPU = ForwardOptions(device="cpu")
assert moetools.hf.routing

STOCK_LOGITS = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM
transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()
torch.set_num_threads(1)
ids = torch.tensor(json.loads(sys.argv[1]))
for path in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(value for key, value in info.items() if key.endswith(("_keys", "_msgs"))), (path, info)
    with torch.no_grad():
        torch.save(model.eval()(input_ids=ids, use_cache=False).logits, path + ".logits.pt")
assert "moetools" not in sys.modules
"""


def write_tokens(folder: Path, rows: int = 30) -> list[str]:
    """Two tasks that use different halves of the vocabulary."""
    generator = torch.Generator().manual_seed(5)
    values = []
    for name, low in (("low", 2), ("high", 66)):
        file = folder / f"{name}.safetensors"
        save_file({"input_ids": torch.randint(low, low + 60, (rows, 16), generator=generator)}, file)
        values.append(f"{name}={file}")
    return values


def routed(folder: Path, model: Path, **options: object) -> Path:
    out = folder / f"{model.parent.name}-{model.name}-out"
    chosen = RouteOptions(**{"score": "output", "keep": 6, "prefix": 8, "report": False, "refit": "none", **options})
    data = DataOptions(data=write_tokens(folder), seq_len=16, batch_size=8)
    route_tasks(model, out, chosen, data, CPU, Writing(verify=False), command="moetools test")
    return out


def load(path: Path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model, ids, **more):
    return model(input_ids=ids, use_cache=False, **more).logits


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, dict[str, tuple[Path, Path]]]:
    """family -> (full checkpoint, output with stock logits of each task beside its folder)."""
    folder = tmp_path_factory.mktemp("routed")
    found = {}
    for family in FAMILIES:
        model = make_tiny(family, folder / family)
        union = ["low+high"] if family == "mixtral" else []
        found[family] = model, routed(folder, model, union=union)
    ids = torch.randint(2, 128, (3, 12), generator=torch.Generator().manual_seed(1))
    paths = [str(out / task) for _, out in found.values() for task in ("low", "high")]
    command = [sys.executable, "-W", "ignore", "-c", STOCK_LOGITS, json.dumps(ids.tolist()), *paths]
    subprocess.run(command, check=True, cwd=folder)
    return ids, found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_masked_full_model_equals_the_extracted_checkpoint_bit_for_bit(family, outputs):
    ids, found = outputs
    path, out = found[family]
    model = load(path)
    before = logits(model, ids)
    model.load_task_routing(out)
    assert torch.equal(logits(model, ids), before)
    for task in ("low", "high"):
        model.set_task(task)
        assert torch.equal(logits(model, ids), torch.load(out / f"{task}.logits.pt")), task
    model.set_task(None)
    assert torch.equal(logits(model, ids), before)
    model.clear_task_routing()
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_mixed_tasks_equals_its_sequences_apart(family, outputs):
    ids, found = outputs
    path, out = found[family]
    model = load(path)
    model.load_task_routing(out)
    tasks = ["high", None, "low"]
    model.set_task(tasks)
    mixed = logits(model, ids)
    for row, task in enumerate(tasks):
        model.set_task(task)
        torch.testing.assert_close(mixed[row], logits(model, ids[row : row + 1])[0], rtol=1e-4, atol=1e-4)


def test_the_tasks_choose_different_experts(outputs):
    _, found = outputs
    differing = 0
    for _, out in found.values():
        tasks = json.loads((out / "task_routing.json").read_text())["tasks"]
        assert all(len(experts) == 6 for sets in tasks.values() for experts in sets.values())
        differing += tasks["low"] != tasks["high"]
    assert differing >= len(found) - 2


def test_a_union_serves_its_tasks_through_its_own_file(outputs):
    ids, found = outputs
    _, out = found["mixtral"]
    model = load(out / "low+high")
    model.load_task_routing(out / "low+high")
    for task in ("low", "high"):
        model.set_task(task)
        assert torch.equal(logits(model, ids), torch.load(out / f"{task}.logits.pt"))


def test_generation_stays_on_the_task(outputs):
    ids, found = outputs
    path, out = found["mixtral"]
    model, small = load(path), load(out / "high")
    model.load_task_routing(out)
    model.set_task(["high", "low", "high"])
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    mixed = model.generate(ids, **settings)
    assert torch.equal(mixed[0], small.generate(ids[:1], **settings)[0])
    beams = model.generate(ids, num_beams=2, **settings)
    assert torch.equal(beams[0], small.generate(ids[:1], num_beams=2, **settings)[0])


def test_a_causal_level_generates_what_the_whole_sequence_gives(outputs):
    """With a cache, token by token, or all at once: the same logits."""
    ids, found = outputs
    for family in ("mixtral", "deepseek_v3"):
        path, out = found[family]
        routing = json.loads((out / "task_routing.json").read_text())
        routing["sentence_end_ids"] = list(range(0, 128, 5))
        (out / "with_ends.json").write_text(json.dumps(routing))
        model = load(path)
        model.load_task_routing(out / "with_ends.json")
        for settings in (
            {"level": "sentence", "reach": "previous"},
            {"level": "sentence", "reach": "running", "pool": "mean-logits"},
            {"level": "sequence", "reach": "running", "weights": "unit"},
        ):
            model.set_routing_level(**settings)
            whole = logits(model, ids)
            with torch.no_grad():
                step = model(input_ids=ids[:, :5], use_cache=True)
                parts = [step.logits]
                for place in range(5, ids.shape[1]):
                    next_ids, cache = ids[:, place : place + 1], step.past_key_values
                    step = model(input_ids=next_ids, past_key_values=cache, use_cache=True)
                    parts.append(step.logits)
            torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-3, atol=1e-3)
            assert not torch.equal(whole, parts[0])


def test_looking_ahead_cannot_generate(outputs):
    ids, found = outputs
    path, out = found["mixtral"]
    model = load(path)
    model.load_task_routing(out)
    model.set_routing_level("sequence", reach="lookahead")
    logits(model, ids)
    with pytest.raises(UserError, match=r"LOOKS AHEAD.* cannot generate"):
        model.generate(ids, max_new_tokens=2, pad_token_id=1)


def test_prompts_are_told_apart_by_their_tokens(outputs):
    _, found = outputs
    path, out = found["mixtral"]
    model = load(path)
    model.load_task_routing(out)
    assert json.loads((out / "moetools.json").read_text())["classifier"]["accuracy"] == 1.0
    prompts = torch.cat([torch.full((2, 8), 1), torch.stack([torch.arange(70, 78), torch.arange(10, 18)])], 1)
    mask = torch.tensor([[0] * 8 + [1] * 8] * 2)
    chosen = model.choose_task(prompts, mask)
    assert chosen == ["high", "low"]
    model.set_task(chosen)


@pytest.mark.parametrize("family", ["mixtral", "minimax_m2"])
def test_prompts_are_told_apart_by_their_routing(family, tmp_path, outputs):
    """What the classifier is shown at run time equals the routers' probabilities as stock transformers reports them."""
    path = outputs[1][family][0]
    out = routed(tmp_path, path, classifier="router", threshold=0.0, prefix=8)
    model = load(path)
    ids = torch.randint(2, 128, (1, 8))
    with torch.no_grad():
        layers = model(input_ids=ids, use_cache=False, output_router_logits=True).router_logits
    scores = [layer.double().sigmoid() if family == "minimax_m2" else layer.double().exp() for layer in layers]
    expected = torch.cat([(layer / layer.sum(1, keepdim=True)).mean(0) for layer in scores])[None]
    model.load_task_routing(out)
    model.set_task("low")
    classifier = load_classifier(out / "task_classifier.safetensors")
    found = classifier.tasks[int(classifier.probabilities(expected).argmax())]
    assert model.choose_task(ids) == [found]
    routing = model.__dict__["_moetools_task_routing"]
    torch.testing.assert_close(routing._router_probabilities(ids[0]), expected, rtol=1e-5, atol=1e-7)


def test_refusals(outputs, tmp_path):
    ids, found = outputs
    path, out = found["mixtral"]
    model = load(path)
    with pytest.raises(UserError, match="no task routing"):
        model.set_task("low")
    with pytest.raises(CheckpointError, match="cannot be read"):
        model.load_task_routing(tmp_path)
    model.load_task_routing(out)
    with pytest.raises(UserError, match="unknown task 'lov'; legal: high, low"):
        model.set_task("lov")
    model.set_task(["low", "high"])
    with pytest.raises(UserError, match="3 sequences, and tasks were set for 2"):
        logits(model, ids)
    with pytest.raises(UserError, match="for 8 experts per layer, this model has 6"):
        load(out / "low").load_task_routing(out)
    other = load(make_tiny("mixtral", tmp_path / "other", seed=4))
    with pytest.raises(UserError, match="another checkpoint"):
        other.load_task_routing(out)
    with pytest.raises(UserError, match="routing pool 'median'"):
        model.set_routing_level("sentence", pool="median")
    (tmp_path / "task_routing.json").write_text('{"format": "moetools-task-routing-1"}')
    with pytest.raises(CheckpointError, match="damaged"):
        model.load_task_routing(tmp_path)
