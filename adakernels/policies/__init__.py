"""Heads that decide what a dynamic network computes."""

from adakernels.policies.channel_policy import ChannelPolicy
from adakernels.policies.soft_modulation_gate import SoftModulationGate

__all__ = ["ChannelPolicy", "SoftModulationGate"]
