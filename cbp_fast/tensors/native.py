"""The compiled module: what it is loaded from, and what it says of any tensor."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from .._version import __version__

try:
    from .. import _C as _C
except ImportError as error:
    package = Path(__file__).parents[1]
    found = ", ".join(path.name for path in package.glob("_C.*.*")) or "no file"
    fix = "--no-build-isolation --force-reinstall --no-deps cbp_fast    (in a checkout: . for cbp_fast)"
    # a version is compared as one
    fix = '"torch>=2.10"' if torch.__version__ < "2.10" else fix
    raise ImportError(
        f"cbp_fast {__version__} has no compiled module for Python {platform.python_version()} on {platform.machine()} "
        f"with PyTorch {torch.__version__} (2.10 is the oldest that will do): {found} in {package}. "
        f"Type:\n    pip install {fix}"
    ) from error

# torch's numbers for the types of tensors that can be read and set
DTYPES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}

# bytes of a tensor's elements; -1 where it has no memory of its own on the CPU, as what torch.func's transforms run on
nbytes = _C.nbytes
# what a list of tensors looks like in memory, on any device: its layout, and the addresses
describe = _C.describe
# copies a uint8 tensor to another, with no call of the dispatcher, which a mode might take for its own
copy_ = _C.copy_
# which tensor of a list cannot be written, and why
unwritable = _C.unwritable
