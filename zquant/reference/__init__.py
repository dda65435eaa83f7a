"""Every operation in plain NumPy: the oracle of the tests and the documentation of what the C kernels compute."""
from .gemm import *  # noqa: F403
from .linear import *  # noqa: F403
from .nn import *  # noqa: F403
from .quantize import *  # noqa: F403
