"""`task_routing.json`: which experts each task uses, for use at run time on the full checkpoint (`moetools.hf`)."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moetools.architectures.weights import LayerWeights
from moetools.checkpoint.folder import read_json_object
from moetools.checkpoint.tensor_file import open_tensor_file
from moetools.errors import CheckpointError, UserError
from moetools.plugins import unknown_name
from moetools.routing.router_control import TaskExperts

FILE_NAME = "task_routing.json"
ROUTERS_NAME = "task_routers.safetensors"
CLASSIFIER_NAME = "task_classifier.safetensors"
_FORMAT = "moetools-task-routing-1"


@dataclass(frozen=True, kw_only=True)
class TaskRouting:
    """The experts of every task of one checkpoint.

    Attributes:
        model_type, num_experts, top_k: of the checkpoint, to be refused on another.
        model: its fingerprint; None where the checkpoint is not written yet (a union's own file).
        tasks: task -> layer -> experts, ascending.
        routers: task -> layer -> fields of `LayerWeights`: routers tuned under the mask; a task may lack them.
        sentence_end_ids: token ids that end a sentence; empty where the model has no tokenizer.
        refitted: tasks whose extracted checkpoint has other expert weights than the full one (`--refit`), so that the
            masked full model only approximates it.
    """

    model_type: str
    num_experts: int
    top_k: int
    model: str | None
    tasks: Mapping[str, Mapping[int, tuple[int, ...]]]
    routers: Mapping[str, Mapping[int, Mapping[str, Tensor]]] = field(default_factory=dict)
    sentence_end_ids: Sequence[int] = ()
    refitted: Sequence[str] = ()

    def experts(self, task: str) -> TaskExperts:
        """What the routers need to know of a task.

        Raises:
            UserError: no such task; the hint names the closest one.
        """
        if task not in self.tasks:
            raise unknown_name("task", task, sorted(self.tasks))
        kept = {layer: torch.tensor(experts) for layer, experts in self.tasks[task].items()}
        return TaskExperts(kept=kept, routers=self.routers.get(task, {}))

    def restricted(self, tasks: Sequence[str], kept: Mapping[int, Sequence[int]]) -> "TaskRouting":
        """The same for a checkpoint that has only the experts `kept`, renumbered, and some of the tasks."""
        place = {layer: {expert: new for new, expert in enumerate(experts)} for layer, experts in kept.items()}
        chosen = {
            task: {layer: tuple(place[layer][expert] for expert in experts) for layer, experts in found.items()}
            for task, found in self.tasks.items()
            if task in tasks
        }
        return TaskRouting(
            model_type=self.model_type,
            num_experts=len(next(iter(kept.values()))),
            top_k=self.top_k,
            model=None,
            tasks=chosen,
            sentence_end_ids=self.sentence_end_ids,
        )

    def to_json(self) -> dict[str, Any]:
        """What the file holds; tuned routers are in a file of their own."""
        plain = {key: value for key, value in asdict(self).items() if key not in ("routers", "tasks")}
        tasks = {task: {str(layer): list(found) for layer, found in sets.items()} for task, sets in self.tasks.items()}
        routers = ROUTERS_NAME if self.routers else None
        return {"format": _FORMAT, **plain, "tasks": tasks, "routers": routers}

    def save_routers(self, folder: Path) -> None:
        """Write the tuned routers, if there are any."""
        tensors = {
            f"{task}/{layer}/{name}": tensor.contiguous()
            for task, layers in self.routers.items()
            for layer, fields in layers.items()
            for name, tensor in fields.items()
        }
        if tensors:
            save_file(tensors, str(folder / ROUTERS_NAME), metadata={"format": "pt"})


def load_task_routing(path: Path) -> TaskRouting:
    """The routing written by `route-tasks`, from its folder or file.

    Raises:
        CheckpointError: the file is missing, damaged or of another kind.
    """
    file = path / FILE_NAME if path.is_dir() else path
    plain = read_json_object(file)
    if plain.get("format") != _FORMAT:
        raise CheckpointError(f"{file} is not a task routing", hint="write one with moetools route-tasks")
    for key, legal in _LEGAL.items():
        if key not in plain or not legal(plain[key]):
            raise _damaged(file, f"{key} {str(plain.get(key, 'missing'))[:60]!r}")
    tasks = {
        task: {int(layer): tuple(experts) for layer, experts in layers.items()}
        for task, layers in plain["tasks"].items()
    }
    routing = TaskRouting(
        **{key: plain[key] for key in ("model_type", "num_experts", "top_k", "model", "sentence_end_ids", "refitted")},
        tasks=tasks,
        routers=_load_routers(file.parent / ROUTERS_NAME) if plain["routers"] else {},
    )
    _check(routing, file)
    return routing


def check_fits(routing: TaskRouting, *, model_type: str, num_experts: int | None, layers: Sequence[int]) -> None:
    """Refuse a routing made for another model.

    Raises:
        UserError: naming what differs.
    """
    if routing.model_type != model_type:
        raise UserError(f"the task routing is for a {routing.model_type} model, this one is {model_type}")
    if routing.num_experts != num_experts:
        raise UserError(
            f"the task routing is for {routing.num_experts} experts per layer, this model has {num_experts}",
            hint="an extracted checkpoint needs none; use the full checkpoint, or a union with its own file",
        )
    for task, sets in routing.tasks.items():
        if sorted(sets) != sorted(layers):
            raise UserError(f"task '{task}' has experts for {len(sets)} layers, the model has them in {len(layers)}")


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{file} is damaged: {what}", hint="write it again with moetools route-tasks")


def _whole(value: Any, low: int = 0) -> bool:
    return type(value) is int and low <= value < 2**31


def _layers_of_tasks(value: Any) -> bool:
    if not isinstance(value, dict) or not value:
        return False
    sets = [found for layers in value.values() if isinstance(layers, dict) for found in layers.items()]
    return all(isinstance(layers, dict) for layers in value.values()) and all(
        re.fullmatch(r"[0-9]{1,6}", layer) and isinstance(experts, list) and all(map(_whole, experts))
        for layer, experts in sets
    )


_LEGAL: Mapping[str, Callable[[Any], bool]] = {
    "model_type": lambda value: isinstance(value, str),
    "num_experts": lambda value: _whole(value, 1),
    "top_k": lambda value: _whole(value, 1),
    "model": lambda value: value is None or isinstance(value, str),
    "tasks": _layers_of_tasks,
    "routers": lambda value: value in (None, ROUTERS_NAME),
    "sentence_end_ids": lambda value: isinstance(value, list) and all(map(_whole, value)),
    "refitted": lambda value: isinstance(value, list) and all(isinstance(task, str) for task in value),
}
"""What every key of the file may hold."""


def _load_routers(file: Path) -> dict[str, dict[int, dict[str, Tensor]]]:
    found: dict[str, dict[int, dict[str, Tensor]]] = {}
    for key, tensor in open_tensor_file(file).read().items():
        parts = re.fullmatch(r"(.*)/([0-9]{1,6})/(\w+)", key)
        if parts is None or parts[3] not in LayerWeights.ROUTER_FIELDS:
            raise _damaged(file, f"unknown tensor '{key}'")
        found.setdefault(parts[1], {}).setdefault(int(parts[2]), {})[parts[3]] = tensor
    return found


def _check_routers(routing: TaskRouting, file: Path) -> None:
    """Every tuned router has a row for each of its task's experts."""
    widths = set()
    for task, layers in routing.routers.items():
        for layer, fields in layers.items():
            rows = len(routing.tasks.get(task, {}).get(layer, ()))
            for name, tensor in fields.items():
                shape = tensor.shape if name == "router_ED" else (*tensor.shape, 1)
                widths |= {shape[-1]} if name == "router_ED" else set()
                finite = tensor.is_floating_point() and bool(torch.isfinite(tensor).all())
                if len(shape) != 2 or shape[0] != rows or not finite:
                    raise _damaged(file, f"router of task '{task}', layer {layer}: {name} {list(tensor.shape)}")
    if len(widths) > 1:
        raise _damaged(file, f"routers of the widths {sorted(widths)}")


def _check(routing: TaskRouting, file: Path) -> None:
    _check_routers(routing, file)
    for task, sets in routing.tasks.items():
        for layer, experts in sets.items():
            legal = sorted(set(experts)) == list(experts) and all(0 <= one < routing.num_experts for one in experts)
            if not legal or len(experts) < routing.top_k:
                raise CheckpointError(
                    f"{file}: task '{task}', layer {layer}: {list(experts)} are not at least {routing.top_k} ascending "
                    f"experts of {routing.num_experts}",
                    hint="write it again",
                )
