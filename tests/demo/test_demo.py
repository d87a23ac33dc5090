"""The embedded demo is what its README says: loadable, small, trained, specialised, and cleanly split."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from moetools.demo import demo_data_path, demo_model_path, install_demo
from moetools.errors import UserError

TASKS = ("code", "prose", "french", "arithmetic")
LAYERS, EXPERTS, TOP_K, WINDOW = 4, 16, 4, 256
VOCABULARY = 2048


def read(name):
    lines = (demo_data_path() / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo_model_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def observed(model, tokenizer):
    """Per task: mean loss in nats on the held-out text, and counts [L, N, E] of experts chosen per window."""
    found = {}
    for task in TASKS:
        ids = [i for row in read(f"{task}/test.jsonl") for i in [0, *tokenizer(row["text"]).input_ids]]
        rows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
        chosen = [[] for _ in range(LAYERS)]
        hooks = [
            layer.mlp.gate.register_forward_hook(lambda _m, _i, out, kept=kept: kept.append(out[2]))
            for layer, kept in zip(model.model.layers, chosen, strict=True)
        ]
        with torch.no_grad():
            losses = [
                model(input_ids=batch, labels=batch, use_cache=False).loss * len(batch) for batch in rows.split(16)
            ]
        for hook in hooks:
            hook.remove()
        counts = [[torch.bincount(w, minlength=EXPERTS) for w in torch.cat(c).view(len(rows), -1)] for c in chosen]
        found[task] = (sum(losses).item() / len(rows), torch.stack([torch.stack(c) for c in counts]).double())
    return found


def test_importing_the_package_loads_no_heavy_library():
    script = "import sys, moetools.demo; sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_checkpoint_loads_without_missing_or_unexpected_keys():
    _, report = AutoModelForCausalLM.from_pretrained(demo_model_path(), output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]


def test_files_are_small():
    assert (demo_model_path() / "model.safetensors").stat().st_size < 8_000_000
    everything = sum(path.stat().st_size for path in demo_data_path().rglob("*") if path.is_file())
    assert everything < 1_200_000


def test_config_has_the_keys_of_public_checkpoints():
    config = json.loads((demo_model_path() / "config.json").read_text())
    assert config["architectures"] == ["Qwen2MoeForCausalLM"]
    assert config["torch_dtype"] == "bfloat16"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert (config["num_experts"], config["num_experts_per_tok"]) == (EXPERTS, TOP_K)


def test_tensors_are_laid_out_as_in_public_checkpoints():
    with (demo_model_path() / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__")
    mlp = "model.layers.{}.mlp."
    for layer in range(LAYERS):
        own = {name.removeprefix(mlp.format(layer)) for name in header if name.startswith(mlp.format(layer))}
        projections = [f"{kind}_proj.weight" for kind in ("gate", "up", "down")]
        experts = {f"experts.{e}.{p}" for e in range(EXPERTS) for p in projections}
        shared = {f"shared_expert.{p}" for p in projections}
        assert own == experts | shared | {"gate.weight", "shared_expert_gate.weight"}
    assert {tensor["dtype"] for tensor in header.values()} == {"BF16"}


def test_tokenizer_is_lossless_and_has_its_special_tokens(tokenizer):
    assert len(tokenizer) == VOCABULARY
    assert tokenizer.convert_ids_to_tokens([0, 1]) == ["<|endoftext|>", "<|pad|>"]
    assert tokenizer.unk_token is None
    for text in ("def f(x):\n    return x  # λ", "Où est l'hôtel ?", "12 + 39 = 51.", "\t\U0001f600"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_digits_are_single_tokens(tokenizer):
    assert len(tokenizer("2024").input_ids) == 4


def test_generation_continues_a_sum(model, tokenizer):
    prompt = tokenizer("Question: What is 40 + 23?\nAnswer:", return_tensors="pt")
    out = model.generate(
        **prompt, generation_config=GenerationConfig(max_new_tokens=40, do_sample=False, pad_token_id=1)
    )
    assert tokenizer.decode(out[0], skip_special_tokens=True).endswith(" The answer is 63.")


@pytest.mark.parametrize(("task", "bound"), [("code", 18.0), ("prose", 19.6), ("french", 15.5), ("arithmetic", 1.55)])
def test_held_out_perplexity(observed, tokenizer, task, bound):
    """Far below the uniform guess and below the best guess that knows how frequent each token is in this text."""
    perplexity = math.exp(observed[task][0])
    assert perplexity < bound < VOCABULARY / 100
    ids = torch.tensor([i for row in read(f"{task}/test.jsonl") for i in tokenizer(row["text"]).input_ids])
    frequency = torch.bincount(ids) / len(ids)
    assert perplexity < torch.special.entr(frequency).sum().exp().item() / 10


@pytest.mark.parametrize("task", TASKS)
def test_the_record_of_the_training_says_what_is_measured_here(observed, task):
    record = json.loads((Path(__file__).with_name("making") / "training.json").read_text())
    assert math.exp(observed[task][0]) == pytest.approx(record["measured_on_test"]["perplexity"][task], rel=0.01)
    assert record["training"]["tokens"] == record["config"]["steps"] * 16 * WINDOW


def mutual_information(counts_NE, labels_N):
    joint = torch.stack([counts_NE[labels_N == task].sum(0) for task in range(len(TASKS))])
    joint = joint / joint.sum()
    entropy = [-(p * p.clamp_min(1e-30).log2()).sum() for p in (joint.sum(0), joint.sum(1), joint)]
    return (entropy[0] + entropy[1] - entropy[2]).item()


@pytest.mark.parametrize("layer", range(LAYERS))
def test_routing_tells_the_tasks_apart(observed, layer):
    """The tasks of whole windows are shuffled for the null: tokens of one window are not independent."""
    counts = torch.cat([observed[task][1][layer] for task in TASKS])
    labels = torch.cat([torch.full((observed[task][1].shape[1],), i) for i, task in enumerate(TASKS)])
    generator = torch.Generator().manual_seed(0)
    null = [mutual_information(counts, labels[torch.randperm(len(labels), generator=generator)]) for _ in range(30)]
    assert mutual_information(counts, labels) > 5 * max(null)
    assert mutual_information(counts, labels) > 0.1


def test_every_expert_is_used(observed):
    counts = torch.cat([observed[task][1] for task in TASKS], dim=1).sum(1)
    assert (counts / counts.sum(1, keepdim=True)).min() > 0.001


def test_losing_the_least_used_half_of_the_experts_hurts(observed, tokenizer):
    usage = sum(observed[task][1].sum(1) for task in TASKS)
    crippled = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32).eval()
    for layer, ids in zip(crippled.model.layers, usage.argsort(1)[:, : EXPERTS // 2], strict=True):
        mask = torch.zeros(EXPERTS).index_fill(0, ids, -1e9)
        weight = layer.mlp.gate.weight

        def gate(module, inputs, _output, mask=mask, weight=weight):
            logits = inputs[0].reshape(-1, weight.shape[1]) @ weight.T + mask
            return logits, *logits.softmax(-1).topk(module.top_k)

        layer.mlp.gate.register_forward_hook(gate)
    for task in TASKS:
        ids = [i for row in read(f"{task}/test.jsonl") for i in [0, *tokenizer(row["text"]).input_ids]]
        rows = torch.tensor(ids[: 32 * WINDOW]).view(-1, WINDOW)
        with torch.no_grad():
            loss = crippled(input_ids=rows, labels=rows, use_cache=False).loss.item()
        assert loss > observed[task][0] + 0.2


def accuracy(model, tokenizer, items):
    """Share of items whose true choice has the highest log-likelihood per byte, one sequence at a time."""
    right = 0
    for item in items:
        prompt = [0, *tokenizer(item["prompt"]).input_ids]
        scores = []
        for choice in item["choices"]:
            ending = tokenizer(choice).input_ids
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + ending]), use_cache=False).logits[0]
            steps = logits[len(prompt) - 1 : -1].log_softmax(-1)
            scores.append(sum(steps[i, token].item() for i, token in enumerate(ending)) / len(choice.encode()))
        right += max(range(len(scores)), key=scores.__getitem__) == item["answer"]
    return right / len(items)


@pytest.mark.parametrize(("task", "bound"), [("arithmetic", 0.9), ("prose", 0.36), ("code", 0.4)])
def test_choices_are_answered_above_chance(model, tokenizer, task, bound):
    assert accuracy(model, tokenizer, read(f"choice/{task}.jsonl")[:60]) > bound


@pytest.mark.parametrize("task", TASKS)
def test_choice_items_are_well_formed_and_balanced(task):
    items = read(f"choice/{task}.jsonl")
    width = 5 if task == "arithmetic" else 4
    assert len(items) == 200
    assert all(len(set(item["choices"])) == len(item["choices"]) == width for item in items)
    positions = [sum(item["answer"] == place for item in items) for place in range(width)]
    assert positions == [200 // width] * width


@pytest.mark.parametrize("task", [task for task in TASKS if task != "arithmetic"])
def test_the_true_choice_is_not_the_longest_or_shortest_by_rule(task):
    items = read(f"choice/{task}.jsonl")
    for pick in (min, max):
        hits = sum(pick(item["choices"], key=len) == item["choices"][item["answer"]] for item in items)
        assert hits < 0.45 * len(items)


@pytest.mark.parametrize(("task", "shared"), [("code", 0), ("prose", 0), ("french", 0), ("arithmetic", 0.02)])
def test_calibration_and_test_share_no_document(task, shared):
    """Neither whole documents nor long lines; short sums are few enough that a worked answer comes twice."""
    calibration, test = ([row["text"] for row in read(f"{task}/{part}.jsonl")] for part in ("calibration", "test"))
    assert not set(calibration) & set(test)
    lines = [{line for text in texts for line in text.split("\n") if len(line) > 60} for texts in (calibration, test)]
    assert len(lines[0] & lines[1]) <= shared * len(lines[1])


@pytest.mark.parametrize("task", TASKS)
def test_text_is_of_the_stated_size(task):
    for part, size in (("calibration", 50_000), ("test", 60_000)):
        texts = [row["text"] for row in read(f"{task}/{part}.jsonl")]
        assert size <= sum(len(text.encode()) for text in texts) < size * 1.1
        assert max(map(len, texts)) <= 8_000


def test_install_copies_both_folders(tmp_path):
    installed = install_demo(tmp_path / "demo")
    for copy, original in ((installed.model, demo_model_path()), (installed.data, demo_data_path())):
        names = sorted(path.relative_to(original) for path in original.rglob("*") if path.is_file())
        assert names == sorted(path.relative_to(copy) for path in copy.rglob("*") if path.is_file())
        assert all((copy / name).read_bytes() == (original / name).read_bytes() for name in names)


@pytest.mark.parametrize("existing", ["model", "data"])
def test_install_refuses_to_overwrite(tmp_path, existing):
    (tmp_path / existing).mkdir()
    with pytest.raises(UserError, match=existing):
        install_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [existing]


def test_a_file_is_no_place_for_the_demo(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is not a folder"):
        install_demo(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
