"""srelu24: squared-ReLU feed-forward networks with 2:4-pruned activations on the sparse tensor cores.

    import srelu24
    y = srelu24.ffn(x, w1, w2)            # prune24(relu(x w1^T)^2) w2^T
    s = srelu24.sparsify24(h)             # dense to packed 2:4
    y = srelu24.matmul(s, w2)             # S w2^T
    print(srelu24.explain(x, w1, w2))     # which kernels, from which record, and why
    print(srelu24.convert(model))         # every squared-ReLU FFN of a model, in place
    print(srelu24.status(model))          # what each of them runs, and why

Names load on first use, so that the command line starts without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from srelu24_gen import __version__

if TYPE_CHECKING:
    from srelu24.fp8.quantize import QuantizedWeight as QuantizedWeight
    from srelu24.fp8.quantize import quantize_weight as quantize_weight
    from srelu24.fp8.recipes import Predicted as Predicted
    from srelu24.fp8.recipes import Rowwise as Rowwise
    from srelu24.fp8.recipes import Static as Static
    from srelu24.nn.calibration import calibrate as calibrate
    from srelu24.nn.conversion import Conversion as Conversion
    from srelu24.nn.conversion import convert as convert
    from srelu24.nn.modules import Linear24 as Linear24
    from srelu24.nn.modules import SquaredReLUFFN as SquaredReLUFFN
    from srelu24.nn.parallel import SquaredReLUFFNParallel as SquaredReLUFFNParallel
    from srelu24.nn.profiling import profile as profile
    from srelu24.nn.serving import warmup as warmup
    from srelu24.nn.status import Status as Status
    from srelu24.nn.status import status as status
    from srelu24.numerics.sparse24 import Sparse24 as Sparse24
    from srelu24.ops.explanation import Explanation as Explanation
    from srelu24.ops.explanation import explain as explain
    from srelu24.ops.functions import ffn as ffn
    from srelu24.ops.functions import gemm_24 as gemm_24
    from srelu24.ops.functions import gemm_relu2_24 as gemm_relu2_24
    from srelu24.ops.functions import gemm_relu2_24_count as gemm_relu2_24_count
    from srelu24.ops.functions import linear as linear
    from srelu24.ops.functions import linear24 as linear24
    from srelu24.ops.functions import matmul as matmul
    from srelu24.ops.functions import sparsify24 as sparsify24
    from srelu24.runtime.fallback import FallbackWarning as FallbackWarning
    from srelu24.training.recipe import Recipe as Recipe

_HOME = {
    "Conversion": "nn.conversion",
    "Explanation": "ops.explanation",
    "FallbackWarning": "runtime.fallback",
    "Predicted": "fp8.recipes",
    "QuantizedWeight": "fp8.quantize",
    "Recipe": "training.recipe",
    "Rowwise": "fp8.recipes",
    "Linear24": "nn.modules",
    "Sparse24": "numerics.sparse24",
    "SquaredReLUFFN": "nn.modules",
    "SquaredReLUFFNParallel": "nn.parallel",
    "Static": "fp8.recipes",
    "Status": "nn.status",
    "calibrate": "nn.calibration",
    "convert": "nn.conversion",
    "explain": "ops.explanation",
    "ffn": "ops.functions",
    "gemm_24": "ops.functions",
    "gemm_relu2_24": "ops.functions",
    "gemm_relu2_24_count": "ops.functions",
    "linear": "ops.functions",
    "linear24": "ops.functions",
    "matmul": "ops.functions",
    "profile": "nn.profiling",
    "quantize_weight": "fp8.quantize",
    "sparsify24": "ops.functions",
    "status": "nn.status",
    "warmup": "nn.serving",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'srelu24' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"srelu24.{_HOME[name]}"), name)
    globals()[name] = value  # also undoes what importing a submodule of the same name binds
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
