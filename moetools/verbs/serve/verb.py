"""Try a checkpoint in the engines of this machine, and compare what they compute with our own forward pass."""

import time
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moetools.architectures.attention import attention_option
from moetools.architectures.building import stock_class
from moetools.errors import CheckpointError, GateError, UserError
from moetools.formats.reader import PackedCheckpoint, open_model
from moetools.forward.evaluate import likelihoods
from moetools.forward.options import ForwardOptions
from moetools.forward.progress import Progress
from moetools.forward.streaming import StreamedModel
from moetools.pipeline.unchanged import Unchanged
from moetools.text.tokenizer import encode, load_tokenizer
from moetools.text.tokens import TokenBatch
from moetools.verbs.serve.engines import Engine, RefusedError, ask, chosen_engines, is_installed
from moetools.verbs.serve.options import DEFAULT_PROMPT, SHORTEST, ServeOptions
from moetools.verbs.serve.report import EngineResult, ServeReport

_IDS_WITHOUT_TOKENIZER = 32


def serve_check(
    model: Path, options: ServeOptions, forward: ForwardOptions, *, progress: Progress | None = None
) -> ServeReport:
    """Score a prompt with every engine, each in a process of its own, and with ours.

    What is compared is the log-probability of every token of the prompt behind those before it:
    d_i = |log p_engine(t_i) - log p_ours(t_i)|. An engine agrees if the mean of d is at most `tolerance` times the
    standard deviation of log p_ours over the prompt: one that loads tensors in the wrong places is off by about that
    much, rounding by a few per cent of it.

    Raises:
        UserError, CheckpointError, UnsupportedModelError: an input that cannot be used.
        GateError: an engine that was named does not agree, one that loads the checkpoint computes something else, or
            no engine agrees; its `result` is the report.
    """
    options.check()
    engines = chosen_engines(options.engine)
    streamed = StreamedModel(open_model(model), forward, progress=progress, only_run=True)
    streamed.arch.check_decodes()
    ids, prompt = _prompt(streamed, options, forward)
    with Unchanged([streamed.checkpoint]):
        ours = _scores(streamed, ids)
        check = _Check(streamed, options, forward, ids, prompt, ours)
        results = [check.result(engine, python) for engine, python in engines]
    report = ServeReport(
        model=Path(model),
        tokens=len(ids),
        spread=check.spread,
        tolerance=options.tolerance,
        dtype=str(streamed.dtype).removeprefix("torch."),
        engines=results,
    )
    missed = _missed(results, named=bool(options.engine))
    if missed:
        raise GateError(missed, result=report)
    return report


class _Check:
    """One checkpoint, one prompt, one engine after the other."""

    def __init__(
        self,
        streamed: StreamedModel,
        options: ServeOptions,
        forward: ForwardOptions,
        ids: Int[Tensor, "N"],
        prompt: str | None,
        ours: Float[Tensor, "N-1"],
    ) -> None:
        path, plain = streamed.checkpoint.path, not isinstance(streamed.checkpoint, PackedCheckpoint)
        on_cpu = streamed.device.type == "cpu"
        self._path, self._options, self._ours = path, options, ours
        self._ids, self._progress = ids.tolist(), streamed.progress
        self._device = "cpu" if forward.device == "cpu" else "auto"
        self.spread = ours.std().item()
        own = forward.dtype if forward.dtype != "auto" else "float32" if plain and on_cpu else "auto"
        self._request = {
            "ids": self._ids,
            "prompt": prompt,
            "class": stock_class(streamed.stock.model.config).__name__,
            "dtype": own,
            "threads": torch.get_num_threads(),
            "device": self._device,
            "trust_remote_code": forward.trust_remote_code,
            "attention": attention_option(path, forward.trust_remote_code),
        }

    def result(self, engine: Engine, python: str) -> EngineResult:
        if not is_installed(engine, python):
            return EngineResult(engine=engine.name, verdict="not installed", said=f"{python} has no {engine.module}")
        try:
            form = engine.form(self._path)
        except RefusedError as refused:
            return EngineResult(engine=engine.name, verdict="refused", said=str(refused))
        request = {**self._request, "path": str(form.resolve()), "packages": list(engine.packages)}
        self._progress.start(f"trying {engine.name}", layers=1, tokens=0)
        start = time.monotonic()
        try:
            answer = ask(engine, python, request, device=self._device, timeout=self._options.timeout)
        finally:
            self._progress.stop()
        found = self._judged(answer)
        shown = "" if form == self._path else str(form.relative_to(self._path))
        return EngineResult(engine=engine.name, form=shown, seconds=time.monotonic() - start, **found)

    def _judged(self, answer: dict[str, Any]) -> dict[str, Any]:
        if "error" in answer:
            return {"verdict": "fails", "said": answer["error"]}
        off = (torch.tensor(answer["scores"], dtype=torch.float64) - self._ours).abs()
        mean, largest = off.mean().item(), off.max().item()
        share = mean / self.spread if self.spread else float(mean > 0)
        same = answer["ids"] == self._ids if "ids" in answer else None
        # A comparison with nan is false: it differs.
        agrees = share <= self._options.tolerance and same is not False
        said = "" if same is not False else f"it tokenizes the prompt as {answer['ids'][:8]}, not {self._ids[:8]}"
        return {
            "verdict": "agrees" if agrees else "differs",
            "version": answer["version"],
            "mean": mean,
            "largest": largest,
            "share": share,
            "same_tokens": same,
            "said": said,
        }


def _prompt(
    streamed: StreamedModel, options: ServeOptions, forward: ForwardOptions
) -> tuple[Int[Tensor, "N"], str | None]:
    """Ids of the prompt and its text; random ids, and None, without a tokenizer and a prompt of the user's."""
    size = streamed.vocab_size
    try:
        tokenizer = load_tokenizer(
            streamed.checkpoint.path, vocab_size=size, trust_remote_code=forward.trust_remote_code
        )
    except CheckpointError:
        if options.prompt != DEFAULT_PROMPT:
            raise
        generator = torch.Generator().manual_seed(0)
        return torch.randint(size, (_IDS_WITHOUT_TOKENIZER,), generator=generator), None
    ids = encode(tokenizer, [options.prompt])[0]
    if len(ids) < SHORTEST:
        raise UserError(
            f"`prompt` has {len(ids)} tokens", hint=f"at least {SHORTEST}; every token but the first is scored"
        )
    return torch.tensor(ids), options.prompt


def _scores(model: StreamedModel, ids_N: Int[Tensor, "N"]) -> Float[Tensor, "N-1"]:
    """Log-probability of every token but the first, by our own forward pass."""
    batch = TokenBatch(input_ids=ids_N[None], attention_mask=None, task=torch.zeros(1, dtype=torch.int64))
    return likelihoods(model, [(batch, torch.arange(len(ids_N))[None] > 0)])[0][0].double()


def _missed(results: list[EngineResult], *, named: bool) -> str:
    """What is wrong, in one line; empty if nothing is."""
    bad = [one for one in results if one.verdict == "differs" or (named and one.verdict != "agrees")]
    if bad:
        return "; ".join(f"{one.engine} {_words(one)}" for one in bad)
    if any(one.verdict == "agrees" for one in results):
        return ""
    return "no engine here serves it: " + "; ".join(f"{one.engine} {_words(one)}" for one in results)


def _words(one: EngineResult) -> str:
    if one.verdict == "differs" and one.mean is not None:
        return f"differs by {one.mean:.3g} nats per token" + (f"; {one.said}" if one.said else "")
    return f"{one.verdict}: {one.said}" if one.said else one.verdict
