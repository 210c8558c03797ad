"""What the vision tower needs beyond the language model's ops. See ``reference.vision``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from step3_hetero.backend import Weights
from step3_hetero.backends.torch_common.arrays import TORCH_DTYPE
from step3_hetero.backends.torch_common.weights import dense
from step3_hetero.resample import resize_matrix
from step3_hetero.specs import HostTensor, OpSpec


@dataclass
class ConvWeights(Weights):
    """Kernels (out, channels, k, k) and their bias, as they are."""

    weight: Tensor
    bias: Tensor | None
    source: Mapping[str, HostTensor]
    method: str
    nbytes: int


def prepare_conv(tensors: Mapping[str, HostTensor], spec: OpSpec) -> ConvWeights:
    """Cast kernels and bias."""
    target = TORCH_DTYPE[spec.dtype]
    weight = dense(tensors["weight"], target)
    bias = dense(tensors["bias"], target) if "bias" in tensors else None
    nbytes = weight.nbytes + (0 if bias is None else bias.nbytes)
    return ConvWeights(weight, bias, tensors, spec.dtype, nbytes)


def conv2d(x: Tensor, weights: ConvWeights, *, stride: int, padding: int) -> Tensor:
    """See ``reference.vision.conv2d``."""
    maps = F.conv2d(x.permute(0, 3, 1, 2), weights.weight, weights.bias, stride, padding)
    return maps.permute(0, 2, 3, 1).contiguous()


def quick_gelu(x: Tensor) -> Tensor:
    """See ``reference.vision.quick_gelu``."""
    w = x.float()
    return (w * torch.sigmoid(1.702 * w)).to(x.dtype)


def resize(x: Tensor, *, size: int) -> Tensor:
    """See ``reference.vision.resize``. The same weights as there: torch's own are in float32."""
    height, width = x.shape[:2]
    down, across = (
        torch.from_numpy(resize_matrix(n, size, "bicubic")).float() for n in (height, width)
    )
    return torch.einsum("ih,jw,hwn->ijn", down, across, x.float())
