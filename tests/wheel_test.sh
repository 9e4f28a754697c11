#!/usr/bin/env bash
# Builds the wheel with BUILDER, a Python that has setuptools, installs it into an empty environment made by PYTHON,
# and runs the README's example from there through the deepspeed launcher, far from the source tree.
set -euo pipefail

builder=${BUILDER:-.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

rm -rf build # what an earlier build left there would get into the wheel
"$builder" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$work" .
"$builder" tests/readme_example.py README.md >"$work/example.py"

export VENV="$work/venv" TORCH_EXTENSIONS_DIR="$work/torch_extensions"
launch/setup.sh venv
launch/setup.sh torch
"$VENV/bin/python" -m pip install --quiet "$work"/*.whl

mkdir "$work/empty"
cd "$work/empty"
# shellcheck disable=SC1091
source "$VENV/bin/activate" # DeepSpeed looks for ninja on the path
python -c "import ds_shampoo; assert ds_shampoo.__file__.startswith('$VENV'), ds_shampoo.__file__"
echo "running the README's example:"
deepspeed --num_gpus 2 --master_port "${MASTER_PORT:-29573}" ../example.py
echo "the wheel works"
