#!/usr/bin/env bash
# Pack the program and the GPU checks for a machine that has a GPU but no compiler: `make gpu-pack`.
#
#   scripts/pack_gpu.sh BUILD OUT.tar.xz
#
# Packed are the program and the checks of BUILD, the libraries they load, the configurations, and with-cuda.sh, which
# finds CUDA's libraries on that machine. The C and C++ runtime and CUDA's libraries must be installed there.
#
#   tar xf OUT.tar.xz && cd gpu-pack && ./with-cuda.sh tests/gpu/check_gpu.sh gpu ./train_iha
set -euo pipefail
cd "$(dirname "$0")/.."
build=$1 out=$2
tree=$build/gpu-pack
rm -rf "$tree"
mkdir -p "$tree/lib" "$tree/gpu" "$tree/tests/gpu"

strip -o "$tree/train_iha" "$build/train_iha"
for program in "$build"/gpu/*; do
    strip -o "$tree/gpu/$(basename "$program")" "$program"
done
cp tests/gpu/check_gpu.sh tests/gpu/check_gpu_runs.sh "$tree/tests/gpu"
cp -r configs "$tree"

installed_there='^(linux-vdso|ld-linux|libc\.|libm\.|libdl\.|librt\.|libpthread\.|libutil\.|libstdc\+\+|libgcc_s|libcuda|libcublas|libcudnn|libcupti|libnccl|libnv)'
ldd "$tree/train_iha" "$tree"/gpu/* | sed -n 's/^\t\([^ ]*\) => \(\/[^ ]*\) .*/\1 \2/p' | sort -u |
    while read -r name path; do
        [[ $name =~ $installed_there ]] || cp -L "$path" "$tree/lib/$name"
    done

cat >"$tree/with-cuda.sh" <<'END'
#!/bin/sh
# Run a command with the libraries packed here, and CUDA's from Python wheels or the toolkit.
# NVIDIA_WHEELS=.../site-packages/nvidia and CUDA_HOME name the places to look in first.
here=$(cd "$(dirname "$0")" && pwd)
wheels=$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib") + "/nvidia")' 2>/dev/null)
path=$here/lib
for folder in ${NVIDIA_WHEELS:+"$NVIDIA_WHEELS"/*/lib} ${wheels:+"$wheels"/*/lib} "${CUDA_HOME:-/usr/local/cuda}"/lib64 \
    "${CUDA_HOME:-/usr/local/cuda}"/extras/CUPTI/lib64; do
    [ -d "$folder" ] && path=$path:$folder
done
export LAUNCH=tcp # built without MPI
export LD_LIBRARY_PATH="$path${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
missing=$(ldd "$here/train_iha" "$here"/gpu/* 2>/dev/null | sed -n 's/^\t\([^ ]*\) => not found/\1/p' | sort -u)
[ -z "$missing" ] || { echo "with-cuda.sh: libraries not found:" $missing "; set NVIDIA_WHEELS or CUDA_HOME" >&2; exit 2; }
exec "$@"
END
chmod +x "$tree/with-cuda.sh"

# The programs share most of their code, so a dictionary that holds all of them compresses well.
tar -C "$build" -cf - gpu-pack | xz --lzma2=preset=1,dict=512MiB >"$out"
echo "$out: $(du -h "$out" | cut -f1), $(du -sh "$tree" | cut -f1) unpacked"
