"""Fused operators for reconstruction training; torch is enough until a CUDA tensor arrives, then Triton."""

from __future__ import annotations

if __name__ != "reca.kernels":
    raise ImportError(
        f"this folder is the package reca.kernels, got an import as {__name__!r}; "
        "write `import reca.kernels`, or leave the repository root if another package was meant"
    )

from reca.kernels._library import Impl as Impl
from reca.kernels._philox import PhiloxNoise as PhiloxNoise
from reca.kernels.adaln_modulation.op import gate_residual as gate_residual
from reca.kernels.adaln_modulation.op import layer_norm_modulate as layer_norm_modulate
from reca.kernels.adamw.op import adamw_ as adamw_
from reca.kernels.adamw.reference import join_master as join_master
from reca.kernels.adamw.reference import split_master as split_master
from reca.kernels.flow_head.op import flow_head as flow_head
from reca.kernels.flow_input.op import flow_input as flow_input
from reca.kernels.flow_matching_loss.op import flow_matching_loss as flow_matching_loss
from reca.kernels.gated_mlp.op import gated_mlp as gated_mlp
from reca.kernels.gated_mlp.op import swiglu as swiglu
from reca.kernels.masked_token_loss.op import masked_token_loss as masked_token_loss
from reca.kernels.qk_norm_rope.op import qk_norm_rope as qk_norm_rope
from reca.kernels.rms_norm.op import add_rms_norm as add_rms_norm
from reca.kernels.rms_norm.op import rms_norm as rms_norm

OPERATORS = (
    "adaln_modulation",
    "adamw",
    "flow_head",
    "flow_input",
    "flow_matching_loss",
    "gated_mlp",
    "masked_token_loss",
    "qk_norm_rope",
    "rms_norm",
)
