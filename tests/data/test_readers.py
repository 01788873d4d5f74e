"""Readers against a few bytes of each format."""

import json
import struct

from kexa.data import readers


def mo(pairs):
    """The bytes of a gettext catalogue."""
    pairs = sorted({"": "Content-Type: text/plain; charset=UTF-8\n", **pairs}.items())
    data, table = b"", []
    start = 28 + 16 * len(pairs)
    for column in (0, 1):
        for pair in pairs:
            raw = pair[column].encode()
            table.append((len(raw), start + len(data)))
            data += raw + b"\0"
    head = struct.pack("<7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 0)
    return head + b"".join(struct.pack("<2I", *entry) for entry in table) + data


def test_wiki_extracts():
    page = {"Seoul": {"title": "Seoul", "extract": "Capital of Korea.", "topic": "Places"}}
    files = {
        "w/data/summaries_en-us.json": json.dumps(page).encode(),
        "w/data/summaries_fr-fr.json": b"{}",
    }
    assert list(readers.wiki_extracts(files)) == [("en", "Seoul", "Seoul\n\nCapital of Korea.")]


def test_factbook_removes_html_and_keeps_field_names():
    page = {
        "Geography": {
            "Area": {"total": {"text": "<p>1 sq&nbsp;km</p>"}},
            "Climate": {"text": "mild"},
        }
    }
    [(category, name, text)] = readers.factbook(
        {"c/data/europe/xx.json": json.dumps(page).encode()}
    )
    assert (category, name) == ("en", "xx")
    assert text.split("\n") == ["", "Geography", "", "total: 1 sq km", "Climate: mild"]


def test_korean_lines_broken_by_a_page_are_joined_and_headings_are_not():
    broken = "가" * 35
    page = {"sections": [{"id": "1", "pages": [{"text": f"제1장\n{broken}\n다음 줄\n끝."}]}]}
    [(_, name, text)] = readers.korean_manuals({"k/manual_body.json": json.dumps(page).encode()})
    assert name == "manual_body.json#1"
    assert text == f"제1장\n{broken}다음 줄\n끝."


def test_node_docs_lose_the_closing_notice():
    files = {
        "c/docs/Node/de.md": b"# Node\n\nText.\n\n> Von KI erzeugt.\n",
        "c/docs/Node/es.md": b"# Nodo\n\n> Una cita.\n\nTexto.\n\n> Generada por IA.\n\n---\n"
        b"**Source fingerprint (SHA-256):** `936d`\n",
        "c/docs/Node/fr.md": b"x",
    }
    assert list(readers.node_docs(files)) == [
        ("de", "Node/de", "# Node\n\nText.\n"),
        ("es", "Node/es", "# Nodo\n\n> Una cita.\n\nTexto.\n"),
    ]


def test_catalogues_keep_long_translated_strings_once_and_group_them():
    long = [f"Câu số {i} được dịch ra tiếng Việt" for i in range(100)]
    pairs = {f"source {i}": text for i, text in enumerate(long)}
    pairs |= {
        "again": long[0],
        "short": "ngắn",
        "Kept in English as it is": "Kept in English as it is",
    }
    documents = list(readers.catalogues({"x/locale/vi_VN/LC_MESSAGES/app.mo": mo(pairs)}))
    assert {d[0] for d in documents} == {"vi"}
    assert sorted("\n".join(d[2] for d in documents).split("\n")) == sorted(long)
    assert [d[1] for d in documents] == [f"app.mo/vi_VN/{i}" for i in range(3)]
    assert all(len(d[2]) < readers.CATALOGUE_CHARACTERS + 100 for d in documents)


def test_docstrings_with_formulas_only():
    formula = (
        'def f():\n    r"""\n    Sum.\n\n    .. math:: \\frac{1}{2}\n    '
        + "word " * 50
        + '\n    """\n'
    )
    plain = 'def g():\n    """' + "word " * 50 + '"""\n'
    [(category, name, text)] = readers.docstrings(
        {"s/a.py": (formula + plain).encode(), "s/tests/b.py": b""}
    )
    assert (category, name) == ("stem", "s/a.py#0")
    assert text.startswith("Sum.\n\n.. math:: \\frac{1}{2}\nword")


def test_python_topics():
    files = {"pydoc_data/topics.py": b"topics = {'b': 'text b', 'a': 'text a'}\n"}
    assert list(readers.python_topics(files)) == [("en", "a", "text a"), ("en", "b", "text b")]


def test_html_help_keeps_the_article():
    page = (
        "<html><head><title>T</title></head><body><nav>menu</nav>"
        '<div id="DisplayArea" class="x"><h1>Kopf</h1><p>Ein &amp; zwei<br>drei</p></div>'
        '<div id="SearchFrame">search</div></body></html>'
    )
    files = {"usr/share/help/de/text/a.html": page.encode(), "usr/share/help/fr/text/a.html": b"x"}
    assert [(c, t) for c, _, t in readers.html_help(files)] == [("de", "Kopf\nEin & zwei\ndrei")]
