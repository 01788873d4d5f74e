"""Text in: sources with cards, filters, the split corpus, packed batches, synthetic documents."""

from kexa.data.corpus import CATEGORIES, Corpus, load_corpus
from kexa.data.document import Document
from kexa.data.packing import Mixture, TokenizedDocuments, balanced, encode
from kexa.data.sources import SourceError

__all__ = [
    "CATEGORIES",
    "Corpus",
    "Document",
    "Mixture",
    "SourceError",
    "TokenizedDocuments",
    "balanced",
    "encode",
    "load_corpus",
]
