"""The recipes that come with the package run with tiny settings: on a tiny model, when asked on the embedded one."""

import os
import shutil
from pathlib import Path

import pytest
import yaml

import moetools
from moetools.demo import demo_data_path, demo_model_path
from moetools.verbs.run.recipe_file import shipped_recipes

TINY = {"seq_len": 32, "samples": 8, "verify": False, "device": "cpu"}
OWN = {"task-slices": {"classifier": "none"}, "dense-student": {"local_steps": 1}}
SET = {"task-slices": ["task=code", "top_p=0.5"], "dense-student": ["minutes=0.001"]}
MADE = {
    "half-and-4-bits": ["quantized"],
    "task-slices": ["code", "prose", "quantized"],
    "dense-student": ["trained"],
    "gguf": ["gguf"],
}
MODEL = {
    "vocab_size": 2048,
    "num_hidden_layers": 1,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "mlp_only_layers": [],
}


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes") / "model"
    shutil.copytree(tiny("qwen2_moe", **MODEL), folder)
    for file in demo_model_path().glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def carried_out(name: str, model: Path, folder: Path) -> dict:
    """The report of a shipped recipe with tiny settings."""
    recipe = yaml.safe_load(shipped_recipes()[name].read_text())
    assert "options" not in recipe
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({**recipe, "options": {**TINY, **OWN.get(name, {})}}))
    texts = []
    for variable, split in (("data", "calibration"), ("test", "test")):
        for task in ("code", "prose"):
            lines = (demo_data_path() / task / f"{split}.jsonl").read_text().splitlines(keepends=True)
            part = folder / f"{task}-{split}.jsonl"
            part.write_text("".join(lines[:20]))
            texts.append(f"{variable}={task}={part}")
    return moetools.run(file, set=[f"model={model}", f"out={folder / 'out'}", *texts, *SET.get(name, [])]).to_json()


def check(name: str, report: dict) -> None:
    assert {step["state"] for step in report["steps"]} == {"done"}
    made = {model["name"]: model for model in report["comparison"]["models"]}
    assert made["model"]["kl"] == 0
    for output in MADE[name]:
        assert Path(made[output]["path"]).is_dir()
        assert 0 < made[output]["kl"] < 5
        assert made[output]["nbytes"] < made["model"]["nbytes"]


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe(name, model, tmp_path):
    check(name, carried_out(name, model, tmp_path))


@pytest.mark.skipif("MOETOOLS_TEST_DOCS" not in os.environ, reason="MOETOOLS_TEST_DOCS=1 runs it, too: a minute")
@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_on_the_embedded_model(name, tmp_path):
    check(name, carried_out(name, demo_model_path(), tmp_path))
