"""What a quantization did: the report, its tables, and the model card."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from moetools.checkpoint.reader import Checkpoint
from moetools.formats.reader import PackedCheckpoint
from moetools.forward.memory import MemoryPlan
from moetools.methods.quantize.base import QuantizeReport
from moetools.passes.quantize_layer import QuantizedLayer
from moetools.pipeline.table import Table
from moetools.printable import in_code, in_markdown, printable
from moetools.sizes import format_bytes


@dataclass(frozen=True, kw_only=True)
class LayerErrors:
    """How well a layer was rounded.

    Attributes:
        groups: name of a group of matrices -> its report, one number per matrix (per expert, for experts).
        bits: code width per tensor on disk, where the grid has one.
    """

    groups: Mapping[str, QuantizeReport]
    bits: Mapping[str, int]

    @classmethod
    def of(cls, layer: QuantizedLayer) -> "LayerErrors":
        widths = {name: getattr(quantized.grid, "bits", None) for name, quantized in layer.quantized.items()}
        return cls(groups=layer.reports, bits={name: bits for name, bits in widths.items() if bits is not None})

    @classmethod
    def restore(cls, facts: Mapping[str, Any]) -> "LayerErrors":
        """From `asdict` of one."""
        groups = {name: QuantizeReport(**report) for name, report in facts["groups"].items()}
        return cls(groups=groups, bits=facts["bits"])


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """The record of one run; `to_json` is what `moetools.json` in the output holds.

    Attributes:
        format: the layout on disk.
        group_size: columns that share a scale; 0 for one scale per row.
        before, after: `describe_sizes` of the input and the output.
        layers: errors per decoder layer, and of embeddings and head under None ("ends" in JSON).
        notes: what a reader should know about the format and its loaders.
    """

    scheme: str
    method: str
    format: str
    command: str
    out: str
    versions: Mapping[str, str]
    seed: int
    input_path: str
    input_fingerprint: str
    model_type: str
    data: str | None
    calibration_tokens: int
    group_size: int
    before: Mapping[str, float]
    after: Mapping[str, float]
    layers: Mapping[int | None, LayerErrors]
    verified: bool
    seconds: Mapping[str, float]
    peak_memory: Mapping[str, int]
    memory: MemoryPlan
    notes: Sequence[str] = field(default_factory=list)
    dry_run: bool = False

    def to_json(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        plain = {key: value for key, value in self.__dict__.items() if key not in ("layers", "memory")}
        plain["memory"] = asdict(self.memory) | {"expected_peak": self.memory.peak}
        return plain | {"layers": {_label(index): asdict(layer) for index, layer in self.layers.items()}}

    def tables(self) -> list[Table]:
        """Sizes before and after, then errors per layer."""
        return [self._sizes(), *([self._errors()] if self.layers else [])]

    def _sizes(self) -> Table:
        before, after = self.before, self.after
        rows = [["weights", format_bytes(int(before["bytes"])), format_bytes(int(after["bytes"]))]]
        if not self.dry_run:
            rows.append(["bits per parameter", f"{before['bits']:.3f}", f"{after['bits']:.3f}"])
            rows.append(["of those quantized", f"{before['quantized_bits']:.3f}", f"{after['quantized_bits']:.3f}"])
            rows.append(["of the routed experts", f"{before['expert_bits']:.3f}", f"{after['expert_bits']:.3f}"])
        rows += [[f"seconds {phase}", "", f"{seconds:.1f}"] for phase, seconds in self.seconds.items()]
        verified = "every tensor and the probe's logits verified" if self.verified else "not verified"
        if self.dry_run:
            verified = "nothing written"
        return Table(
            title=f"quantize to {self.scheme} by {self.method}: {self.out}"
            + (" (dry run, nothing written)" if self.dry_run else ""),
            columns=["", "before", "after"],
            rows=rows,
            note="; ".join([f"format {self.format}", verified, *self.notes]),
        )

    def _errors(self) -> Table:
        rows = []
        for index, layer in self.layers.items():
            for name, report in layer.groups.items():
                rows.append(
                    [
                        _label(index),
                        name,
                        str(len(report.weight_error)),
                        _mean_and_most(report.weight_error),
                        _mean_and_most(report.output_error),
                        f"{min(report.slots):,.0f}" if report.slots else "",
                        str(len(report.fallback)) if report.fallback else "",
                    ]
                )
        return Table(
            title="errors",
            columns=["layer", "matrices", "count", "weights %", "outputs %", "least slots", "without tokens"],
            rows=rows,
            note="mean / largest share of energy lost, of the weights and of the outputs on calibration tokens",
        )

    def card(self) -> str:
        """README.md of the output: what it was made from, how, and how to make it again."""
        needs = "\nLoading needs `import moetools.hf`.\n" if self.format == "moetools" else ""
        return f"""---
library_name: transformers
tags: [moe, quantized, moetools]
---

# {in_markdown(self.out.rstrip("/").rpartition("/")[2])}

Made from {in_code(self.input_path)} ({in_markdown(self.model_type)}) by moetools {self.versions["moetools"]}:
`quantize`, scheme
{self.scheme}, method {self.method}, format {self.format}.
{needs}
| | before | after |
|---|---|---|
| weights | {format_bytes(int(self.before["bytes"]))} | {format_bytes(int(self.after["bytes"]))} |
| bits per parameter | {self.before["bits"]:.3f} | {self.after["bits"]:.3f} |

```
{printable(self.command)}
```

Errors of every matrix, the input's fingerprint and all versions are in `moetools.json`.
"""


def _label(layer: int | None) -> str:
    return "ends" if layer is None else str(layer)


def _mean_and_most(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{100 * sum(values) / len(values):.3f} / {100 * max(values):.3f}"


def describe_sizes(checkpoint: Checkpoint, quantized: Collection[str], experts: Collection[str]) -> dict[str, float]:
    """Bytes, parameters, true bits per parameter: of everything, of the tensors `quantized`, of the `experts`."""
    counts = {name: _elements(info.shape) for name, info in checkpoint.tensors.items()}
    stored = {name: info.nbytes for name, info in checkpoint.tensors.items()}
    if isinstance(checkpoint, PackedCheckpoint):
        stored = {name: checkpoint.stored_bytes(name) for name in checkpoint.tensors}

    def bits(names: Collection[str]) -> float:
        return 8 * sum(stored[name] for name in names) / max(1, sum(counts[name] for name in names))

    return {
        "bytes": checkpoint.total_bytes,
        "parameters": sum(counts.values()),
        "bits": bits(counts),
        "quantized_bits": bits(quantized),
        "expert_bits": bits(experts),
    }


def _elements(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
