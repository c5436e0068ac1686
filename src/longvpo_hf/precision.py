"""What this machine's CPU computes in, and what it can only hold.

x86 processors without AVX-512 (most laptops, and servers up to AMD's Zen 3) have no instructions for half precision.
PyTorch then computes it number by number: a product of two matrices of 512 × 512 takes 80 times as long in bfloat16
as in float32 on one core of a Zen 3, and a training step of a model of 135 million parameters 180 seconds there, on a
busy core; in float32 two quiet cores need 7.
"""

from __future__ import annotations

import logging
import time
from functools import cache
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound="PreTrainedModel")

#: Half precision that takes more than this many times as long as float32 is not computed by instructions: on a Zen 3,
#: which has none, it takes 49 times as long with this number of rows; where there are some, about as long or less.
_SLOWEST = 4.0
_ROWS, _WIDTH, _REPEATS = 64, 512, 5


@cache
def is_computed(dtype: torch.dtype) -> bool:
    """Whether this machine's CPU has instructions for products in a type, by the time of a small one.

    Takes 0.2 seconds at most. A process asks once, so that all it does is done in one type.
    """
    return dtype == torch.float32 or _seconds(dtype) <= _SLOWEST * _seconds(torch.float32)


def computable(model: Model) -> Model:
    """A model in a type that its device computes in: in float32 if it is in half precision, which its CPU only holds.

    Quantised models stay as they are.
    """
    dtype = model.dtype
    if model.device.type != "cpu" or getattr(model, "is_quantized", False) or is_computed(dtype):
        return model
    logger.warning(
        f"This CPU has no instructions for {_named(dtype)}: the weights of {model.config.name_or_path} are used in "
        "float32, which holds the same numbers in twice the memory and is tens of times faster here."
    )
    return model.float()


def warn_of_half_precision(model: PreTrainedModel, device: torch.device, is_bf16: bool) -> None:
    """Warns where a model is to be trained in a type that the device only holds: by autocast, or by its weights'.

    Args:
        model: The model, which may not be on its device yet.
        device: Where it is trained.
        is_bf16: Whether under autocast to bfloat16.
    """
    if device.type == "cuda" and is_bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        logger.warning(
            f"This GPU ({torch.cuda.get_device_name(device)}) has no instructions for bfloat16, which PyTorch then "
            "emulates; it has some for float16: set fp16=True in place of bf16."
        )
    if device.type != "cpu" or getattr(model, "is_quantized", False):
        return
    asked = {"bf16=False": torch.bfloat16} if is_bf16 else {}
    asked |= {"dtype=float32": model.dtype}
    slow = {instead: dtype for instead, dtype in asked.items() if not is_computed(dtype)}
    if slow:
        logger.warning(
            f"This CPU has no instructions for {' and '.join(sorted({_named(dtype) for dtype in slow.values()}))}: "
            f"training is tens of times slower here than with {' and '.join(slow)}."
        )


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _seconds(dtype: torch.dtype) -> float:
    """Of a product, the fastest of some: a busy machine makes others slow, and the first one prepares."""
    left, right = torch.ones(_ROWS, _WIDTH, dtype=dtype), torch.ones(_WIDTH, _WIDTH, dtype=dtype)
    taken = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        torch.mm(left, right)
        taken.append(time.perf_counter() - start)
    return min(taken)
