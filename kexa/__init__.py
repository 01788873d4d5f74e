"""kexa: the K-EXAONE recipe (arXiv 2601.01739), end to end, at any scale."""

__version__ = "0.1.0"
