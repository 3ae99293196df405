#!/usr/bin/env bash
# Set up a clean environment of its own and run everything that must pass: lint, types, tests, notebooks.
# Arguments go to pytest, e.g. `bash scripts/test.sh -m slow` for the long tests.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${MOEJAX_TEST_VENV:-.venv-test}
rm -rf "$venv"
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --upgrade pip
"$venv/bin/pip" install --quiet ".[dev]"
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/pyright" --pythonpath "$venv/bin/python"
# tests run on the sources; two workers, since compiling is most of the work, and each whole files, whose tests share
# what is compiled
PYTHONPATH=. "$venv/bin/pytest" -n 2 --dist loadfile "$@"
