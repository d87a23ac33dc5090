"""Tasks of EleutherAI's evaluation harness, run on our forward pass; differences with their significance.

Two models answer the same questions, so they are compared question by question: McNemar's exact test where an answer is
right or wrong (McNemar 1947; binomial on the questions that only one of them has right), and an interval for the
difference of the means by resampling questions (paired bootstrap, Efron 1979).
"""

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import yaml
from scipy.stats import binomtest
from transformers import PreTrainedTokenizerBase

from moetools.errors import DataError, UserError
from moetools.forward.streaming import StreamedModel
from moetools.text.foreign import foreign

_RESAMPLES = 2000
_FILES = (".yaml", ".yml")
_NOT_METRICS = ("alias", "name", "sample_len", "sample_count")
_HINT = "the task's description, or the files it names; without a network, local tasks and data alone"


@dataclass(frozen=True, kw_only=True)
class HarnessScore:
    """One metric of one task.

    Attributes:
        task, metric: the harness' names; the filter follows the metric behind a comma unless it is "none".
        value: as the harness reports it.
        standard_error: of the value; None where the harness has none.
        questions: value of every question, in order; empty for metrics that are no mean over questions.
    """

    task: str
    metric: str
    value: float
    standard_error: float | None
    questions: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A score against the reference's.

    Attributes:
        recovery: value / the reference's value; None where that is 0.
        low, high: 95 % interval of the difference of the means over questions; None without values per question.
        p: McNemar's exact p-value; None unless every question is right or wrong.
    """

    recovery: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None


class Harness:
    """Tasks that were found; `scores` runs them.

    Args:
        tasks: names that the harness knows, or .yaml files of tasks.
        fewshot: examples in front of every question; None: as the task says.
        limit: questions of each task; None: all.

    Raises:
        UserError: lm-eval is not installed, or a task that it does not know.
        DataError: a .yaml file that cannot be read.
    """

    def __init__(self, tasks: Sequence[str], *, fewshot: int | None, limit: int | None) -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError("`harness` needs the package lm-eval", hint="pip install 'moetools[harness]'")
        from lm_eval.tasks import TaskManager

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        files = [Path(task) for task in tasks if task.endswith(_FILES)]
        self.names = [task_name(task) for task in tasks]
        self._fewshot, self._limit = fewshot, limit
        folders = sorted({str(file.absolute().parent) for file in files})
        self._manager = TaskManager(include_path=folders or None)
        known = set(self._manager.all_tasks)
        for name in self.names:
            if name not in known:
                raise UserError(
                    f"lm-eval knows no task '{name}'", hint="'lm_eval ls tasks' lists them; a file ends in .yaml"
                )

    def scores(
        self, model: StreamedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int
    ) -> tuple[HarnessScore, ...]:
        """All metrics of all tasks.

        Raises:
            DataError: a task whose data cannot be had.
        """
        from lm_eval import simple_evaluate

        from moetools.verbs.evaluate._streamed_lm import StreamedLM

        with foreign(f"harness tasks {', '.join(self.names)} cannot be run", _HINT):
            found = simple_evaluate(
                model=StreamedLM(model, tokenizer, batch_size),
                tasks=list(self.names),
                num_fewshot=self._fewshot,
                limit=self._limit,
                task_manager=self._manager,
                bootstrap_iters=0,
                log_samples=True,
            )
        samples = found.get("samples") or {}
        return tuple(
            score for task, metrics in found["results"].items() for score in _scores_of(task, metrics, samples)
        )


def _scores_of(task: str, metrics: Mapping[str, Any], samples: Mapping[str, Any]) -> list[HarnessScore]:
    found = []
    for key, value in metrics.items():
        name, _, chosen = key.partition(",")
        if name in _NOT_METRICS or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        rows = [row for row in samples.get(task, ()) if row.get("filter", "none") == (chosen or "none")]
        each = [row[name] for row in rows if isinstance(row.get(name), int | float)]
        error = metrics.get(f"{name}_stderr,{chosen}")
        found.append(
            HarnessScore(
                task=task,
                metric=name if chosen in ("", "none") else key,
                value=float(value),
                standard_error=float(error) if isinstance(error, int | float) else None,
                questions=tuple(map(float, each)) if len(each) == len(rows) else (),
            )
        )
    return found


def difference(score: HarnessScore, reference: HarnessScore) -> Difference:
    """How a score compares with the reference's on the same questions."""
    recovery = score.value / reference.value if reference.value else None
    ours, theirs = numpy.array(score.questions), numpy.array(reference.questions)
    if not len(ours) or len(ours) != len(theirs):
        return Difference(recovery=recovery)
    generator = numpy.random.default_rng(0)
    drawn = generator.integers(len(ours), size=(_RESAMPLES, len(ours)))
    low, high = numpy.quantile((ours - theirs)[drawn].mean(1), [0.025, 0.975])
    binary = set(ours.tolist()) | set(theirs.tolist()) <= {0.0, 1.0}
    p = mcnemar(int((ours > theirs).sum()), int((theirs > ours).sum())) if binary else None
    return Difference(recovery=recovery, low=float(low), high=float(high), p=p)


def mcnemar(only_one: int, only_other: int) -> float:
    """Two-sided exact p-value: the questions that one of two models alone has right, as tosses of a fair coin."""
    both = only_one + only_other
    return float(binomtest(only_one, both).pvalue) if both else 1.0


def task_name(task: str) -> str:
    """A task's name: itself, or what a .yaml file calls it; tags such as `!function` are left alone.

    Raises:
        UserError, DataError: a file that is missing or names none.
    """
    if not task.endswith(_FILES):
        return task
    file = Path(task)
    if not file.is_file():
        raise UserError(f"`harness`: no file '{file}'")

    class Loader(yaml.SafeLoader):
        """Reads any tag as nothing."""

    Loader.add_multi_constructor("!", lambda *_: None)
    with foreign(f"{file} cannot be read", "a task of lm-eval as .yaml"):
        found = yaml.load(file.read_text(), Loader)
    name = found.get("task") if isinstance(found, dict) else None
    if not isinstance(name, str):
        raise DataError(f"{file} names no `task`", hint="a task of lm-eval as .yaml")
    return name
