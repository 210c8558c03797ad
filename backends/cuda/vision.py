"""What the vision tower needs beyond the language model's ops. See ``reference.vision``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from step3_hetero.backend import Weights
from step3_hetero.backends.cuda.kernels import rows as kernels
from step3_hetero.backends.cuda.launch import ELEMENTS, launch
from step3_hetero.backends.torch_common.arrays import TORCH_DTYPE
from step3_hetero.backends.torch_common.weights import dense
from step3_hetero.resample import resize_matrix
from step3_hetero.specs import HostTensor, OpSpec


@dataclass
class ConvWeights(Weights):
    """Kernels (out, channels, k, k), channels last, and their bias."""

    weight: Tensor
    bias: Tensor | None
    source: Mapping[str, HostTensor]
    method: str
    nbytes: int


def prepare_conv(
    tensors: Mapping[str, HostTensor], spec: OpSpec, device: torch.device
) -> ConvWeights:
    """Cast kernels and bias and bring them to the device."""
    target = TORCH_DTYPE[spec.dtype]
    weight = dense(tensors["weight"], target).to(device, memory_format=torch.channels_last)
    bias = dense(tensors["bias"], target).to(device) if "bias" in tensors else None
    nbytes = weight.nbytes + (0 if bias is None else bias.nbytes)
    return ConvWeights(weight, bias, tensors, f"{spec.dtype}, channels last", nbytes)


def conv2d(x: Tensor, weights: ConvWeights, *, stride: int, padding: int) -> Tensor:
    """See ``reference.vision.conv2d``. cuDNN's, which is the best there is for an odd stride."""
    maps = F.conv2d(x.permute(0, 3, 1, 2), weights.weight, weights.bias, stride, padding)
    return maps.permute(0, 2, 3, 1).contiguous()


def quick_gelu(x: Tensor) -> Tensor:
    """See ``reference.vision.quick_gelu``."""
    x = x.contiguous()
    out, n = torch.empty_like(x), x.numel()
    launch(kernels.quick_gelu, (triton.cdiv(n, ELEMENTS),), x, out, n, BLOCK=ELEMENTS)
    return out


def resize(x: Tensor, *, size: int) -> Tensor:
    """See ``reference.vision.resize``. The same weights as there: torch's own are in float32."""
    height, width = x.shape[:2]
    down, across = (
        torch.from_numpy(resize_matrix(n, size, "bicubic")).to(x.device, torch.float32)
        for n in (height, width)
    )
    return torch.einsum("ih,jw,hwn->ijn", down, across, x.float())
