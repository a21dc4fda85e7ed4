import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adakernels.policies import ChannelPolicy
from adakernels.policies.channel_policy import straight_through_gumbel_softmax

FRAMES = 3


@pytest.fixture
def head() -> ChannelPolicy:
    torch.manual_seed(0)
    head = ChannelPolicy(5, 7, hidden=16).eval()
    torch.nn.init.normal_(head.fc2.weight)
    torch.nn.init.normal_(head.bn.running_mean)
    torch.nn.init.uniform_(head.bn.running_var, 0.5, 2)
    return head


@pytest.fixture
def features() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2 * FRAMES, 5, 4, 4)


def expected_logits(head: ChannelPolicy, features: Tensor) -> Tensor:
    rows = []
    for n in range(len(features)):
        present = features[n].mean((1, 2))
        past = features[n - 1].mean((1, 2)) if n % FRAMES else torch.zeros(5)
        rows.append(torch.cat((past, present)))
    return head.fc2(F.relu(head.bn(head.fc1(torch.stack(rows))))).view(len(features), 7, 3)


def test_default_widths() -> None:
    head = ChannelPolicy(64, 128)
    assert head.fc1.weight.shape == (1024, 128)
    assert head.fc2.weight.shape == (3 * 128, 1024)
    assert head.temperature == 0.67


@pytest.mark.parametrize("training", [True, False])
def test_logits(head: ChannelPolicy, features: Tensor, training: bool) -> None:
    head.train(training)
    expected = expected_logits(copy.deepcopy(head), features)
    with torch.no_grad():
        torch.testing.assert_close(head.logits(features, frames=FRAMES), expected)


def test_evaluation_takes_the_most_likely(head: ChannelPolicy, features: Tensor) -> None:
    policy = head(features, frames=FRAMES)
    expected = expected_logits(head, features).argmax(2)
    first = expected[::FRAMES]
    first[first == 1] = 2
    assert policy.dtype == torch.int64
    assert torch.equal(policy, expected)
    assert set(policy.unique().tolist()) == {0, 1, 2}
    assert torch.equal(head(features, frames=FRAMES), policy)


def test_evaluation_follows_changes(head: ChannelPolicy, features: Tensor) -> None:
    with torch.no_grad():
        head(features, frames=FRAMES)
        head.fc1.weight.mul_(-1)
        head.bn.bias.add_(0.5)
        torch.testing.assert_close(head.logits(features, frames=FRAMES), expected_logits(head, features))


def test_clips_do_not_mix(head: ChannelPolicy, features: Tensor) -> None:
    changed = features.clone()
    changed[:FRAMES] *= -3
    before, after = head(features, frames=FRAMES), head(changed, frames=FRAMES)
    assert torch.equal(before[FRAMES:], after[FRAMES:])
    assert not torch.equal(before[:FRAMES], after[:FRAMES])


def test_training_draws_one_hot_with_gradients(head: ChannelPolicy, features: Tensor) -> None:
    head.train()
    features.requires_grad_()
    policy = head(features, frames=FRAMES)
    assert policy.shape == (2 * FRAMES, 7, 3)
    assert torch.equal(policy, F.one_hot(policy.argmax(2), 3).float())
    (policy * torch.randn_like(policy)).sum().backward()
    for tensor in (features, *head.parameters()):
        assert tensor.grad is not None and tensor.grad.abs().sum() > 0


def test_sampling_is_a_switch(head: ChannelPolicy, features: Tensor) -> None:
    greedy = head(features, frames=FRAMES)
    head.sample, head.generator = True, torch.Generator().manual_seed(3)
    first = head(features, frames=FRAMES)
    second = head(features, frames=FRAMES)
    head.generator = torch.Generator().manual_seed(3)
    assert torch.equal(head(features, frames=FRAMES), first)
    assert not torch.equal(first, second)
    assert not torch.equal(first, greedy)
    assert not (first[::FRAMES] == 1).any()


def test_draws_follow_the_softmax() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0])
    draws = straight_through_gumbel_softmax(
        logits.expand(20000, 3), 0.67, generator=torch.Generator().manual_seed(0)
    )
    # Three standard deviations of a frequency over 20000 draws are at most 0.011.
    torch.testing.assert_close(draws.mean(0), logits.softmax(0), rtol=0, atol=0.011)


def test_gradient_is_that_of_the_relaxation() -> None:
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, 3, dtype=torch.float64)
    policy = straight_through_gumbel_softmax(logits, 0.67, generator=torch.Generator().manual_seed(5))
    (grad,) = torch.autograd.grad((policy * weights).sum(), logits)
    noise = torch.empty(4, 3, dtype=torch.float64)
    noise = -noise.exponential_(generator=torch.Generator().manual_seed(5)).log()
    soft = ((logits + noise) / 0.67).softmax(1)
    torch.testing.assert_close(grad, torch.autograd.grad((soft * weights).sum(), logits)[0])
    assert torch.equal(policy.argmax(1), soft.argmax(1))


def test_errors(head: ChannelPolicy) -> None:
    with pytest.raises(ValueError, match=r"shape \[N, 5, H, W\], got \[6, 4, 2, 2\]"):
        head(torch.empty(6, 4, 2, 2), frames=3)
    with pytest.raises(ValueError, match="multiple of frames = 4, got N = 6"):
        head(torch.empty(6, 5, 2, 2), frames=4)


def test_one_frame_and_no_frames(head: ChannelPolicy) -> None:
    assert head(torch.randn(2, 5, 2, 2), frames=1).shape == (2, 7)
    assert head(torch.empty(0, 5, 2, 2), frames=3).shape == (0, 7)


def test_compiles_whole(head: ChannelPolicy, features: Tensor) -> None:
    for training in (False, True):
        compiled = torch.compile(head.train(training), fullgraph=True, backend="aot_eager")
        assert compiled(features, frames=FRAMES).shape[:2] == (2 * FRAMES, 7)
