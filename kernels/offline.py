# mypy: disable-error-code="import-untyped"
"""Every kernel compiled for every architecture without a GPU: registers, spills, shared memory, instructions.

Nothing is declared twice: the launchers run on meta tensors of real sizes, their launches are recorded, and
what would have been launched is compiled with the specialisations (alignment, constants) of that launch.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reca.kernels import offline_cases
from reca.kernels._launch import Launch, record_launches

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory that one program may use."""

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """What the compiler's own tools say about one kernel on one architecture.

    Attributes:
        kernel: "case/function".
        architecture: 90 for sm_90 and so on.
        registers: per thread.
        spills: instructions that move registers to local memory and back.
        shared_bytes: shared memory per program.
        loads_128, stores_128: global accesses of 16 bytes per thread.
        instructions: length of the machine code.
        narrow_products: 32-bit products of a runtime size, which overflow beyond 2^31 elements.
    """

    kernel: str
    architecture: int
    registers: int
    spills: int
    shared_bytes: int
    loads_128: int
    stores_128: int
    instructions: int
    narrow_products: int


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _adamw(weight: Tensor, low: Tensor | None, step: Tensor | None) -> None:
    from reca.kernels.adamw import kernel

    state, scalar = _meta(weight.shape[0], dtype=torch.float32), _meta(dtype=torch.float32)
    tensors = (_meta(weight.shape[0]), state, state, state, scalar, scalar, scalar, _meta(dtype=torch.bool))
    kernel.step_(weight, low, *tensors, step, 0.9, 0.95, 1e-8, 0.02, 0.999, -(1 << 40), 1 << 32)


def _adamw_fp32() -> None:
    _adamw(_meta(1 << 32, dtype=torch.float32), None, None)


def _adamw_split() -> None:
    _adamw(_meta(1 << 32), _meta(1 << 32, dtype=torch.int16), None)


def _adamw_rounded() -> None:
    _adamw(_meta(1 << 32), None, _meta(dtype=torch.int64))


def _adamw_8bit() -> None:
    from reca.kernels.adamw import kernel

    count, scalar = 1 << 32, _meta(dtype=torch.float32)
    codes, scales = _meta(count, dtype=torch.uint8), _meta(count // 256, dtype=torch.float32)
    tensors = (_meta(count), codes, codes, None, scalar, scalar, scalar, _meta(dtype=torch.bool))
    settings = (_meta(dtype=torch.int64), 0.9, 0.95, 1e-8, 0.02, 0.999, -(1 << 40), 1 << 32)
    kernel.step_(_meta(count), None, *tensors, *settings, scales, scales)


def _index(count: int) -> Tensor:
    return _meta(count, dtype=torch.int64)


def _flow_input() -> None:
    from reca.kernels.flow_input import kernel

    clean, time = _meta(32768, 64, dtype=torch.float32), _meta(8, dtype=torch.float32)
    latents = (clean, time, _index(32768), None, _index(8), _index(32768), _meta(dtype=torch.int64), 1 << 40)
    tables = (_meta(3584), _meta(8, 3584), _meta(4096, 3584), _index(32768))
    kernel.forward(*latents, _meta(3584, 64), *tables)
    kernel.features(*latents, torch.bfloat16)


def _adaln_modulation() -> None:
    from reca.kernels.adaln_modulation import kernel

    x, weight = _meta(170000, 1536), _meta(1536)
    modulation = _meta(170000, 3 * 1536)
    shift, scale, gate = modulation.chunk(3, dim=1)
    out, mean, rstd = kernel.forward(x, shift, scale, weight, weight, 1e-6)
    kernel.backward(out, x, scale, weight, weight, mean, rstd, True, True, True)
    kernel.gate_residual(x, gate, x)


def _adaln_modulation_plain() -> None:
    from reca.kernels.adaln_modulation import kernel

    x = _meta(170000, 1024)
    out, mean, rstd = kernel.forward(x, x, x, None, None, 1e-6)
    kernel.backward(out, x, x, None, None, mean, rstd, True, True, False)
    kernel.gate_backward(out, x, x, True, True)


def _diffusion_loss() -> None:
    from reca.kernels.diffusion_loss import kernel

    rows, clean, table = 1 << 28, _meta(1 << 26, 16, dtype=torch.float32), _meta(1000, 8, dtype=torch.float32)
    step = _meta(dtype=torch.int64)
    drawn = (_index(rows), None, _index(8), _index(rows), step, 1 << 40)
    kernel.noised(clean, _index(rows), table, *drawn, torch.bfloat16)
    kernel.forward(_meta(rows, 32), clean, _index(rows), table, None, *drawn, True)


def _dropout() -> None:
    from reca.kernels.dropout import kernel

    rows = _meta(1 << 22, 1280)
    samples, step = _index(192), _meta(dtype=torch.int64)
    kernel.forward(rows, rows, _meta(193, dtype=torch.int32), samples, step, 1 << 40, 0.1)


def _dropout_attention(dim: int, lengths: list[int]) -> None:
    from reca.kernels.dropout_attention import kernel

    qkv = _meta(sum(lengths), 3, 16, dim)
    samples, step = _index(len(lengths)), _meta(dtype=torch.int64)
    places = (_meta(len(lengths) + 1, dtype=torch.int32), lengths, samples, step, 1 << 40, 0.1, 0.125)
    out, lse = kernel.forward(qkv, *places)
    kernel.backward(out, qkv, out, lse, *places)


def _dropout_attention_80() -> None:
    _dropout_attention(80, [1088] * 8)


def _dropout_attention_128() -> None:
    _dropout_attention(128, [1088] * 8)


def _dropout_attention_ragged() -> None:
    _dropout_attention(64, [201] * 8)


def _flow_head() -> None:
    from reca.kernels.flow_head import kernel

    hidden, clean = _meta(32768, 3584), _meta(32768, 64, dtype=torch.float32)
    weights = (_meta(3584), _meta(64, 3584))
    mask, step = _meta(32768, dtype=torch.float32), _meta(dtype=torch.int64)
    noise = (_index(32768), None, _index(8), _index(32768), step, 1 << 40)
    loss, *saved = kernel.forward(hidden, *weights, _meta(64), clean, mask, *noise, 1e-6)
    kernel.backward(loss, hidden, *weights, *saved, True, True)


def _flow_matching_loss() -> None:
    from reca.kernels.flow_matching_loss import kernel

    rows = _meta(32768, 64)
    kernel.forward(rows, rows, rows, _meta(32768, dtype=torch.float32), True)


def _rms_norm() -> None:
    from reca.kernels.rms_norm import kernel

    rows, weight = _meta(32768, 3584), _meta(3584)
    summed, normed, rstd = kernel.forward(rows, rows, weight, 1e-6)
    kernel.backward(normed, summed, summed, weight, rstd, True, True)


def _rms_norm_narrow() -> None:
    from reca.kernels.rms_norm import kernel

    rows, weight = _meta(131072, 128), _meta(128)
    _, normed, rstd = kernel.forward(rows, None, weight, 1e-6)
    kernel.backward(normed, None, rows, weight, rstd, True, True)


def _rms_norm_experts() -> None:
    from reca.kernels.rms_norm import kernel

    rows, weight, experts = _meta(32768, 3584), _meta(2, 3584), _meta(32768, dtype=torch.int32)
    summed, normed, rstd = kernel.forward(rows, rows, weight, 1e-6, experts)
    kernel.backward(normed, summed, summed, weight, rstd, True, True, experts)


def _gated_mlp() -> None:
    from reca.kernels.gated_mlp import kernel

    gate_up = _meta(32768, 2 * 18944)
    kernel.backward(kernel.forward(gate_up), gate_up, True)


def _masked_token_loss() -> None:
    from reca.kernels.masked_token_loss import kernel

    labels = _meta(1304, dtype=torch.int64)
    kernel.loss_rows_(_meta(1304, 58560), 58498, labels, True)


def _qk_norm_rope() -> None:
    from reca.kernels.qk_norm_rope import kernel

    qkv, weight, angle = _meta(32768, 36 * 128), _meta(128), _meta(32768, 64, dtype=torch.float32)
    inputs: tuple[Any, ...] = (qkv, weight, weight, angle, angle, 28, 4, 1e-6)
    kernel.backward(*kernel.forward(*inputs), *(*inputs, True, True))


def _qk_norm_rope_partial() -> None:
    from reca.kernels.qk_norm_rope import kernel

    qkv, angle = _meta(8192, 96 * 64), _meta(8192, 16, dtype=torch.float32)
    inputs: tuple[Any, ...] = (qkv, None, None, angle, angle, 32, 32, 1e-6)
    kernel.backward(*kernel.forward(*inputs), *(*inputs, True, False))


def _qk_norm_rope_experts() -> None:
    from reca.kernels.qk_norm_rope import kernel

    qkv, weight, angle = _meta(32768, 36 * 128), _meta(2, 128), _meta(32768, 64, dtype=torch.float32)
    inputs: tuple[Any, ...] = (qkv, weight, weight, angle, angle, 28, 4, 1e-6)
    experts, buffer, places = _meta(32768, dtype=torch.int32), _meta(65536, 4, 128), _index(32768)
    outs = kernel.forward(*inputs, None, None, experts, True, (buffer, buffer, places))
    kernel.backward(*outs, *inputs, True, True, None, None, experts, places)


def _qk_norm_rope_layer_norm() -> None:
    from reca.kernels.qk_norm_rope import kernel

    qkv, weight, angle = _meta(8192, 96 * 64), _meta(64), _meta(8192, 16, dtype=torch.float32)
    inputs: tuple[Any, ...] = (qkv, weight, weight, angle, angle, 32, 32, 1e-5)
    kernel.backward(*kernel.forward(*inputs, weight, weight), *inputs, True, True, weight, weight)


CASES: dict[str, Callable[[], None]] = {
    "adamw": _adamw_fp32,
    "adamw_split": _adamw_split,
    "adamw_rounded": _adamw_rounded,
    "adamw_8bit": _adamw_8bit,
    "adaln_modulation": _adaln_modulation,
    "adaln_modulation_plain": _adaln_modulation_plain,
    "diffusion_loss": _diffusion_loss,
    "dropout": _dropout,
    "dropout_attention_80": _dropout_attention_80,
    "dropout_attention_128": _dropout_attention_128,
    "dropout_attention_ragged": _dropout_attention_ragged,
    "flow_head": _flow_head,
    "flow_input": _flow_input,
    "flow_matching_loss": _flow_matching_loss,
    "rms_norm": _rms_norm,
    "rms_norm_narrow": _rms_norm_narrow,
    "rms_norm_experts": _rms_norm_experts,
    "gated_mlp": _gated_mlp,
    "masked_token_loss": _masked_token_loss,
    "qk_norm_rope": _qk_norm_rope,
    "qk_norm_rope_partial": _qk_norm_rope_partial,
    "qk_norm_rope_experts": _qk_norm_rope_experts,
    "qk_norm_rope_layer_norm": _qk_norm_rope_layer_norm,
} | offline_cases.CASES


def launches(architecture: int) -> Iterator[tuple[str, Launch]]:
    """("case/function", launch) for everything that the cases would launch on this architecture."""
    for case, run in CASES.items():
        with record_launches(architecture) as recording:
            run()
        for made in recording.launches:
            yield f"{case}/{made.kernel.__name__.removeprefix('_').removesuffix('_kernel')}", made


def _specialise(value: Any) -> tuple[str, bool]:
    """(Triton type, whether Triton assumes divisibility by 16) of an argument, as its launcher decides."""
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}", True
    if isinstance(value, float):
        return "fp32", False
    return "i32" if -(1 << 31) <= value < 1 << 31 else "i64", value % 16 == 0


def _source(made: Launch) -> Any:
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    arguments = dict(zip(made.kernel.arg_names, made.arguments, strict=False)) | made.constants
    for index, name in enumerate(made.kernel.arg_names):
        value = arguments[name]
        # An integer 1 is a constant for the launcher too: unit strides vectorise.
        if name in made.constants or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name], divisible = _specialise(value)
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(made.kernel, signature, constants, attributes)


def _tool(name: str, *arguments: str) -> str:
    from triton import knobs

    command = [getattr(knobs.nvidia, name).path, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def narrow_products(ttir: str) -> int:
    """Products in 32 bits of a runtime size with anything but a constant: offsets that can overflow."""
    header = ttir[ttir.index("tt.func public") :].split("\n", 1)[0]
    sizes = set(re.findall(r"(%\w+): i32", header))
    constants: set[str] = set()
    found = 0
    for result, operation, rest in re.findall(r"^\s*(%\w+) = ([\w.]+) (.*)$", ttir, re.MULTILINE):
        operands = set(re.findall(r"%\w+", rest.split(" : ")[0]))
        if operation == "arith.constant":
            constants.add(result)
        if operands & sizes and re.search(r"\bi32>?(?:\s+loc\(.*)?$|xi32>", rest):
            sizes.add(result)
            found += operation == "arith.muli" and not operands & constants
    return found


def _inspect(name: str, architecture: int, compiled: Any) -> CompiledKernel:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", str(cubin))
        listing = _tool("nvdisasm", "-c", str(cubin))
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, f"cuobjdump printed no register count for {name}: {usage}"
    return CompiledKernel(
        kernel=name,
        architecture=architecture,
        registers=int(registers[1]),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", listing)),
        shared_bytes=compiled.metadata.shared,
        loads_128=len(re.findall(r"\bLDG[.\w]*\.128", listing)),
        stores_128=len(re.findall(r"\bSTG[.\w]*\.128", listing)),
        instructions=len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/", listing, re.MULTILINE)),
        narrow_products=narrow_products(compiled.asm["ttir"]),
    )


def compile_all(architectures: Iterable[int] = ARCHITECTURES) -> list[CompiledKernel]:
    """Compile every kernel at real sizes for every architecture; about half a second each, no GPU needed.

    Args:
        architectures: e.g. (80, 90).

    Returns: one row per kernel and architecture.
    Raises: RuntimeError in a process whose Triton interprets; subprocess.CalledProcessError if a tool fails.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    if triton.knobs.runtime.interpret:
        raise RuntimeError(
            "compile_all: Triton interprets in this process, so nothing would be compiled; "
            "unset TRITON_INTERPRET"
        )
    rows = []
    for architecture in architectures:
        for name, made in launches(architecture):
            target = GPUTarget("cuda", architecture, 32)
            compiled = triton.compile(_source(made), target=target, options={"num_warps": made.warps})
            rows.append(_inspect(name, architecture, compiled))
    return rows
