import pytest
import torch

from adakernels.nn import temporal_shift


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("channels", [8, 19])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_every_element(frames: int, channels: int, memory_format: torch.memory_format) -> None:
    x = torch.randn(2 * frames, channels, 3, 2).to(memory_format=memory_format).requires_grad_()
    y = temporal_shift(x, frames=frames)
    fold = channels // 8
    for n in range(2 * frames):
        t = n % frames
        for c in range(channels):
            step = 1 if c < fold else -1 if c < 2 * fold else 0
            source = x[n + step, c] if 0 <= t + step < frames else torch.zeros(3, 2)
            assert torch.equal(y[n, c], source)
    assert y.stride() == x.stride()


def test_gradient() -> None:
    x = torch.randn(6, 8, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: temporal_shift(x, frames=3), x)


def test_no_frames() -> None:
    assert temporal_shift(torch.empty(0, 8, 2, 2), frames=3).shape == (0, 8, 2, 2)


def test_errors() -> None:
    with pytest.raises(ValueError, match="multiple of frames = 4, got N = 6"):
        temporal_shift(torch.empty(6, 8, 2, 2), frames=4)
    with pytest.raises(ValueError, match=r"shape \[N, C, H, W\], got \[6, 8\]"):
        temporal_shift(torch.empty(6, 8), frames=3)
