"""The dispatcher namespace that the operators are declared in."""

from torch.library import Library

library = Library("adakernels", "DEF")
