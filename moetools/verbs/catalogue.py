"""Every verb as the command line and the Python API know it: what it takes, and the function that does it.

A function takes the places, then an instance of every option class in the order given here, then `progress` (if it has
options) and, if it writes a checkpoint, `command`. Imports no torch.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from moetools.arguments import about, read, types
from moetools.errors import UserError
from moetools.forward.options import ForwardOptions
from moetools.pipeline.options import Writing
from moetools.text.options import DataOptions
from moetools.training.options import TrainOptions
from moetools.verbs.compare.options import CompareOptions
from moetools.verbs.compress.options import CompressOptions
from moetools.verbs.demo_options import DemoOptions
from moetools.verbs.distill.options import StudentOptions
from moetools.verbs.evaluate.options import EvaluateOptions
from moetools.verbs.inspect.options import RoutingOptions
from moetools.verbs.place.options import PlaceOptions
from moetools.verbs.quantize.options import QuantizeOptions
from moetools.verbs.reduce.options import MergeOptions, PruneOptions
from moetools.verbs.route.options import RouteOptions
from moetools.verbs.run.options import RunOptions
from moetools.verbs.serve.options import ServeOptions

LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class Place:
    """A folder that is named by its position.

    Attributes:
        several: one or more of them.
    """

    name: str
    help: str
    several: bool = False

    @property
    def type(self) -> Any:
        """What the verb gets."""
        return list[Path] if self.several else Path

    def read(self, value: Any) -> Any:
        """One path, or a list of them, from what was given.

        Raises:
            UserError: something else.
        """
        if not self.several:
            return read(self.name, value, Path)
        return [Path(one) for one in read(self.name, value, list[str])]


@dataclass(frozen=True, kw_only=True)
class Verb:
    """What a user can ask for.

    Attributes:
        name: on the command line.
        summary: one sentence.
        details: more of them.
        function: dotted path of what does it.
        returns: type of the report, as a dotted path.
        python: name of the Python function; None: the name with `_` for `-`.
        options: option classes.
        writes: whether it writes a checkpoint: it is then told the command line, and can be resumed.
        again: an interrupted run goes on when it is given again as it was.
    """

    name: str
    summary: str
    details: str = ""
    function: str
    returns: str
    python: str | None = None
    places: tuple[Place, ...]
    options: tuple[type, ...] = ()
    writes: bool = False
    again: bool = False

    def arguments(self) -> Iterator[tuple[type, "Field[Any]"]]:
        """(option class, field) of every option, in order; a class's own options come before what it inherits."""
        for kind in self.options:
            known = {one.name: one for one in fields(kind) if about(one) is not None}
            own = [name for name in kind.__annotations__ if name in known]
            yield from ((kind, known[name]) for name in dict.fromkeys([*own, *known]))

    @property
    def resume(self) -> str:
        """How an interrupted run goes on, in a few words; empty if it cannot."""
        if self.writes:
            return "run it again with `resume` to go on from the last finished layer"
        return "run it again: what is finished is kept" if self.again else ""

    @property
    def python_name(self) -> str:
        """The function in `moetools`."""
        return self.python or self.name.replace("-", "_")

    def instances(self, values: Mapping[str, Any]) -> list[Any]:
        """An instance of every option class.

        Raises:
            UserError: a value of a wrong type, or a seed that some generator of random numbers does not take.
        """
        seed = values.get("seed", 0)
        if type(seed) is int and not 0 <= seed <= LARGEST_SEED:
            raise UserError(f"`seed={seed}` is not between 0 and {LARGEST_SEED}")
        return [_instance(kind, values) for kind in self.options]

    def written_call(self, values: Mapping[str, Any]) -> str:
        """A call of the Python function as one writes it, for the report; `values` are places and options by name."""
        places = {place.name for place in self.places}
        words = [repr(_plain(values[name])) for name in values if name in places]
        words += [f"{name}={_plain(value)!r}" for name, value in values.items() if name not in places]
        return f"moetools.{self.python_name}({', '.join(words)})"

    def call(self, places: Sequence[Any], values: Mapping[str, Any], *, command: str, progress: Any) -> Any:
        """Do it.

        Args:
            places: one value for each.
            values: of the options, by field name; those that are left out have their defaults.
            command: what the user wrote, for the report.
            progress: a `Progress`, or None for silence.

        Raises:
            MoetoolsError: what the verb refuses, or a value of a wrong type.
        """
        given = [place.read(value) for place, value in zip(self.places, places, strict=True)]
        made = self.instances(values)
        more = {"progress": progress} if self.options else {}
        if self.writes:
            more["command"] = command
        module, _, name = self.function.rpartition(".")
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return function(*given, *made, **more)


def _instance(kind: type, values: Mapping[str, Any]) -> Any:
    # What several classes have (the seed) is an option of one of them.
    own = [one.name for one in fields(kind) if one.name in values]
    return kind(**{name: read(name, values[name], types(kind)[name]) for name in own})


def _plain(value: Any) -> Any:
    if isinstance(value, PathLike):
        return fspath(value)
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


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
        returns="moetools.verbs.inspect.summary.ModelSummary",
        places=(_MODEL,),
    ),
    Verb(
        name="inspect-routing",
        summary="Measure how the routers use their experts, per layer and per task.",
        details="Load, entropy, skew, balance loss, z-loss, and experts that get too little.",
        function="moetools.verbs.inspect.routing.inspect_routing",
        returns="moetools.verbs.inspect.routing_report.RoutingReport",
        places=(_MODEL,),
        options=(RoutingOptions, *_RUN),
    ),
    Verb(
        name="prune-experts",
        summary="Write a checkpoint with fewer experts: the ones a method scores lowest are dropped.",
        function="moetools.verbs.reduce.verb.prune_experts",
        returns="moetools.verbs.reduce.report.ReduceReport",
        places=(_MODEL, _OUT),
        options=(PruneOptions, *_RUN, Writing),
        writes=True,
    ),
    Verb(
        name="merge-experts",
        summary="Write a checkpoint with fewer experts: similar ones are merged into one.",
        details="`to=1` makes every MoE layer dense.",
        function="moetools.verbs.reduce.verb.merge_experts",
        returns="moetools.verbs.reduce.report.ReduceReport",
        places=(_MODEL, _OUT),
        options=(MergeOptions, *_RUN, Writing),
        writes=True,
    ),
    Verb(
        name="route-tasks",
        summary="Choose each task's experts and write a small checkpoint per task.",
        details="`out`/TASK holds a checkpoint with the task's experts, `out`/task_routing.json the same choice for "
        "the full checkpoint at run time (import moetools.hf). Every task is tested on the held-out text of every "
        "other.",
        function="moetools.verbs.route.verb.route_tasks",
        returns="moetools.verbs.route.report.RouteReport",
        places=(_MODEL, _OUT),
        options=(RouteOptions, *_RUN, Writing),
        writes=True,
    ),
    Verb(
        name="place-experts",
        summary="Write the checkpoint with its experts in an order that loads several devices evenly.",
        details="For engines that give every device consecutive experts. The router's rows move along: the output "
        "computes the same. inspect-routing with `devices` plans without writing, and with replicas.",
        function="moetools.verbs.place.verb.place_experts",
        returns="moetools.verbs.place.report.PlaceReport",
        places=(_MODEL, _OUT),
        options=(PlaceOptions, *_RUN, Writing),
        writes=True,
    ),
    Verb(
        name="quantize",
        summary="Write a checkpoint whose weights take fewer bits: from int8 down to below one bit per weight.",
        details="Routers and norms stay as they are; embeddings and the head do unless `embeddings` is given. `expand` "
        "turns a quantized checkpoint into a plain one.",
        function="moetools.verbs.quantize.verb.quantize",
        returns="moetools.verbs.quantize.report.QuantizationReport",
        places=(_MODEL, _OUT),
        options=(QuantizeOptions, *_RUN, Writing),
        writes=True,
    ),
    Verb(
        name="distill",
        summary="Make a dense student of a Mixture-of-Experts model, or train a student towards its teacher.",
        details="Every FFN is fitted to its MoE block in closed form and by local steps; `steps`, `epochs` or "
        "`max_minutes` train the whole student afterwards. `student` heals an existing checkpoint.",
        function="moetools.verbs.distill.verb.distill",
        returns="moetools.verbs.distill.report.DistillReport | None",
        places=(Place(name="teacher", help="Folder of the Mixture-of-Experts checkpoint."), _OUT),
        options=(StudentOptions, TrainOptions, *_RUN, Writing),
        writes=True,
    ),
    Verb(
        name="evaluate",
        summary="Measure models side by side: perplexity per task, exact KL to the original, agreement, size, speed.",
        function="moetools.verbs.evaluate.verb.evaluate",
        returns="moetools.verbs.evaluate.report.Evaluation",
        places=(Place(name="models", help="Folders of one or more checkpoints, compared in one table.", several=True),),
        options=(EvaluateOptions, *_RUN),
    ),
    Verb(
        name="compare",
        summary="Show checkpoints side by side: size, experts, bits, loss, and which of them no other one beats.",
        details="Without text, sizes alone. `html` writes the comparison as a page.",
        function="moetools.verbs.compare.verb.compare",
        returns="moetools.verbs.compare.report.Comparison",
        places=(Place(name="models", help="Folders of one or more checkpoints.", several=True),),
        options=(CompareOptions, *_RUN),
    ),
    Verb(
        name="serve-check",
        summary="Try a checkpoint in the engines of this machine: who loads it, and who computes the same.",
        details="transformers, vLLM, SGLang, llama.cpp (a .gguf file in the folder) and mlx-lm, each in a process of "
        "its own, score one prompt; so does moetools. Exit code 3 if one differs.",
        function="moetools.verbs.serve.verb.serve_check",
        returns="moetools.verbs.serve.report.ServeReport",
        places=(_MODEL,),
        options=(ServeOptions, ForwardOptions),
    ),
    Verb(
        name="compress",
        summary="Write the best mix of fewer experts and fewer bits that fits into a number of bytes.",
        details="Plans are predicted from measurements of single choices on little text, and the most promising one is "
        "built. The weight files never take more than `target_size`.",
        function="moetools.verbs.compress.verb.compress",
        returns="moetools.verbs.compress.report.CompressReport",
        places=(_MODEL, _OUT),
        options=(CompressOptions, *_RUN, Writing),
        writes=True,
    ),
    Verb(
        name="run",
        summary="Carry out a recipe: a chain of the other commands, checked as a whole before it begins.",
        details="A YAML file, or the name of a recipe that comes with moetools. Steps that are finished are not done "
        "again unless their settings or inputs have changed.",
        function="moetools.verbs.run.verb.run",
        returns="moetools.verbs.run.report.RunReport",
        places=(Place(name="recipe", help="File of the recipe, or name of one that comes with moetools."),),
        options=(RunOptions,),
        again=True,
    ),
    Verb(
        name="demo",
        summary="Try everything on the small MoE model that comes with the package, offline.",
        details="Puts the model and its data into `dir`, prunes and merges it to half of its experts, and compares all "
        "three.",
        function="moetools.verbs.demo.demo",
        returns="moetools.verbs.demo.DemoReport",
        python="run_demo",
        places=(Place(name="dir", help="Folder for the model, its data and the results."),),
        options=(DemoOptions, ForwardOptions),
    ),
)
