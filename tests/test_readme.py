"""What the README says runs as it stands."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


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


def test_make_targets_exist():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
