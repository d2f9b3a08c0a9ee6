#!/usr/bin/env bash
# The other tools, at the versions compared, in an environment of their own: benchmarks/.venv-peers (about 1 GB).
set -euo pipefail
cd "$(dirname "$0")"
test -x .venv-peers/bin/python || "${PYTHON:-python3}" -m venv .venv-peers
.venv-peers/bin/pip install -q torch==2.13.0
.venv-peers/bin/pip install -q weightscope==0.4.3 mergelens==2.0.3 modeldelta==0.4.4
.venv-peers/bin/weightscope --version
.venv-peers/bin/mergelens --version
