"""The importance matrix that `quantize` writes beside a GGUF file."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from moetools.checkpoint.reader import Checkpoint
from moetools.formats.imatrix import write_imatrix
from moetools.forward.memory import MemoryPlan
from moetools.forward.streaming import StreamedModel
from moetools.passes.input_moments import load_moments, measure_moments, moments_bytes, moments_key, save_moments
from moetools.passes.quantize_places import Place
from moetools.pipeline.kept import made_once
from moetools.text.tokens import TokenData
from moetools.verbs.quantize.options import QuantizeOptions
from moetools.verbs.quantize.plan import plan_places


class ImportanceMatrix:
    """What every linear layer and expert of the unquantized model sees, whatever the run quantizes.

    Args:
        plan: of the run.
        scratch: keeps the measurement for a run that is resumed.
    """

    def __init__(self, model: StreamedModel, data: TokenData, plan: MemoryPlan, scratch: Path) -> None:
        self._data, places = data, plan_places(model, QuantizeOptions())
        self._keys = {place.name: moments_key(place) for place in _all(places.values())}
        kept = made_once(
            scratch / "imatrix.safetensors", lambda file: save_moments(measure_moments(model, data, plan, places), file)
        )
        self._moments = load_moments(kept)

    def write(self, written: Checkpoint, file: Path, datasets: Sequence[str]) -> None:
        """Write `file`, under the names that the tensors of `written` have in its GGUF file."""
        tokens, length = self._data.num_tokens, self._data.seq_len
        write_imatrix(written, file, self._seen, datasets=datasets, num_tokens=tokens, seq_len=length)

    def _seen(self, name: str) -> tuple[Tensor, Tensor] | None:
        moments = self._moments.get(self._keys.get(name, ""))
        return None if moments is None else (moments.sum_BI, moments.count_B)


def matrix_bytes(model: StreamedModel) -> int:
    """Memory that the measurement takes."""
    return moments_bytes(_all(plan_places(model, QuantizeOptions()).values()), model.layer_shape(1).num_experts)


def _all(places: Iterable[Sequence[Place]]) -> list[Place]:
    return [place for here in places for place in here]
