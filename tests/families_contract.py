"""What holds for every MoE family of the installed transformers, on tiny checkpoints made from its own defaults.

`python tests/families_contract.py [FAMILY ...]` runs all of it and writes docs/families.md; pytest runs a quick part.
"""

import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from families import COMMON, FAMILIES, SHRUNK_OVERRIDES
from safetensors.torch import load_file, save_file
from tiny_configs import VOCABULARY, families, merged, shrunk
from torch import Tensor

from moetools.checkpoint.reader import open_checkpoint
from moetools.errors import MoetoolsError, UnsupportedModelError
from moetools.forward.streaming import ForwardOptions, StreamedModel
from moetools.pipeline.options import Writing
from moetools.text.options import DataOptions
from moetools.text.tokens import TokenBatch
from moetools.training.options import TrainOptions
from moetools.verbs.distill.options import StudentOptions
from moetools.verbs.distill.verb import distill
from moetools.verbs.inspect.verb import inspect

KEPT = (1, 2, 3, 4, 6, 7)
"""Three experts of each group of [0..3] and [4..7]: legal for every router."""
PROMPT = 8
"""Tokens that an encoder reads; the decoder reads the others."""
CHECKS = ("inspect", "evaluate", "prune by list", "distill to dense")


def make_shrunk(family: str, path: Path, *, seed: int = 0) -> Path:
    """Write a random tiny checkpoint of `family`, as its own class saves it."""
    config_class = transformers.CONFIG_MAPPING[family]
    if family in FAMILIES:
        config = config_class(**{**COMMON, **FAMILIES[family]})
    else:
        small = merged(shrunk(config_class().to_dict()), SHRUNK_OVERRIDES.get(family, {}))
        small.pop("model_type", None)
        config = config_class.from_dict(small)
    torch.manual_seed(seed)
    model = getattr(transformers, families()[family])._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not re.search("vision|visual|audio", name):
                _randomise(name, tensor)
    model.to(torch.bfloat16).save_pretrained(path)
    return path


def _randomise(name: str, tensor: Tensor) -> None:
    if "tid2eid" in name:
        tensor.copy_(torch.randint_like(tensor, 8))
    elif "inv_freq" in name or not tensor.is_floating_point():
        return
    elif re.search(r"correction_bias|expert_bias|\.bias$|_bias$|per_expert_scale", name):
        tensor.copy_(torch.randn_like(tensor) * 0.1 + ("scale" in name))
    elif tensor.dim() >= 2:
        tensor.copy_(torch.randn_like(tensor) / tensor.shape[-1] ** 0.5)


def stock_model(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Stock transformers' model by the class that config.json names, without any difference in names."""
    (name,) = json.loads((path / "config.json").read_text())["architectures"]
    model, info = getattr(transformers, name).from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"] | info["mismatched_keys"], info
    return model.eval()


def token_ids(rows: int, length: int, seed: int) -> Tensor:
    return torch.randint(8, VOCABULARY - 30, (rows, length), generator=torch.Generator().manual_seed(seed))


def streamed_logits(model: StreamedModel, ids: list[Tensor]) -> list[Tensor]:
    source = PROMPT if model.arch.stacks else None
    batches = [
        TokenBatch(input_ids=one, attention_mask=None, task=torch.zeros(len(one)).long(), source=source) for one in ids
    ]
    with torch.inference_mode():
        activations = model.activations(batches, model.memory_plan(batches))
        model.embed(batches, activations)
        for layer in model.layers(prefetch=False):
            for number, batch in enumerate(batches):
                activations[number] = model.run_layer(layer, batch, activations[number])
        return [model.skeleton.logits(batch, activations[number]) for number, batch in enumerate(batches)]


def check_inspect(path: Path) -> None:
    summary = inspect(path)
    if summary.experts is None:
        raise UnsupportedModelError("shown as a MoE model whose experts are not described")
    assert (summary.experts, summary.top_k) in ((8, 2), (8, 3), (8, 4), (8, 1)), (summary.experts, summary.top_k)


def check_evaluate(path: Path) -> None:
    """Streamed logits are stock's, bit for bit, with 1, 2 and 4 sequences in a batch."""
    model = StreamedModel(open_checkpoint(path), ForwardOptions(device="cpu"), only_run=True)
    reference = stock_model(path)
    ids = [token_ids(rows, 20, 10 * rows + again) for rows in (1, 2, 4) for again in (0, 1)]
    for one, logits in zip(ids, streamed_logits(model, ids), strict=True):
        given = {"input_ids": one}
        if model.arch.stacks:
            given = {"input_ids": one[:, :PROMPT], "decoder_input_ids": one[:, PROMPT:]}
        with torch.inference_mode():
            expected = reference(**given, use_cache=False).logits
        assert torch.isfinite(expected).all(), "stock's own logits are not finite"
        assert torch.equal(logits, expected), (
            f"batch of {len(one)}: off by {float((logits - expected).abs().max()):.2g}"
        )


def rewritten(path: Path, select: tuple[int, ...] | None = None) -> tuple[StreamedModel, dict[str, Tensor]]:
    """Every tensor as moetools would write it, MoE layers through `LayerWeights`."""
    model = StreamedModel(open_checkpoint(path), ForwardOptions(device="cpu"))
    found = model.checkpoint.read([*model.stock.names[None], *model.stock.extra_names])
    for layer in model.layers(keep_native=True, fill=False, prefetch=False):
        if layer.index not in model.stock.moe_layers:
            found |= model.checkpoint.read(model.stock.names[layer.index])
            continue
        weights = model.weights(layer)
        if select is not None:
            weights = weights.select(torch.tensor(select))
        found |= model.stock.disk_tensors(layer.index, layer.native, weights)
    return model, found


def check_prune(path: Path) -> None:
    """Disk -> layer -> disk is byte-identical; keeping a list of experts is slicing stock's own model."""
    on_disk = {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    model, same = rewritten(path)
    assert same.keys() == on_disk.keys(), sorted(same.keys() ^ on_disk.keys())[:3]
    changed = [
        name
        for name in same
        if same[name].dtype != on_disk[name].dtype
        or not torch.equal(same[name].view(torch.uint8), on_disk[name].view(torch.uint8))
    ]
    assert not changed, changed[:3]
    with tempfile.TemporaryDirectory() as folder:
        model.arch.check_expert_count(model.config, len(KEPT))
        config = model.arch.with_expert_count(json.loads((path / "config.json").read_text()), len(KEPT))
        (Path(folder) / "config.json").write_text(json.dumps(config))
        save_file(rewritten(path, KEPT)[1], Path(folder) / "model.safetensors", metadata={"format": "pt"})
        pruned = stock_model(Path(folder), torch.bfloat16).state_dict()
    _check_sliced(stock_model(path, torch.bfloat16).state_dict(), pruned, len(model.stock.moe_layers))


def _check_sliced(original: dict[str, Tensor], pruned: dict[str, Tensor], layers: int) -> None:
    smaller = 0
    for name, tensor in pruned.items():
        whole = original[name]
        for dim in range(whole.dim()):
            if whole.shape[dim] != tensor.shape[dim]:
                assert (whole.shape[dim], tensor.shape[dim]) == (8, len(KEPT)), name
                whole, smaller = whole.index_select(dim, torch.tensor(KEPT)), smaller + 1
        assert torch.equal(tensor, whole), name
    assert smaller >= 3 * layers


def check_distill(path: Path) -> str | None:
    """A student without training is what was meant, in stock transformers, and has no experts."""
    with tempfile.TemporaryDirectory() as folder:
        text, out = Path(folder) / "text.safetensors", Path(folder) / "out"
        save_file({"input_ids": token_ids(16, 16, 0)}, text)
        distill(
            path,
            out,
            StudentOptions(local_steps=0, width=40),
            TrainOptions(),
            DataOptions(data=[str(text)], seq_len=16),
            ForwardOptions(device="cpu"),
            Writing(),
        )
        student = StreamedModel(open_checkpoint(out), ForwardOptions(device="cpu"))
        return "one expert per layer" if student.stock.moe_layers else None


def outcome(check: Callable[[Path], str | None], path: Path) -> str:
    """ "works", with what a check adds to it; "refused: ...", or what went wrong."""
    try:
        said = check(path)
    except MoetoolsError as error:
        return f"refused: {error.message}".replace(str(path), "MODEL").splitlines()[0]
    except Exception as error:  # noqa: BLE001 - the table is of what happens, whatever it is
        return f"FAILS: {type(error).__name__}: {' '.join(str(error).split())[:150]}"
    return "works" if said is None else f"works: {said}"


def table(names: list[str]) -> dict[str, dict[str, str]]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for family in names:
            try:
                path = make_shrunk(family, Path(folder) / family)
                stock_model(path)
            except Exception as error:  # noqa: BLE001 - a config that shrinking breaks is one line of the table
                reason = f"no tiny model: {type(error).__name__}: {' '.join(str(error).split())[:110]}"
                found[family] = dict.fromkeys(CHECKS, reason)
            else:
                checks = zip(CHECKS, (check_inspect, check_evaluate, check_prune, check_distill), strict=True)
                found[family] = {name: outcome(check, path) for name, check in checks}
            print(family, "|", " | ".join(found[family].values()), flush=True)  # noqa: T201
    return found


HEAD = f"""# Which families work

Written by `python tests/families_contract.py`, which makes a tiny random checkpoint of every Mixture-of-Experts model
type of transformers {transformers.__version__} from the family's own defaults, saved by its own class, and tries on it:

- **evaluate**: the logits of the streamed model equal those of `from_pretrained`, bit for bit in fp32, with 1, 2 and 4
  sequences in a batch; those of an encoder-decoder model after a prompt that its encoder read.
- **prune by list**: disk -> layer -> disk is byte-identical; a checkpoint with listed experts only loads in stock
  transformers and is the original, sliced.
- **distill to dense**: a student made without training, verified in stock transformers; dense layers of the family's
  own or a dense family, else one expert per layer.
- **inspect**: experts and top-k are found in config.json and agree with the tensors.

A family without a file in `moetools/architectures/families` is described by what is discovered when its model is built
without weights. "no tiny model" means that the test could not make one, not that the family fails.
"""


def markdown(rows: dict[str, dict[str, str]]) -> str:
    counts = ", ".join(f"{check} {sum(row[check].startswith('works') for row in rows.values())}" for check in CHECKS)
    lines = [f"| family | {' | '.join(CHECKS)} |", "|---" * (len(CHECKS) + 1) + "|"]
    for family, row in rows.items():
        cells = (re.sub(r"([|*_<>])", r"\\\1", row[check]) for check in CHECKS)
        lines.append(f"| `{family}` | {' | '.join(cells)} |")
    return f"{HEAD}\nOf {len(rows)} model types work: {counts}.\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    rows = table(sys.argv[1:] or list(families()))
    if not sys.argv[1:]:
        (Path(__file__).parents[1] / "docs" / "families.md").write_text(markdown(rows))
    for check in CHECKS:
        print(check, sum(row[check].startswith("works") for row in rows.values()), "of", len(rows))  # noqa: T201
