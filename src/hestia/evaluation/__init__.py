"""How good is the model: NLL and KL to its parent (``scoring``), tasks (``harness``), intervals (``paired``)."""

from .harness import run_tasks
from .paired import PairedDifference, paired_difference
from .protocols import ProtocolPerplexity, hestia_protocol_perplexity
from .scoring import Logits, Score, model_logits, score

__all__ = [
    "Logits",
    "PairedDifference",
    "ProtocolPerplexity",
    "Score",
    "hestia_protocol_perplexity",
    "model_logits",
    "paired_difference",
    "run_tasks",
    "score",
]
