"""Every block of code in the README, the documentation and the recipes runs as it stands, or says why it cannot.

What a reader does not see: trainings end after two steps, and commands get the options in `SHORTER`. A comment before a
block says more of it:

- ``<!-- not run here: REASON -->``: it must be valid all the same, as far as that can be told without running it;
- ``<!-- output of the block above -->``: what that block prints;
- ``<!-- schema: NAME -->``: what a block of data is checked against;
- ``<!-- as in README.md -->``: it stands there word for word.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from markdown_it import MarkdownIt

from mechreward.features.pack import FeaturePack

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md")), *ROOT.glob("recipes/*/*.md")]
QUICK = ["README.md", "docs/quickstart.md", "docs/concepts.md", "docs/your_model.md"]  # their Python, by default

SHORTER = {
    "mechreward discover": "--questions 100 --rollouts 2 --permutations 100",
    "mechreward gate": "--questions 100 --rollouts 2",
    "mechreward redteam": "--questions 60 --family filler_dilution --best-of 8 --best-of-questions 4",
    "mechreward features show": "--texts 20",
    "mechreward probe train": "--layers 2,3",
    "mechreward train --pack": "--steps 2 --every 2 --questions 20 --prompts-per-step 2",
    "mechreward eval mechreward/pocket": "--questions 20",
    "recipes/trl/train.py": "--steps 1",
    "scripts/train_sae.py": "--tokens 20000 --latents 256",
}
"""Options that a test adds to a command; the last ones count."""

CUT = {"max_steps": 2, "questions": 30, "discovery, rows": 60}
"""What experiments' configurations are cut down to."""

SCHEMAS: dict[str, Callable[[Any], object]] = {"pack": FeaturePack.model_validate}

needs_no_run = re.compile(r"pip (install|download)|hf auth|git clone|pre-commit")


@dataclass
class Block:
    """A block of code of a page.

    Attributes:
        page: Its page.
        line: Where it begins there.
        language: As the page names it.
        text: The code.
        says: The comments directly before it.
    """

    page: Path
    line: int
    language: str
    text: str
    says: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def said(self, what: str) -> str | None:
        """What a comment says after ``what``, if there is one that begins so."""
        return next((comment.removeprefix(what).strip() for comment in self.says if comment.startswith(what)), None)

    @property
    def runs(self) -> bool:
        return self.language in ("python", "bash") and self.said("not run here:") is None


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, with the comments before each."""
    found, comments = [], []
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "html_block":
            comments += re.findall(r"<!--\s*(.*?)\s*-->", token.content, re.DOTALL)
        elif token.type in ("fence", "code_block"):
            line = token.map[0] + 1 if token.map else 0
            found.append(Block(page, line, token.info.split()[0] if token.info else "", token.content, comments))
            comments = []
        elif token.type != "paragraph_close":
            comments = []
    return found


def commands(text: str) -> list[str]:
    """The commands of a bash block: continued lines and quoted line breaks joined, comments left out."""
    found, open_one = [], ""
    for line in text.splitlines():
        if line.endswith("\\"):
            open_one += line.removesuffix("\\")
            continue
        open_one += re.sub(r"(^|\s)# .*", "", line)
        try:
            words = shlex.split(open_one)
        except ValueError:  # a quotation that goes on
            open_one += "\n"
            continue
        if words:
            found.append(open_one.strip())
        open_one = ""
    assert not open_one, f"This command does not end: {open_one}"
    return found


EVERY = [block for page in PAGES for block in blocks(page)]
IDS = [block.name for block in EVERY]


@pytest.mark.parametrize("block", EVERY, ids=IDS)
def test_each_block_is_known_for_what_it_is(block):
    """Run below, or checked here, or said why not: nothing else."""
    reason = block.said("not run here:")
    if block.language == "python":
        compile(block.text, block.name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    elif block.language == "bash":
        for command in commands(block.text):
            known(command)
    elif block.language in ("json", "yaml"):
        data = json.loads(block.text) if block.language == "json" else yaml.safe_load(block.text)
        SCHEMAS[block.said("schema:") or "none given"](data)
    elif block.language == "text":
        assert block.says, f"{block.name} does not say where this text comes from."
    else:
        assert reason, f"{block.name} is neither run nor says why it is not."
    assert reason is None or len(reason) > 10, f"{block.name} gives no reason."
    if block.said("as in README.md") is not None:
        assert f"```{block.language}\n{block.text}```" in (ROOT / "README.md").read_text()


def known(command: str) -> None:
    """That a command's options exist, without running it.

    Raises:
        AssertionError: They don't.
    """
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=.*", word)]
    if words[:1] == ["mechreward"]:
        _parse(words[1 : words.index("||") if "||" in words else None])
    elif words[:1] == ["make"]:
        for target in words[1:]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
    elif words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for wanted in re.findall(r"\[([\w,]+)\]", command):
            assert set(wanted.split(",")) <= set(extras), command
    else:
        for word in words:
            if re.match(r"(scripts|recipes|experiments|configs|benchmarks)/", word):
                assert (ROOT / word).exists(), command


def _parse(arguments: list[str]) -> None:
    from mechreward.cli import app

    command, context = typer.main.get_command(app), None
    while True:
        group = hasattr(command, "resolve_command")
        context = command.make_context(command.name or "mechreward", list(arguments), parent=context)
        if not group:
            return
        _, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])


# -- running them ------------------------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch, tmp_path) -> Path:
    """Trainings of two steps, a folder with the checkout's scripts in it, and the environment of a reader."""
    from trl import GRPOConfig

    whole = GRPOConfig.__post_init__

    def cut(self):
        self.max_steps, self.logging_steps, self.report_to = 2, 1, []
        whole(self)

    monkeypatch.setattr(GRPOConfig, "__post_init__", cut)
    for name in ("scripts", "recipes", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("experiments", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
        for config in (tmp_path / name).rglob("pocket.yaml" if name == "experiments" else "*.yaml"):
            config.write_text(
                re.sub(
                    r"\b(max_steps|questions|discovery, rows): \d+",
                    lambda m: f"{m[1]}: {CUT[m[1]]}",
                    config.read_text(),
                )
            )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(page: Path, wanted: tuple[str, ...], change: tuple[str, str] = ("", "")) -> dict[str, Any]:
    """Run a page's blocks from top to bottom: Python in one namespace, bash command by command.

    Args:
        page: Of the repository.
        wanted: Languages.
        change: A text in the Python code, and what is run in its place.

    Returns:
        The names that Python has given.
    """
    names: dict[str, Any] = {}
    printed = ""
    with Servers() as servers:
        for block in blocks(page):
            if block.said("output of the block above") is not None and "python" in wanted:
                assert block.text == printed, f"{block.name} says what is not printed any more."
            elif not block.runs or block.language not in wanted:
                continue
            elif block.language == "python":
                code = block.text.replace(*change) if change[0] else block.text
                with redirect_stdout(StringIO()) as out:
                    exec(compile("\n" * block.line + code, str(page), "exec"), names)
                printed = out.getvalue()
            else:
                for command in commands(block.text):
                    if command.startswith("mechreward serve"):
                        servers.start(command)
                    elif not needs_no_run.match(command) and not command.startswith("make "):
                        bash(command)
    return names


def bash(command: str) -> None:
    """Run a command as a reader would, but shorter."""
    for start, options in SHORTER.items():
        if start in command:
            command = re.sub(r"( \|\| true)?$", rf" {options}\1", command, count=1)
    done = subprocess.run(
        ["bash", "-ec", command], env=environment(), capture_output=True, text=True, timeout=900, check=False
    )
    expected = (0, 1) if command.startswith("mechreward gate") else (0,)  # 1: the pack stays a candidate
    assert done.returncode in expected, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def environment() -> dict[str, str]:
    """The test's own, with the programs of its interpreter first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


class Servers:
    """Reward servers that a page starts: up from then on to its end."""

    def __init__(self):
        self.running: list[subprocess.Popen] = []

    def start(self, command: str) -> None:
        """Start one, and wait until it is ready."""
        chosen = re.search(r"--port (\d+)", command)
        port = chosen[1] if chosen else str(free_port())
        command += "" if chosen else f" --port {port}"
        self.running.append(subprocess.Popen(["bash", "-ec", f"exec {command}"], env=environment()))
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz"):
                    return
            except OSError:
                assert self.running[-1].poll() is None, command
                time.sleep(0.2)
        raise AssertionError(f"It is not ready after two minutes: {command}")

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.running:
            process.terminate()
            process.wait(60)


@pytest.mark.parametrize("page", QUICK)
def test_the_python_of_a_page_runs(page, short):
    # The quickstart says of the other trainer that nothing else changes.
    change = ("= GRPOTrainer(", "= mr.MechRewardGRPOTrainer(") if page == "docs/quickstart.md" else ("", "")
    names = run(ROOT / page, ("python",), change)
    if page == "README.md":
        assert "guards/flagged" in _logged(names["trainer"])[0]
    if page == "docs/quickstart.md":
        assert {"composite/reasoning_pack", "composite/math_boxed"} <= set(_logged(names["trainer"])[0])
        assert type(names["trainer"]).__name__ == "MechRewardGRPOTrainer"
        right, wrong = names["scores"]
        assert right > 1 > wrong


def _logged(trainer) -> list[dict]:
    steps = [log for log in trainer.state.log_history if "reward" in log]
    assert len(steps) == 2
    return steps


RUNNING = [page for page in PAGES if any(block.runs for block in blocks(page))]


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("page", RUNNING, ids=[str(page.relative_to(ROOT)) for page in RUNNING])
def test_a_page_runs_from_top_to_bottom(page, short):
    run(page, ("python", "bash"))


def test_calculations_are_labelled_as_the_page_on_saes_says():
    page = ROOT / "docs" / "training_new_sae.md"
    script = next(block.text for block in blocks(page) if "label.py" in block.says)
    rows = ["3 + 4 = 7, and 10 / 4 = 2.5", "3 + 4 = 8", "seven", "2 x 1,000 = $2,000"]
    lines = "".join(json.dumps({"completion": row}) + "\n" for row in rows)
    done = subprocess.run([sys.executable, "-c", script], input=lines, capture_output=True, text=True, check=True)
    labels = {row["completion"]: row["label"] for row in map(json.loads, done.stdout.splitlines())}
    assert labels == {rows[0]: True, rows[1]: False, rows[3]: True}


def messages() -> list[str]:
    """Every text in the library's source, ``{}`` in the place of what is put into it."""
    found = []
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[.\d]*[sdf]", "{}", node.value).replace("%%", "%"))
    return found


def test_the_messages_that_the_faq_quotes_exist():
    quoted = re.findall(r"^> (.*)$", (ROOT / "docs" / "faq.md").read_text(), re.MULTILINE)
    assert len(quoted) > 20
    sources = messages()
    for said in quoted:
        assert any(_holds(source, said.split("...")) for source in sources), f"The library does not say: {said}"


def _holds(text: str, parts: list[str]) -> bool:
    """Whether all parts stand in the text, one after the other."""
    at = 0
    for part in parts:
        if (at := text.find(part, at)) < 0:
            return False
        at += len(part)
    return True


def test_the_reference_names_everything_that_is_imported_by_name():
    import mechreward

    table = (ROOT / "docs" / "api" / "index.md").read_text()
    assert set(re.findall(r"^\| `mr\.(\w+)`", table, re.MULTILINE)) == set(mechreward.__all__)


@pytest.mark.slow
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path):
    mkdocs = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    subprocess.run(mkdocs, cwd=ROOT, env=environment(), check=True, timeout=250)
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 30
    loads = re.compile(
        r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"(\w+:|//)[^>]*|<link\b[^>]*\bhref=\"(\w+:|//)[^>]*"
    )
    for page in pages:
        assert not loads.search(page.read_text(encoding="utf-8")), page
    for sheet in tmp_path.rglob("*.css"):
        assert not re.search(r"@import|url\([\"']?(https?:|//)", sheet.read_text(encoding="utf-8")), sheet
