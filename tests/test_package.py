"""The package as a user gets it."""

import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mechreward import errors

ROOT = Path(__file__).parent.parent


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_brings_neither_torch_nor_its_like():
    heavy = ("torch", "transformers", "trl", "sae_lens", "sympy", "sklearn", "numpy")
    found = run(f"import sys, mechreward; print([m for m in {heavy} if m in sys.modules])")
    assert found == "[]"


def test_every_public_name_exists():
    found = run("import mechreward as mr; print(all(getattr(mr, n) is not None for n in mr.__all__), len(dir(mr)))")
    assert found.startswith("True")


def test_missing_extra_is_one_sentence():
    code = (
        "import sys; sys.modules['trl'] = None\n"
        "import mechreward as mr\n"
        "from mechreward.errors import MissingExtraError\n"
        "try: mr.MechRewardGRPOTrainer\n"
        "except MissingExtraError as error: print(error)\n"
    )
    assert run(code) == (
        "This needs the package 'trl', which is not installed: run pip install '.[trl]' in the mechreward checkout."
    )


def test_an_engine_that_is_missing_is_one_sentence():
    code = (
        "import sys; sys.modules['verl'] = None\n"
        "from mechreward.errors import MissingExtraError\n"
        "try: import mechreward.integrations.verl\n"
        "except MissingExtraError as error: print(error)\n"
    )
    assert run(code) == (
        "This needs the package 'verl', which is not installed: install verl as its documentation says, and then run "
        "pip install '.[verl]' in the mechreward checkout."
    )


def test_errors_survive_a_trip_to_another_process():
    """Ray pickles what its actors raise: the sentence would be lost in an error about the error."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    for kind in kinds:
        raised = kind("httpx", "client") if kind is errors.MissingExtraError else kind("What is wrong.")
        again = pickle.loads(pickle.dumps(raised))
        assert type(again) is kind and str(again) == str(raised) and len(kinds) > 10


@pytest.mark.slow
def test_wheel_holds_the_model_and_the_catalogs_and_no_experiments(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(tmp_path), str(ROOT)], check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 20e6
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "mechreward/pocket/files/model/model.safetensors",
        "mechreward/pocket/files/saes/topk/sae_weights.safetensors",
        "mechreward/catalogs/pocket/reasoning_pack.json",
        "mechreward/catalogs/gemma-2-2b/reasoning_pack.json",
        "mechreward/catalogs/gemma-2-9b/reasoning_pack.json",
    ):
        assert needed in names
    assert not [name for name in names if name.startswith(("mechreward/experiments", "mechreward/baselines"))]
