"""What `inspect` says of a checkpoint."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moetools.pipeline.table import Table
from moetools.sizes import format_bytes


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of something is on disk: number of tensors, elements stored, bytes."""

    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class ModelSummary:
    """Structure and sizes of a checkpoint; None stands for what config.json does not say.

    Attributes:
        path, model_type: the folder as given; the family named in config.json.
        described: whether the family has a file of its own, or is read by the generic description.
        scoring: how router logits become weights; None for a family without a file.
        layers, moe_layers: number of decoder layers; indices of those that have expert tensors.
        experts, top_k, groups, shared_experts: E and K of a MoE layer, its router groups (1: none), its shared experts;
            a dense model, such as a distilled student, has 0 experts; None where config.json speaks of experts in a
            way that is not described.
        expert_width, hidden_size: F (of a dense model the width of its FFN) and D.
        parts, dtypes: sizes by part of the model and by dtype on disk, extra tensors not counted.
        extra: tensors that stock transformers does not load (multi-token prediction) and that are carried over.
        active_parameters: parameters one token uses, sum over all parts but experts + experts * K / E. Embedding tables
            count whole and as often as they are on disk: once if tied.
        files, file_bytes: safetensors files and their size, headers included.
        quantization: what config.json says about packed weights; None for plain ones.
        decoded: False where weights are packed in a way that moetools does not read. Parameters are then elements as
            stored (packed words, scales), not weights.
        serving_bytes: dtype -> bytes of all weights; int8 and int4 for the linear layers without their scales, router,
            embeddings and norms in 16 bits. "as stored" alone for packed weights.
        kv_cache_bytes: per 1,000 tokens of context in 16 bits, see `architectures.kv_cache`.
    """

    path: str
    model_type: str
    described: bool
    scoring: str | None
    layers: int
    moe_layers: tuple[int, ...]
    experts: int | None
    top_k: int | None
    groups: int
    shared_experts: int
    expert_width: int | None
    hidden_size: int | None
    parts: Mapping[str, Size]
    dtypes: Mapping[str, Size]
    extra: Size
    active_parameters: int | None
    files: int
    file_bytes: int
    quantization: Mapping[str, Any] | None
    decoded: bool
    serving_bytes: Mapping[str, int]
    kv_cache_bytes: int | None

    @property
    def parameters(self) -> int:
        """All elements but those of extra tensors."""
        return sum(size.parameters for size in self.parts.values())

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors but the extra ones."""
        return sum(size.bytes for size in self.parts.values())

    def to_json(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        totals = {"parameters": self.parameters, "weight_bytes": self.weight_bytes}
        return asdict(self) | {"moe_layers": list(self.moe_layers)} | totals

    def tables(self) -> list[Table]:
        """Overview, sizes by part, memory to serve."""
        return [self._overview(), self._parts(), self._serving()]

    def _overview(self) -> Table:
        family = self.model_type if self.described else f"{self.model_type} (generic description)"
        sizes = f"{_or_unknown(self.expert_width)}, {_or_unknown(self.hidden_size)}"
        experts = "not described" if self.experts is None else str(self.experts)
        structure = [
            ["family", family],
            ["layers", f"{self.layers}, {len(self.moe_layers)} of them MoE"],
            ["experts per MoE layer", experts + (f" in {self.groups} groups" if self.groups > 1 else "")],
            ["experts per token (top-k)", _or_unknown(self.top_k)],
            ["shared experts", str(self.shared_experts)],
            ["expert width, hidden size", sizes],
            ["router scoring", self.scoring or "not described"],
        ]
        if self.experts == 0:
            structure = [
                ["family", f"{self.model_type}, dense"],
                ["layers", str(self.layers)],
                ["FFN width, hidden size", sizes],
            ]
        rows = [
            *structure,
            ["parameters" if self.decoded else "stored elements", f"{self.parameters:,}"],
            ["active per token", _or_unknown(self.active_parameters)],
            ["dtypes", ", ".join(f"{name} {format_bytes(size.bytes)}" for name, size in self.dtypes.items())],
            ["on disk", f"{format_bytes(self.file_bytes)} in {self.files} {'file' if self.files == 1 else 'files'}"],
        ]
        if self.quantization:
            rows.append(["quantized", ", ".join(f"{key} {value}" for key, value in self.quantization.items())])
        if self.quantization and self.decoded:
            rows.append(["bits per parameter", f"{8 * self.weight_bytes / self.parameters:.2f}, scales included"])
        note = "" if self.decoded else "the weights are packed: elements are counted as they are stored"
        return Table(title=self.path, columns=["", "value"], rows=rows, note=note)

    def _parts(self) -> Table:
        sizes = dict(self.parts)
        if self.extra.tensors:
            sizes["extra (carried over)"] = self.extra
        whole = sum(size.bytes for size in sizes.values())
        rows = [
            [part, str(size.tensors), f"{size.parameters:,}", format_bytes(size.bytes), f"{size.bytes / whole:.1%}"]
            for part, size in sorted(sizes.items(), key=lambda item: -item[1].bytes)
        ]
        unit = "parameters" if self.decoded else "elements"
        return Table(title="by part", columns=["part", "tensors", unit, "bytes", "share"], rows=rows)

    def _serving(self) -> Table:
        cache = self.kv_cache_bytes
        rows = [
            [dtype, format_bytes(count), format_bytes(cache) if cache is not None else "unknown"]
            for dtype, count in self.serving_bytes.items()
        ]
        note = (
            "weights without activations; int8 and int4: linear layers, without scales; the rest and the cache 16 bit"
        )
        columns = ["weights as", "weights", "KV cache per 1,000 tokens"]
        return Table(title="memory to serve", columns=columns, rows=rows, note=note)


def _or_unknown(value: int | None) -> str:
    return "not in config.json" if value is None else f"{value:,}"
