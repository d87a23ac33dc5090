"""`moetools inspect`."""

from moetools.cli import options as opt
from moetools.cli.console import Session


def command(model: opt.Model, as_json: opt.Json = False, quiet: opt.Quiet = False, debug: opt.Debug = False) -> None:
    """Show what a checkpoint is made of, from config.json and safetensors headers alone.

    Family, layers, experts, parameters (total and active per token), bytes by part and dtype, memory to serve.
    """
    with Session(as_json=as_json, quiet=quiet, debug=debug) as session:
        from moetools.verbs.inspect.verb import inspect

        session.result(inspect(model))
