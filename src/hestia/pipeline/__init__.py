"""The main job, from a pretrained checkpoint to verified files.

``run.py`` has the stages in order; ``workspace.py`` what they start from; ``planning.py``, ``fitting.py``,
``scoring.py``, ``delivery.py`` and ``record.py`` the stages themselves; ``artefacts.py`` the names of what they leave.
"""

from .delivery import digest, export_and_verify, record_export
from .run import Run, check, quantize
from .workspace import Workspace

__all__ = ["Run", "Workspace", "check", "digest", "export_and_verify", "quantize", "record_export"]
