"""Evaluate models on the same texts and questions: perplexity, KL to a reference, accuracy, size, speed; and gates."""

import math
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moetools.checkpoint.durable import write_durably
from moetools.checkpoint.folder import read_json_object
from moetools.errors import GateError, UserError
from moetools.formats.reader import open_model
from moetools.forward.evaluate import ChoiceData, Evaluator, check_vocabulary
from moetools.forward.generate import (
    Continuations,
    GenerationMetrics,
    Sampling,
    continuations,
    end_tokens,
    generation_metrics,
    generation_plan,
    prompt_batches,
)
from moetools.forward.memory import MemoryPlan
from moetools.forward.metrics import PERCENTILES
from moetools.forward.options import ForwardOptions
from moetools.forward.progress import Progress
from moetools.forward.streaming import StreamedModel
from moetools.pipeline.page import check_page, html_page, html_table
from moetools.pipeline.unchanged import Unchanged
from moetools.plugins import unknown_name
from moetools.sizes import format_bytes, parse_bytes
from moetools.text.choices import choice_batches, load_choices
from moetools.text.options import DataOptions, load_model_tokenizer, load_tokens
from moetools.text.sources import DataSource, parse_data_option
from moetools.text.tokens import TokenBatch, TokenData
from moetools.verbs.evaluate.harness import Harness, task_name
from moetools.verbs.evaluate.options import EvaluateOptions
from moetools.verbs.evaluate.report import EvaluatedModel, Evaluation, GateResult
from moetools.verbs.evaluate.structured import VALID, Structured

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_GATE = re.compile(r"\s*([^<>=]+?)\s*(<=|>=|<|>)\s*([^<>=]+?)\s*")


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A bound that every model except the reference must keep: `metric comparison bound`."""

    text: str
    metric: str
    comparison: str
    bound: float

    def holds(self, value: float) -> bool:
        return _COMPARISONS[self.comparison](value, self.bound)


def evaluate(
    models: Sequence[Path],
    options: EvaluateOptions,
    text: DataOptions,
    forward: ForwardOptions,
    *,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure all models, and the reference, on the same tokens: one pass through each model's layers.

    Args:
        models: checkpoint folders. One that is also the reference is listed once, as the reference, unless it is alone.
        options: `gate` bounds are `metric<=value` (or <, >=, >) with the metrics of `gate_metrics`.
        text: tokenized with the tokenizer of the reference or else of the first model.

    Raises:
        UserError: nothing to measure, an illegal gate, models of different vocabularies.
        CheckpointError, UnsupportedModelError, DataError: an input that cannot be used.
        VerificationError: a model whose logits are not finite.
        GateError: a gate was missed; its `result` is the evaluation.
    """
    reference = options.reference
    paths = distinct_models(models, reference)
    sources = parse_data_option(options.choices, "choices")
    # What judges is all of the text.
    text = replace(text, samples="all" if text.samples is None else text.samples)
    options.check(has_text=bool(text.data))
    if options.html is not None:
        judged = {f"model {number}": path for number, path in enumerate(paths)} | dict(text.paths())
        items = {f"choices {one.task}": Path(one.location) for one in sources if not one.is_hub}
        check_page(options.html, judged | items)
    bounds = _check_inputs(text, sources, options, has_reference=reference is not None)
    harness = None
    if options.harness:
        harness = Harness(options.harness, fewshot=options.fewshot, limit=options.limit)
    opened = [StreamedModel(open_model(path), forward, progress=progress, only_run=True) for path in paths]
    for model in opened:
        _refuse_pairs(model, opened[0], options)
    same_inputs = Unchanged([model.checkpoint for model in opened])
    for model in opened:
        model.stock.check_names()
        _check_same_tokens(opened[0], model)
    tokens = load_tokens(text, opened[0].checkpoint, opened[0].vocab_size) if text.data else None
    sets = _load_sets(sources, text, opened[0])
    writer = None if tokens is None else _writer(tokens, options, text, reference is not None)
    more = _More(writer, _structured(options, text, opened[0], bounds), harness, text)
    with same_inputs:
        result = _measure(paths, opened, tokens, sets, bounds, more, has_reference=reference is not None)
    if options.html is not None:
        page = html_page("moetools evaluate", ["<h1>Evaluation</h1>", *map(html_table, result.tables())])
        write_durably(options.html, page.encode())
    missed = [_missed(found) for found in result.gates if not found.passed]
    if missed:
        raise GateError("; ".join(missed), result=result)
    return result


def gate_metrics(
    tasks: Sequence[str], sets: Sequence[str], *, has_reference: bool, generates: bool = False, samples: bool = False
) -> list[str]:
    """Metrics that a gate may bound: what can be measured with these tasks and choice sets."""
    written = ["looping", "ended", "length", "distinct", "compression"] if generates else []
    written += ["agreed", "same_start"] if generates and has_reference else []
    names = ["bytes", *written, *(f"sampled.{name}" for name in written if samples)]
    if tasks:
        names += ["perplexity", *(f"perplexity.{task}" for task in tasks)]
    if tasks and has_reference:
        names += ["kl", *(f"kl_p{percentile}" for percentile in PERCENTILES), "kl_max", "top1"]
        names += [f"{metric}.{task}" for metric in ("kl", "top1") for task in tasks]
    return names + [f"accuracy.{name}" for name in sets]


def parse_gate(text: str, legal: list[str]) -> Gate:
    """A gate from its text; `bytes` takes units (`10MB`).

    Raises:
        UserError: not of the form `metric<=value`, or a metric that is not in `legal`.
    """
    match = _GATE.fullmatch(text)
    if not match:
        raise UserError(f"gate '{text}' is not METRIC<=VALUE", hint="also <, >= and >; for example 'kl<=0.05'")
    metric, comparison, value = match.groups()
    if metric not in legal:
        needs_reference = re.split(r"[._]", metric)[0] in ("kl", "top1") and "kl" not in legal and "perplexity" in legal
        if needs_reference:
            raise UserError(f"gate '{text}' needs a model to compare to", hint="name the original: `reference=MODEL`")
        raise unknown_name("gate metric", metric, legal)
    try:
        bound = float(parse_bytes(value)) if metric == "bytes" else float(value)
    except ValueError:
        bound = math.nan
    if not math.isfinite(bound):
        raise UserError(f"gate '{text}': '{value}' is not a number", hint="for example 'kl<=0.05'")
    return Gate(text=text.strip(), metric=metric, comparison=comparison, bound=bound)


def metric_value(model: EvaluatedModel, metric: str) -> float:
    """The number that a gate on `metric` (`gate_metrics`) bounds."""
    metrics = model.metrics
    kind, _, name = metric.partition(".")
    if model.generation is not None and hasattr(model.generation, metric):
        return float(getattr(model.generation, metric))
    if metric in VALID:
        return float(getattr(model.structured, metric))
    if kind == "sampled":
        return float(getattr(model.sampled, name))
    if metric == "bytes":
        return metrics.size.nbytes
    if kind == "harness":
        # A task's own first metric.
        found = [one.value for one in model.harness if one.task == task_name(name)]
        if not found:
            raise UserError(f"gate '{metric}': the task has no metric of its own", hint="bound one of its parts")
        return found[0]
    if kind == "accuracy":
        return metrics.choices[name].accuracy
    if kind == "perplexity":
        value = metrics.tasks[name].perplexity if name else metrics.perplexity
        assert value is not None
        return value
    percentile = metric.startswith("kl_")
    agreement = metrics.tasks[name].agreement if name and not percentile else metrics.agreement
    assert agreement is not None
    if metric.startswith("kl_p"):
        return agreement.kl_percentiles[metric.removeprefix("kl_p")]
    return {"kl": agreement.kl, "kl_max": agreement.kl_max, "top1": agreement.top1}[kind]


def distinct_models(models: Sequence[Path], reference: Path | None) -> list[Path]:
    """The reference first, if there is one, then the models."""
    if not models:
        raise UserError("no model was named", hint="name the folder of one or more checkpoints")
    paths = [Path(model) for model in models]
    if reference is None:
        return paths
    others = [path for path in paths if path.resolve() != reference.resolve()]
    return [reference, *(others or paths[:1])]


def _check_inputs(
    text: DataOptions, choices: Sequence[DataSource], options: EvaluateOptions, *, has_reference: bool
) -> list[Gate]:
    """What can be refused before any model is opened: no or missing data, gates."""
    if not text.data and not choices and not options.harness:
        raise UserError("nothing to measure: no text and no questions", hint="`data`, `choices` or `harness`")
    if text.data:
        text.check()
    tasks = [source.task for source in parse_data_option(text.data)]
    for source in choices:
        load_choices(source)
    sets, generates = [source.task for source in choices], options.generate is not None
    samples = options.sampled is not None
    legal = gate_metrics(tasks, sets, has_reference=has_reference, generates=generates, samples=samples)
    legal += VALID if options.structured is not None else ()
    legal += [f"harness.{name}" for name in options.harness]
    return [parse_gate(gate, legal) for gate in options.gate]


def _refuse_pairs(model: StreamedModel, first: StreamedModel, options: EvaluateOptions) -> None:
    """An encoder-decoder model is measured on prompts with completions, beside its kind, and on nothing else."""
    if bool(model.arch.stacks) != bool(first.arch.stacks):
        raise UserError(
            f"one of {first.checkpoint.path} and {model.checkpoint.path} is an encoder-decoder model, the other is not",
            hint="they read the same text in different ways; measure each on its own",
        )
    more = ("choices", "harness", "generate")
    asked = [name for name in more if getattr(options, name)] if model.arch.stacks else []
    if asked:
        raise UserError(
            f"{model.checkpoint.path} is an encoder-decoder model, for which `{asked[0]}` is not measured",
            hint="`data` of prompts with completions gives its loss and KL",
        )


def _check_same_tokens(first: StreamedModel, model: StreamedModel) -> None:
    """One vocabulary size, and one vocabulary where both models bring a tokenizer.json."""
    check_vocabulary(first, model)
    check_same_tokenizer(first.checkpoint.path, model.checkpoint.path)


def check_same_tokenizer(first: Path, other_model: Path) -> None:
    """Refuse two models whose tokenizer.json files, where both have one, hold different vocabularies.

    Raises:
        UserError: naming both folders.
    """
    files = [path / "tokenizer.json" for path in (first, other_model)]
    if not all(file.is_file() for file in files) or files[0].read_bytes() == files[1].read_bytes():
        return
    one, other = (read_json_object(file).get("model", {}).get("vocab") for file in files)
    if one != other:
        raise UserError(
            f"{files[0].parent} and {files[1].parent} have tokenizers with different vocabularies",
            hint="their token ids mean different text; compare models of one tokenizer",
        )


def _load_sets(sources: Iterable[DataSource], options: DataOptions, first: StreamedModel) -> list[ChoiceData]:
    loaded = [load_choices(source) for source in sources]
    if not loaded:
        return []
    tokenizer = load_model_tokenizer(options, first.checkpoint, first.vocab_size)
    size = {"seq_len": options.seq_len, "batch_size": options.sequences_per_batch}
    return [ChoiceData(choices=one, batches=tuple(choice_batches(one, tokenizer, **size))) for one in loaded]


class _Writer:
    """Continues the same beginnings with every model.

    Args:
        compares: whether the first model is the reference of the others.
    """

    def __init__(self, prompts: Sequence[TokenBatch], options: EvaluateOptions, seed: int, *, compares: bool) -> None:
        assert options.generate is not None
        self._tokens, self._compares = options.generate, compares
        self._runs: dict[str, tuple[list[TokenBatch], Sampling | None]] = {"generation": (list(prompts), None)}
        if options.sampled is not None:
            sampling = Sampling(temperature=options.temperature, top_p=options.top_p, seed=seed)
            self._runs["sampled"] = ([batch for batch in prompts for _ in range(options.sampled)], sampling)
        self._reference: dict[str, Continuations] = {}
        self._end_ids: frozenset[int] | None = None

    def plan(self, model: StreamedModel) -> MemoryPlan:
        prompts, _ = list(self._runs.values())[-1]
        return generation_plan(model, prompts, self._tokens)

    def __call__(self, model: StreamedModel) -> dict[str, GenerationMetrics]:
        """The reference comes first, and decides what ends a text."""
        if self._end_ids is None or not self._compares:
            self._end_ids = end_tokens(model)
        ends, plan = self._end_ids, self.plan(model)
        metrics = {}
        for kind, (prompts, sampling) in self._runs.items():
            found = continuations(model, prompts, self._tokens, plan, end_ids=ends, sampling=sampling)
            reference = self._reference.setdefault(kind, found) if self._compares else None
            metrics[kind] = generation_metrics(found, reference, ends)
        return metrics


def _writer(tokens: TokenData, options: EvaluateOptions, text: DataOptions, compares: bool) -> _Writer | None:
    if options.generate is None:
        return None
    length = options.prompt_tokens
    size = text.sequences_per_batch
    prompts = prompt_batches(tokens, prompts=options.prompts, length=length, batch_size=size)
    if not prompts:
        raise UserError(f"no text is longer than `prompt_tokens={length}` tokens", hint="shorter beginnings")
    return _Writer(prompts, options, text.seed, compares=compares)


def _structured(
    options: EvaluateOptions, text: DataOptions, first: StreamedModel, bounds: Sequence[Gate]
) -> Structured | None:
    if options.structured is None or options.generate is None:
        return None
    tokenizer = load_model_tokenizer(text, first.checkpoint, first.vocab_size)
    found = Structured(text, tokenizer, count=options.structured, tokens=options.generate)
    for gate in bounds:
        if gate.metric in VALID and not found.measures(gate.metric):
            raise UserError(f"gate '{gate.text}': no chat in the data asks for it", hint="drop it, or other `data`")
    return found


@dataclass(frozen=True)
class _More:
    """What is measured of a model beside likelihoods of texts and choices."""

    writer: _Writer | None
    structured: Structured | None
    harness: Harness | None
    text: DataOptions

    def check(self, model: StreamedModel) -> None:
        """Refuse what does not fit in memory."""
        if self.writer is not None:
            self.writer.plan(model).check()
        if self.structured is not None:
            self.structured.plan(model).check()

    def __call__(self, model: StreamedModel) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.writer is not None:
            found |= self.writer(model)
        if self.structured is not None:
            found["structured"] = self.structured(model)
        if self.harness is not None:
            tokenizer = load_model_tokenizer(self.text, model.checkpoint, model.vocab_size)
            found["harness"] = self.harness.scores(model, tokenizer, self.text.sequences_per_batch)
        return found


def _measure(
    paths: Sequence[Path],
    opened: list[StreamedModel],
    tokens: TokenData | None,
    sets: Sequence[ChoiceData],
    gates: Sequence[Gate],
    more: "_More",
    *,
    has_reference: bool,
) -> Evaluation:
    dtype, device = str(opened[0].dtype).removeprefix("torch."), str(opened[0].device)
    reference = opened.pop(0) if has_reference else None
    evaluator = Evaluator(tokens, choices=sets, reference=reference)
    # Before any weight is read.
    for model in opened:
        evaluator.plan(model).check()
        more.check(model)
    first = {} if reference is None else more(reference)
    names = model_names(paths)
    rows = []
    for name, path in list(zip(names, paths, strict=True))[has_reference:]:
        # Popped, so that a model's embeddings and head are freed before the next one loads.
        model = opened.pop(0)
        metrics = evaluator.measure(model)
        rows.append(EvaluatedModel(name=name, path=path, is_reference=False, metrics=metrics, **more(model)))
        del model
    found = [_apply(gate, row) for row in rows for gate in gates]
    if has_reference:
        metrics = evaluator.reference_metrics()
        rows.insert(0, EvaluatedModel(name=names[0], path=paths[0], is_reference=True, metrics=metrics, **first))
    return Evaluation(
        models=tuple(rows),
        gates=tuple(found),
        data=tokens.fingerprint if tokens else None,
        num_tokens=tokens.num_tokens if tokens else 0,
        dtype=dtype,
        device=device,
    )


def _apply(gate: Gate, model: EvaluatedModel) -> GateResult:
    value = metric_value(model, gate.metric)
    return GateResult(model=model.name, gate=gate.text, value=value, passed=gate.holds(value))


def _missed(found: GateResult) -> str:
    value = format_bytes(int(found.value)) if found.gate.startswith("bytes") else f"{found.value:.6g}"
    return f"{found.model}: {found.gate} is missed with {value}"


def model_names(paths: Sequence[Path]) -> list[str]:
    """Folder names; the whole path where two folders have one name."""
    short = [path.resolve().name for path in paths]
    return [name if short.count(name) == 1 else str(path) for name, path in zip(short, paths, strict=True)]
