"""Every file of results names the commit and the date of its run, and the page that quotes it shows both."""

import json
import re
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from common.provenance import made_by
from mechreward import files as module
from mechreward.files import environment, made_now, made_sentence

ROOT = Path(__file__).parent.parent
PACK = ROOT / "experiments/results/smollm2-gate.json"
"""A pack, whose schema has no room for it: the page alone tells."""
FILES = sorted(file for file in ROOT.glob("*/results/*.json") if file != PACK)
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "recipes/**/*.md", "experiments/*.md", "benchmarks/*.md")
    for page in ROOT.glob(pattern)
)


def name(file):
    return str(file.relative_to(ROOT))


def stamp(file):
    found = json.loads(file.read_text())["made"]
    assert set(found) == {"commit", "date"}
    return found["commit"], found["date"]


def quoted(page):
    """The files of results that a page links or names, each with what follows within two lines' length."""
    text = " ".join(page.read_text().split())
    found = {}
    for named in re.finditer(r"\b(benchmarks|experiments)/results/([\w.-]+?)\.(?:md|json)\b", text):
        found.setdefault(f"{named[1]}/results/{named[2]}.json", []).append(text[named.end() : named.end() + 160])
    return found


# -- what is stored ----------------------------------------------------------------------------------------------------


def test_there_are_files_and_pages_that_quote_them():
    assert len(FILES) >= 12 and PACK.exists()
    by_page = {name(page): set(quoted(page)) for page in PAGES}
    assert len([files for files in by_page.values() if files]) >= 7
    assert "benchmarks/results/overhead-cpu.json" in by_page["README.md"]
    assert "experiments/results/smollm2-sae.json" in by_page["docs/training_new_sae.md"]
    quoted_somewhere = set.union(*by_page.values())
    assert all((ROOT / file).exists() for file in quoted_somewhere)


@pytest.mark.parametrize("file", FILES, ids=name)
def test_a_file_of_results_names_its_commit_and_date(file):
    commit, date = stamp(file)
    assert re.match(r"[0-9a-f]{7}", commit) and re.match(r"\d{4}-\d\d-\d\d\b", date)


@pytest.mark.parametrize("page", [f for f in (file.with_suffix(".md") for file in FILES) if f.exists()], ids=name)
def test_its_page_shows_them_in_its_first_lines(page):
    commit, date = stamp(page.with_suffix(".json"))
    assert f" {commit}, {date}. " in " ".join([*page.read_text().splitlines()[:3], ""])


@pytest.mark.parametrize("page", [page for page in PAGES if quoted(page)], ids=name)
def test_a_page_that_quotes_results_shows_their_commit_and_date(page):
    for file, following in quoted(page).items():
        commit, date = (r"[0-9a-f]{7}", r"\d{4}-\d\d-\d\d")
        if ROOT / file != PACK:
            commit, date = map(re.escape, stamp(ROOT / file))
        # Before the next file is named: of two, each has its own.
        beside = [text.split("/results/")[0] for text in following]
        assert any(re.search(f"commit {commit}, {date}", text) for text in beside), f"{name(page)}: {file}"


# -- where they come from ----------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    """A package in a checkout of its own, with one commit."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    package = tmp_path / "checkout" / "src" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package.parent.parent / ".gitignore").write_text(".venv/\n")
    git(package.parent.parent, "init", "--quiet")
    commit(package.parent.parent)
    return package


def git(folder, *arguments):
    settings = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false")
    run = subprocess.run(["git", "-C", folder, *settings, *arguments], check=True, capture_output=True, text=True)
    return run.stdout.strip()


def commit(folder):
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "A commit.")


class TestMade:
    def test_the_commit_of_a_checkout(self, checkout):
        head = git(checkout, "rev-parse", "HEAD")
        assert made_now(checkout)["commit"] == head[:7]
        (checkout / "untracked.py").write_text("")
        assert made_now(checkout)["commit"] == head[:7]
        (checkout / "__init__.py").write_text("changed = True\n")
        assert made_now(checkout)["commit"] == f"{head[:7]}-dirty"
        git(checkout, "add", "__init__.py")
        assert made_now(checkout)["commit"] == f"{head[:7]}-dirty"
        commit(checkout)
        assert made_now(checkout)["commit"] == git(checkout, "rev-parse", "HEAD")[:7] != head[:7]

    def test_of_another_repository_that_the_environment_names(self, checkout, tmp_path, monkeypatch):
        other = tmp_path / "other"
        other.mkdir()
        git(other, "init", "--quiet")
        head = git(checkout, "rev-parse", "HEAD")
        monkeypatch.setenv("GIT_DIR", str(other / ".git"))  # as in a hook
        assert made_now(checkout)["commit"] == head[:7]

    def test_an_installed_copy_in_somebody_elses_checkout_has_none(self, checkout):
        installed = checkout.parent.parent / ".venv" / "package"
        shutil.copytree(checkout, installed)
        assert made_now(installed)["commit"] is None

    def test_nowhere_to_look(self, checkout, tmp_path, monkeypatch):
        outside = tmp_path / "package"
        outside.mkdir()
        (outside / "__init__.py").write_text("")
        assert made_now(outside)["commit"] is None and made_now(tmp_path / "missing")["commit"] is None
        empty = tmp_path / "empty"
        empty.mkdir()
        git(empty, "init", "--quiet")
        (empty / "__init__.py").write_text("")
        git(empty, "add", ".")
        assert made_now(empty)["commit"] is None  # no commit yet
        monkeypatch.setenv("PATH", str(outside))
        assert made_now(checkout)["commit"] is None  # no git

    def test_git_that_never_answers(self, checkout, monkeypatch):
        def slow(*arguments, **options):
            raise subprocess.TimeoutExpired("git", options["timeout"])

        monkeypatch.setattr(module.subprocess, "run", slow)
        assert made_now(checkout)["commit"] is None

    def test_today_in_utc(self, tmp_path):
        before, found, after = datetime.now(UTC), made_now(tmp_path)["date"], datetime.now(UTC)
        assert found in (f"{before:%Y-%m-%d}", f"{after:%Y-%m-%d}")

    def test_the_environment_of_a_run_carries_both(self):
        assert made_now().items() <= environment().items()


class TestSeveralRuns:
    def write(self, folder, *environments):
        files = []
        for number, content in enumerate(environments):
            files.append(folder / f"{number}.json")
            if content is not None:
                files[-1].write_text(json.dumps(content))
        return files

    @pytest.mark.parametrize(
        ("runs", "sentence"),
        [
            ([("aaaaaaa", "2026-11-22")] * 3, "Commit aaaaaaa, 2026-11-22."),
            ([("aaaaaaa", "2026-11-24"), ("aaaaaaa", "2026-11-22")], "Commit aaaaaaa, 2026-11-22 to 2026-11-24."),
            (
                [("aaaaaaa", "2026-11-24"), ("bbbbbbb", "2026-11-22")],
                "Commits bbbbbbb and aaaaaaa, 2026-11-22 to 2026-11-24.",
            ),
            (
                [("aaaaaaa", "2026-11-24"), ("ccccccc-dirty", "2026-11-23"), ("bbbbbbb", "2026-11-22")],
                "Commits bbbbbbb, ccccccc-dirty and aaaaaaa, 2026-11-22 to 2026-11-24.",
            ),
            ([(None, "2026-11-24")], "Commit not recorded, 2026-11-24."),
            (
                [("aaaaaaa", "2026-11-24"), (None, "2026-11-25")],
                "Commit aaaaaaa (not recorded for 1 of 2 runs), 2026-11-24 to 2026-11-25.",
            ),
        ],
    )
    def test_they_are_told_in_one_sentence(self, tmp_path, runs, sentence):
        files = self.write(tmp_path, *[{"commit": c, "date": d, "python": "3"} for c, d in runs])
        assert made_sentence({"made": made_by(files)}) == sentence

    def test_older_runs(self, tmp_path):
        assert made_sentence({"made": made_by(self.write(tmp_path, {"python": "3"}, None))}) == "Commit not recorded."
        mixed = self.write(tmp_path, {"python": "3"}, {"commit": "aaaaaaa", "date": "2026-11-24"})
        assert made_sentence({"made": made_by(mixed)}) == ("Commit aaaaaaa (not recorded for 1 of 2 runs), 2026-11-24.")

    def test_an_older_report(self):
        assert made_sentence({}) == "Commit not recorded."
