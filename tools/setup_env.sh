#!/usr/bin/env bash
# Makes the virtual environment VENV with a stack pinned in requirements/ and mmslide in editable mode.
# Usage: tools/setup_env.sh VENV STACK    (PYTHON=python3.12 picks the interpreter, MAX_JOBS the compile jobs)
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 stack=$2
requirements=requirements/$stack.txt
python=${PYTHON:-python3}
started=$SECONDS

say() { printf '[setup %4ds] %s\n' $((SECONDS - started)) "$*"; }
fail() { echo "$*" >&2; exit 1; }

case $stack in
    official) oldest=11 newest=13 ;;
    onedl) oldest=11 newest=12 ;;
    classic) oldest=10 newest=11 ;;
    *) fail "STACK must be official, classic or onedl, got $stack" ;;
esac
"$python" -c "import sys; sys.exit(not (3, $oldest) <= sys.version_info[:2] <= (3, $newest))" ||
    fail "This stack needs Python 3.$oldest to 3.$newest, got $("$python" --version). Say PYTHON=python3.11 make ..."
say "virtual environment $venv ($("$python" --version)); 4 to 10 minutes the first time, 1 to 3 with a cached mmcv"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet)
# Python compiles modules when they are first imported. Compiling all of torch's at installation takes seconds more.
install=("${pip[@]}" install --no-compile)

say "torch and the build tools"
"${install[@]}" -c "$requirements" torch numpy setuptools wheel ninja

# OpenMMLab's index has mmcv wheels for torch up to 2.1. For later versions mmcv is compiled once per user, for each torch
# (with its CUDA), Python and platform: pip's own cache ignores the torch version, and a wheel for another torch does not load.
mmcv=$(grep -E '^(onedl-)?mmcv==' "$requirements")
mapfile -t torch < <("$venv/bin/python" - <<'PY'
import sys, sysconfig, torch
from torch.utils.cpp_extension import CUDA_HOME
cuda = f'cu{torch.version.cuda}' if torch.cuda.is_available() else 'cpu'
print(f'torch{torch.__version__}-{cuda}-cp{sys.version_info[0]}{sys.version_info[1]}-{sysconfig.get_platform()}')
print(f'{cuda.replace(".", "")}/torch{".".join(torch.__version__.split(".")[:2])}.0')
print(torch.version.cuda if torch.cuda.is_available() and CUDA_HOME is None else '')
PY
)
key=${torch[0]} index=https://download.openmmlab.com/mmcv/dist/${torch[1]}/index.html nvcc_missing=${torch[2]}
wheels="${XDG_CACHE_HOME:-$HOME/.cache}/mmslide/$mmcv-O3-$key"
cached() { compgen -G "$wheels/*mmcv-*.whl" >/dev/null; }

# If two builds run at the same time, the first to finish is kept.
keep() { mv -T "$1" "$wheels" 2>/dev/null || cached; }

prebuilt() {
    [ "$stack" = classic ] || return 1
    "${pip[@]}" download --timeout 10 --retries 0 --no-deps --only-binary :all: --no-index --find-links "$index" \
        -d "$1" "$mmcv" >/dev/null 2>&1
}

# Three quarters of the time to compile one of mmcv's files are spent in torch's headers. The compiler uses the precompiled
# header only if all flags match; otherwise it reads the header itself.
precompile() {
    local header=$1 torch_flags
    shift
    echo '#include <torch/types.h>' >"$header"
    torch_flags=$("$venv/bin/python" - <<'PY'
import torch
from torch.utils.cpp_extension import BuildExtension, include_paths
print(*('-I' + path for path in include_paths()))
if hasattr(BuildExtension, '_add_gnu_cpp_abi_flag'):  # torch before 2.7
    print(f'-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}')
PY
)
    "${CXX:-c++}" "$@" -fPIC -std=c++17 -DTORCH_API_INCLUDE_EXTENSION_H -DTORCH_EXTENSION_NAME=_ext $torch_flags \
        -x c++-header "$header" -o "$header.gch" 2>/dev/null
}

if cached; then
    say "$mmcv with its ops: taken from $wheels"
else
    mkdir -p "$(dirname "$wheels")"
    build=$(mktemp -d "$wheels.XXXXXX")
    trap 'rm -rf "$build"' EXIT
    if prebuilt "$build"; then
        say "$mmcv with its ops: OpenMMLab's wheel, kept in $wheels"
    else
        [ -z "$nvcc_missing" ] || [ "$stack" != classic ] || fail "OpenMMLab's wheel of $mmcv could not be downloaded" \
            "from $index, and without nvcc it cannot be compiled for the GPU. Either check the connection to" \
            "download.openmmlab.com, or install the CUDA toolkit $nvcc_missing. Without the GPU: CUDA_VISIBLE_DEVICES= make ..."
        [ -z "$nvcc_missing" ] || fail "For the GPU $mmcv is compiled with nvcc, which is not installed. Either install the" \
            "CUDA toolkit $nvcc_missing, or take the stack with prebuilt wheels: make ... STACK=classic" \
            "(torch 2.1.2+cu121, mmcv from download.openmmlab.com). Without the GPU: CUDA_VISIBLE_DEVICES= make ..."
        say "$mmcv with its ops: compiling (3-8 minutes on 2 cores), kept in $wheels"
        # CFLAGS replaces Python's own flags, so without -O3 nothing would be optimized. -g0 keeps the wheel small.
        flags='-O3 -DNDEBUG -g0'
        header=$(mktemp -d)
        trap 'rm -rf "$build" "$header"' EXIT
        precompile "$header/torch.h" $flags || rm -f "$header/torch.h.gch"
        CFLAGS="$flags -include $header/torch.h" MMCV_WITH_OPS=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} \
            "${pip[@]}" wheel --no-build-isolation --no-deps --no-cache-dir -w "$build" "$mmcv" >"$build.log" 2>&1 ||
            { tail -n 40 "$build.log" >&2; fail "mmcv did not compile; the whole log is $build.log"; }
        rm "$build.log"
    fi
    keep "$build"
fi

# In parallel, since compiling mmslide's kernels uses only one core.
say "mmslide itself, editable, and the OpenMMLab packages"
"${install[@]}" --no-build-isolation --no-deps --editable . &
mmslide=$!
"${install[@]}" --no-build-isolation --find-links "$wheels" -r "$requirements"
wait $mmslide
"${pip[@]}" check
say "ready"
