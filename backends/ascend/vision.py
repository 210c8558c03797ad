"""What the vision tower needs beyond the language model's ops. See ``reference.vision``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from step3_hetero.backend import Weights
from step3_hetero.resample import resize_matrix
from step3_hetero.specs import HostTensor


@dataclass
class ConvWeights(Weights):
    """Kernels (out, channels, k, k) and their bias, as they are."""

    weight: Tensor
    bias: Tensor | None
    source: Mapping[str, HostTensor]
    method: str
    nbytes: int


def conv2d(x: Tensor, weights: ConvWeights, *, stride: int, padding: int) -> Tensor:
    """See ``reference.vision.conv2d``. In float32 only while HF32 is off: ``driver`` sees to it."""
    maps = x.permute(0, 3, 1, 2).contiguous()
    maps = F.conv2d(maps, weights.weight, weights.bias, stride, padding)
    return maps.permute(0, 2, 3, 1).contiguous()


def quick_gelu(x: Tensor) -> Tensor:
    """See ``reference.vision.quick_gelu``."""
    w = x.float()
    return (w * torch.sigmoid(w * 1.702)).to(x.dtype)


def resize(x: Tensor, *, size: int) -> Tensor:
    """See ``reference.vision.resize``."""
    height, width, n = x.shape
    down, across = _matrix(height, size, x.device), _matrix(width, size, x.device)
    rows = (down @ x.float().reshape(height, -1)).view(size, width, n)
    turned = rows.transpose(0, 1).reshape(width, -1)
    return (across @ turned).view(size, size, n).transpose(0, 1).contiguous()


@lru_cache(maxsize=8)
def _matrix(size_in: int, size_out: int, device: torch.device) -> Tensor:
    """Return the weights of one axis on the device."""
    return torch.from_numpy(resize_matrix(size_in, size_out, "bicubic")).float().to(device)
