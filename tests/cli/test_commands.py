"""What each command and each function of the Python API hand to their verb."""

import dataclasses
import inspect as signatures
import logging
import warnings
from pathlib import Path

import pytest

import moetools as package
from moetools.arguments import about, default, types
from moetools.cli.app import COMMANDS
from moetools.cli.commands import DisplayOptions, as_options, flag
from moetools.verbs.catalogue import VERBS

BY_NAME = {verb.name: verb for verb in VERBS}
ARGUMENTS = [
    pytest.param(verb, owner, one, id=f"{verb.name} {one.name}") for verb in VERBS for owner, one in verb.arguments()
]
each_verb = pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)


@pytest.fixture
def received(stub, report):
    """What a verb's function was called with: (positional, keyword) arguments."""
    calls = []

    def replace(verb):
        def record(*args, **options):
            calls.append((args, options))
            return report

        module, _, name = verb.function.removeprefix("moetools.verbs.").rpartition(".")
        stub(module, **{name: record})
        return calls

    return replace


def example(owner, one, number):
    """A value that the option does not have by itself: (words of the command line, what the field then holds)."""
    hint, known, before = types(owner)[one.name], about(one), default(one)
    on, _, off = (known["flags"] or flag(one.name)).partition("/")
    on = on.split()[0]
    if bool in (hint, *getattr(hint, "__args__", ())):
        return ([off], False) if before is True else ([on], True)
    if hint == list[str]:
        values = [f"a{number}=x", f"b{number}=y"]
        return [on, values[0], on, values[1]], values
    if Path in getattr(hint, "__args__", ()):
        return [on, f"p{number}"], Path(f"p{number}")
    if one.name == "memory_budget":
        return [on, "2GiB"], 2 * 2**30
    if int in (hint, *getattr(hint, "__args__", ())):
        return [on, str(100 + number)], 100 + number
    if float in (hint, *getattr(hint, "__args__", ())):
        return [on, f"{number}.5"], number + 0.5
    value = next((name for name in (known["choices"] or tuple)() if name != before), f"text{number}")
    return [on, value], value


def folders(verb):
    """(words, what the verb gets) of its places."""
    names = [f"folder of {place.name}" for place in verb.places]
    return names, [
        [Path(name)] if place.several else Path(name) for name, place in zip(names, verb.places, strict=True)
    ]


def instances(verb, values):
    """What the verb gets for these options: an instance of each class, with what it has of them."""
    own = {kind: {one.name for one in dataclasses.fields(kind)} for kind in verb.options}
    return [kind(**{name: value for name, value in values.items() if name in own[kind]}) for kind in verb.options]


@each_verb
def test_all_options_reach_the_verb(moetools, received, verb):
    calls = received(verb)
    words, values = [], {}
    for number, (owner, one) in enumerate(verb.arguments()):
        more, values[one.name] = example(owner, one, number)
        words += more
    names, places = folders(verb)
    done = moetools(verb.name, *names, *words)
    assert done.code == 0, done.err
    ((args, options),) = calls
    assert list(args) == [*places, *instances(verb, values)]
    assert set(options) == ({"progress"} if verb.options else set()) | ({"command"} if verb.writes else set())
    if verb.writes:
        assert options["command"].startswith(f"moetools {verb.name} 'folder of {verb.places[0].name}' ")
        assert options["command"].endswith(words[-1])


@pytest.mark.parametrize(("verb", "owner", "one"), ARGUMENTS)
def test_an_argument_of_the_python_api_reaches_the_verb_alone(received, verb, owner, one):
    calls = received(verb)
    value = example(owner, one, 7)[1]
    names, places = folders(verb)
    getattr(package, verb.python_name)(*names, **{one.name: value})
    ((args, options),) = calls
    assert list(args) == [*places, *instances(verb, {one.name: value})]
    assert list(args) != [*places, *instances(verb, {})]
    assert options.get("progress") is None
    if verb.writes:
        said = str(value) if isinstance(value, Path) else value
        places = ", ".join(repr(name) for name in names)
        assert options["command"] == f"moetools.{verb.python_name}({places}, {one.name}={said!r})"


@each_verb
def test_without_options_both_hand_over_the_defaults(moetools, received, verb):
    calls = received(verb)
    names, places = folders(verb)
    moetools(verb.name, *names)
    getattr(package, verb.python_name)(*names)
    for args, _ in calls:
        assert list(args) == [*places, *(kind() for kind in verb.options)]
    assert len(calls) == 2


@each_verb
def test_options_are_written_once(verb):
    command, function = (
        signatures.signature(COMMANDS[verb.name]),
        signatures.signature(getattr(package, verb.python_name)),
    )
    own = {one.name: default(one) for _, one in verb.arguments()}
    display = [one.name for one in dataclasses.fields(DisplayOptions)]
    places = [place.name for place in verb.places]
    assert list(command.parameters) == ["invocation", *places, *own, *display]
    assert list(function.parameters) == [*places, *own, *(["progress"] if verb.options else [])]
    for name, value in own.items():
        assert command.parameters[name].default == function.parameters[name].default == value, name


def test_every_verb_is_a_command():
    assert list(COMMANDS) == list(BY_NAME)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("prune-experts", "`keep` is missing", "--keep is missing"),
        ("prune-experts", "`keep=4`, or `ratio=0.5`", "--keep 4, or --ratio 0.5"),
        ("prune-experts", "`save_stats` and `stats`", "--save-stats and --stats"),
        ("prune-experts", "`data=NAME=FILE`", "--data NAME=FILE"),
        ("prune-experts", "`trust_remote_code=True` and `shuffle`", "--trust-remote-code and --shuffle"),
        ("prune-experts", "`verify` or `verify=False`", "--verify or --no-verify"),
        ("prune-experts", "`sequential=True`, `sequential=False`", "--sequential, --one-shot"),
        ("distill", "`relative_rate=False`, `warm_start=False`", "--absolute-rate, --no-warm-start"),
        ("distill", "`teacher` and `out`", "TEACHER and OUT"),
        ("prune-experts", "replace `out`/x of `model`", "replace OUT/x of MODEL"),
        ("inspect", "`keep=4` is of another verb", "`keep=4` is of another verb"),
        ("prune-experts", "no `options` of ours, `import x`", "no `options` of ours, `import x`"),
        (
            "prune-experts",
            "write it: `moetools.quantize('a b', 'OUT', expand=True, group_size=0)`",
            "write it: moetools quantize 'a b' OUT --expand --group-size 0",
        ),
        ("evaluate", "`moetools.evaluate(['a', 'b'], gate='kl<=1')`", "moetools evaluate a b --gate 'kl<=1'"),
    ],
)
def test_messages_name_options(name, text, said):
    assert as_options(text, BY_NAME[name]) == said


@each_verb
def test_help_texts_name_arguments_that_there_are(verb):
    texts = [verb.summary, verb.details, *(about(one)["help"] for _, one in verb.arguments())]
    for text in texts:
        assert "`" not in as_options(text, verb)
        assert "--" not in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [("--dtype int8", "--dtype int8 is not a compute dtype"), ("--memory-budget lots", "'lots' is not a memory size")],
)
def test_values_that_are_none_are_refused(moetools, received, flags, message):
    calls = received(BY_NAME["inspect-routing"])
    done = moetools(*f"inspect-routing m {flags}".split())
    assert done.code == 2
    assert message in done.err
    assert not calls


def test_a_process_without_a_report_prints_nothing(moetools, stub):
    stub("distill.verb", distill=lambda *_, **__: None)
    done = moetools("distill", "moe", "out", "--data", "a.txt")
    assert (done.code, done.out) == (0, "")


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
