"""PatchGather: actions in [0, 1]² become origins."""

from __future__ import annotations

import pytest
import torch

import adakernels as ak


def test_action_spans_the_frame() -> None:
    input = torch.arange(2 * 9 * 11, dtype=torch.float32).reshape(1, 2, 9, 11).expand(4, 2, 9, 11)
    action = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.5, 0.0], [0.25, 2.0]])
    got = ak.PatchGather((5, 7))(input, action)
    for patch, (y, x) in zip(got, [(0, 0), (4, 4), (2, 0), (1, 4)], strict=True):
        assert torch.equal(patch, input[0, :, y : y + 5, x : x + 7])


@pytest.mark.parametrize("size", [5, (5, 8)])
def test_gradient_is_that_of_the_origin_times_the_room(size: int | tuple[int, int]) -> None:
    torch.manual_seed(0)
    input, action = torch.randn(3, 2, 12, 14), torch.rand(3, 2).requires_grad_()
    height, width = (size, size) if isinstance(size, int) else size
    room = torch.tensor([12.0 - height, 14.0 - width])
    origin = (action.detach() * room).requires_grad_()
    got, want = ak.PatchGather(size)(input, action), ak.patch_gather(input, origin, size)
    assert torch.equal(got, want)
    (grad,) = torch.autograd.grad(got.square().sum(), action)
    (of_origin,) = torch.autograd.grad(want.square().sum(), origin)
    torch.testing.assert_close(grad, of_origin * room)


def test_half_precision_action_keeps_its_place() -> None:
    input = torch.randn(1, 1, 512, 512)
    action = torch.tensor([[0.7001953125, 0.3]], dtype=torch.float16)
    got = ak.PatchGather(96)(input, action)
    assert torch.equal(got, ak.patch_gather(input, action.float() * 416, 96))


def test_normalises_and_indexes() -> None:
    torch.manual_seed(0)
    input = torch.randint(0, 256, (2, 3, 12, 12), dtype=torch.uint8)
    action, index = torch.rand(5, 2), torch.tensor([1, 0, 0, 1, 1])
    mean, std = (0.4, 0.5, 0.6), torch.tensor([0.2, 0.25, 0.3])
    module = ak.PatchGather(4, mean=mean, std=std)
    assert not module.state_dict() and repr(module) == "PatchGather(size=(4, 4))"
    got = module(input, action, frame_index=index)
    want = ak.patch_gather(input, action * 8, 4, frame_index=index, mean=mean, std=std)
    assert torch.equal(got, want)
    assert module.to(torch.device("meta")).mean.device.type == "meta"


def test_compiles() -> None:
    torch._dynamo.reset()
    module, input = ak.PatchGather((4, 5)), torch.randn(2, 3, 9, 9)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        action = torch.rand(2, 2, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        torch.testing.assert_close(compiled(input, action), module(input, action))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="PatchGather: expected size of at least 1, got 0"):
        ak.PatchGather(0)
    with pytest.raises(TypeError, match="PatchGather: expected size to be an int, got float"):
        ak.PatchGather((4, 4.0))
    module = ak.PatchGather(4)
    for input, action, message in (
        (torch.ones(3, 9, 9), torch.ones(3, 2), r"input of rank 4 \[N, C, H, W\], got shape \[3, 9, 9\]"),
        (torch.ones(2, 3, 9, 9), torch.ones(2), r"origin of rank 2 \[M, 2\], got shape \[2\]"),
        (torch.ones(2, 3, 3, 9), torch.ones(2, 2), r"a size within \[H, W\] = \[3, 9\], got \[4, 4\]"),
    ):
        with pytest.raises(ValueError, match=f"patch_gather: expected {message}"):
            module(input, action)
