"""Kernels in Cython and C++ over Arrow memory: compute only, no file, no socket, no thread, no clock.

They link Arrow's C++ from the pyarrow wheel, whose name carries its major version; a wrong one would end in a bare
"cannot open shared object file", so it is checked here first.
"""

import importlib.util
from typing import Final

import pyarrow as pa

ARROW_MAJOR: Final = 26
"""The pyarrow that marble is built with; CMakeLists.txt and pyproject.toml name the same."""

if int(pa.__version__.split(".")[0]) != ARROW_MAJOR:
    raise ImportError(
        f"this marble was built for pyarrow {ARROW_MAJOR}, but pyarrow {pa.__version__} is installed: "
        f"run pip install 'pyarrow>={ARROW_MAJOR},<{ARROW_MAJOR + 1}'"
    )

if importlib.util.find_spec("marble._core.entry_batch") is None:
    raise ImportError(
        "marble's compiled modules are missing: Python found a source tree, not an installation. Run pip install . there, "
        "and start Python elsewhere or with -P"
    )
