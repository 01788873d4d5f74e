"""Checkpoints in and out, in the published Hugging Face layout: the bridge to other engines."""

from kexa.interop.checkpoint import load_hf, save_hf
from kexa.interop.published import from_published, published_tensors, to_published

__all__ = ["from_published", "load_hf", "published_tensors", "save_hf", "to_published"]
