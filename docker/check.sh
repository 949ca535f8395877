#!/usr/bin/env bash
# Runs the Dockerfile's steps as far as a machine without a Docker daemon allows: TORCH=cpu by default, or --torch cuda.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/steps.py" "$@"
