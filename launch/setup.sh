#!/usr/bin/env bash
# Sets up what `make pretrain` and `make test` need, one step a call: venv, torch, package, ops;
# and what `make trainers-test` needs besides: trainers.
#
# Reads VENV (the environment's folder) and PYTHON (what makes it). Every step may be called again.
set -euo pipefail

venv=${VENV:-.venv}
python=${PYTHON:-python3}

# The newest release of torch that this project was tested with, without CUDA's gigabytes.
cpu_torch="torch==2.13.0+cpu"

fail() {
    echo "setup: error: $*" >&2
    exit 1
}

say() {
    echo "setup: $*"
}

check_python() {
    command -v "$python" >/dev/null || fail "$python not found: apt-get install python3, or set PYTHON=..."
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$("$python" --version) is too old: Python 3.10 or newer is needed (set PYTHON=...)"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python has no venv module: apt-get install python3-venv"
    "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' ||
        fail "Python.h not found, which DeepSpeed's ops are compiled with: apt-get install python3-dev"
    command -v g++ >/dev/null || fail "g++ not found, which DeepSpeed's ops are compiled with: apt-get install g++"
}

sees_torch() {
    "$1" -c 'import sys, torch
sys.exit(tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 4))' 2>/dev/null
}

make_venv() {
    if "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    check_python
    if sees_torch "$python"; then
        say "$python already has torch: the environment will use it"
        "$python" -m venv --clear --system-site-packages "$venv"
    else
        "$python" -m venv --clear "$venv"
    fi
}

install_torch() {
    local pip=("$venv/bin/python" -m pip install --quiet)
    if sees_torch "$venv/bin/python"; then
        return
    elif nvidia-smi >/dev/null 2>&1; then
        say "installing torch for this machine's NVIDIA GPU"
        "${pip[@]}" torch
    elif "${pip[@]}" "$cpu_torch" 2>/dev/null; then
        say "installed $cpu_torch"
    elif "${pip[@]}" uv && "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --torch-backend cpu torch; then
        say "installed a CPU build of torch"
    else
        say "warning: no CPU build of torch can be had here: installing the full one, several GB"
        "${pip[@]}" torch
    fi
    sees_torch "$venv/bin/python" || fail "torch was installed but can't be imported from $venv"
}

install_package() {
    "$venv/bin/python" -m pip install --quiet --editable ".[dev]"
}

# The torch that is there stays, whatever one of the libraries would like.
install_trainers() {
    local kept
    kept=$(mktemp)
    "$venv/bin/python" -c 'import torch; print(f"torch=={torch.__version__}")' >"$kept"
    "$venv/bin/python" -m pip install --quiet --constraint "$kept" --editable ".[trainers]"
    rm "$kept"
}

# On CPU DeepSpeed compiles its collective of processes on one machine at its first use, which takes a minute.
build_ops() {
    [ "${DS_ACCELERATOR:-}" = cpu ] || return 0
    say "building DeepSpeed's CPU collective (about a minute the first time)"
    # shellcheck disable=SC1091
    source "$venv/bin/activate" # torch looks for ninja on the path
    python -c '
from deepspeed.accelerator import get_accelerator
get_accelerator().create_op_builder("ShareMemCommBuilder").load()' >/dev/null
}

case "${1:-}" in
venv) make_venv ;;
torch) install_torch ;;
package) install_package ;;
ops) build_ops ;;
trainers) install_trainers ;;
*) fail "usage: $0 venv|torch|package|ops|trainers" ;;
esac
