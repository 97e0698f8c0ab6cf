"""The command line: which verbs there are, and how one is found and called; each verb is a function in its own file.

Invariant: importing this imports no verb and no library; a verb's file is imported when that verb is asked for, and the
overview (`edgepose --help`) is written from the table below alone.

A verb's file holds the function named in the table, whose annotated parameters are its flags, whose docstring is its
help, and which returns the exit code (None for 0); and EXAMPLES, command lines that `--help` shows. Where it holds
ACTIONS as well, functions of the same kind, the verb takes the name of one of these as its first word.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

from edgepose.errors import UsageError

if TYPE_CHECKING:
    from typer import Typer


@dataclass(frozen=True, slots=True)
class Verb:
    """Where a verb is and what it does.

    Attributes:
        module: File below edgepose/cli.
        function: The function in it.
        summary: One line for the overview.
    """

    module: str
    function: str
    summary: str


VERBS: dict[str, Verb] = {
    "demo": Verb("demo", "demo", "compile, run, evaluate, profile and gate a small network, start to end"),
    "render": Verb("render", "render", "render people to train on beside photographs"),
    "train": Verb("train", "train", "train a network on labelled photographs"),
    "compile": Verb("compile", "compile_", "turn a checkpoint into a bundle by a recipe: prune, quantise, export"),
    "prune": Verb("prune", "prune", "plan which blocks and channels go, show the plan, apply it to a checkpoint"),
    "build": Verb("build", "build", "build the engines of a bundle for other targets, as a new bundle"),
    "import": Verb("import_", "import_", "turn somebody else's ONNX network into a bundle"),
    "run": Verb("run", "run", "find the poses in a photograph, a folder, a video, or before a camera"),
    "eval": Verb("eval", "eval_", "measure the accuracy of a network or bundle on labelled photographs"),
    "select": Verb("select", "select", "measure which engine of a bundle serves best on this machine, and remember it"),
    "profile": Verb("profile", "profile", "measure latency, throughput and memory of a bundle"),
    "gate": Verb("gate", "gate", "compare two bundles and fail on a regression"),
    "baseline": Verb("baseline", "baseline", "accept what a gate said as the new baseline, and watch for slow creep"),
    "report": Verb("report", "report", "write all that is known of a bundle as one HTML page"),
    "inspect": Verb("inspect", "inspect", "show what a bundle or checkpoint holds and where it came from"),
    "verify": Verb("verify", "verify", "check every byte of a bundle and what its engines answer"),
    "doctor": Verb("doctor", "doctor", "say what this machine can run, and what is missing for the rest"),
}

_EXITS = """\
exit codes: 0 pass or warning, 1 unexpected error, 2 usage or bad input, 3 accuracy regression, 4 latency, memory or
size regression, 5 parity, 6 environment (backend, data, disk, noise), 7 inconclusive, 8 integrity, 130 interrupted"""


def dispatch(words: Sequence[str]) -> int:
    """Runs the verb that `words` begins with.

    Args:
        words: The command line behind the program's name.

    Returns:
        The exit code.

    Raises:
        UsageError: There is no such verb, or its flags are wrong.
        EdgeposeError: Whatever the verb raises.
    """
    first = words[0] if words else "--help"
    if first in ("--help", "-h", "help"):
        print(overview())
        return 0
    if first == "--version":
        from edgepose import __version__

        print(f"edgepose {__version__}")
        return 0
    if first not in VERBS:
        kind = "flag" if first.startswith("-") else "verb"
        close = get_close_matches(first, VERBS, n=1)
        fix = f"did you mean {close[0]!r}?" if close else "see edgepose --help"
        raise UsageError("command line", found=f"the unknown {kind} {first!r}", expected="a verb", fix=fix)
    return call(first, words[1:])


def call(verb: str, arguments: Sequence[str]) -> int:
    """Parses the flags of one verb and runs it.

    Raises:
        UsageError: The flags are wrong.
        EdgeposeError: Whatever the verb raises.
    """
    import typer

    command: Any = typer.main.get_command(app_of(verb))
    # Typer carries its own copy of click or uses the installed one; either way this is click's UsageError.
    usage_fault: type[Any] = typer.BadParameter.__mro__[1]
    try:
        # Not command.main(), which turns Ctrl-C and errors into texts and codes of its own.
        with command.make_context(f"edgepose {verb}", list(arguments)) as context:
            code = command.invoke(context)
    except typer.Exit as err:
        return int(err.exit_code)
    except usage_fault as err:
        text = err.format_message().rstrip(".")
        raise UsageFault(text, verb) from err
    finally:
        sys.stdout.flush()
    return int(code or 0)


def app_of(verb: str) -> Typer:
    """The Typer application of one verb: imports the verb's file and nothing of the others."""
    import typer

    entry = VERBS[verb]
    module = import_module(f"edgepose.cli.{entry.module}")
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    settings = {"help_option_names": ["--help", "-h"], "max_content_width": 100}

    def epilog(name: str) -> str:
        lines = [f"  {line}" for line in module.EXAMPLES if f"{line} ".startswith(f"edgepose {name} ")]
        return "\n".join(["\b", "Examples:", *lines])

    function, actions = getattr(module, entry.function), getattr(module, "ACTIONS", ())
    if not actions:
        app.command(verb, epilog=epilog(verb), context_settings=settings)(function)
        return app
    app.callback(epilog=epilog(verb), context_settings=settings)(function)
    for action in actions:
        name = action.__name__
        app.command(name, epilog=epilog(f"{verb} {name}"), context_settings=settings)(action)
    return app


def overview() -> str:
    """The text of `edgepose --help`."""
    width = max(map(len, VERBS))
    lines = [f"  {name:{width}}  {verb.summary}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "edgepose takes a trained pose network to devices: prune, quantise, export, run, measure, gate.",
            "",
            "usage: edgepose VERB [OPTIONS] …        edgepose VERB --help shows the options, with examples",
            "",
            *lines,
            "",
            "  --version  print the version          --debug  show the traceback of an error (or EDGEPOSE_DEBUG=1)",
            "",
            _EXITS,
        ]
    )


class UsageFault(UsageError):
    """What the parser of the flags says, in its own words.

    Args:
        text: The parser's message.
        verb: The verb it was parsing for.
    """

    def __init__(self, text: str, verb: str) -> None:
        super().__init__("command line", found=text, fix=f"see edgepose {verb} --help")
        self.args = (f"{text}; see edgepose {verb} --help",)
        self._pickled = (text, verb)

    def __reduce__(self) -> tuple[object, ...]:
        return (UsageFault, self._pickled)
