#!/usr/bin/env bash
# On a GPU machine: the tests that need one, then how near to its floor decoding comes, with one table last.
#
#   tests/tools/bench/gpu.sh --models 8b --seconds 500      # options of: python -m tests.tools.bench decode --help
#
# PYTHON is the interpreter (default: python3). TESTS=no leaves the tests out. Ends with the tests' exit code, or with
# the benchmark's where the tests have passed.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
tests=0
if [ "${TESTS:-yes}" != no ]; then
  "$python" -m pytest --numprocesses=0 tests/gpu
  tests=$?
fi
"$python" -m tests.tools.bench decode "$@"
bench=$?
exit $((tests != 0 ? tests : bench))
