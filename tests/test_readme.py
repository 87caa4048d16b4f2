"""The figures in the README and on the pages are those of the results. (What runs there is in test_docs.py.)"""

import json
from pathlib import Path

from common.page import markdown

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_verdicts_on_the_research_page_are_those_of_the_results():
    research, tables = (ROOT / "RESEARCH.md").read_text(), (ROOT / "experiments/results/pocket.md").read_text()
    _, quoted = research.split("<!-- from experiments/results/pocket.md -->")
    verdicts = [line for line in quoted.split("<!-- end -->")[0].splitlines() if line]
    assert len(verdicts) == tables.count("\n- `")
    assert all(line in tables.splitlines() for line in verdicts)


def test_the_tables_are_made_from_the_json():
    results = ROOT / "experiments/results"
    assert markdown(json.loads((results / "pocket.json").read_text())) == (results / "pocket.md").read_text()


def test_the_costs_are_those_of_the_benchmark():
    comparisons = json.loads((ROOT / "benchmarks/results/overhead-cpu.json").read_text())["comparisons"]
    for arm in ("generation", "old_logprobs", "reference", "topk", "forward", "naive"):
        cells = []
        for entry in (comparison["summary"][arm] for comparison in comparisons):
            time, memory = entry["naive_over_this"]["median"], entry["naive_bytes_over_this"]
            cells.append(f"{100 * entry['share_of_outcome_step']['median']:.2f} %")
            cells.append("" if arm == "naive" else f"{time:.1f} x, {memory:.1f} x")
        assert f"| {' | '.join(cells)} |" in README


def test_the_figures_on_goodharts_page_are_those_of_the_results():
    page = " ".join((ROOT / "docs" / "goodhart.md").read_text().split())
    report = json.loads((ROOT / "experiments/results/hacking.json").read_text())
    cells = report["cells"]

    def short(value, sign=""):
        return f"{value:{sign}.3f}".replace("0.", ".", 1)

    rows = {
        "none: features alone": "none",
        "all: gated, KL .04, reference, dual verifier, detectors": "all",
        "gated by the outcome, no KL, no guard": "gated",
        "HERO, no KL, no guard": "hero",
        "KL .1": "kl_1",
        "KL .04": "kl_04",
        "read on the frozen reference": "reference",
        "detectors": "suite",
        "dual verifier": "dual",
        "max over tokens": "max",
    }
    for said, name in rows.items():
        gap = cells[name]["minus_outcome"]
        low, high = (short(v, "+") for v in gap["interval"])
        end = short(cells[name]["accuracy"][-1]["mean"])
        assert f"| {said} | {end} | {short(gap['mean'], '+')} ({low} to {high}) |" in page
    assert f"| the outcome alone, no features | {short(cells['outcome']['accuracy'][-1]['mean'])} | |" in page
    assert sum(len(cell["seeds"]) for cell in cells.values()) == 51
    gamed = [
        auc for n in ("none", "reference", "dual", "suite", "max") for auc in cells[n]["detection"]["auc"]["per_seed"]
    ]
    assert len(gamed) == 17 and min(gamed) >= 0.975
    leads = [round(fell) - rang for fell, rang in _falls(cells["none"])]
    assert f"rang {', '.join(map(str, leads[:-1]))} and {leads[-1]} steps before" in page
    honest = [rang for n in ("outcome", "all", "gated", "hero") for _, rang in _falls(cells[n])]
    assert len(honest) == 16 and sum(rang is not None for rang in honest) == 1
    aware = ("none_blind", "none_mild", "none_aware", "all_aware")
    for name in aware:
        ends = " ".join(f"{a:.2f}"[1:] for a in cells[name]["accuracy"][-1]["per_seed"])
        detection = cells[name]["detection"]
        auc, passing = f"{detection['auc']['mean']:.2f}"[1:], f"{100 * detection['evasion']['mean']:.0f} %"
        assert f"| {ends} | {auc} | {passing} |" in page
    best = report["best_of_n"]["curves"]["none"]["accuracy"]
    assert f"rises from {best[0]:.2f} to {best[4]:.2f} at N = 16".replace("0.", ".") in page
    assert f"falls to {best[8]:.2f} at N = 256".replace("0.", ".") in page


def _falls(cell):
    """For each seed the step at which accuracy fell, and the one at which the flagged share rang."""
    rang = cell["first_alarm"].get("flagged", [None] * len(cell["seeds"]))
    return list(zip(cell["fell_at"], rang, strict=True))
