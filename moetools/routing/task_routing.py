"""`task_routing.json`: which experts each task uses, for use at run time on the full checkpoint (`moetools.hf`)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moetools.architectures.weights import LayerWeights
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
    try:
        plain = json.loads(file.read_text())
        if plain.get("format") != _FORMAT:
            raise CheckpointError(f"{file} is not a task routing", hint="write one with moetools route-tasks")
        tasks = {
            str(task): {int(layer): tuple(map(int, experts)) for layer, experts in layers.items()}
            for task, layers in plain["tasks"].items()
        }
        routing = TaskRouting(
            model_type=plain["model_type"],
            num_experts=int(plain["num_experts"]),
            top_k=int(plain["top_k"]),
            model=plain["model"],
            tasks=tasks,
            routers=_load_routers(file.parent / plain["routers"]) if plain["routers"] else {},
            sentence_end_ids=[int(token) for token in plain["sentence_end_ids"]],
            refitted=[str(task) for task in plain["refitted"]],
        )
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{file} is damaged: {type(error).__name__}: {error}", hint="write it again") from error
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


def _load_routers(file: Path) -> dict[str, dict[int, dict[str, Tensor]]]:
    found: dict[str, dict[int, dict[str, Tensor]]] = {}
    for key, tensor in load_file(file).items():
        task, layer, name = key.rsplit("/", 2)
        if name not in LayerWeights.ROUTER_FIELDS:
            raise ValueError(f"unknown tensor '{key}'")
        found.setdefault(task, {}).setdefault(int(layer), {})[name] = tensor
    return found


def _check(routing: TaskRouting, file: Path) -> None:
    for task, sets in routing.tasks.items():
        for layer, experts in sets.items():
            legal = sorted(set(experts)) == list(experts) and all(0 <= one < routing.num_experts for one in experts)
            if not legal or len(experts) < routing.top_k:
                raise CheckpointError(
                    f"{file}: task '{task}', layer {layer}: {list(experts)} are not at least {routing.top_k} ascending "
                    f"experts of {routing.num_experts}",
                    hint="write it again",
                )
