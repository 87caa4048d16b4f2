"""The command line as a whole: every help has an example, and helps are cheap."""

import re
import subprocess
import sys

import pytest
import typer

from mechreward.cli import app


def commands(command, path=()):
    """A command and all below it, with the words that call it. (typer has a click of its own: no isinstance.)"""
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*path, name))


TREE = list(commands(typer.main.get_command(app)))


@pytest.mark.parametrize(("path", "command"), TREE, ids=lambda value: " ".join(value) if type(value) is tuple else "")
def test_every_help_has_an_example_of_its_command(path, command):
    text = " ".join((command.help or "").split())
    assert re.search(rf"\bExamples?: {' '.join(('mechreward', *path))}\b", text), text


def test_the_tree_is_the_whole_command_line():
    assert len(TREE) >= 23 and {path[0] for path, _ in TREE if path} >= {"discover", "serve", "eval", "probe"}
    assert ("features", "explain") in [path for path, _ in TREE]


@pytest.mark.parametrize("path", [[], ["gate"], ["features", "show"]], ids=" ".join)
def test_a_help_imports_no_torch(path):
    code = (
        "import sys\nfrom mechreward.cli import app\n"
        "try:\n    app(sys.argv[1:], prog_name='mechreward')\n"
        "finally:\n    print('torch is here' if 'torch' in sys.modules else 'no torch')"
    )
    done = subprocess.run([sys.executable, "-c", code, *path, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Example" in done.stdout and done.stdout.splitlines()[-1] == "no torch"
