"""What mkdocs.yml cannot say: pages from outside docs/, and the pages of the API reference.

The repository is read in two ways, as files and as a site, and its links are written for the first. A link from a page
to a file outside docs/ brings that file into the site, and is rewritten to where it lies there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "mechreward"
LINK = re.compile(r"(\]\(|src=\")([^)\s#\"]+)")
NO_REFERENCE = {"cli"}  # the command line has a page of its own


def on_config(config: Any) -> None:
    """Put the pages of the API reference into the navigation."""
    section = next(entry["API reference"] for entry in config.nav if "API reference" in entry)
    section += [f"api/{part}.md" for part in parts()]


def on_files(files: Files, config: Any) -> Files:
    """Add the API reference, and every file that a page of the site links to."""
    for part, modules in parts().items():
        lines = [f"# {part}", *(f"::: {module}" for module in modules)]
        files.append(File.generated(config, f"api/{part}.md", content="\n\n".join(lines)))
    wanted = [ROOT / name for name in _in_nav(config.nav) if (ROOT / name).is_file()]
    wanted += [target for file in files if file.is_documentation_page() for target in _linked(file)]
    while wanted:
        path = wanted.pop()
        if files.get_file_from_path(_in_site(path)) is None:
            file = File.generated(config, _in_site(path), abs_src_path=str(path))
            files.append(file)
            wanted += _linked(file) if file.is_documentation_page() else []
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between files become links between the site's pages."""
    if page.file.abs_src_path is None:
        return markdown
    folder, here = Path(page.file.abs_src_path).parent, os.path.dirname(page.file.src_uri)

    def rewritten(link: re.Match) -> str:
        target = _target(folder, link[2])
        return link[1] + (link[2] if target is None else os.path.relpath(_in_site(target), here or "."))

    return LINK.sub(rewritten, markdown)


def parts() -> dict[str, list[str]]:
    """For each part of the package, the names of its public modules."""
    found: dict[str, list[str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        names = list(file.relative_to(PACKAGE).with_suffix("").parts)
        if names[-1] == "__init__":
            names.pop()
        if names and names[0] not in NO_REFERENCE and not any(n.startswith("_") for n in names) and file.stat().st_size:
            part = names[0] if (PACKAGE / names[0]).is_dir() else "mechreward"
            found.setdefault(part, []).append(".".join(["mechreward", *names]))
    return dict(sorted(found.items(), key=lambda part: (part[0] != "mechreward", part[0])))


def _in_nav(nav: Any) -> Iterator[str]:
    """The pages that the navigation names."""
    if isinstance(nav, str):
        yield nav
    for entry in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from _in_nav(entry)


def _linked(file: File) -> list[Path]:
    """The files that a page links to."""
    if file.abs_src_path is None:
        return []
    path = Path(file.abs_src_path)
    found = (_target(path.parent, link[2]) for link in LINK.finditer(path.read_text(encoding="utf-8")))
    return [target for target in found if target is not None]


def _target(folder: Path, link: str) -> Path | None:
    """The file of the repository that a link leads to, if it does."""
    path = (folder / link).resolve() if ":" not in link else ROOT
    return path if path.is_file() and path.is_relative_to(ROOT) else None


def _in_site(path: Path) -> str:
    """Where a file of the repository lies in the site."""
    name = path.relative_to(ROOT).as_posix()
    return "readme.md" if name == "README.md" else name.removeprefix("docs/")  # README.md would be the index


class WithoutRoles(griffe.Extension):
    """``:class:`Reward` `` in a docstring, which Sphinx would link, is ``Reward`` in code here."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r":(?:class|func|meth|mod|data|attr):`~?", "`", obj.docstring.value)
