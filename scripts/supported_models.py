"""Write the table of supported models into the README, between its two markers: python scripts/supported_models.py"""

from pathlib import Path

from mechreward.sae.supported import table

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- supported-models -->\n", "<!-- end of supported-models -->"


def updated(text: str) -> str:
    """The README's text with the table as the code makes it."""
    before, rest = text.split(START)
    return before + START + table() + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
