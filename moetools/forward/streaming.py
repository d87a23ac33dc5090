"""The shared forward pass: one decoder layer at a time, all batches through it, then the next.

There is no second way to run a model: calibration, compression, evaluation and verification loop over its `layers`.
"""

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moetools.architectures.base import find_architecture
from moetools.architectures.weights import LayerWeights
from moetools.checkpoint.reader import Checkpoint
from moetools.errors import CheckpointError, UnsupportedModelError
from moetools.forward.activations import Activations, activation_bytes
from moetools.forward.experts import RoutedCall, observe
from moetools.forward.finite import HiddenGuard
from moetools.forward.memory import MemoryPlan, default_budget, give_back_memory, hold_allocator, module_bytes, widest
from moetools.forward.options import ForwardOptions
from moetools.forward.progress import Progress, Silent
from moetools.forward.proof import compare_with_stock
from moetools.forward.skeleton import Skeleton
from moetools.forward.stacks import StackSkeleton
from moetools.forward.stock import StockModel
from moetools.sizes import format_bytes
from moetools.statistics.base import LayerShape, Reads, RoutedBatch, RoutedSlots
from moetools.text.tokens import TokenBatch


@dataclass(frozen=True, kw_only=True)
class LoadedLayer:
    """A decoder layer that is ready to run.

    Attributes:
        index: its position.
        module: the stock module, in the compute dtype; on the meta device if only the tensors were asked for.
        native: its fused tensors in the dtype on disk, if they were asked for.
    """

    index: int
    module: nn.Module
    native: dict[str, Tensor] | None = None


class StreamedModel:
    """A checkpoint that runs layer by layer within a memory budget.

    Args:
        config: config.json to build the model with, where it differs from the checkpoint's own.
        only_run: nobody will ask for its experts, so they may be such that nothing is known of them.

    Attributes:
        own_entry: what enters its first layer is not only its embedded tokens.
    """

    own_entry: ClassVar[bool] = False

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: ForwardOptions,
        *,
        config: dict[str, Any] | None = None,
        progress: Progress | None = None,
        only_run: bool = False,
    ) -> None:
        self.checkpoint, self.options = checkpoint, options
        self.progress: Progress = progress or Silent()
        self.device, self.dtype = options.torch_device(), options.torch_dtype()
        self.arch = find_architecture(config or checkpoint.config, dense=True)
        self.arch.check_runs()
        if not only_run:
            self.arch.check_known()
        self.stock = StockModel(
            checkpoint,
            self.arch,
            dtype=self.dtype,
            device=self.device,
            config=config,
            trust_remote_code=options.trust_remote_code,
        )
        self._refuse_carried()
        self.config = self.stock.raw_config
        self.num_layers = self.stock.num_layers
        self.hidden_size: int = self.stock.model.config.get_text_config().hidden_size
        self.stream_width = math.prod(self.stock.flow.tail)
        self.vocab_size: int = self.stock.model.config.get_text_config().vocab_size
        budget = options.budget_bytes
        self.memory_budget = default_budget(self.device) if budget is None else budget
        if budget is not None and self.device.type == "cpu":
            hold_allocator()
        self._skeleton: Skeleton | StackSkeleton | None = None
        self._guard = HiddenGuard(checkpoint, self.dtype)
        self._resident: set[int] = set()
        self._side_stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def _refuse_carried(self) -> None:
        carried = self.stock.flow.carried
        if carried is not None:
            raise UnsupportedModelError(
                f"model_type '{self.arch.model_type}': its layers hand on more than hidden states ({carried}), so it "
                "cannot be run layer by layer",
                hint="moetools runs every model layer by layer; this one cannot be handled yet",
            )

    @property
    def skeleton(self) -> Skeleton | StackSkeleton:
        if self._skeleton is None:
            self.stock.load_rest()
            stock = self.stock
            plain = None if self.arch.stacks else Skeleton(stock.model, stock.decoder_path, stock.flow)
            self._skeleton = plain or StackSkeleton(stock)
            if self.stock.flow.problem is not None:
                compare_with_stock(self)
        return self._skeleton

    def memory_plan(
        self,
        batches: Sequence[TokenBatch],
        *,
        keep_native: bool = False,
        beside: Sequence["StreamedModel"] = (),
        rooms: int = 1,
        scratch: int = 0,
    ) -> MemoryPlan:
        """Where the bytes of a pass over `batches` go, known before any weight is read.

        Args:
            keep_native: layers are kept in the dtype on disk as well.
            beside: other models whose embeddings, norms and heads are in memory too, and a layer that is being made.
            rooms, scratch: see `MemoryPlan`.
        """
        sizes = [module_bytes(self.stock.layer(index), self.dtype) for index in range(self.num_layers)]
        on_disk = [sum(self.checkpoint.tensors[name].nbytes for name in self.stock.names[i]) for i in range(len(sizes))]
        decoding = [self.checkpoint.decode_bytes(self.stock.names[index]) for index in range(len(sizes))]
        # While a layer is fused its parts and the result coexist; a cast or kept copy adds the disk-dtype tensors.
        layer = max((sum(bytes_) for bytes_ in zip(sizes, on_disk, decoding, strict=True)), default=0)
        largest = max((batch.input_ids.numel() for batch in batches), default=0)
        width, top_k = self._ffn_size()
        intermediate = width * 3 + self.hidden_size * 3
        return MemoryPlan(
            budget=self.memory_budget,
            rest=sum(model.rest_bytes() for model in (self, *beside)),
            layer=layer + (max(on_disk) if keep_native else 0) + sum(model.made_layer() for model in beside),
            layers=sum(sizes),
            activations=activation_bytes(batches, self.stream_width, self.dtype),
            workspace=largest * self.dtype.itemsize * (top_k * intermediate + 8 * self.hidden_size),
            rooms=rooms,
            scratch=scratch,
        )

    def rest_bytes(self) -> int:
        """Of embeddings, final norm and head in the compute dtype."""
        layers = sum(module_bytes(self.stock.layer(index), self.dtype) for index in range(self.num_layers))
        return module_bytes(self.stock.model, self.dtype) - layers

    def largest_layer(self) -> int:
        """Bytes of the largest decoder layer in the compute dtype."""
        return max(module_bytes(self.stock.layer(index), self.dtype) for index in range(self.num_layers))

    def made_layer(self) -> int:
        """Bytes of the largest layer that is being made: to run, and in the dtype on disk both fused and as stored."""
        stored = 2 * widest(self.checkpoint, self.arch)
        return self.largest_layer() * (self.dtype.itemsize + stored) // self.dtype.itemsize

    def layer_shape(self, num_tasks: int) -> LayerShape:
        """Sizes of the MoE layers, as statistics need them."""
        experts = self._any_experts()
        return LayerShape(
            num_experts=experts.num_experts,
            top_k=self.arch.top_k(self.config) or self._any_top_k(),
            hidden_size=self.hidden_size,
            expert_size=experts.down_proj.shape[1 if experts.is_transposed else 2],
            num_tasks=num_tasks,
            scoring="sigmoid" if self.arch.scoring == "sigmoid" else "softmax",
        )

    def _ffn_size(self) -> tuple[int, int]:
        """Width of one expert and experts per token; a dense model has one expert."""
        if self.stock.moe_layers:
            shape = self.layer_shape(1)
            return shape.expert_size, shape.top_k
        width = getattr(self.stock.model.config.get_text_config(), "intermediate_size", None)
        return width if isinstance(width, int) else 4 * self.hidden_size, 1

    def _any_experts(self) -> Any:
        index, moe = next(iter(self.stock.moe_layers.items()))
        return self.stock.layer(index).get_submodule(moe.inside(self.arch.experts))

    def _any_top_k(self) -> int:
        index, moe = next(iter(self.stock.moe_layers.items()))
        router: Any = self.stock.layer(index).get_submodule(moe.inside(self.arch.router))
        return router.top_k

    def layers(
        self, *, keep_native: bool = False, fill: bool = True, resident: bool = False, prefetch: bool = True
    ) -> Generator[LoadedLayer]:
        """All decoder layers in order, each ready to run; layer i + 1 loads while layer i is used.

        A layer is freed when the next one is asked for or the loop is left, unless `resident`. With `fill=False` the
        tensors are read (`keep_native`), but the module is not made ready to run.
        """
        upcoming: Future[LoadedLayer] | None = None
        for index in range(self.num_layers):
            layer = upcoming.result() if upcoming else self._load(index, keep_native, fill)
            upcoming = None
            if prefetch and index + 1 < self.num_layers:
                upcoming = _in_thread(functools.partial(self._load, index + 1, keep_native, fill))
            try:
                yield layer
                self._guard.settle()
            except (GeneratorExit, CheckpointError):
                if upcoming:
                    self._drop(upcoming, index + 1)
                raise
            finally:
                if resident and fill:
                    self._resident.add(index)
                else:
                    self._free(index)

    def _drop(self, upcoming: Future[LoadedLayer], index: int) -> None:
        """Free a prefetched layer that nobody will use; loading cannot be stopped halfway, so it is waited for."""
        wait([upcoming])
        if index not in self._resident:
            self._free(index)

    def _load(self, index: int, keep_native: bool, fill: bool) -> LoadedLayer:
        if index in self._resident and not keep_native:
            return LoadedLayer(index=index, module=self.stock.layer(index), native=None)
        self._resident.discard(index)
        with self._on_side_stream():
            tensors = self.stock.read_layer(index)
            module = self.stock.fill_layer(index, tensors) if fill else self.stock.layer(index)
        return LoadedLayer(index=index, module=module, native=tensors if keep_native else None)

    def _free(self, index: int) -> None:
        if self.device.type == "cuda":
            # The memory goes back to a pool that the loading stream may reuse at once.
            torch.cuda.current_stream(self.device).synchronize()
        self._resident.discard(index)
        self.stock.free_layer(index)
        if self.device.type == "cpu":
            give_back_memory()

    def release(self) -> None:
        """Free the layers that `layers(resident=True)` kept."""
        for index in sorted(self._resident):
            self._free(index)

    @contextlib.contextmanager
    def _on_side_stream(self) -> Iterator[None]:
        """On CUDA, load on a stream of its own so that copies overlap the computation; done when the context ends.

        It is the same stream for every layer: the allocator hands freed memory out again only on the stream it was for.
        """
        if self._side_stream is None:
            yield
            return
        with torch.cuda.stream(self._side_stream):
            yield
        self._side_stream.synchronize()

    def embed(self, batches: Sequence[TokenBatch], activations: Activations) -> None:
        """Put what enters the first layer into `activations`."""
        for number, batch in enumerate(batches):
            activations[number] = self.skeleton.enter(self.on_device(batch))[0]

    def activations(self, batches: Sequence[TokenBatch], plan: MemoryPlan) -> Activations:
        """Room for the hidden states of `batches`."""
        return Activations(
            batches, width=self.stream_width, dtype=self.dtype, device=self.device, budget=plan.activation_budget
        )

    def on_device(self, batch: TokenBatch) -> TokenBatch:
        if self.device.type == "cpu":
            return batch
        mask = None if batch.attention_mask is None else batch.attention_mask.to(self.device)
        ids, task = batch.input_ids.to(self.device), batch.task.to(self.device)
        return replace(batch, input_ids=ids, attention_mask=mask, task=task)

    def run_layer(self, layer: LoadedLayer, batch: TokenBatch, hidden: Tensor) -> Tensor:
        """Hidden states [B, N, D] behind `layer`."""
        behind = self.skeleton.run(layer.module, layer.index, batch, hidden.to(self.device))
        self._guard.see(layer.index, behind, batch)
        return behind

    def run_tensors(self, index: int, tensors: Mapping[str, Tensor], batch: TokenBatch, hidden: Tensor) -> Tensor:
        """Hidden states behind layer `index` when it has the given fused tensors instead of those on disk."""
        with self.filled(index, tensors) as layer:
            return self.run_layer(layer, batch, hidden)

    @contextlib.contextmanager
    def filled(self, index: int, tensors: Mapping[str, Tensor]) -> Iterator[LoadedLayer]:
        """Layer `index`, ready to run, with the given fused tensors instead of those on disk; freed at the end."""
        try:
            yield LoadedLayer(index=index, module=self.stock.fill_layer(index, tensors))
        finally:
            self._free(index)

    def weights(self, layer: LoadedLayer) -> LayerWeights:
        """Canonical MoE weights of a layer loaded with `keep_native`."""
        assert layer.native is not None
        return self.stock.weights(layer.index, layer.native)

    @contextlib.contextmanager
    def observe(self, layer: LoadedLayer, reads: frozenset[Reads], observer: "LayerObserver") -> Iterator[None]:
        """Hand every batch's `RoutedBatch` of a MoE layer to `observer`; a dense layer has nothing to show."""
        moe = self.stock.moe_layers.get(layer.index)
        if moe is None:
            return (yield)
        block = layer.module.get_submodule(moe.block)
        with observe(block, router=self.arch.router, experts=self.arch.experts, reads=reads, callback=observer.see):
            yield


def _in_thread(load: Callable[[], LoadedLayer]) -> Future[LoadedLayer]:
    """Run `load` in a thread of its own that ends with it.

    A thread that has used torch keeps a team of OpenMP threads while it lives; with more of them than cores, OpenMP
    stops waiting actively, and everything the main thread computes gets a quarter slower.
    """
    future: Future[LoadedLayer] = Future()

    def run() -> None:
        try:
            future.set_result(load())
        except BaseException as error:  # noqa: BLE001 - handed to whoever asks for the result
            future.set_exception(error)

    threading.Thread(target=run, name="moetools-layer").start()
    return future


class LayerObserver:
    """Passes the calls of one MoE block on as `RoutedBatch`es; set `batch`, and `first` (sequence), before each one."""

    def __init__(self, consume: Any) -> None:
        self._consume = consume
        self.batch: TokenBatch | None = None
        self.first = 0

    def see(self, call: RoutedCall) -> None:
        assert self.batch is not None
        self._consume(routed_batch(call, self.batch, self.first))


def routed_batch(call: RoutedCall, batch: TokenBatch, first: int) -> RoutedBatch:
    """What a MoE block did for the real tokens of a batch; padding tokens and their slots are dropped."""
    mask, (rows_B, columns_N) = batch.attention_mask, map(torch.arange, batch.input_ids.shape)
    task_T, sequence_T, position_T = (
        one.expand(batch.input_ids.shape).reshape(-1).to(call.hidden_TD.device)
        for one in (batch.task[:, None], first + rows_B[:, None], columns_N)
    )
    token_S, expert_S, weight_S, counts_E = call.token_S, call.expert_S, call.weight_S, call.counts_E
    intermediate_SF, output_SD, shared_TD = call.intermediate_SF, call.output_SD, call.shared_TD
    rows: Any = slice(None)
    if mask is not None and not bool(mask.all()):
        real_T = mask.reshape(-1).to(token_S.device)
        rows = real_T.nonzero().squeeze(1)
        slots = real_T[token_S].nonzero().squeeze(1)
        place_T = torch.cumsum(real_T.long(), 0) - 1
        token_S, expert_S, weight_S = place_T[token_S[slots]], expert_S[slots], weight_S[slots]
        counts_E = torch.bincount(expert_S, minlength=counts_E.numel())
        intermediate_SF = None if intermediate_SF is None else intermediate_SF[slots]
        output_SD = None if output_SD is None else output_SD[slots]
    return RoutedBatch(
        hidden_TD=call.hidden_TD[rows],
        router_logits_TE=call.router_logits_TE[rows],
        topk_index_TK=call.topk_index_TK[rows],
        topk_weight_TK=call.topk_weight_TK[rows],
        task_T=task_T[rows],
        sequence_T=sequence_T[rows],
        position_T=position_T[rows],
        routed_TD=None if call.routed_TD is None or shared_TD is None else call.routed_TD[rows],
        shared_TD=None if shared_TD is None else shared_TD[rows],
        slots=RoutedSlots(
            token_S=token_S,
            expert_S=expert_S,
            weight_S=weight_S,
            counts_E=counts_E,
            intermediate_SF=intermediate_SF,
            output_SD=output_SD,
        ),
    )


def describe_memory(plan: MemoryPlan) -> str:
    """One line for logs and `--dry-run`."""
    streamed = "layers streamed" + (", next one prefetched" if plan.prefetch else "")
    how = "all layers resident" if plan.resident else streamed
    spill = ", activations on disk" if plan.activations > plan.activation_budget else ""
    return f"{how}{spill}; expected peak {format_bytes(plan.peak)} of {format_bytes(plan.budget)}"
