"""Recipes: the choices beside which experts go together; published methods are settings of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from moetools.errors import UserError
from moetools.methods.base import ExpertMethod
from moetools.plugins import load_plugin

Router = Literal["mean", "centroid", "fitted"]
Combine = Literal["average", "subspace", "neurons"]
Refit = Literal["none", "joint", "members"]
SETTINGS = ("combine", "rank", "router", "refit", "sequential", "align")
"""Names of a recipe's settings; a method's own are attributes of the same names."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The orthogonal choices beside which experts go together.

    Attributes:
        combine: "average" sums the members' weights; "subspace" sums what they have in the directions in which all of
            them together are largest (`methods.subspace`); "neurons" keeps those neurons of all members that the
            layer's output needs most (`methods.neurons`).
        rank: how many of those directions "subspace" takes, as a share of all.
        router: "mean" or "centroid" rows of the members, or "fitted" to the cluster's exact logit
            (`methods.router_fit`).
        refit: "joint" solves all new down projections together for the original's hidden states
            (`methods.joint_refit`); "members" solves each merged expert's for its members' weighted mean output.
        sequential: statistics are measured behind the already compressed layers instead of once on the original.
        align: put the members' neurons in the centroid's order before they are averaged (`methods.alignment`).
    """

    combine: Combine
    rank: float
    router: Router
    refit: Refit
    sequential: bool
    align: bool

    @property
    def needs_streams(self) -> bool:
        """Whether the two-stream pass (`passes.sequential`) is needed at all."""
        return self.sequential or self.refit != "none" or self.router == "fitted" or self.combine == "neurons"

    def describe(self) -> str:
        """The settings as the command line names them."""
        order = "`sequential`" if self.sequential else "`sequential=False`"
        align = "`align`" if self.align else "`align=False`"
        rank = f" `rank={self.rank:g}`" if self.combine == "subspace" else ""
        return f"`combine={self.combine}`{rank} {align} `router={self.router}` `refit={self.refit}` {order}"

    def check(self) -> None:
        """Refuse combinations that cannot work.

        Raises:
            UserError: neurons without a joint refit, a rank that is none, or an unknown value.
        """
        for option, value, kind in (
            ("`combine`", self.combine, Combine),
            ("`router`", self.router, Router),
            ("`refit`", self.refit, Refit),
        ):
            if value not in get_args(kind):
                raise UserError(f"{option} '{value}' is unknown; legal: {', '.join(get_args(kind))}")
        if not 0 < self.rank <= 1:
            raise UserError(f"`rank={self.rank:g}` is not above 0 and at most 1", hint="1 keeps the full rank")
        if self.combine == "neurons" and self.refit != "joint":
            raise UserError("`combine=neurons` keeps parts of several experts and needs `refit=joint`")


def recipe_for(method: ExpertMethod, overrides: Mapping[str, Any]) -> Recipe:
    """The method's own settings, with those of the user (where not None) in their place.

    Raises:
        UserError: settings that do not go together.
    """
    own = {name: getattr(method, name) for name in SETTINGS}
    recipe = Recipe(**own | {name: value for name, value in overrides.items() if value is not None})
    if overrides.get("rank") is not None and recipe.combine != "subspace":
        raise UserError("`rank` belongs to `combine=subspace`")
    recipe.check()
    return recipe


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A method with a recipe; `auto` tries several for each layer."""

    name: str
    method: ExpertMethod
    recipe: Recipe

    @property
    def needs_streams(self) -> bool:
        return self.recipe.needs_streams or self.method.needs_sample


_REFIT: dict[str, str | bool] = {"refit": "joint", "sequential": True}
_PRUNING = tuple(("prune", name, _REFIT) for name in ("reap", "frequency", "gate-mass", "naee"))
AUTO: dict[str, tuple[tuple[str, str, dict[str, str | bool]], ...]] = {
    "prune": _PRUNING,
    "merge": (("merge", "joint", {}), ("merge", "joint", {"router": "centroid"}), *_PRUNING),
}
"""What `--method auto` tries: package, method, and its settings."""


def candidate_of(method: ExpertMethod, overrides: Mapping[str, Any]) -> Candidate:
    """A method with its recipe.

    Raises:
        UserError: settings that do not go together.
    """
    return Candidate(name=method.name, method=method, recipe=recipe_for(method, overrides))


def candidates_for(verb: str, method: str, overrides: Mapping[str, Any]) -> tuple[Candidate, ...]:
    """The one candidate a method names, or those `auto` chooses from.

    Raises:
        UserError: unknown method, or settings that do not go together.
    """
    if method != "auto":
        found: ExpertMethod = load_plugin(f"moetools.methods.{verb}", method, kind=f"{verb} method").METHOD
        return (candidate_of(found, overrides),)
    chosen = {name: value for name, value in overrides.items() if value is not None}
    if chosen:
        raise UserError("`method=auto` chooses the recipe itself", hint="name a method to set " + ", ".join(chosen))
    found_all = []
    for package, name, settings in AUTO[verb]:
        plugin: ExpertMethod = load_plugin(f"moetools.methods.{package}", name, kind="method").METHOD
        label = " ".join([name, *(f"{key}={value}" for key, value in settings.items() if key == "router")])
        found_all.append(Candidate(name=label, method=plugin, recipe=recipe_for(plugin, settings)))
    return tuple(found_all)
