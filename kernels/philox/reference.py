"""The mathematics in plain torch.

word_sp    = word p % 4 of Philox 4x32-10 at counter (p // 4, step, low and high word of sample id s)
uniform_sp = 2^-31 min(word, 2^32 - 1 - word)
normal_sp  = sqrt(-2 log u) cos(2 pi v) for even p and ... sin(2 pi v) for odd p, with u and v the uniforms of
             p and its neighbour
"""

from __future__ import annotations

import torch
from torch import Tensor

from reca.kernels._philox import normals_of, philox4x32, uniform_of

WORDS, UNIFORM, NORMAL = 0, 1, 2
_WORD = 0xFFFFFFFF


def forward(samples: Tensor, count: int, key: int, step: int, kind: int) -> Tensor:
    """[samples, count] int64 words, or fp32 uniforms or normals."""
    blocks = torch.arange((count + 3) // 4, device=samples.device)
    low, high = (samples & _WORD)[:, None], ((samples >> 32) & _WORD)[:, None]
    words = philox4x32(key, blocks, torch.full_like(low, step), low, high)
    if kind == UNIFORM:
        words = uniform_of(words[0]), uniform_of(words[1]), uniform_of(words[2]), uniform_of(words[3])
    elif kind == NORMAL:
        words = normals_of(words)
    return torch.stack(words, dim=-1).flatten(1)[:, :count].contiguous()
