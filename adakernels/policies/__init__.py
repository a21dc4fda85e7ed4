"""Heads that decide what a dynamic network computes."""

from adakernels.policies.channel_policy import ChannelPolicy

__all__ = ["ChannelPolicy"]
