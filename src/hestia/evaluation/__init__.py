"""How good is the model: NLL and KL to its parent (``scoring``), tasks (``harness``), intervals (``paired``),
finished runs against each other (``comparison``).
"""

from .comparison import Comparison, ScoredRun, compare_runs
from .harness import check_tasks, run_tasks
from .paired import PairedDifference, gap_closed, holm, over_blocks, paired_difference, paired_p_value
from .protocols import PAPER_TOKENS, ProtocolPerplexity, hestia_protocol_perplexity
from .scoring import Logits, Score, model_logits, score
from .shared import shared_score

__all__ = [
    "PAPER_TOKENS",
    "Comparison",
    "Logits",
    "PairedDifference",
    "ProtocolPerplexity",
    "Score",
    "ScoredRun",
    "check_tasks",
    "compare_runs",
    "gap_closed",
    "hestia_protocol_perplexity",
    "holm",
    "model_logits",
    "over_blocks",
    "paired_difference",
    "paired_p_value",
    "run_tasks",
    "score",
    "shared_score",
]
