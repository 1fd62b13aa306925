#!/usr/bin/env bash
# Everything that wants a CUDA GPU, most important first: tests, calibration, a large model's step, the headline recipe, kernels, precision.
# Usage: benchmarks/gpu.sh [PYTHON]     Results go to benchmarks/results/*_cuda.*, and to $OUT where that is set. A part that
# fails or takes longer than PART_SECONDS (default 540) does not keep the others from running.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${1:-python}
export PYTHONPATH=. HF_HUB_OFFLINE=1
failed=0
part() {
  echo "== $*"
  timeout "${PART_SECONDS:-540}" "$@" || { failed=1; echo "== failed: $*"; }
  [ -z "${OUT:-}" ] || cp -r benchmarks/results flora_train/kernels/flora/thresholds.json "$OUT/"
}
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "no CUDA device")' || exit 1
part "$PYTHON" -m pytest -q tests/gpu tests/unit/kernels
part "$PYTHON" benchmarks/calibrate.py --save
part "$PYTHON" benchmarks/large_step.py --save
part "$PYTHON" benchmarks/headline_gpu.py --save
part "$PYTHON" benchmarks/kernel_times.py --save
part "$PYTHON" benchmarks/serving_layer.py --quick --save
part "$PYTHON" benchmarks/kernels.py --precision fused --save
part "$PYTHON" benchmarks/kernels.py --save
part "$PYTHON" benchmarks/precision.py --save
exit $failed
