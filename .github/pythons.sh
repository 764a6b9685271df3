#!/usr/bin/env bash
# pythons.sh X.Y...: put links to what actions/setup-python has installed where tests/run.sh looks for Pythons.
set -euo pipefail
mkdir -p "$HOME/.pyenv/versions"
for version; do
  python=$("python$version" -c 'import os, sys; print(os.path.dirname(os.path.dirname(os.path.realpath(sys.executable))))')
  ln -sfn "$python" "$HOME/.pyenv/versions/$version.0"
  "$HOME/.pyenv/versions/$version.0/bin/python" --version
done
