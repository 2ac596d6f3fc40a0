#!/usr/bin/env bash
# sanitize_threads.sh BUILD: calls from several threads at once under the thread sanitizer, with the
# variant of the package in BUILD/package (tools/variant.sh).
#
# The sanitizer comes before Python, which is not built for it, and leaves libraries alone that are
# not, torch among them. In one mode ops work in their caller's thread; in the other, in a forked
# child, they split their work over threads of their own: how OpenMP's threads wait for each other
# is not seen, and would be taken for races.
set -euo pipefail
cd "$(dirname "$0")/.."
build=$1
log=$build/report
export TSAN_OPTIONS="ignore_noninstrumented_modules=1 halt_on_error=0 exitcode=66 history_size=4"
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 PYTHONPATH=$build/package
python() {
  LD_PRELOAD=$("${CXX:-g++}" -print-file-name=libtsan.so) setarch -R .venv/bin/python "$@"
}

"${CXX:-g++}" -O1 -g -fPIC -shared -fsanitize=thread tests/cpp/race.cpp -o "$build/librace.so"

setarch -R "$build/thread_test"
setarch -R "$build/team_test"
for mode in "--threads 1 1 1 1" "--threads 3 3 2 1 --forked"; do
  # Proof that it works here: a deliberate race is reported.
  if python tests/callers.py --race "$build/librace.so" $mode > "$log" 2>&1 ||
    ! grep -q "WARNING: ThreadSanitizer: data race" "$log"; then
    cat "$log"
    echo "sanitize_threads: a deliberate race is not reported: a clean run would prove nothing"
    exit 1
  fi
  for seed in 1 2 3; do # each a process, whose first calls come together
    python tests/callers.py --rounds 2 --drawn 60 --seed $seed $mode
    echo "sanitize_threads: callers.py --seed $seed $mode: nothing reported"
  done
done
