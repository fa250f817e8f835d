#!/usr/bin/env bash
# Runs the host tests against real FastDeploy, on the CPU: builds the wheel, installs it into a fresh
# environment on top of FastDeploy's requirements, and calls pytest there.
#   FASTDEPLOY_SRC  a FastDeploy checkout; unset: the installed FastDeploy of the base environment
#   HOST_VENV       the base environment, .venv-host by default; made here when it is not there
#   BUILD_PYTHON    builds the wheel; needs pip and a C++ compiler
# Arguments go to pytest; the default is every host test. `run.sh --shell COMMAND...` runs a command.
set -euo pipefail
cd "$(dirname "$0")/../.."
base=${HOST_VENV:-.venv-host}
build_python=$(command -v "${BUILD_PYTHON:-python3}")
layer=$PWD/build/host/${HOST_LAYER:-venv}

if [ ! -x "$base/bin/python" ]; then
  "$build_python" -m venv "$base"
fi
stamp=$(sha256sum tests/host/requirements.txt | cut -c1-16)
if [ -z "${HOST_VENV:-}" ] && [ ! -e "$base/.requirements-$stamp" ]; then
  "$base/bin/python" -m pip install --quiet --disable-pip-version-check -r tests/host/requirements.txt
  rm -f "$base"/.requirements-*
  touch "$base/.requirements-$stamp"
fi

# A fresh layer over the base: our wheel alone, in a real site-packages, where .pth files are read.
rm -rf "$layer" "$layer.wheel"
"$base/bin/python" -m venv --without-pip "$layer"
site=$("$layer/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$base/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/base.pth"
"$build_python" -m pip wheel --quiet --disable-pip-version-check --no-deps ${WHEEL_ARGS:-} \
  --config-settings=cmake.define.FDM_CUDA=OFF --config-settings=build-dir="$layer.build" \
  --wheel-dir "$layer.wheel" .
"$base/bin/python" -m pip --python "$layer/bin/python" install --quiet --disable-pip-version-check \
  --no-deps "$layer.wheel"/fd_minicpm41-*.whl
"$base/bin/python" -m pip --python "$layer/bin/python" install --quiet --disable-pip-version-check \
  pytest pytest-timeout hypothesis gguf

if [ -n "${FASTDEPLOY_SRC:-}" ]; then
  FASTDEPLOY_SRC=$(cd "$FASTDEPLOY_SRC" && pwd)
  export FASTDEPLOY_SRC
  # The console script that FastDeploy's own setup.py declares.
  cat >"$layer/bin/fastdeploy" <<SCRIPT
#!$layer/bin/python
import sys

from fastdeploy.entrypoints.cli.main import main

sys.exit(main())
SCRIPT
  chmod +x "$layer/bin/fastdeploy"
fi

export PATH="$layer/bin:$PATH"
export FD_MINICPM41_TEST_BASE_PYTHON="$base/bin/python"
if [ "${1:-}" = --shell ]; then
  shift
  exec "$@"
fi
[ $# -gt 0 ] || set -- tests/models tests/integration tests/contract
exec "$layer/bin/python" -m pytest "$@"
