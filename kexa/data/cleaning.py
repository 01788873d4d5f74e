"""The cleaning steps in the order of a list of names, and what each of them did to each source.

    filters             functions of kexa.data.filters: a document stays or goes
    mask_personal       e-mail addresses and telephone numbers become special tokens
    exact_duplicates    a text that was seen before goes
    near_duplicates     a text that resembles one that passed before goes
    decontaminate       a text that repeats an evaluation item goes

A document meets the steps one after the other and is counted by the first that removes it, so that
documents looked at = kept + removed, whatever the order. ``is_text`` has to come first: the others
may then rely on text that UTF-8 can write.

reported: "multi-faceted data filtering", no rules. chosen: the steps and their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from kexa.data import filters
from kexa.data.decontamination import Overlap
from kexa.data.document import Document
from kexa.data.duplicates import NearDuplicates, shingles
from kexa.data.personal import mask_personal
from kexa.data.sources import SourceError

Step = Callable[[Document], tuple[Document | None, str]]  # what is left, and a remark on a removal
FILTERS = {
    f.__name__: f
    for f in (
        filters.is_text,
        filters.has_length,
        filters.has_script,
        filters.is_language,
        filters.has_variety,
        filters.has_fresh_phrases,
        filters.has_own_text,
        filters.has_little_markup,
        filters.has_few_symbols,
        filters.is_unlabelled,
    )
}
STEPS = (*FILTERS, "mask_personal", "exact_duplicates", "near_duplicates", "decontaminate")
CARD_STEPS = (*FILTERS, "mask_personal", "exact_duplicates")  # before the figures in a card
EXAMPLES = 3
EXAMPLE_CHARACTERS = 80


@dataclass
class Effect:
    """What one step did to the documents of one source and category."""

    step: str
    source: str
    category: str
    removed: int = 0
    changed: int = 0
    bytes: int = 0  # UTF-8 bytes taken away
    examples: list[str] = field(default_factory=list)  # of removals and changes, the first few


class Cleaner:
    """The named steps, ready to be called with one document after the other."""

    def __init__(self, steps: Sequence[str], evaluation: Mapping[str, str]) -> None:
        """Set up the steps.

        Args:
            steps: names of :data:`STEPS`, ``is_text`` first.
            evaluation: name to text of the evaluation items for ``decontaminate``.

        Raises:
            SourceError: an unknown or repeated step, another first step than ``is_text``, or
                ``decontaminate`` without evaluation items.
        """
        for step in steps:
            if step not in STEPS:
                raise SourceError(f"data.steps names {step!r}; the steps are: {', '.join(STEPS)}")
            if steps.count(step) > 1:
                raise SourceError(f"data.steps names {step!r} twice; name it once")
        if not steps or steps[0] != "is_text":
            raise SourceError(
                f"data.steps is {list(steps)}; it must begin with 'is_text', on which the other "
                "steps rely"
            )
        if "decontaminate" in steps and not evaluation:
            raise SourceError(
                "data.steps names 'decontaminate' but there are no evaluation items to look for; "
                "name their cards in data.evaluation, or take the step out"
            )
        stateful = {
            "mask_personal": _mask,
            "exact_duplicates": _exact_duplicates(),
            "near_duplicates": _near_duplicates(),
            "decontaminate": _decontaminate(evaluation),
        }
        self._steps: dict[str, Step] = {
            name: _filter(FILTERS[name]) if name in FILTERS else stateful[name] for name in steps
        }
        self._effects: dict[tuple[str, str, str], Effect] = {}

    def __call__(self, document: Document) -> Document | None:
        """The document after all steps, or None where a step removed it."""
        for name, step in self._steps.items():
            left, remark = step(document)
            if left is not document:
                self._record(name, document, left, remark)
            if left is None:
                return None
            document = left
        return document

    def table(self) -> list[Effect]:
        """What was done so far, in the order of the steps, then by source and category.

        A step that did nothing to a source has no row there.
        """
        order = list(self._steps)
        return sorted(
            self._effects.values(), key=lambda e: (order.index(e.step), e.source, e.category)
        )

    def _record(self, step: str, before: Document, after: Document | None, remark: str) -> None:
        key = (step, before.source, before.category)
        effect = self._effects.setdefault(key, Effect(*key))
        if after is None:
            effect.removed += 1
        else:
            effect.changed += 1
        effect.bytes += before.bytes - (after.bytes if after else 0)
        if len(effect.examples) < EXAMPLES:
            effect.examples.append(f"{before.id}: {remark}")


def clean(
    documents: Iterable[Document],
    steps: Sequence[str] = STEPS,
    evaluation: Mapping[str, str] | None = None,
) -> tuple[list[Document], list[Effect]]:
    """The documents that pass every step, in order, and the table of what each step did.

    Arguments and errors are those of :class:`Cleaner`.
    """
    cleaner = Cleaner(steps, evaluation or {})
    kept = [left for document in documents if (left := cleaner(document)) is not None]
    return kept, cleaner.table()


def effect_table(effects: Iterable[Effect]) -> list[str]:
    """One line per effect, with its first example, under a line of headings."""
    effects = list(effects)
    width = max([len("source"), *(len(e.source) for e in effects)])
    lines = [f"{'step':18s} {'source':{width}s} category  removed changed        bytes  example"]
    for e in effects:
        lines.append(
            f"{e.step:18s} {e.source:{width}s} {e.category:8s} {e.removed:8,d} {e.changed:7,d} "
            f"{e.bytes:12,d}  {e.examples[0]}"
        )
    return lines


def _snippet(text: str) -> str:
    return repr(text[:EXAMPLE_CHARACTERS])


def _filter(keep: Callable[[str, str], bool]) -> Step:
    def step(document: Document) -> tuple[Document | None, str]:
        if keep(document.text, document.category):
            return document, ""
        return None, _snippet(document.text)

    return step


def _mask(document: Document) -> tuple[Document | None, str]:
    text = mask_personal(document.text, document.category)
    if text == document.text:
        return document, ""
    at = text.index("PI:")
    return replace(document, text=text), _snippet(text[max(at - EXAMPLE_CHARACTERS // 2, 0) :])


def _exact_duplicates() -> Step:
    first: dict[str, str] = {}

    def step(document: Document) -> tuple[Document | None, str]:
        if document.hash in first:
            return None, f"equals {first[document.hash]}"
        first[document.hash] = document.id
        return document, ""

    return step


def _near_duplicates() -> Step:
    seen = NearDuplicates()
    ids: list[str] = []

    def step(document: Document) -> tuple[Document | None, str]:
        mine = shingles(document.text)
        if matches := seen.matches(mine):
            return None, f"resembles {ids[matches[0]]}"
        seen.add(mine)
        ids.append(document.id)
        return document, ""

    return step


def _decontaminate(evaluation: Mapping[str, str]) -> Step:
    overlap = Overlap(evaluation)

    def step(document: Document) -> tuple[Document | None, str]:
        if found := overlap.find(document.text):
            return None, f"repeats {min(found)}"
        return document, ""

    return step
