"""Different numbers of experts per layer: what is written loads with moetools.hf, and nowhere else silently."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moetools.errors import CheckpointError, UserError
from moetools.forward.uneven import EXPERTS_PER_LAYER, experts_by_layer
from moetools.text.options import DataOptions
from moetools.verbs.evaluate.options import EvaluateOptions
from moetools.verbs.evaluate.verb import evaluate
from moetools.verbs.inspect.options import RoutingOptions
from moetools.verbs.inspect.routing import inspect_routing
from moetools.verbs.reduce.report import ReduceReport
from tests.families import FAMILIES, make_tiny
from tests.verbs.reduce.reducing import CPU, reduce

WITH_HF = """
import json, sys, torch, transformers
import moetools.hf
from transformers import AutoModelForCausalLM
transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()
torch.set_num_threads(1)
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, output_loading_info=True)
assert not [key for key, value in info.items() if value and key.endswith(("_keys", "_msgs"))], info
with torch.no_grad():
    torch.save(model.eval()(input_ids=torch.tensor(json.loads(sys.argv[2])), use_cache=False).logits, sys.argv[3])
"""
STOCK = """
import sys, transformers
from transformers import AutoModelForCausalLM
transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except (RuntimeError, ValueError) as error:
    print("refused", type(error).__name__)
assert "moetools" not in sys.modules
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataOptions:
    file = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save_file({"input_ids": torch.randint(2, 128, (42, 24), generator=torch.Generator().manual_seed(3))}, file)
    return DataOptions(data=[f"random={file}"], seq_len=24, batch_size=7)


def lopsided(folder: Path, family: str = "mixtral") -> Path:
    """A model whose last layer has two strong experts; the others are of little use."""
    # Two groups of which one is chosen must hold top-k experts each: with top-k 2 there is something to spread.
    overrides = {"num_experts_per_tok": 2} if family == "deepseek_v3" else {}
    source = make_tiny(family, folder / "even", **overrides)
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        expert = name.partition(".experts.")[2].partition(".")[0]
        if (
            name.startswith("model.layers.2.")
            and expert.isdigit()
            and int(expert) % 4 > 0
            and ("w2" in name or "down" in name)
        ):
            tensors[name] = tensor / 100
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def run(verb: str, model: Path, out: Path, data: DataOptions | None, **options: object) -> ReduceReport:
    return reduce(verb, model, out, data, **{"target": 5, "allow_uneven": True, **options})


@pytest.mark.parametrize(
    ("family", "verb", "options"),
    [
        ("mixtral", "prune", {"method": "reap"}),
        ("qwen2_moe", "merge", {"method": "m-smoe", "refit": "joint"}),
        ("mixtral", "merge", {"method": "joint"}),
        ("deepseek_v3", "prune", {"method": "frequency", "target": 6}),
    ],
)
def test_an_uneven_checkpoint_loads_with_moetools_hf(
    family: str, verb: str, options: dict, tmp_path: Path, data: DataOptions
) -> None:
    out = tmp_path / "out"
    report = run(verb, lopsided(tmp_path, family), out, data, **options)
    assert report.verified
    assert report.uneven
    assert report.budget is not None
    counts = {layer: len(decision.clusters) for layer, decision in report.layers.items()}
    assert counts == dict(report.budget.experts)
    assert sum(counts.values()) == options.get("target", 5) * len(counts)
    assert len(set(counts.values())) > 1
    config = json.loads((out / "config.json").read_text())
    assert experts_by_layer(config) == {layer: n for layer, n in counts.items() if n < max(counts.values())}
    ids = torch.randint(2, 128, (2, 9), generator=torch.Generator().manual_seed(4)).tolist()
    script = [sys.executable, "-W", "ignore", "-c"]
    loaded = subprocess.run([*script, WITH_HF, str(out), json.dumps(ids), str(tmp_path / "logits.pt")], cwd=Path.cwd())
    assert loaded.returncode == 0
    refused = subprocess.run([*script, STOCK, str(out)], capture_output=True, text=True, cwd=tmp_path)
    assert refused.stdout.startswith("refused"), refused.stderr
    text = DataOptions(data=data.data, seq_len=24, samples=4)
    found = evaluate([out], EvaluateOptions(reference=tmp_path / "even"), text, CPU)
    assert 0 < found.to_json()["models"][1]["agreement"]["kl"] < 10


def test_an_even_budget_is_an_ordinary_checkpoint(tiny: Callable[..., Path], tmp_path: Path, data: DataOptions) -> None:
    run("prune", tiny("mixtral"), tmp_path / "uneven", data, method="frequency", target=8)
    assert EXPERTS_PER_LAYER not in json.loads((tmp_path / "uneven" / "config.json").read_text())


def test_the_budget_is_reported_without_being_written(tmp_path: Path, data: DataOptions) -> None:
    model = lopsided(tmp_path)
    report = run("prune", model, tmp_path / "out", data, method="reap", allow_uneven=False)
    assert {len(decision.clusters) for decision in report.layers.values()} == {5}
    assert report.budget is not None
    assert report.budget.experts[2] < 5
    assert report.budget.lost < report.budget.lost_uniform
    assert "not written" in report.tables()[1].note
    stored = json.loads((tmp_path / "out" / "moetools.json").read_text())["budget"]
    assert stored["measure"] == "routed output"
    assert sum(stored["experts"].values()) == 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "explicit", "experts": "0,1,2,3,4", "target": None}, "`experts` lists them"),
        ({"method": "reap", "heal": 3}, "`allow_uneven` and `heal`"),
        ({"method": "reap", "target": 1}, "nothing to spread"),
    ],
)
def test_what_does_not_go_together(
    options: dict, message: str, tiny: Callable[..., Path], tmp_path: Path, data: DataOptions
) -> None:
    with pytest.raises(UserError, match=message):
        run("prune", tiny("mixtral"), tmp_path / "out", data, **options)
    assert not (tmp_path / "out").exists()


def test_no_text_no_budget(tiny: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs text"):
        run("prune", tiny("mixtral"), tmp_path / "out", None, method="random")


def test_an_uneven_model_is_not_reduced_again(tmp_path: Path, data: DataOptions) -> None:
    run("prune", lopsided(tmp_path), tmp_path / "out", data, method="reap")
    with pytest.raises(UserError, match="prune-experts needs equally many experts in every layer"):
        run("prune", tmp_path / "out", tmp_path / "again", data, method="reap", target=3)
    with pytest.raises(UserError, match="measuring statistics needs equally many experts"):
        inspect_routing(tmp_path / "out", RoutingOptions(), data, CPU)


@pytest.mark.parametrize("value", [[1, 2], {"a": 1}, {"0": 0}])
def test_a_damaged_key_is_refused(value: object) -> None:
    with pytest.raises(CheckpointError, match=EXPERTS_PER_LAYER):
        experts_by_layer({EXPERTS_PER_LAYER: value})


def test_every_family_is_built_with_the_sizes_it_names(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from moetools.forward.uneven import install
    from tests.families import COMMON

    install()
    for family, settings in FAMILIES.items():
        config = AutoConfig.for_model(family, **{**COMMON, **settings, EXPERTS_PER_LAYER: {"2": 6}})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        sizes = [
            len(tensor)
            for name, tensor in model.named_parameters()
            if tensor.dim() == 3 and name.endswith("down_proj") and ".experts" in name
        ]
        assert (set(sizes[:-1]), sizes[-1]) == ({8}, 6), family
