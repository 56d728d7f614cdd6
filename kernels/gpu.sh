#!/usr/bin/env bash
# Run by `make gpu` on a machine with a CUDA device: the steps that are named, in their order. A step that fails does
# not stop the others. Installs nothing. GPU_PYTHON: a Python with torch, triton, numpy and, for the tests, pytest.
# GPU_MINUTES: time after which tuning starts no further kernel. The output of a step also goes to
# results/gpu-<step>.txt.
#
# Estimated minutes per step (nobody has run it yet); a machine lent for half an hour has time for one or two:
#   tests    15  all kernel tests on the device: most of it is compiling, which is cached for the next time
#   tune     25  tiles, written to fused/tiles.json after each kernel; kernels that are not reached keep their tiles
#   compile  10  builds every kernel ahead of time with these tiles, and the figures that the tests compare with
#   retest   15  the tests again, with the new tiles
#   bench    30  benchmarks, written to results/<device>.csv after each case; then the README's tables and plots
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

read -ra python <<<"${GPU_PYTHON:-python3}"
results=${GPU_RESULTS:-kernels/results}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

check() {
  "${python[@]}" - <<'END'
import os, shutil, sys, sysconfig
from importlib.util import find_spec

lacking = [name for name in ("numpy", "torch", "triton") if find_spec(name) is None]
if lacking:
    sys.exit(f"gpu: {sys.executable} has no {', '.join(lacking)}")
import torch

header = os.path.join(sysconfig.get_path("include", "posix_prefix"), "Python.h")
if not torch.cuda.is_available():
    sys.exit("gpu: no CUDA device")
if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
    sys.exit("gpu: no C compiler, which Triton needs: install gcc or set CC")
if not os.path.isfile(header):
    sys.exit(f"gpu: no {header}, which Triton compiles with: install Python's headers")
print(f"gpu: {torch.cuda.get_device_name()}, torch {torch.__version__}")
END
}

pytest() { D2S_TEST_DEVICE=cuda "${python[@]}" -m pytest tests/kernels -q; }

run() {
  local status=0
  case $1 in
    tests | retest) pytest ;;
    tune)
      "${python[@]}" -m d2s.kernels.tune --minutes "${GPU_MINUTES:-20}" || status=$?
      # A run that was interrupted has still written a table.
      cp kernels/fused/tiles.json "$results/gpu-tiles.json" || status=1
      return $status
      ;;
    compile) "${python[@]}" -m d2s.kernels.compile --jobs "$(nproc)" --write ;;
    bench)
      "${python[@]}" -m d2s.kernels.bench --device cuda || status=$?
      "${python[@]}" -m d2s.kernels.results || status=1
      return $status
      ;;
  esac
}

for step in "$@"; do
  case $step in
    tests | tune | compile | retest | bench) ;;
    *) echo "gpu: no step $step; there are tests, tune, compile, retest, bench" >&2; exit 2 ;;
  esac
done
check || exit 2
mkdir -p "$results"
# Without pytest the other steps still run; the last line says that nothing was tested.
"${python[@]}" -c "import pytest" 2>/dev/null && tested=yes || tested=
taken="" failed="" left=""
for step in "$@"; do
  if [[ $step == *test* && -z $tested ]]; then
    echo "gpu: $step: left out, pytest is not installed"
    left+=" $step"
    continue
  fi
  echo "gpu: $step, since $(date +%H:%M)"
  before=$SECONDS
  run "$step" 2>&1 | tee "$results/gpu-$step.txt" || failed+=" $step"
  taken+=" $step $(((SECONDS - before + 59) / 60)) min,"
done
echo "gpu:${taken%,}; left out:${left:- nothing}; failed:${failed:- nothing}"
[[ -z $failed ]]
