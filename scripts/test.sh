#!/usr/bin/env bash
# Run everything that must pass: lint, types, tests, notebooks, in an environment made for it.
#
#   bash scripts/test.sh                      a clean environment, then everything but the slow tests
#   bash scripts/test.sh --reuse              keep the environment of the last run; make it if there is none
#   bash scripts/test.sh [--reuse] -m slow    further arguments go to pytest
#
# MOEJAX_TEST_REUSE=1 is the same as --reuse; MOEJAX_TEST_VENV names the folder of the environment (.venv-test).
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${MOEJAX_TEST_VENV:-.venv-test}
reuse=${MOEJAX_TEST_REUSE:-0}
if [[ ${1:-} == --reuse ]]; then
    reuse=1
    shift
fi
# the last file that a set-up writes, so that an environment whose set-up failed is not reused
complete="$venv/moejax-test-complete"
if [[ $reuse != 1 || ! -e $complete ]]; then
    rm -rf "$venv"
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --upgrade pip
fi
if [[ pyproject.toml -nt $complete ]]; then
    "$venv/bin/pip" install --quiet ".[dev]"
    touch "$complete"
fi
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/pyright" --pythonpath "$venv/bin/python"
# The tests run on the sources. Two workers, since most of the time is compilation; each takes whole files, because the
# tests of a file share compiled programs.
PYTHONPATH=. "$venv/bin/pytest" -n 2 --dist loadfile "$@"
