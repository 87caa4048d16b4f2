"""The command line as a whole: every help has an example, helps are cheap, and ``--json`` prints JSON."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from mechreward.cli import app
from mechreward.cli.common import expanded
from mechreward.features.catalog import CATALOGS
from mechreward.features.pack import read_pack


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


@pytest.mark.parametrize(("path", "said"), [(["serve", "--model", "x"], 0), (["packs", "list"], 1)])
def test_ctrl_c_ends_a_command_with_a_sentence_and_a_server_without(path, said, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    for module, name in (("serve", "_loopback"), ("packs", "shipped_packs")):
        monkeypatch.setattr(sys.modules[f"mechreward.cli.{module}"], name, stop)
    result = CliRunner().invoke(app, path)
    assert result.exit_code == 130 and result.stdout == ""
    assert [line[:12] for line in result.stderr.splitlines()] == ["Interrupted:"] * said


def test_a_dataclass_stands_for_options_in_its_place_and_order():
    @dataclass(frozen=True)
    class Size:
        width: Annotated[int, typer.Option(min=1)]
        height: Annotated[int, typer.Option("--high", help="Upwards.")] = 2

    @dataclass(frozen=True)
    class Tall(Size):
        height: Annotated[int, typer.Option("--high", help="Upwards.")] = 9

    told = []
    made = typer.Typer()

    @made.command()
    @expanded
    def command(ctx: typer.Context, name: str, *, size: Tall, loud: bool = False) -> None:
        told.append((ctx.get_parameter_source("width").name, name, size, loud))

    assert [each.name for each in typer.main.get_command(made).params][:4] == ["name", "width", "height", "loud"]
    assert CliRunner().invoke(made, ["a", "--width", "3"]).exit_code == 0
    assert CliRunner().invoke(made, ["a", "--width", "3", "--high", "4", "--loud"]).exit_code == 0
    assert told == [("COMMANDLINE", "a", Tall(3, 9), False), ("COMMANDLINE", "a", Tall(3, 4), True)]
    assert CliRunner().invoke(made, ["a"]).exit_code == CliRunner().invoke(made, ["a", "--width", "0"]).exit_code == 2


def printed(*args):
    """What a command prints with ``--json``: JSON alone, whatever it says on stderr."""
    result = CliRunner().invoke(app, [*map(str, args), "--json"])
    assert result.exit_code in (0, 1) and not isinstance(result.exception, Exception), (result.output, result.exception)
    return json.loads(result.stdout)


def test_a_sound_pack_is_told_in_json(tmp_path):
    file = tmp_path / "a.json"
    shutil.copy(CATALOGS / "pocket" / "reasoning_pack.json", file)
    told = printed("packs", "validate", file)
    assert told["file"] == str(file) and (told["name"], told["status"]) == ("pocket/reasoning_pack", "candidate")


def test_latents_and_their_examples_are_told_in_json():
    told = printed("features", "show", "pocket/reasoning_pack", "--texts", "20", "--top", "2")
    pack = read_pack(CATALOGS / "pocket" / "reasoning_pack.json")
    assert told["sae"] == f"{pack.sae.release}/{pack.sae.sae_id}" and "20 texts" in told["corpus"]
    assert [(each["index"], each["weight"]) for each in told["features"]] == [(f.id, f.weight) for f in pack.features]
    for each in told["features"]:
        assert len(each["examples"]) <= 2
        tops = [max(example["activations"]) for example in each["examples"]]
        assert tops == sorted(tops, reverse=True) and all(0 < top <= each["maximum"] + 1e-6 for top in tops)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["Waiting for application startup", "Uvicorn running"])
def test_a_terminals_ctrl_c_ends_a_server_quietly(when):
    """SIGINT to the whole process group, while the worker still imports, and when it serves."""
    code = "from mechreward.cli import app; app()"
    command = ["serve", "--model", "mechreward/pocket", "--pack", "pocket/reasoning_pack", "--port", "0"]
    with subprocess.Popen(
        [sys.executable, "-c", code, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    ) as server:  # fmt: skip
        assert server.stdout is not None
        before = [next(line for line in server.stdout if when in line)]
        time.sleep(1)  # the worker is started, and imports
        os.killpg(server.pid, signal.SIGINT)
        said = "".join(before + server.stdout.readlines())
        assert server.wait(60) == 0
    assert "Traceback" not in said and "Interrupted" not in said and "same command" not in said
    assert "Application shutdown complete" in said
