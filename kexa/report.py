"""``runs/<profile>/report.html``: one page over a run, for a phone, a desk and a printer.

Everything is in the file (figures as data URIs, no script, no font from elsewhere), so it can be
mailed. It shows what is on disk: a stage that has not run, that is out of date or whose check does
not hold says so, and the summary at the top counts it.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from kexa import stages
from kexa.pipeline import Pipeline, shown
from kexa.record import read_json, write_atomic
from kexa.stages import Stage

STYLE = """
:root { --ink: #1d2328; --soft: #5d6770; --rule: #dfe3e6; --good: #00704f; --bad: #b34700; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 54rem; padding: 1.5rem 1rem 4rem; color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; background: #fff; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 2.5rem 0 .5rem; padding-top: 1rem;
  border-top: 1px solid var(--rule); }
p { margin: .4rem 0; } a { color: inherit; }
.soft { color: var(--soft); font-size: .875rem; }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; }
.facts { display: flex; flex-wrap: wrap; gap: .75rem 2rem; margin: 1rem 0; padding: 0; }
.facts div { min-width: 6rem; } .facts dt { color: var(--soft); font-size: .8rem; }
.facts dd { margin: 0; font-size: 1.15rem; font-weight: 600; overflow-wrap: anywhere; }
.facts dd small { font-weight: 400; font-size: .8rem; color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .35rem .75rem .35rem 0; vertical-align: top;
  border-bottom: 1px solid var(--rule); }
th { font-weight: 600; color: var(--soft); font-size: .8rem; }
@media (min-width: 36rem) { td:first-child, td:last-child { white-space: nowrap; } }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
ul.checks { list-style: none; padding: 0; margin: .5rem 0; font-size: .95rem; }
ul.checks li { padding-left: 1.4rem; text-indent: -1.4rem; margin: .2rem 0; }
figure { margin: 1.25rem 0; } img { max-width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .875rem; }
summary { cursor: pointer; color: var(--soft); font-size: .875rem; margin-top: .5rem; }
@media (max-width: 36rem) { .wide { display: none; } body { padding-top: 1rem; } }
@media print {
  body { max-width: none; font-size: 10.5pt; padding: 0; }
  h2 { break-after: avoid; } figure, tr, li { break-inside: avoid; }
  summary { display: none; } a { text-decoration: none; }
  details::details-content { content-visibility: visible; }
}
"""


@dataclass(frozen=True)
class Entry:
    """A stage with what is on disk about it."""

    stage: Stage
    title: str
    state: str  # "done", "out of date", "unfinished" or "not run"
    results: Mapping[str, Any]
    done: Mapping[str, Any]
    directory: Path

    @property
    def checks(self) -> list[Mapping[str, Any]]:
        return self.results.get("checks", [])

    @property
    def headlines(self) -> list[tuple[str, Mapping[str, Any]]]:
        return [(n, v) for n, v in self.results.get("values", {}).items() if v["headline"]]


def write_report(pipeline: Pipeline) -> Path:
    """Write the page from what the stage directories hold; returns its path."""
    page = pipeline.out / "report.html"
    write_atomic(page, render(pipeline))
    return page


def render(pipeline: Pipeline) -> str:
    """The page as HTML."""
    entries = [_entry(pipeline, stage) for stage in stages.table().values()]
    body = "\n".join([*_head(pipeline, entries), *_table(entries), *map(_section, entries)])
    title = f"kexa, {escape(pipeline.config.profile)}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{title}</title>\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def readme_table(runs: Path) -> str:
    """The README's table: every notebook with minutes and memory of the runs that are there."""
    lines = ["| notebook | smoke | laptop |", "|---|--:|--:|"]
    made_on: dict[str, None] = {}  # in order, each once
    for stage in stages.table().values():
        costs = []
        for profile in ("smoke", "laptop"):
            if made_by := read_json(runs / profile / stage.name / "results.json").get(
                "environment"
            ):
                made_on[f"{profile}: {made_by['device']}, commit {made_by['commit']}"] = None
            done = read_json(runs / profile / stage.name / "done.json")
            cost = f"{done['minutes']:.1f} min, {done['peak_memory_gib']:.1f} GiB" if done else "-"
            costs.append(cost)
        link = f"[{_title(stage)}](notebooks/{stage.name}.ipynb)"
        lines.append(f"| {link} | {' | '.join(costs)} |")
    lines += [
        "",
        f"Wall clock and peak memory. {'; '.join(made_on) or 'Not measured yet'}.",
    ]
    return "\n".join(lines)


def update_readme(readme: Path, runs: Path) -> bool:
    """Put the table of :func:`readme_table` between the README's marks; whether it changed."""
    old = readme.read_text(encoding="utf-8")
    table = f"<!-- notebooks: written by `kexa notebooks --readme` -->\n{readme_table(runs)}\n"
    new = re.sub(r"<!-- notebooks:.*?(?=<!-- end -->)", lambda _: table, old, flags=re.DOTALL)
    if new != old:
        write_atomic(readme, new)
    return new != old


def _entry(pipeline: Pipeline, stage: Stage) -> Entry:
    directory = pipeline.directory(stage)
    results, done = read_json(directory / "results.json"), read_json(directory / "done.json")
    if done:
        state = "out of date" if pipeline.stale(stage) else "done"
    else:
        state = "unfinished" if (directory / "started.json").is_file() else "not run"
    return Entry(stage, _title(stage), state, results, done, directory)


def _title(stage: Stage) -> str:
    source = stage.source.read_text(encoding="utf-8") if stage.source.is_file() else ""
    heading = re.search(r"^# # (.+)$", source, re.MULTILINE)
    return heading.group(1) if heading else stage.name


def _head(pipeline: Pipeline, entries: list[Entry]) -> Iterator[str]:
    finished = sum(e.state == "done" for e in entries)
    checks = [check for e in entries for check in e.checks]
    holding = sum(check["holds"] for check in checks)
    minutes = sum(e.done.get("minutes", 0) for e in entries)
    peak = max((e.done.get("peak_memory_gib", 0) for e in entries), default=0)
    made_by = [e.results["environment"] for e in entries if e.results]
    yield "<h1>The K-EXAONE recipe, run end to end</h1>"
    yield '<p class="soft">Every number on this page was measured in this run.</p>'
    facts = {
        "profile": escape(pipeline.config.profile),
        "notebooks": _tally(finished, len(entries), "up to date"),
        "checks": _tally(holding, len(checks), "hold"),
        "minutes": f"{minutes:.1f}",
        "peak memory": f"{peak:.1f} GiB",
        "seed": str(pipeline.seed),
        "device": _distinct(made_by, "device"),
        "commit": _distinct(made_by, "commit"),
    }
    yield _facts(facts)
    if made_by:
        versions = made_by[-1]["versions"]
        shown_versions = ", ".join(f"{escape(k)} {escape(v)}" for k, v in versions.items())
        yield f'<p class="soft">Python {escape(made_by[-1]["python"])}, {shown_versions}.</p>'


def _table(entries: list[Entry]) -> Iterator[str]:
    yield '<div class="scroll"><table><thead><tr><th>notebook</th><th class="wide">headline</th>'
    yield '<th class="number">min</th><th class="number">GiB</th><th>state</th></tr></thead><tbody>'
    for e in entries:
        headline = "; ".join(f"{escape(name)} {escape(shown(v))}" for name, v in e.headlines)
        minutes = f"{e.done['minutes']:.1f}" if e.done else ""
        peak = f"{e.done['peak_memory_gib']:.1f}" if e.done else ""
        failing = any(not check["holds"] for check in e.checks)
        good = e.state == "done" and not failing
        yield (
            f'<tr><td><a href="#{e.stage.name}">{e.stage.name.replace("_", " ")}</a></td>'
            f'<td class="wide">{headline}</td><td class="number">{minutes}</td>'
            f'<td class="number">{peak}</td>'
            f'<td class="{"good" if good else "bad"}">{e.state}</td></tr>'
        )
    yield "</tbody></table></div>"


def _section(e: Entry) -> str:
    parts = [f'<h2 id="{e.stage.name}">{escape(e.title)}</h2>']
    if e.state != "done":
        parts.append(f'<p class="bad">{e.state}</p>')
    if e.headlines:
        parts.append(_facts({name: _value(value) for name, value in e.headlines}))
    if e.checks:
        lines = "".join(
            f'<li class="{"good" if c["holds"] else "bad"}">{"✓" if c["holds"] else "✗"}&ensp;'
            f'{escape(c["claim"])} <span class="soft">({escape(c["measured"])})</span></li>'
            for c in e.checks
        )
        parts.append(f'<ul class="checks">{lines}</ul>')
    for figure in e.results.get("figures", []):
        path = e.directory / figure["file"]
        if path.is_file():
            data = base64.b64encode(path.read_bytes()).decode("ascii")
            caption = escape(figure["caption"])
            parts.append(
                f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
                f"<figcaption>{caption}</figcaption></figure>"
            )
    others = {n: v for n, v in e.results.get("values", {}).items() if not v["headline"]}
    if others:
        rows = "".join(
            f'<tr><td>{escape(name)}</td><td class="number">{escape(shown(value))}</td>'
            f'<td class="soft">{escape(value["note"])}</td></tr>'
            for name, value in others.items()
        )
        parts.append(
            f"<details><summary>{len(others)} more values</summary>"
            f'<div class="scroll"><table>{rows}</table></div></details>'
        )
    return "\n".join(parts)


def _facts(facts: Mapping[str, str]) -> str:
    cells = "".join(f"<div><dt>{escape(k)}</dt><dd>{v}</dd></div>" for k, v in facts.items())
    return f'<dl class="facts">{cells}</dl>'


def _value(value: Mapping[str, Any]) -> str:
    number = escape(shown({**value, "unit": ""}))
    note = f"<br><small>{escape(value['note'])}</small>" if value["note"] else ""
    return f"{number} <small>{escape(value['unit'])}</small>{note}"


def _tally(count: int, total: int, word: str) -> str:
    return f'<span class="{"good" if count == total else "bad"}">{count} of {total} {word}</span>'


def _distinct(environments: list[Mapping[str, Any]], key: str) -> str:
    return escape(", ".join(sorted({e[key] for e in environments}))) or "none yet"
