#!/bin/sh
# Puts aiconfigurator, whose AFD search bench.planner times beside ours, into an environment of its own.
#   bench/setup_aiconfigurator.sh .venv-aiconfigurator        (Python 3.10 or later, 0.6 GB)
set -eu
folder=${1:?"usage: $0 FOLDER"}
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet aiconfigurator==0.12.0
"$folder/bin/aiconfigurator" version
