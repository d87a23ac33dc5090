"""Route by task, sentence or sequence at run time, on the full checkpoint, without a copy of any expert.

    import moetools.hf
    model = AutoModelForCausalLM.from_pretrained("MODEL")
    model.load_task_routing("OUT")            # the folder that moetools route-tasks wrote
    model.set_task("math")                    # all sequences
    model.set_task(["math", "code", None])    # one per sequence of the batch; None: all experts
    model.set_task(model.choose_task(ids))    # by the prompt
    model.set_routing_level("sentence", pool="mean-probs", reach="previous")

Importing this adds these methods to `PreTrainedModel`. They put a `RouterControl` in front of the routers, and a hook
in front of the model that tells it the shape of the batch; `model.clear_task_routing()` takes both away.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moetools.architectures.base import find_architecture
from moetools.checkpoint.reader import open_checkpoint
from moetools.errors import UserError
from moetools.routing.classifier import TaskClassifier, load_classifier, ngram_features, router_features
from moetools.routing.router_control import RouterControl
from moetools.routing.routing_level import RoutingLevel
from moetools.routing.task_routing import CLASSIFIER_NAME, TaskRouting, check_fits, load_task_routing

_ATTRIBUTE = "_moetools_task_routing"


class ModelRouting:
    """The task routing of one model in memory."""

    def __init__(self, model: Any, routing: TaskRouting, classifier: TaskClassifier | None) -> None:
        config = model.config.to_dict()
        self._model, self._routing, self._classifier = model, routing, classifier
        self._arch = find_architecture(config)
        vocab_size = model.config.get_text_config().vocab_size
        if any(not 0 <= token < vocab_size for token in routing.sentence_end_ids):
            raise UserError(f"the task routing's sentence ends are not among this model's {vocab_size} tokens")
        ends_V = torch.zeros(vocab_size, dtype=torch.bool)
        ends_V[list(routing.sentence_end_ids)] = True
        self.control = RouterControl(model, self._arch, ends_V=ends_V if routing.sentence_end_ids else None)
        check_fits(
            routing,
            model_type=self._arch.model_type,
            num_experts=self._arch.num_experts(config),
            layers=self.control.layers,
        )
        self._hook: Any = None

    def install(self) -> None:
        self.control.install()
        # The decoder, not the model around it: it is called in every case, also on its own.
        self._hook = self._model.base_model.register_forward_pre_hook(self._before, with_kwargs=True)

    def remove(self) -> None:
        self._hook.remove()
        self.control.remove()

    def set_task(self, task: str | Sequence[str | None] | None) -> None:
        names = [task] if task is None or isinstance(task, str) else list(task)
        if not names:
            raise UserError("no task was given", hint="a name, one name per sequence, or None for all experts")
        known = {name: self._routing.experts(name) for name in dict.fromkeys(names) if name is not None}
        self.control.tasks = [None if name is None else known[name] for name in names]

    def choose(self, input_ids: Tensor, attention_mask: Tensor | None) -> list[str | None]:
        classifier = self._classifier
        if classifier is None:
            raise UserError(
                f"the task routing has no {CLASSIFIER_NAME}",
                hint="route-tasks writes one with `classifier=ngrams` or `classifier=router`",
            )
        mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        prompts = [ids[real][: classifier.prefix] for ids, real in zip(input_ids, mask, strict=True)]
        if classifier.kind == "ngrams":
            return classifier.choose(ngram_features(prompts, classifier.prefix))
        rows = [self._router_probabilities(ids) for ids in prompts]
        return classifier.choose(torch.cat(rows))

    def _router_probabilities(self, ids: Tensor) -> Tensor:
        """[1, X] features of one prompt, from a pass over its prefix with all experts."""
        with self.control.recording() as logits, torch.no_grad():
            self._model(input_ids=ids[None], use_cache=False)
        return router_features([router_probability(logits[layer], self._arch.scoring) for layer in self.control.layers])

    def _before(self, _model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell the control what the decoder's coming forward sees."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        embeds = kwargs.get("inputs_embeds")
        shown = ids if ids is not None else embeds
        if shown is None:
            return
        size, length = shown.shape[:2]
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if mask is None or mask.dim() != 2:
            real = torch.ones(size, length, dtype=torch.bool, device=shown.device)
        else:
            # With a cache the mask also covers the tokens before.
            real = mask[:, -length:].bool()
        self.control.begin(ids, real, continues=_cached_tokens(kwargs.get("past_key_values")) > 0)


def router_probability(logits_TE: Tensor, scoring: str) -> Tensor:
    """[1, E] mean over tokens of softmax(l), or of sigmoid(l) / sum sigmoid(l); as the statistic "router" has it."""
    logits_TE = logits_TE.float()
    scores_TE = torch.nn.functional.logsigmoid(logits_TE) if scoring == "sigmoid" else logits_TE
    return scores_TE.softmax(1).double().mean(0, keepdim=True).cpu()


def _cached_tokens(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _of(model: Any) -> ModelRouting:
    found = model.__dict__.get(_ATTRIBUTE)
    if found is None:
        raise UserError("the model has no task routing", hint="model.load_task_routing('OUT') first")
    return found


def _load_task_routing(self: Any, path: str | Path) -> None:
    """Read `task_routing.json` (and the tuned routers and the classifier beside it) for this model.

    Raises:
        CheckpointError: the file is missing or damaged.
        UserError: it was made for another model.
    """
    path = Path(path)
    routing = load_task_routing(path)
    classifier_file = (path if path.is_dir() else path.parent) / CLASSIFIER_NAME
    classifier = load_classifier(classifier_file) if classifier_file.is_file() else None
    found = ModelRouting(self, routing, classifier)
    _check_checkpoint(routing, Path(self.config._name_or_path or "."))
    _clear_task_routing(self)
    found.install()
    self.__dict__[_ATTRIBUTE] = found


def _check_checkpoint(routing: TaskRouting, folder: Path) -> None:
    if routing.model is None or not (folder / "config.json").is_file():
        return
    found = open_checkpoint(folder).fingerprint()
    if found != routing.model:
        raise UserError(
            f"the task routing was made for another checkpoint (fingerprint {routing.model[:12]}, {folder} has "
            f"{found[:12]})",
            hint="run moetools route-tasks on this one",
        )


def _set_task(self: Any, task: str | Sequence[str | None] | None) -> None:
    """Route among one task's experts; a list gives every sequence of the batch its own, None is all experts.

    Raises:
        UserError: an unknown task, or no task routing was loaded.
    """
    _of(self).set_task(task)


def _choose_task(self: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[str | None]:
    """The task of every prompt by the classifier, None where it is not sure: what `set_task` takes."""
    return _of(self).choose(input_ids, attention_mask)


def _set_routing_level(self: Any, level: str, **settings: str) -> None:
    """Choose experts per token, sentence or sequence; settings as in `RoutingLevel` (pool, reach, weights)."""
    _of(self).control.level = RoutingLevel(level=level, **settings)  # type: ignore[arg-type]


def _clear_task_routing(self: Any) -> None:
    """Give the model its own routing back."""
    found = self.__dict__.pop(_ATTRIBUTE, None)
    if found is not None:
        found.remove()


for _name, _method in {
    "load_task_routing": _load_task_routing,
    "set_task": _set_task,
    "choose_task": _choose_task,
    "set_routing_level": _set_routing_level,
    "clear_task_routing": _clear_task_routing,
}.items():
    setattr(PreTrainedModel, _name, _method)
