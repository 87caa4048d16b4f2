"""What the README says runs as it stands."""

import json
import re
from pathlib import Path

import pytest

from mechreward.experiments.page import markdown

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("trainer", ["GRPOTrainer", "MechRewardGRPOTrainer"])
def test_quickstart(tmp_path, monkeypatch, trainer):
    code = re.search(r"<!-- quickstart -->\n```python\n(.*?)```", README, re.DOTALL)[1]
    short = code.replace('output_dir="out"', 'output_dir="out", max_steps=2, logging_steps=1, report_to=[]')
    assert short != code
    if trainer != "GRPOTrainer":
        short = short.replace("trainer = GRPOTrainer(", f"trainer = mr.{trainer}(")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(short, "README.md", "exec"), names)
    steps = [log for log in names["trainer"].state.log_history if "reward" in log]
    assert len(steps) == 2
    assert {"composite/reasoning_pack", "composite/math_boxed"} <= set(steps[0])


def test_guards_and_monitors(tmp_path, monkeypatch):
    quickstart, guards = (
        re.search(rf"<!-- {name} -->\n```python\n(.*?)```", README, re.DOTALL)[1] for name in ("quickstart", "guards")
    )
    short = guards.replace('output_dir="out"', 'output_dir="out", max_steps=2, logging_steps=1, report_to=[]')
    assert short != guards
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(quickstart.split("trainer =")[0] + short, "README.md", "exec"), names)
    steps = [log for log in names["trainer"].state.log_history if "reward" in log]
    assert len(steps) == 2 and names["trainer"].stopped_because is None
    assert "guards/flagged" in steps[0]


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile


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
    ends = {name: cell["accuracy"][-1]["mean"] for name, cell in cells.items()}
    assert f"accuracy went from .36 to .0{ends['none'] * 100:.0f}" in page
    gap, (low, high) = cells["all"]["minus_outcome"]["mean"], cells["all"]["minus_outcome"]["interval"]
    said = f".{1000 * ends['all']:.0f}, against .{1000 * ends['outcome']:.0f} of the outcome alone (difference "
    said += f"{gap:+.3f}, {low:+.3f} to {high:+.3f};".replace("0.", ".").replace(" +.", " +.")
    assert said in page
    best = report["best_of_n"]["curves"]["none"]["accuracy"]
    assert f"rises from {best[0]:.2f} to {best[4]:.2f} at N = 16".replace("0.", ".") in page
    assert f"falls to {best[8]:.2f} at N = 256".replace("0.", ".") in page
    assert (
        min(d for n in ("none", "reference", "dual", "suite") for d in cells[n]["detection"]["auc"]["per_seed"])
        >= 0.975
    )
