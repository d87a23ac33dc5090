"""What every writing verb writes, byte for byte: sha256 digests of its outputs on the embedded model.

`python tests/benchmarks/digests.py [--python-path DIR] [--out FILE] [--only PATTERN] [--compare FILE]`

Runs a fixed list of seeded commands on one CPU thread and digests the weights, config.json and task_routing.json that
each leaves, so that a refactoring can be shown to change no byte: write a file with the code before (`--python-path`
takes any checkout), compare with it after. Model and text are always those of this checkout. `--only` takes the
commands whose name matches a regular expression, and those whose output they read. Exit code 1 if a command fails or
an entry differs.

Every command is `python -m moetools ...` in a process of its own, forked from one that has imported torch and
transformers (6 of the 8 seconds that most commands take otherwise) and nothing of moetools.
"""

import argparse
import hashlib
import importlib
import importlib.util
import json
import multiprocessing
import os
import re
import runpy
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "moetools" / "demo"
TASKS = ("arithmetic", "code", "french", "prose")
WEIGHTS = ("*.safetensors", "*.gguf", "config.json", "task_routing.json")
"""Digested; moetools.json, README.md and metrics.jsonl hold times and paths."""
PRELOADED = ("torch", "transformers.modeling_utils", "transformers.trainer", "compressed_tensors", "sklearn.cluster")
MODELS = ("qwen2_moe", "qwen2")
"""The embedded model and its dense student."""
Digests = dict[str, dict[str, str]]

# Before a command's own options, which may give one of these again: the last counts.
RUN = "--device cpu --dtype float32 --memory-budget 4GB --batch-size 16 --seed 0 --quiet"
TEXT = " ".join(f"--data {task}={DEMO}/data/{task}/calibration.jsonl" for task in TASKS) + " --samples 8 --seq-len 128"
PLAIN = "--refit none --one-shot"
JOINT = "--refit joint --sequential"
LISTED = "0,2,3,5,7,8,11,14"


def reductions() -> dict[str, str]:
    """Pruning and merging: every method, and every part of a recipe on one or two of them."""
    prune, merge = f"prune-experts {DEMO}/model OUT {TEXT}", f"merge-experts {DEMO}/model OUT {TEXT}"
    methods = ("ean", "easy-ep", "frequency", "gate-mass", "naee", "random", "reap")
    found = {f"prune {method}": f"{prune} --keep 8 --method {method} {PLAIN}" for method in methods}
    found |= {
        "prune explicit": f"{prune} --method explicit --experts {LISTED} {PLAIN}",
        "prune auto": f"{prune} --keep 8 --method auto",
        "prune ratio": f"{prune} --ratio 0.25 --method reap {PLAIN}",
        "prune joint": f"{prune} --keep 8 --method reap {JOINT}",
        "prune joint one-shot": f"{prune} --keep 8 --method reap --refit joint --one-shot",
        "prune uneven": f"{prune} --keep 8 --method reap --allow-uneven {PLAIN}",
        "prune uneven joint": f"{prune} --keep 8 --method reap --allow-uneven {JOINT}",
        "prune save-stats": f"{prune} --keep 6 --method reap {PLAIN} --save-stats HERE/statistics.safetensors",
        "prune stats": f"prune-experts {DEMO}/model OUT --keep 6 --method reap {PLAIN} "
        "--stats @{prune save-stats}/statistics.safetensors",
        "prune no-pack": f"{prune} --keep 8 --method reap {JOINT} --no-pack --shuffle",
        "prune streamed": f"{prune} --keep 8 --method reap {JOINT} --memory-budget 48MB --batch-size 4",
        "prune heal router": f"{prune} --keep 8 --method reap {PLAIN} --heal 4 --heal-train router",
    }
    methods = ("average", "frequency-average", "hc-smoe", "joint", "m-smoe", "mergemoe", "ream", "saliency-average")
    for method in (*methods, "sub-moe", "auto"):
        found[f"merge {method}"] = f"{merge} --to 8 --method {method}"
    found |= {
        "merge neurons": f"{merge} --to 8 --method ream --combine neurons {JOINT}",
        "merge subspace": f"{merge} --to 8 --method hc-smoe --combine subspace --rank 0.5",
        "merge router mean": f"{merge} --to 8 --method hc-smoe --combine average --router mean",
        "merge router centroid": f"{merge} --to 8 --method hc-smoe --combine average --router centroid",
        "merge router fitted": f"{merge} --to 8 --method hc-smoe --combine average --router fitted",
        "merge align": f"{merge} --to 8 --method average --align {PLAIN}",
        "merge no-align": f"{merge} --to 8 --method m-smoe --no-align {PLAIN}",
        "merge members": f"{merge} --to 8 --method hc-smoe --refit members --one-shot",
        "merge uneven": f"{merge} --to 8 --method hc-smoe --allow-uneven {PLAIN}",
        "merge to 1": f"{merge} --to 1 --method frequency-average {PLAIN}",
        "merge to 1 joint": f"{merge} --to 1 --method average {JOINT}",
        "merge heal": f"{merge} --to 8 --method hc-smoe {PLAIN} --heal 4 --heal-train all",
    }
    return found


def quantizations() -> dict[str, str]:
    """Every scheme, every method at every width of plain integers, every format."""
    quantize = f"quantize {DEMO}/model OUT {TEXT}"
    own = f"{quantize} --format moetools"
    found = {
        f"quantize {scheme} {method}": f"{quantize} --scheme {scheme} --method {method}"
        for scheme in ("w8a16", "w4a16", "w3a16", "w2a16")
        for method in ("rtn", "gptq", "hqq", "awq")
    }
    for scheme in ("ternary", "fp8", "mxfp4", "mixed", "sub1"):
        found[f"quantize {scheme}"] = f"{quantize} --scheme {scheme} --method gptq"
    found |= {
        "quantize mixed bits": f"{quantize} --scheme mixed --method hqq --bits 3.2",
        "quantize sub1 rtn": f"{quantize} --scheme sub1 --method rtn --bits 1.5 --attention sub1:3",
        "quantize experts-only": f"{quantize} --scheme w4a16 --method gptq --experts-only --group-size 32",
        "quantize rows": f"{quantize} --scheme w8a16 --method rtn --group-size 0 --attention none",
        "quantize embeddings": f"{own} --scheme w4a16 --method gptq --embeddings w8a16",
        "quantize embeddings sub1": f"{own} --scheme w3a16 --method rtn --embeddings sub1:3",
        "quantize asymmetric": f"{own} --scheme w3a16 --method gptq --asymmetric",
        "quantize asymmetric mixed": f"{own} --scheme mixed --method hqq --asymmetric",
        "quantize gguf": f"{quantize} --scheme w4a16 --method gptq --format gguf",
        "quantize gguf embeddings": f"{quantize} --scheme w4a16 --method gptq --format gguf --embeddings w8a16",
        "quantize fp8-block": f"{quantize} --scheme fp8-block --method gptq --experts-only",
        "quantize nvfp4": f"{quantize} --scheme nvfp4 --method gptq --target vllm",
        "quantize w8a8": f"{quantize} --scheme w8a8 --method gptq --target vllm",
        "quantize expand": "quantize @{quantize w4a16 gptq}/out OUT --expand",
        "quantize expand sub1": "quantize @{quantize sub1}/out OUT --expand",
        "quantize quantized": "quantize @{quantize w8a16 rtn}/out OUT --scheme w4a16 --method rtn",
        "quantize pruned": f"quantize @{{prune joint}}/out OUT {TEXT} --scheme w4a16 --method gptq",
    }
    return found


def routings() -> dict[str, str]:
    """Task checkpoints: scores, unions, refits, trained routers, classifiers."""
    route = f"route-tasks {DEMO}/model OUT {TEXT}"
    keep = f"{route} --keep 8 --score output"
    return {
        "route plain": f"{keep} --refit none",
        "route union": f"{keep} --refit none --union code+prose --union all",
        "route joint": f"{keep} --refit joint",
        "route tune-router": f"{keep} --refit none --tune-router 2 --classifier none",
        "route top-p": f"{route} --top-p 0.8 --score gate --refit none --classifier router --prefix 32",
        "route reap": f"{route} --keep 6 --score reap --refit none --level sequence --pool mean-logits",
    }


def distillations() -> dict[str, str]:
    """Dense students in closed form, fitted layer by layer, trained; healing."""
    distill = f"distill {DEMO}/model OUT {TEXT}"
    train = "--steps 3 --train-batch-size 4 --learning-rate 0.001"
    closed = "--width 512 --scaling uniform --local-steps 0"
    found = {
        f"distill {init}": f"{distill} --init {init} {closed}"
        for init in ("neurons", "do-acp", "svd-kg", "saliency-average", "random-neurons")
    }
    return found | {
        "distill local-steps": f"{distill} --init neurons --width 256 --scaling uniform --local-steps 2",
        "distill marginal": f"{distill} --init top-kg --scaling marginal --width 512 --local-steps 0 --layers 2",
        "distill cold": f"{distill} --init mean --no-warm-start --local-steps 0",
        "distill steps": f"{distill} --init neurons {closed} {train}",
        "distill losses": f"{distill} --init neurons {closed} {train} --alpha 0.25 --temperature 2 --divergence jsd "
        "--hidden-weight 0.1 --accumulate 2",
        "distill cache": f"{distill} --init neurons {closed} {train} --teacher-cache HERE/cache --cache-top 16",
        "distill student": f"{distill} --student @{{prune reap}}/out {train} --train all",
        "distill student router": f"{distill} --student @{{prune reap}}/out {train} --train router --relative-rate",
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--python-path", type=Path, default=ROOT, help="the checkout whose moetools runs")
    parser.add_argument("--out", type=Path, default=None, help="where the digests are written")
    parser.add_argument("--only", default="", metavar="PATTERN")
    parser.add_argument("--compare", type=Path, default=None, metavar="FILE", help="digests of an earlier run")
    asked = parser.parse_args()
    commands = chosen(reductions() | quantizations() | routings() | distillations(), asked.only)
    with tempfile.TemporaryDirectory() as work:
        prepare(asked.python_path.resolve(), work)
        found, failed = run_all(commands, Path(work))
    if asked.out is not None:
        asked.out.write_text(json.dumps(found, indent=1) + "\n")
    differing = differences(json.loads(asked.compare.read_text()), found) if asked.compare else []
    print(*differing, f"{len(found)} commands, {len(failed)} failed, {len(differing)} entries differ", sep="\n")
    sys.exit(1 if failed or differing else 0)


def chosen(commands: dict[str, str], pattern: str) -> dict[str, str]:
    """The commands whose name matches, and before them those they read from."""
    wanted = {name for name in commands if re.search(pattern, name)}
    wanted |= {needed for name in wanted for needed in re.findall(r"@\{(.*?)\}", commands[name])}
    return {name: line for name, line in commands.items() if name in wanted}


def prepare(python_path: Path, work: str) -> None:
    """One thread, no GPU, no network, `python_path` first; then import what every command needs of other packages."""
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TMPDIR": work}
    os.environ |= {"PYTHONPATH": str(python_path), "TRANSFORMERS_VERBOSITY": "error"}
    sys.path[0] = str(python_path)
    spec = importlib.util.find_spec("moetools")
    if spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(python_path):
        sys.exit(f"{python_path} holds no moetools")
    models = [f"transformers.models.{model}.modeling_{model}" for model in MODELS]
    for module in (*PRELOADED, *models):
        importlib.import_module(module)


def run_all(commands: dict[str, str], work: Path) -> tuple[Digests, list[str]]:
    """Digests by command, and the commands that failed; the outputs stay in folders of `work`."""
    folders = {name: work / name.replace(" ", "-") for name in commands}
    found: Digests = {}
    failed = []
    began = cpu_seconds()
    for name, line in commands.items():
        here = folders[name]
        here.mkdir()
        line = re.sub(r"@\{(.*?)\}", lambda match: str(folders[match[1]]), line)
        verb, *arguments = line.replace("OUT", f"{here}/out").replace("HERE", str(here)).split()
        start = cpu_seconds()
        process = multiprocessing.get_context("fork").Process(target=run, args=([verb, *RUN.split(), *arguments], here))
        process.start()
        process.join()
        print(f"{cpu_seconds() - start:6.1f} s  exit code {process.exitcode}  {name}", flush=True)
        if process.exitcode:
            failed.append(name)
            print((here / "log").read_text()[-2000:], flush=True)
        found[name] = digests(here)
    print(f"{cpu_seconds() - began:6.1f} s")
    return found, failed


def cpu_seconds() -> float:
    """Of the commands that ended: what they take on an idle machine, one thread each."""
    return os.times().children_user + os.times().children_system


def run(arguments: list[str], here: Path) -> None:
    """`python -m moetools ARGUMENTS`, its output to HERE/log."""
    with (here / "log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.argv = ["moetools", *arguments]
    runpy.run_module("moetools", run_name="__main__", alter_sys=True)


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file that holds results, by its path in `folder`."""
    files = sorted({file for pattern in WEIGHTS for file in folder.rglob(pattern)})
    return {str(file.relative_to(folder)): hashlib.sha256(stable_bytes(file)).hexdigest() for file in files}


def stable_bytes(file: Path) -> bytes:
    """The file's bytes; where safetensors metadata has several entries, they are put in order.

    safetensors writes them in the order of a hash map that every process seeds anew.
    """
    content = file.read_bytes()
    if file.suffix != ".safetensors":
        return content
    data = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:data])
    metadata = header.get("__metadata__", {})
    if len(metadata) < 2:
        return content
    return json.dumps(header | {"__metadata__": dict(sorted(metadata.items()))}).encode() + content[data:]


def differences(before: Digests, now: Digests) -> list[str]:
    """A line per file of `now`'s commands that is new, missing or other than before."""
    lines = []
    for name, files in now.items():
        old = before.get(name, {})
        for file in sorted(old | files):
            if old.get(file) != files.get(file):
                what = "differs" if file in old and file in files else "is new" if file in files else "is missing"
                lines.append(f"{name}: {file} {what}")
    return lines


if __name__ == "__main__":
    main()
