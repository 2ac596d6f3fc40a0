#!/usr/bin/env bash
# variant.sh NAME CMAKE_OPTION...: the package with an extension that is compiled another way, in
# build/NAME/package, for PYTHONPATH. The Python files are links to those of the source tree.
set -euo pipefail
cd "$(dirname "$0")/.."
build=build/$1
shift
export PATH="$PWD/.venv/bin:$PATH"
cmake -G Ninja -S . -B "$build" -DPython_EXECUTABLE="$PWD/.venv/bin/python" -DDYNQUANT_CUDA=off "$@"
cmake --build "$build" --target dynquant _C
rm -rf "$build/package"
mkdir -p "$build/package"
cp -rs "$PWD/dynquant" "$build/package/"
rm -f "$build"/package/dynquant/*.so
cmake --install "$build" --prefix "$PWD/$build/package/dynquant"
