"""Draws the pictures in docs/pictures anew: python tests/benchmarks/draw_docs.py (three minutes of one core).

All are of the embedded model and its text, made by `plots` of the verbs whose guides show them.
"""

import shutil
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

import moetools

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"
DEMO = Path(str(files("moetools.demo")))
TASKS = ("arithmetic", "code", "french", "prose")


def text(part: str) -> list[str]:
    return [f"{task}={DEMO / 'data' / task / part}.jsonl" for task in TASKS]


def draw(work: Path, pictures: Path) -> None:
    model, text_of = DEMO / "model", {"data": text("calibration"), "device": "cpu"}
    moetools.inspect_routing(model, similarity=True, plots=work / "routing", **text_of)
    for name in ("all-tasks", "task-code", "task-french"):
        shutil.copy(work / "routing" / f"{name}.svg", pictures / f"load-{name}.svg")
    shutil.copy(work / "routing" / "tree-of-alike-experts-layer-1-by-mean-outputs.svg", pictures / "alike-experts.svg")
    made = {name: work / name for name in ("pruned to 8", "merged to 8", "merged to 4", "four bits")}
    moetools.prune_experts(model, made["pruned to 8"], keep=8, method="reap", refit="none", **text_of)
    moetools.merge_experts(model, made["merged to 8"], to=8, **text_of)
    moetools.merge_experts(model, made["merged to 4"], to=4, **text_of)
    moetools.quantize(model, made["four bits"], scheme="w4a16", **text_of)
    judged = {"data": text("test"), "device": "cpu"}
    moetools.compare(list(made.values()), reference=model, plots=work / "compared", **judged)
    (picture,) = (work / "compared").glob("*.svg")
    shutil.copy(picture, pictures / "compared.svg")
    moetools.route_tasks(model, work / "tasks", keep=8, test=text("test"), plots=work / "routed", **text_of)
    shutil.copy(work / "routed" / "perplexity-over-the-full-model-s.svg", pictures / "task-checkpoints.svg")


if __name__ == "__main__":
    pictures = Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURES
    pictures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder), pictures)
