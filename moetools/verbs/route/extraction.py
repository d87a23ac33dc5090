"""One checkpoint with some of the experts, written and verified: what `route-tasks` makes for a task or a union."""

from pathlib import Path
from typing import Any

import torch

from moetools.architectures.base import Architecture
from moetools.checkpoint.reader import Checkpoint, open_checkpoint
from moetools.checkpoint.writer import CheckpointWriter
from moetools.forward.progress import Progress
from moetools.forward.streaming import ForwardOptions, StreamedModel
from moetools.methods.base import ExpertDecision
from moetools.methods.prune.base import KeepListed
from moetools.passes.layer_reduction import LayerReducer
from moetools.passes.recipes import Candidate, candidate_of
from moetools.pipeline.verification import Intended, probe_batch, tensor_digests, verify_checkpoint
from moetools.routing.task_routing import FILE_NAME, TaskRouting
from moetools.text.tokens import TokenData
from moetools.verbs.reduce.report import CompressReport, describe_output, model_card, versions
from moetools.verbs.route.selection import Sets, TaskSets


class Extraction:
    """Writes checkpoints that have only some of a checkpoint's experts.

    Args:
        refit: "none", or "joint" to solve the down projections anew on the task's own text.
    """

    def __init__(
        self,
        source: Checkpoint,
        arch: Architecture,
        forward: ForwardOptions,
        *,
        refit: str,
        seed: int,
        verify: bool,
        score: str,
        command: str,
        progress: Progress | None,
    ) -> None:
        self._source, self._arch, self._forward, self._refit = source, arch, forward, refit
        self._seed, self._verify, self._score, self._command = seed, verify, score, command
        self._progress = progress

    def expected_bytes(self, keep: int) -> int:
        """Bytes of the tensors of a checkpoint with `keep` experts per layer."""
        return expected_bytes(self._source, self._arch, keep)

    def write(
        self, sets: TaskSets, out: Path, tokens: TokenData, *, routing: TaskRouting | None, name: Path, resume: bool
    ) -> CompressReport:
        """Write `out`.

        Args:
            tokens: the task's text, for the refit and the probe of the verification.
            routing: put beside a union's weights: its tasks' experts in the union's numbering.
            name: where the checkpoint will be in the end, for the report.
        """
        config = self._arch.with_expert_count(self._source.config, sets.keep)
        model = StreamedModel(self._source, self._forward, progress=self._progress)
        smaller = StreamedModel(self._source, self._forward, config=config)
        with CheckpointWriter(
            out,
            source=self._source,
            plan=self._plan(sets, tokens),
            expected_bytes=self.expected_bytes(sets.keep),
            resume=resume,
        ) as writer:
            decisions, intended = self._write(writer, model, smaller, sets, tokens, config)
            contents = writer.assemble()
            if self._verify:
                verify_checkpoint(contents, self._forward, intended, source=self._source, progress=model.progress)
            report = self._report(sets, contents, tokens, decisions, model, name)
            writer.write_json("moetools.json", report.to_json())
            writer.write_text("README.md", model_card(report, self._arch.model_type))
            if routing is not None:
                writer.write_json(FILE_NAME, routing.to_json())
            writer.commit()
        return report

    def _plan(self, sets: TaskSets, tokens: TokenData) -> dict[str, Any]:
        return {
            "model": self._source.fingerprint(),
            "experts": {str(layer): list(found) for layer, found in sets.experts.items()},
            "refit": self._refit,
            "data": tokens.fingerprint if self._refit != "none" else None,
            "dtype": str(self._forward.torch_dtype()),
        }

    def _candidate(self, experts: Sets) -> Candidate:
        settings = {} if self._refit == "none" else {"refit": self._refit, "sequential": True}
        return candidate_of(KeepListed(every=None, layers=experts), settings)

    def _write(
        self,
        writer: CheckpointWriter,
        model: StreamedModel,
        smaller: StreamedModel,
        sets: TaskSets,
        tokens: TokenData,
        config: dict[str, Any],
    ) -> tuple[dict[int, ExpertDecision], Intended]:
        """All units, and what was meant by them."""
        reducer = LayerReducer(
            candidates=(self._candidate(sets.experts),),
            arch=self._arch,
            top_k=self._arch.top_k(config) or 1,
            keep=sets.keep,
            num_groups=self._arch.num_groups(config),
            seed=self._seed,
            statistics=None,
            protected={},
        )
        stock, batch = model.stock, smaller.on_device(probe_batch(tokens, smaller.vocab_size))
        if "rest" not in writer.finished:
            writer.write_unit("rest", self._source.read([*stock.names[None], *stock.extra_names]))
        writer.carry_sidecars()
        writer.write_json("config.json", config)
        decisions: dict[int, ExpertDecision] = {}
        digests: dict[int, dict[str, str]] = {}
        with torch.inference_mode():
            hidden = smaller.skeleton.enter(batch)[0]
            layers = (
                reducer.layer_by_layer(model)
                if self._refit == "none"
                else reducer.stream_by_stream(model, smaller, tokens)
            )
            for layer in layers:
                tensors, on_disk = layer.tensors, None
                if layer.weights is not None and layer.decision is not None:
                    on_disk = stock.disk_tensors(layer.index, layer.native, layer.weights)
                    decisions[layer.index] = layer.decision
                digests[layer.index] = tensor_digests(tensors)
                unit = f"layer-{layer.index:05d}"
                if unit not in writer.finished:
                    writer.write_unit(unit, on_disk or self._source.read(stock.names[layer.index]))
                hidden = smaller.run_tensors(layer.index, tensors, batch, hidden)
            logits = smaller.skeleton.logits(batch, hidden)
        return decisions, Intended(digests=digests, batch=batch, logits=logits)

    def _report(
        self,
        sets: TaskSets,
        contents: Path,
        tokens: TokenData,
        decisions: dict[int, ExpertDecision],
        model: StreamedModel,
        name: Path,
    ) -> CompressReport:
        refit = "" if self._refit == "none" else f", refit {self._refit}"
        return CompressReport(
            verb="route-tasks",
            method=f"{self._score} on {sets.name}{refit}",
            command=self._command,
            out=str(name),
            versions=versions(),
            seed=self._seed,
            input_path=str(self._source.path),
            input_fingerprint=self._source.fingerprint(),
            provenance={"tasks": list(sets.tasks), "tokens": tokens.num_tokens, "data": tokens.fingerprint},
            before=describe_output(self._source),
            after=describe_output(open_checkpoint(contents)),
            layers=decisions,
            load=None,
            verified=self._verify,
            seconds={},
            memory=model.memory_plan(tokens.batches, keep_native=True),
        )


def expected_bytes(source: Checkpoint, arch: Architecture, keep: int) -> int:
    """Bytes of all tensors when every MoE layer has `keep` experts; routers shrink as well, by next to nothing."""
    count = arch.num_experts(source.config)
    assert count is not None
    experts = sum(info.nbytes for name, info in source.tensors.items() if arch.part_of(name) == "experts")
    return source.total_bytes - experts + experts * keep // count


def expected_parameters(source: Checkpoint, arch: Architecture, keep: int) -> int:
    """Parameters of such a checkpoint."""
    count = arch.num_experts(source.config)
    assert count is not None
    total = experts = 0
    for name, info in source.tensors.items():
        size = 1
        for length in info.shape:
            size *= length
        total += size
        experts += size if arch.part_of(name) == "experts" else 0
    return total - experts + experts * keep // count
