"""Fused operators for reconstruction training; torch is enough until a CUDA tensor arrives, then Triton."""

from __future__ import annotations

if __name__ != "reca.kernels":
    raise ImportError(
        f"this folder is the package reca.kernels, got an import as {__name__!r}; "
        "write `import reca.kernels`, or leave the repository root if another package was meant"
    )

from reca.kernels._dropout import PhiloxDropout as PhiloxDropout
from reca.kernels._library import Impl as Impl
from reca.kernels._library import can_run_fused as can_run_fused
from reca.kernels._library import interpreted_kernels as interpreted_kernels
from reca.kernels._library import runs_fused as runs_fused
from reca.kernels._library import triton_interprets as triton_interprets
from reca.kernels._philox import PhiloxNoise as PhiloxNoise
from reca.kernels._philox import philox4x32 as philox4x32
from reca.kernels._philox import uniform_of as uniform_of
from reca.kernels.adaln_modulation.grouped import add_layer_norm_modulate as add_layer_norm_modulate
from reca.kernels.adaln_modulation.grouped import group_gate_residual as group_gate_residual
from reca.kernels.adaln_modulation.op import gate_residual as gate_residual
from reca.kernels.adaln_modulation.op import layer_norm_modulate as layer_norm_modulate
from reca.kernels.adamw.op import adamw_ as adamw_
from reca.kernels.adamw.reference import join_master as join_master
from reca.kernels.adamw.reference import split_master as split_master
from reca.kernels.depthwise_glu.op import depthwise_glu as depthwise_glu
from reca.kernels.diffusion_loss.op import diffusion_loss as diffusion_loss
from reca.kernels.diffusion_loss.op import diffusion_noise as diffusion_noise
from reca.kernels.dropout.op import dropout as dropout
from reca.kernels.dropout_attention.op import dropout_attention as dropout_attention
from reca.kernels.embedding_projection.op import embedding_projection as embedding_projection
from reca.kernels.flow_head.op import flow_head as flow_head
from reca.kernels.flow_input.op import flow_input as flow_input
from reca.kernels.flow_matching_loss.op import flow_matching_loss as flow_matching_loss
from reca.kernels.gated_mlp.op import gated_mlp as gated_mlp
from reca.kernels.gated_mlp.op import swiglu as swiglu
from reca.kernels.gelu_mlp.op import bias_gelu as bias_gelu
from reca.kernels.gelu_mlp.op import gelu_mlp as gelu_mlp
from reca.kernels.group_norm_silu.op import group_norm_silu as group_norm_silu
from reca.kernels.layer_norm.op import add_layer_norm as add_layer_norm
from reca.kernels.layer_norm.op import layer_norm as layer_norm
from reca.kernels.linear_attention.op import linear_attention as linear_attention
from reca.kernels.masked_token_loss.op import masked_token_loss as masked_token_loss
from reca.kernels.philox.op import philox as philox
from reca.kernels.qk_norm_rope.op import qk_norm_rope as qk_norm_rope
from reca.kernels.qk_norm_rope.spread import qk_norm_rope_spread as qk_norm_rope_spread
from reca.kernels.rms_norm.op import add_rms_norm as add_rms_norm
from reca.kernels.rms_norm.op import rms_norm as rms_norm
from reca.kernels.skinny_linear.op import skinny_linear as skinny_linear
from reca.kernels.skinny_linear.reference import Fp8Weight as Fp8Weight
from reca.kernels.skinny_linear.reference import Nf4Weight as Nf4Weight
from reca.kernels.skinny_linear.reference import dequantize_nf4 as dequantize_nf4
from reca.kernels.skinny_linear.reference import quantize_fp8 as quantize_fp8
from reca.kernels.skinny_linear.reference import quantize_nf4 as quantize_nf4

OPERATORS = (
    "adaln_modulation",
    "adamw",
    "depthwise_glu",
    "diffusion_loss",
    "embedding_projection",
    "dropout",
    "dropout_attention",
    "flow_head",
    "flow_input",
    "flow_matching_loss",
    "gated_mlp",
    "gelu_mlp",
    "group_norm_silu",
    "layer_norm",
    "linear_attention",
    "masked_token_loss",
    "philox",
    "qk_norm_rope",
    "rms_norm",
    "skinny_linear",
)
