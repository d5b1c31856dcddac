"""Who gets how many bits: a width a tensor, under a budget of stored bytes, so that the predicted damage is least.

problem    what may be chosen (tied tensors, true bytes, damages) and what was chosen
exact      the optimum, by integer programming; pairwise terms as an option
baq        the closed form of BAQ, rounded to the widths there are: a baseline
frontier   the cheapest allocation within a bound on the damage, and the curve of both
controls   uniform, random and positional allocations, to compare with

Pure functions of numbers: no tensor, no model, and the same answer whatever the order of the input.
"""

from .baq import closed_form
from .controls import positional, random_widths, uniform
from .exact import optimum
from .frontier import Point, cheapest, curve
from .problem import KEPT, Allocation, Choice, Damage, Group, Interactions, Problem, tie_of

__all__ = [
    "KEPT",
    "Allocation",
    "Choice",
    "Damage",
    "Group",
    "Interactions",
    "Point",
    "Problem",
    "cheapest",
    "closed_form",
    "curve",
    "optimum",
    "positional",
    "random_widths",
    "tie_of",
    "uniform",
]
