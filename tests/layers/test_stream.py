"""The residual stream between layers: a sum that the norm behind it forms."""

from __future__ import annotations

import pytest
import torch

from reca.layers.norm import LayerNorm, RMSNorm
from reca.layers.stream import Stream


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
@pytest.mark.parametrize("has_delta", [False, True])
def test_reading_a_stream_gives_the_norm_of_its_sum_and_the_sum(
    kind: type[RMSNorm | LayerNorm], has_delta: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    residual, delta = (torch.randn(5, 12, generator=generator, requires_grad=True) for _ in range(2))
    norm = kind(12)
    stream = Stream(residual, delta if has_delta else None)
    expected = residual + delta if has_delta else residual
    normed, rows = stream.read(norm)
    assert torch.equal(rows, expected) and torch.equal(stream.rows, expected)
    torch.testing.assert_close(normed, norm(expected))
    # the norm is not the only reader: both gradients reach both summands
    weights = torch.randn(2, 5, 12, generator=generator)
    (weights[0] * normed + weights[1] * rows).sum().backward()
    got = residual.grad
    leaf = expected.detach().requires_grad_()
    (weights[0] * norm(leaf) + weights[1] * leaf).sum().backward()
    torch.testing.assert_close(got, leaf.grad)
    assert not has_delta or torch.equal(delta.grad, got)
