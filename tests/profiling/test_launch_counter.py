"""Counting what would run on a GPU: launches, FLOPs, bytes and live memory, with or without values."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from reca.kernels import masked_token_loss
from reca.layers.attention import attention
from reca.layers.segments import Segments
from reca.profiling.kernel_counts import list_launches
from reca.profiling.launches import Launch, LaunchCounter
from reca.profiling.roofline import DEVICES, LAUNCH_SECONDS


def only(counter: LaunchCounter) -> Launch:
    ((launch, times),) = counter.launches.items()
    assert times == 1
    return launch


def test_a_product_is_counted_by_its_flops_and_operands() -> None:
    left, right = torch.ones(3, 5, dtype=torch.bfloat16), torch.ones(5, 7, dtype=torch.bfloat16)
    with LaunchCounter() as counter:
        left @ right
    assert only(counter) == Launch("aten::mm", "matmul", False, 2 * 3 * 5 * 7, 2 * (15 + 35 + 21))
    assert (counter.kernels, counter.flops, counter.bytes) == (1, 210, 142)


def test_views_allocations_and_questions_launch_nothing() -> None:
    values = torch.ones(4, 6)
    with LaunchCounter() as counter:
        values.view(6, 4).t()[1:].detach().unsqueeze(0)
        torch.empty(3)
        torch.empty_like(values)
        assert values.is_contiguous()
    assert not counter.launches


def test_what_is_changed_in_place_is_read_and_written() -> None:
    values, others = torch.ones(8), torch.ones(8)
    with LaunchCounter() as counter:
        values.add_(others)
    assert only(counter).bytes == 3 * 32


@pytest.mark.parametrize(
    ("sizes", "depth", "launches"),
    [
        ([10_000_000, 11_000_000], 1, 2),  # 153 and 168 chunks of 65,536 elements, 320 a launch
        ([320 * 65_536], 1, 1),
        ([320 * 65_536 + 1], 1, 2),
        ([7] * 110, 1, 1),
        ([7] * 111, 1, 2),
        ([7] * 111, 2, 2),
        ([7] * 129, 2, 3),
        ([319 * 65_536, 2 * 65_536, *[7] * 35], 4, 2),  # cut in the second, which opens the next launch
        ([319 * 65_536, 2 * 65_536, *[7] * 36], 4, 3),
        ([0, 0], 3, 0),
        ([], 1, 0),
    ],
)
def test_a_kernel_over_lists_takes_so_many_chunks_and_so_many_tensors(
    sizes: list[int], depth: int, launches: int
) -> None:
    assert list_launches(sizes, depth) == launches


def test_lists_that_are_walked_in_step_are_counted_and_counters_of_steps_are_not() -> None:
    with FakeTensorMode():
        lists = [[torch.empty(5) for _ in range(72)] for _ in range(4)]
        with LaunchCounter() as adamw:
            steps = [torch.empty(()) for _ in range(72)]
            torch._fused_adamw_(
                *lists,
                [],
                steps,
                lr=1e-3,
                beta1=0.9,
                beta2=0.95,
                weight_decay=0.0,
                eps=1e-8,
                amsgrad=False,
                maximize=False,
            )
        with LaunchCounter() as norms:
            torch._foreach_norm(lists[0])
        with LaunchCounter() as sums:
            torch._foreach_add(lists[0], lists[1])
    found = [
        sum(x.kernels for x in c.launches if "each" in x.operator or "fused" in x.operator)
        for c in (adamw, norms, sums)
    ]
    assert found == [2, 1, 2]  # 36, 110 and 48 tensors a launch


@pytest.mark.parametrize(("affine", "kernels"), [(True, 2), (False, 1)])
def test_the_backward_of_a_layer_norm_has_a_kernel_for_rows_and_one_for_its_weights(
    affine: bool, kernels: int
) -> None:
    rows = torch.ones(3, 8, requires_grad=True)
    norm = nn.LayerNorm(8, elementwise_affine=affine)
    with LaunchCounter() as counter:
        norm(rows).sum().backward()
    [backward] = [x for x in counter.launches if x.operator == "aten::native_layer_norm_backward"]
    assert backward.kernels == kernels


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("kv_heads", "kernels"), [(4, 3), (2, 5)])
def test_packed_attention_is_counted_as_a_gpu_runs_it(is_causal: bool, kv_heads: int, kernels: int) -> None:
    """One call whatever the lengths, with the FLOPs of visible pairs; grouped heads are summed afterwards."""
    lengths = (3, 5)
    with FakeTensorMode():
        query = torch.empty(8, 4, 16, dtype=torch.bfloat16, requires_grad=True)
        key = torch.empty(8, kv_heads, 16, dtype=torch.bfloat16, requires_grad=True)
        with LaunchCounter() as counter:
            segments = Segments.of(lengths, is_causal=is_causal)
            attention(query, key, key, segments, backend="counted").sum().backward()
    found = {x.kind: (x.kernels, x.flops) for x in counter.launches if x.flops}
    pairs = sum(n * (n + 1) // 2 if is_causal else n * n for n in lengths)
    assert found == {
        "attention": (2, 4 * 4 * 16 * pairs),
        "attention_backward": (kernels, 10 * 4 * 16 * pairs),
    }


def test_packed_attention_is_only_counted_without_values_and_in_half_precision() -> None:
    rows, segments = torch.ones(3, 2, 8), Segments.of((3,))
    with pytest.raises(ValueError, match="counts launches, on tensors without values only"):
        attention(rows, rows, rows, segments, backend="counted")
    with FakeTensorMode(), LaunchCounter() as counter:
        wide = torch.empty(3, 2, 8)
        attention(wide, wide, wide, Segments.of((3,)), backend="counted")
    assert not any(launch.operator.startswith("reca_profiling") for launch in counter.launches)


def test_memory_lives_as_long_as_its_last_view() -> None:
    with LaunchCounter() as counter:
        first = torch.ones(300)  # 1200 bytes take three blocks of 512
        assert counter.live_bytes == 1536
        view = first[:1]
        second = first + 1
        del first
        assert counter.live_bytes == 2 * 1536
        del view, second
        assert counter.live_bytes == 0
        assert torch.zeros(1).sum() == 0
    assert counter.peak_bytes == 2 * 1536


def test_storage_from_outside_is_not_counted() -> None:
    weight = torch.ones(1000, requires_grad=True)
    with LaunchCounter() as counter:
        kept = weight.detach().view(10, 100)
        kept.mul_(2)
    assert counter.peak_bytes == 0


@pytest.mark.parametrize("is_causal, pairs", [(False, 49), (True, 28)])
def test_attention_counts_visible_pairs_and_grouped_heads(is_causal: bool, pairs: int) -> None:
    query = torch.ones(1, 4, 7, 16, requires_grad=True)
    key = torch.ones(1, 2, 7, 16, requires_grad=True)
    with LaunchCounter() as counter:
        F.scaled_dot_product_attention(query, key, key, is_causal=is_causal, enable_gqa=True).sum().backward()
    flops = {launch.kind: launch.flops for launch in counter.launches if launch.flops}
    assert flops == {"attention": 4 * 4 * pairs * 16, "attention_backward": 10 * 4 * pairs * 16}


def test_a_depthwise_convolution_is_not_taken_for_a_dense_one() -> None:
    layer, pixels = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), torch.ones(2, 8, 5, 5)
    with LaunchCounter() as counter:
        layer(pixels.requires_grad_()).sum().backward()
    assert counter.flops == 3 * (2 * 9 * 8 * 2 * 25)


def test_the_token_loss_counts_the_products_it_hides() -> None:
    hidden, weight = torch.ones(6, 16, requires_grad=True), torch.ones(32, 16, requires_grad=True)
    with LaunchCounter() as counter:
        masked_token_loss(hidden, weight, torch.zeros(6, dtype=torch.int64)).backward()
    assert counter.flops == 3 * (2 * 6 * 16 * 32)


def step(counter: LaunchCounter) -> Counter[Launch]:
    model = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 3))
    rows: Tensor = torch.zeros(5, 12)
    with counter:
        model(rows).square().sum().backward()
    return counter.launches


def test_tensors_without_values_give_the_same_counts() -> None:
    real, fake = LaunchCounter(), LaunchCounter()
    expected = step(real)
    with FakeTensorMode():
        assert step(fake) == expected
    assert fake.peak_bytes == real.peak_bytes


def test_a_call_takes_the_longest_of_arithmetic_traffic_and_launch() -> None:
    device = DEVICES["h200"]
    assert device.seconds(Launch("x", "matmul", False, 790 * 10**12, 8)) == pytest.approx(1)
    assert device.seconds(Launch("x", "matmul", True, 54 * 10**12, 8)) == pytest.approx(1)
    assert device.seconds(Launch("x", "attention", False, 790 * 10**12, 8)) > 2
    assert device.seconds(Launch("x", "memory", True, 0, 43 * 10**11)) == pytest.approx(1)
    assert device.seconds(Launch("x", "memory", True, 0, 8, kernels=3)) == 3 * LAUNCH_SECONDS
