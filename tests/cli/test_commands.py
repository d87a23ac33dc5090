"""What each command hands to its verb."""

import dataclasses
import inspect as signatures
import logging
import warnings
from pathlib import Path

import pytest

from moetools.cli.app import COMMANDS
from moetools.forward.options import ForwardOptions
from moetools.text.options import DataOptions

ALL_DATA = (
    "--data code=c.txt --data p.txt --seq-len 64 --samples 5 --batch-size 3 --no-pack --shuffle --seed 7 --tokenizer t"
)
ALL_FORWARD = "--device cpu --dtype bfloat16 --memory-budget 2GiB --trust-remote-code"
DATA = DataOptions(
    data=["code=c.txt", "p.txt"],
    seq_len=64,
    samples=5,
    batch_size=3,
    pack=False,
    shuffle=True,
    seed=7,
    tokenizer=Path("t"),
    trust_remote_code=True,
)
FORWARD = ForwardOptions(device="cpu", dtype="bfloat16", memory_budget=2 * 2**30, trust_remote_code=True)


@pytest.fixture
def recorded(stub, report):
    """Calls of all verbs: name -> (positional, keyword) arguments, without the progress."""
    calls = {}

    def verb(name):
        def record(*args, progress, **options):
            progress.stop()
            calls[name] = args, options
            return report

        return record

    stub("reduce.verb", CompressOptions=dict, prune_experts=verb("prune"), merge_experts=verb("merge"))
    stub("inspect.routing", inspect_routing=verb("routing"))
    stub("evaluate.verb", evaluate=verb("evaluate"))
    stub("demo", demo=verb("demo"))
    return calls


@pytest.mark.parametrize(("name", "option"), [("prune", "--keep"), ("merge", "--to")])
def test_compress_passes_everything_on(moetools, recorded, name, option):
    flags = f"{option} 4 --method average --stats s --save-stats v --overwrite --resume --dry-run --no-verify"
    recipe = "--combine neurons --rank 0.5 --router fitted --refit joint --sequential --no-align"
    recipe += " --allow-uneven --heal 9 --heal-train router --heal-data new=n"
    line = f"{name}-experts m o {flags} {recipe} {ALL_DATA} {ALL_FORWARD} --quiet"
    assert moetools(*line.split()).code == 0
    args, options = recorded[name]
    choice = ({"experts": None} if name == "prune" else {}) | {
        "method": "average",
        "target": 4,
        "ratio": None,
        "stats": Path("s"),
        "save_stats": Path("v"),
        "overwrite": True,
        "resume": True,
        "dry_run": True,
        "verify": False,
        "seed": 7,
        "combine": "neurons",
        "rank": 0.5,
        "router": "fitted",
        "refit": "joint",
        "sequential": True,
        "align": False,
        "allow_uneven": True,
        "heal": 9,
        "heal_train": "router",
        "heal_data": dataclasses.replace(DATA, data=["new=n"]),
    }
    assert args == (Path("m"), Path("o"), DATA, FORWARD, choice)
    assert options == {"command": f"moetools {line}"}


def test_compress_quotes_the_command_it_reports(moetools, recorded):
    moetools("prune-experts", "my model", "o", "--ratio", "0.25", "--quiet")
    (_, _, data, _, choice), options = recorded["prune"]
    assert options["command"] == "moetools prune-experts 'my model' o --ratio 0.25 --quiet"
    assert data is None
    assert (choice["target"], choice["ratio"], choice["method"]) == (None, 0.25, "reap")


@pytest.mark.parametrize(
    ("flags", "method"), [("", "reap"), ("--experts 0,1", "explicit"), ("--experts 0,1 --method ean", "ean")]
)
def test_a_list_of_experts_is_the_method(moetools, recorded, flags, method):
    assert moetools(*f"prune-experts m o {flags}".split()).code == 0
    choice = recorded["prune"][0][4]
    assert (choice["method"], choice["experts"]) == (method, "0,1" if flags else None)


def test_inspect_routing(moetools, recorded):
    assert moetools(*f"inspect-routing m {ALL_DATA} {ALL_FORWARD} --stats s --save-stats v".split()).code == 0
    assert recorded["routing"] == ((Path("m"), DATA, FORWARD), {"stats": Path("s"), "save_stats": Path("v")})


def test_evaluate(moetools, recorded):
    flags = "--reference r --choices a=1 --choices b=2 --gate kl<=1 --gate agreement>=0.5"
    assert moetools(*f"evaluate m n {flags} {ALL_DATA} {ALL_FORWARD}".split()).code == 0
    args, options = recorded["evaluate"]
    assert args == ([Path("m"), Path("n")], DATA, FORWARD)
    assert options == {"reference": Path("r"), "choices": ["a=1", "b=2"], "gates": ["kl<=1", "agreement>=0.5"]}


def test_demo(moetools, recorded):
    flags = "--device cpu --dtype bfloat16 --memory-budget 500MB"
    assert moetools("demo", "d", "--quick", *flags.split()).code == 0
    forward = ForwardOptions(device="cpu", dtype="bfloat16", memory_budget=500_000_000)
    assert recorded["demo"] == ((Path("d"), forward), {"quick": True})


@pytest.mark.parametrize(
    ("flags", "message"), [("--dtype int8", "--dtype 'int8'"), ("--memory-budget lots", "'lots' is not a memory size")]
)
def test_values_that_are_none_are_refused(moetools, recorded, flags, message):
    done = moetools(*f"inspect-routing m {flags}".split())
    assert done.code == 2
    assert message in done.err
    assert not recorded


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("options", [DataOptions, ForwardOptions])
def test_defaults_are_those_of_the_python_api(name, options):
    legal = {field.name: field.default for field in dataclasses.fields(options) if field.name != "data"}
    for parameter in signatures.signature(COMMANDS[name]).parameters.values():
        assert parameter.default == legal.get(parameter.name, parameter.default), parameter.name


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        ([], "one layer\nwarning: odd tokens\n"),
        (["--quiet"], ""),
        (["--debug"], "debug: detail\none layer\nwarning: odd tokens\n"),
    ],
    ids=["plain", "quiet", "debug"],
)
def test_log_lines_go_to_stderr(moetools, stub, report, flags, shown):
    def verb(model):
        log = logging.getLogger("moetools.verbs.inspect.verb")
        log.debug("detail")
        log.info("one layer")
        log.warning("odd %s", "tokens")
        return report

    stub("inspect.verb", inspect=verb)
    assert moetools("inspect", "m", *flags).err == shown


def test_library_warnings_are_silent_unless_debugging(moetools, stub, report):
    def verb(model):
        warnings.warn("deprecated", stacklevel=1)
        return report

    stub("inspect.verb", inspect=verb)
    assert moetools("inspect", "m").code == 0
    # pytest turns the warning into an error where it gets through.
    assert "UserWarning: deprecated" in moetools("inspect", "m", "--debug").err
