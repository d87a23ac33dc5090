"""Every verb as the command line and the Python API know it: what it takes, and the function that does it.

A function takes the places, then an instance of every option class in the order given here, then `progress` and, if it
writes a checkpoint, `command`. Imports no torch.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import Field, dataclass, fields
from typing import Any

from moetools.arguments import about
from moetools.forward.options import ForwardOptions
from moetools.pipeline.options import Writing
from moetools.text.options import DataOptions
from moetools.training.options import TrainOptions
from moetools.verbs.demo_options import DemoOptions
from moetools.verbs.distill.options import StudentOptions
from moetools.verbs.evaluate.options import EvaluateOptions
from moetools.verbs.inspect.options import RoutingOptions
from moetools.verbs.quantize.options import QuantizeOptions
from moetools.verbs.reduce.options import MergeOptions, PruneOptions
from moetools.verbs.route.options import RouteOptions


@dataclass(frozen=True, kw_only=True)
class Place:
    """A folder that is named by its position.

    Attributes:
        several: one or more of them.
    """

    name: str
    help: str
    several: bool = False


@dataclass(frozen=True, kw_only=True)
class Verb:
    """What a user can ask for.

    Attributes:
        name: on the command line; the Python function has `_` for `-`.
        summary: one sentence.
        details: more of them.
        function: dotted path of what does it.
        options: option classes.
        writes: whether it writes a checkpoint: it is then told the command line, and can be resumed.
    """

    name: str
    summary: str
    details: str = ""
    function: str
    places: tuple[Place, ...]
    options: tuple[type, ...] = ()
    writes: bool = False

    def arguments(self) -> Iterator[tuple[type, "Field[Any]"]]:
        """(option class, field) of every option, in order."""
        for kind in self.options:
            yield from ((kind, one) for one in fields(kind) if about(one) is not None)

    def call(self, places: list[Any], values: dict[str, Any], **more: Any) -> Any:
        """Do it.

        Args:
            values: of the options, by field name; those that are left out have their defaults.
            more: progress, and the command line.
        """
        module, _, name = self.function.rpartition(".")
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        made = [_instance(kind, values) for kind in self.options]
        if not self.writes:
            more.pop("command", None)
        return function(*places, *made, **more)


def _instance(kind: type, values: dict[str, Any]) -> Any:
    # What several classes have (the seed) is an option of one of them.
    own = [one.name for one in fields(kind)]
    return kind(**{name: values[name] for name in own if name in values})


_MODEL = Place(name="model", help="Folder of the checkpoint (Hugging Face layout, safetensors).")
_OUT = Place(name="out", help="Folder to write; must not exist.")
_RUN = (DataOptions, ForwardOptions)

VERBS = (
    Verb(
        name="inspect",
        summary="Show what a checkpoint is made of, from config.json and safetensors headers alone.",
        details="Family, layers, experts, parameters (total and active per token), bytes by part and dtype, memory to "
        "serve.",
        function="moetools.verbs.inspect.verb.inspect",
        places=(_MODEL,),
    ),
    Verb(
        name="inspect-routing",
        summary="Measure how the routers use their experts, per layer and per task.",
        details="Load, entropy, skew, balance loss, z-loss, and experts that get too little.",
        function="moetools.verbs.inspect.routing.inspect_routing",
        places=(_MODEL,),
        options=(RoutingOptions, *_RUN),
    ),
    Verb(
        name="prune-experts",
        summary="Write a checkpoint with fewer experts: the ones a method scores lowest are dropped.",
        function="moetools.verbs.reduce.verb.prune_experts",
        places=(_MODEL, _OUT),
        options=(PruneOptions, *_RUN, Writing),
        writes=True,
    ),
    Verb(
        name="merge-experts",
        summary="Write a checkpoint with fewer experts: similar ones are merged into one.",
        details="--to 1 makes every MoE layer dense.",
        function="moetools.verbs.reduce.verb.merge_experts",
        places=(_MODEL, _OUT),
        options=(MergeOptions, *_RUN, Writing),
        writes=True,
    ),
    Verb(
        name="route-tasks",
        summary="Choose each task's experts and write a small checkpoint per task.",
        details="OUT/TASK holds a checkpoint with the task's experts, OUT/task_routing.json the same choice for the "
        "full checkpoint at run time (import moetools.hf). Every task is tested on the held-out text of every other.",
        function="moetools.verbs.route.verb.route_tasks",
        places=(_MODEL, _OUT),
        options=(RouteOptions, *_RUN, Writing),
        writes=True,
    ),
    Verb(
        name="quantize",
        summary="Write a checkpoint whose weights take fewer bits: from int8 down to below one bit per weight.",
        details="Routers and norms stay as they are; embeddings and the head do unless --embeddings is given. --expand "
        "turns a quantized checkpoint into a plain one.",
        function="moetools.verbs.quantize.verb.quantize",
        places=(_MODEL, _OUT),
        options=(QuantizeOptions, *_RUN, Writing),
        writes=True,
    ),
    Verb(
        name="distill",
        summary="Make a dense student of a Mixture-of-Experts model, or train a student towards its teacher.",
        details="Every FFN is fitted to its MoE block in closed form and by local steps; --steps, --epochs or "
        "--max-minutes train the whole student afterwards. --student heals an existing checkpoint.",
        function="moetools.verbs.distill.verb.distill",
        places=(Place(name="teacher", help="Folder of the Mixture-of-Experts checkpoint."), _OUT),
        options=(StudentOptions, TrainOptions, *_RUN, Writing),
        writes=True,
    ),
    Verb(
        name="evaluate",
        summary="Measure models side by side: perplexity per task, exact KL to the original, agreement, size, speed.",
        function="moetools.verbs.evaluate.verb.evaluate",
        places=(Place(name="models", help="Folders of one or more checkpoints, compared in one table.", several=True),),
        options=(EvaluateOptions, *_RUN),
    ),
    Verb(
        name="demo",
        summary="Try everything on the small MoE model that comes with the package, offline.",
        details="Puts the model and its data into DIR, prunes and merges it to half of its experts, and compares all "
        "three.",
        function="moetools.verbs.demo.demo",
        places=(Place(name="dir", help="Folder for the model, its data and the results."),),
        options=(DemoOptions, ForwardOptions),
    ),
)


@functools.cache
def verb(name: str) -> Verb:
    """The verb called `name` on the command line or in Python."""
    return next(one for one in VERBS if one.name == name.replace("_", "-"))
