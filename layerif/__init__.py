"""Layer-wise influence functions for large language models."""

from pathlib import Path

__version__ = "0.1.0"

PACKAGE = Path(__file__).parent
"""The folder of this package: what lies below it is ours."""
