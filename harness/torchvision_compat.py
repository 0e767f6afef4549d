"""Import this before torchvision or transformers: it makes both work on a CPU-only build of torch.

torchvision's wheel from PyPI is built against CUDA. Its C++ operators cannot load with a CPU-only torch, and its Python
part then fails at import when it registers a fake for `torchvision::nms`. Data sets and transforms need none of these
operators, so it is enough that their schemas exist. transformers imports torchvision if it is installed.

With docstrings stripped (python3 -OO), transformers' decorators that rewrite docstrings fail, so they are disabled.
"""

import contextlib
import sys

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

_library = None  # A Library unregisters its schemas when it is collected, so it has to outlive this import.

try:
    import torchvision
except RuntimeError as error:
    if "torchvision::" not in str(error):
        raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        _library.define(schema)
    import torchvision  # noqa: F401
except ImportError:
    pass  # SimCLS does not need it.

if sys.flags.optimize > 1:
    with contextlib.suppress(ImportError):
        import transformers.utils

        transformers.utils.auto_docstring = lambda decorated=None, **options: decorated or (lambda each: each)
