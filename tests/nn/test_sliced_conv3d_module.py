import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adakernels as ak
from adakernels.nn import PackedClips, SlicedConv3d, select_frames


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def batch_norm(channels: int) -> nn.BatchNorm3d:
    """A batch normalisation that has seen something."""
    norm = nn.BatchNorm3d(channels)
    for tensor in (norm.weight, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 2)
    for tensor in (norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    return norm


def make(kernel: tuple[int, int, int] = (3, 3, 3), activation: str | None = "relu") -> SlicedConv3d:
    padding = tuple(k // 2 for k in kernel)
    return SlicedConv3d(4, 6, kernel, padding=padding, norm=batch_norm(6), activation=activation)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"stride": (1, 2, 2), "padding": 1, "bias": False},
        {"padding": "same", "dilation": 2},
        {"padding": (1, 2, 1), "padding_mode": "replicate"},
        {"padding": 1, "groups": 2, "padding_mode": "circular"},
    ],
)
def test_is_conv3d_without_flags(kwargs: dict[str, object]) -> None:
    conv, sliced = nn.Conv3d(4, 6, 3, **kwargs), SlicedConv3d(4, 6, 3, **kwargs)
    assert list(sliced.state_dict()) == list(conv.state_dict())
    sliced.load_state_dict(conv.state_dict())
    clips = torch.randn(2, 4, 5, 6, 7)
    assert torch.equal(sliced(clips), conv(clips))
    every, centre = (sliced(clips, torch.full((2,), flag)) for flag in (True, False))
    torch.testing.assert_close(every, conv(clips), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        conv.weight[:, :, 0::2] = 0
    torch.testing.assert_close(centre, conv(clips), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", [None, "relu", "relu6", "silu"])
@pytest.mark.parametrize("training", [False, True])
def test_norm_and_activation(activation: str | None, training: bool) -> None:
    conv = make(activation=activation).train(training)
    clips, temporal = torch.randn(3, 4, 4, 5, 6), torch.tensor([True, False, True])
    twin, packed = copy.deepcopy(conv), copy.deepcopy(conv)
    features = ak.sliced_conv3d(clips, twin.weight, twin.bias, temporal, padding=1)
    want = twin.norm(features)
    want = want if activation is None else getattr(F, activation)(want)
    torch.testing.assert_close(conv(clips, temporal), want, rtol=1e-4, atol=1e-5)
    frames = packed(PackedClips.from_clips(clips), temporal).frames
    torch.testing.assert_close(frames, want.transpose(1, 2).flatten(0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", [(3, 1, 1), (1, 3, 3), (1, 1, 1), (3, 3, 3)])
def test_packed_clips_are_computed_one_by_one(kernel: tuple[int, int, int]) -> None:
    conv = make(kernel).eval()
    clips, keep = torch.randn(3, 4, 5, 6, 7), torch.rand(3, 5) < 0.6
    keep[:, 2] = True
    temporal = torch.tensor([True, False, True])
    packed = select_frames(clips, keep)
    assert packed.length == 5 and packed.offsets.tolist() == [0, *keep.sum(1).cumsum(0).tolist()]
    got = conv(packed, temporal)
    rows = [conv(clips[b : b + 1, :, keep[b]], temporal[b : b + 1]) for b in range(3)]
    want = torch.cat([row[0].transpose(0, 1) for row in rows])
    torch.testing.assert_close(got.frames, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        got.mean(), torch.cat([row.mean((2, 3, 4)) for row in rows]), rtol=1e-4, atol=1e-5
    )
    pooled = got.map(lambda frames: F.max_pool2d(frames, 2))
    torch.testing.assert_close((pooled + pooled).frames, 2 * F.max_pool2d(want, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"kernel_size": (1, 3, 3), "padding": (0, 1, 1)},
        {"kernel_size": (1, 3, 3), "padding": "same", "dilation": (1, 2, 2), "bias": False},
        {"kernel_size": 1, "stride": (1, 2, 2)},
        {"kernel_size": (1, 3, 3), "groups": 2},
    ],
)
def test_packed_clips_in_inference_without_taps_in_time(
    kwargs: dict[str, Any], activation: str | None, dtype: torch.dtype, order: torch.memory_format
) -> None:
    conv = SlicedConv3d(32, 64, activation=activation, **kwargs).eval()
    for rows, size in ((3, 5), (4, 30)):
        clips = torch.randn(1, 32, rows, size, size).to(dtype)
        packed = PackedClips.from_clips(clips).map(lambda frames: frames.contiguous(memory_format=order))
        want = conv.to(dtype).double()(clips.double())[0].transpose(0, 1)
        with torch.no_grad():
            got = conv.to(dtype)(packed).frames
        assert got.dtype == dtype and got.is_contiguous(memory_format=order)
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_gradients_through_a_packed_block() -> None:
    conv = make((3, 1, 1)).double()
    clips = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    keep, temporal = torch.tensor([[True, False, True], [True, True, True]]), torch.tensor([False, True])

    def call(clips: Tensor) -> Tensor:
        return conv(select_frames(clips, keep), temporal).mean()

    assert torch.autograd.gradcheck(call, clips)


def test_clips_without_frames_have_no_features() -> None:
    packed = PackedClips(torch.ones(2, 3, 4, 4), torch.tensor([0, 0, 2], dtype=torch.int32))
    assert packed.mean().tolist() == [[0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        (torch.ones(2, 4, dtype=torch.bool), ValueError, r"clips \[B, C, T, H, W\] and keep \[B, T\], got"),
        (torch.ones(2, 3), TypeError, "expected keep of dtype bool"),
        (torch.tensor([[1, 1, 1], [0, 0, 0]]) > 0, ValueError, "to leave every clip at least one frame"),
    ],
)
def test_bad_selections(keep: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        select_frames(torch.ones(2, 1, 3, 2, 2), keep)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="SlicedConv3d: expected activation to be one of None, 'relu'"):
        SlicedConv3d(4, 6, 3, activation="gelu")
    conv = SlicedConv3d(4, 6, 3, padding=1, padding_mode="reflect")
    with pytest.raises(ValueError, match="expected padding_mode 'zeros' with packed clips, got 'reflect'"):
        conv(PackedClips.from_clips(torch.ones(1, 4, 2, 5, 5)))


@pytest.mark.parametrize("taps", [1, 3])
def test_bad_packed_clips(taps: int) -> None:
    conv = make((taps, 3, 3))
    packed = PackedClips.from_clips(torch.ones(2, 4, 3, 5, 5))
    with pytest.raises(ValueError, match=r"expected temporal of shape \[B\] = \[2\], got \[3\]"):
        conv(packed, torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeError, match="expected temporal of dtype bool, got float32"):
        conv(packed, torch.ones(2))
    with pytest.raises(ValueError, match="expected frame_offsets to end at the number of frames, 6, got 4"):
        conv(PackedClips(packed.frames, torch.tensor([0, 2, 4], dtype=torch.int32)))
    with pytest.raises(TypeError, match="expected frame_offsets of dtype int32, got int64"):
        conv(PackedClips(packed.frames, torch.tensor([0, 3, 6])))


def test_clips_of_no_frames() -> None:
    packed = PackedClips.from_clips(torch.ones(2, 4, 0, 5, 5))
    assert packed.offsets.tolist() == [0, 0, 0] and packed.offsets.dtype == torch.int32
    assert make((3, 3, 3))(packed).frames.shape == (0, 6, 5, 5)


def test_copies_and_pickles() -> None:
    conv = make().eval()
    clips, temporal = torch.randn(2, 4, 3, 5, 5), torch.tensor([True, False])
    want = conv(clips, temporal)
    assert "activation=relu" in repr(conv)
    for other in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert torch.equal(other(clips, temporal), want)


@pytest.mark.parametrize("taps", [1, 3])
def test_compiles_with_packed_clips(taps: int) -> None:
    conv = make((taps, 1, 1)).eval()
    frames, offsets = torch.randn(5, 4, 3, 3), torch.tensor([0, 2, 5], dtype=torch.int32)

    def call(frames: Tensor, temporal: Tensor) -> Tensor:
        return conv(PackedClips(frames, offsets), temporal).mean()

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for flags in ([True, False], [False, True]):
        temporal = torch.tensor(flags)
        torch.testing.assert_close(compiled(frames, temporal), call(frames, temporal))
