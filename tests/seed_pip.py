"""Let ansible-test bootstrap pip from the ensurepip of Python, not from a download.

ansible-test looks for a get-pip script in the cache below the home folder before it downloads one. The stand-in that
is written there does the same with what CPython bundles and the package index that pip is configured for.
Run it with the Python of a virtual environment that has ansible-core, and with HOME set to the home to prepare.
"""

from __future__ import annotations

import pathlib
import re

import ansible_test._internal.python_requirements as requirements

STAND_IN = """\
import os
import subprocess
import sys

wanted = [argument for argument in sys.argv[1:] if argument not in ("--no-setuptools", "--no-wheel")]
environment = {name: value for name, value in os.environ.items() if name != "GET_PIP"}
run = [sys.executable, "-m"]
subprocess.run([*run, "ensurepip", "--default-pip"], check=True, stdout=subprocess.DEVNULL, env=environment)
sys.exit(subprocess.run([*run, "pip", "install", "--quiet", *wanted], env=environment).returncode)
"""

source = pathlib.Path(str(requirements.__file__)).read_text(encoding="utf-8")
cache = pathlib.Path.home() / ".ansible" / "test" / "cache"
cache.mkdir(parents=True, exist_ok=True)
for version in set(re.findall(r"\bpip='([0-9.]+)'", source)):
    (cache / f"get_pip_{version.replace('.', '_')}.py").write_text(STAND_IN, encoding="utf-8")
