"""K-FAC for PyTorch with its own CPU and CUDA kernels.

from kfac_fast import KFAC
optimizer = KFAC(model)
"""

import sys
from importlib.util import find_spec

if find_spec(f"{__name__}._C") is None:
    raise ImportError(
        f"the kernels of kfac_fast are not in {__path__[0]}. Is that the source folder? Python takes what is in the "
        "current folder before what is installed: go elsewhere, or install with `pip install -e .`"
    )

import torch  # noqa: F401 - first: the loader then shares torch's OpenMP runtime with _C

from . import _C, ops
from .adaptive import Adaptive
from .batches import GrowingBatches
from .diagnostics import show_config
from .distributed import Distributed
from .inverses import KFACWarning
from .layers import Blocks
from .likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from .ops import BlockDiagonal, ConvRows
from .optimizer import KFAC
from .preconditioner import Preconditioner

__version__: str = _C.__version__
__all__ = [
    "KFAC",
    "Adaptive",
    "Bernoulli",
    "BlockDiagonal",
    "Blocks",
    "Categorical",
    "ConvRows",
    "Distributed",
    "Gaussian",
    "GrowingBatches",
    "KFACWarning",
    "Likelihood",
    "Preconditioner",
    "__version__",
    "ops",
    "show_config",
]

# `import kfac_fast.KFAC` finds the class where the import system looks for a module.
sys.modules[f"{__name__}.KFAC"] = KFAC  # type: ignore[assignment]
