"""Linear layers: the forward that a patched nn.Linear runs for the few rows of a decode step.

M rows, D input width, N output width.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekern import ops
from moekern.hf import _common

# Up to here a product is a stream of the weights, which the kernel reads faster than torch's GEMM: 1 row of a [3072, 2048]
# layer in bf16 takes 565 us against 642, 16 rows 582 against 689 (two threads, AMX); lm_head's [102400, 2048] 15.8 ms
# against 21.3. More rows are prefill, where torch's GEMM is kept. fp16 has no tile instructions: 844 us against 1711 at 2
# rows, but 433 against 319 at 8 rows of [1024, 1024] (one thread).
MAX_ROWS = {torch.bfloat16: 16, torch.float16: 2}

# One row of a [1024, 1024] layer takes 160 us against 191 (bf16, one thread), of [256, 1024] 85 against 98, which is
# within the noise: small layers gain nothing and would only lengthen the list of what is changed. fp32 layers are not in
# the table above so that the outputs of an fp32 model do not change.
MIN_WEIGHTS = 1 << 20


def _is_readable(module: Any, weight: Any) -> bool:
    """Whether the layer is its weight and nothing else, and the weight one that the kernel is for."""
    return (
        type(module) is nn.Linear
        and type(weight) in (Tensor, nn.Parameter)
        and weight.device.type == "cpu"
        and weight.dtype in MAX_ROWS
        and weight.dim() == 2
        and weight.numel() >= MIN_WEIGHTS
    )


def is_linear(module: Any) -> bool:
    """Whether the module is a plain linear layer that would gain: small, fp32, quantized and CUDA ones are none."""
    return type(module) is nn.Linear and _is_readable(module, module.weight)


def reason_against(module: Any) -> str | None:
    """Why the layer cannot be patched, or None."""
    reason = _common.reason_against_instance(module)
    if reason is not None:
        return reason
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has hooks"
    if module.weight.stride(1) != 1:
        return "its weight is strided"
    return _common.reason_without_kernel("grouped_gemm", module.weight.device)


@functools.cache
def _cached_offsets(num_rows: int) -> Tensor:
    # Outside inference mode: an inference tensor would be refused by a later call with gradients around it.
    with torch.inference_mode(False):
        return torch.tensor([0, num_rows], dtype=torch.int32, device="cpu")


def _offsets(num_rows: int) -> Tensor:
    """[2] int32, one segment of all rows."""
    if torch.compiler.is_compiling():  # dynamo traces into a cached function, but warns
        return torch.arange(2, dtype=torch.int32, device="cpu") * num_rows
    return _cached_offsets(num_rows)


def _runs_kernel(module: Any, x: Tensor, weight: Any, bias: Any) -> bool:
    return (
        _is_readable(module, weight)
        and type(x) in (Tensor, nn.Parameter)
        and x.dtype == weight.dtype
        and x.device.type == "cpu"
        and x.dim() >= 1
        and x.shape[-1] == weight.shape[1]
        and 0 < x.numel() <= MAX_ROWS[weight.dtype] * weight.shape[1]
        and weight.stride(1) == 1
        and (bias is None or (type(bias) in (Tensor, nn.Parameter) and bias.dtype == weight.dtype))
        and not torch.is_autocast_enabled("cpu")
        and not (
            torch.is_grad_enabled()
            and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad))
        )
    )


def linear_forward(module: Any, input: Tensor) -> Tensor:
    """Replaces the forward of a linear layer.

    Args:
        module: the layer; its weight [N, D] and bias [N] are read at each call, since adapters and loading replace them.
        input: [..., D].

    Returns:
        [..., N] in the dtype of input: by `moekern::grouped_gemm` with one expert for up to MAX_ROWS rows in inference,
        else what the class of the module computes.
    """
    weight, bias = module.weight, module.bias
    if not _runs_kernel(module, input, weight, bias):
        if type(module) is nn.Linear:
            return F.linear(input, weight, bias)
        out: Tensor = type(module).forward(module, input)  # an adapter that came after patching
        return out
    rows = input.reshape(-1, weight.shape[1])
    out = ops.grouped_gemm(
        rows, weight.unsqueeze(0), _offsets(rows.shape[0]), bias=None if bias is None else bias.unsqueeze(0)
    )
    return out.reshape(*input.shape[:-1], weight.shape[0])
