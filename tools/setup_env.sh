#!/usr/bin/env bash
# Makes the virtual environment VENV with the stack pinned in requirements.txt and mmslide in editable mode.
# Usage: tools/setup_env.sh VENV    (PYTHON=python3.12 picks the interpreter, MAX_JOBS the compile jobs)
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
python=${PYTHON:-python3}
started=$SECONDS

say() { printf '[setup %4ds] %s\n' $((SECONDS - started)) "$*"; }

"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || {
    echo "The stack needs Python 3.11 or 3.12, got $("$python" --version). Say PYTHON=python3.11 make ..." >&2
    exit 1
}
say "virtual environment $venv ($("$python" --version)); about 10 minutes the first time, 90 seconds with a cached mmcv"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet)

say "torch and the build tools"
"${pip[@]}" install -c requirements.txt torch numpy setuptools wheel ninja

# mmcv has no wheel for this torch. It is compiled once a user, for each torch (with its CUDA), Python and platform:
# pip's own cache does not look at torch, and a wheel compiled against another torch does not load.
mmcv=$(grep '^mmcv==' requirements.txt)
key=$("$venv/bin/python" - <<'PY'
import sys, sysconfig, torch
from torch.utils.cpp_extension import CUDA_HOME
if torch.cuda.is_available() and CUDA_HOME is None:
    sys.exit(f'For the GPU mmcv is compiled with nvcc, which is not there: install the CUDA toolkit {torch.version.cuda}. '
             'For a stack without CUDA say CUDA_VISIBLE_DEVICES= make ...')
cuda = f'cu{torch.version.cuda}' if torch.cuda.is_available() else 'cpu'
print(f'torch{torch.__version__}-{cuda}-cp{sys.version_info[0]}{sys.version_info[1]}-{sysconfig.get_platform()}')
PY
)
wheels="${XDG_CACHE_HOME:-$HOME/.cache}/mmslide/$mmcv-$key"
if compgen -G "$wheels/mmcv-*.whl" >/dev/null; then
    say "$mmcv with its ops: taken from $wheels"
else
    say "$mmcv with its ops: compiling (5-8 minutes on 2 cores), kept in $wheels"
    mkdir -p "$(dirname "$wheels")"
    build=$(mktemp -d "$wheels.XXXXXX")
    trap 'rm -rf "$build"' EXIT
    # -g0: without debug information the wheel is 2 MB instead of 32.
    CFLAGS=-g0 MMCV_WITH_OPS=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} \
        "${pip[@]}" wheel --no-build-isolation --no-deps --no-cache-dir -w "$build" "$mmcv" >"$build.log" 2>&1 ||
        { tail -n 40 "$build.log" >&2; echo "mmcv did not compile; the whole log is $build.log" >&2; exit 1; }
    rm "$build.log"
    # Two builds at once: the first one there stays.
    mv -T "$build" "$wheels" 2>/dev/null || compgen -G "$wheels/mmcv-*.whl" >/dev/null
fi

say "the OpenMMLab packages and the developers' tools"
"${pip[@]}" install --no-build-isolation --find-links "$wheels" -r requirements.txt
say "mmslide itself, editable"
"${pip[@]}" install --no-build-isolation --no-deps --editable .
"${pip[@]}" check
say "ready"
