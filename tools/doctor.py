"""Checks the installation: versions, compiled kernels, devices. `python tools/doctor.py [--json]`"""

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

# Not imported as mmslide.doctor, since `import mmslide` fails if a package is incompatible.
spec = find_spec('mmslide')
if spec is None or spec.origin is None:
    sys.exit("error: mmslide is not installed in this Python. Run: pip install '.'")
runpy.run_path(str(Path(spec.origin).with_name('doctor.py')), run_name='__main__')
