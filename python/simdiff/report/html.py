"""The frame of every page: style sheet, tiles, tables and figures, all without outside files."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from simdiff.io.kinds import GENERATOR

# Blue and orange of Okabe and Ito's palette, darker or lighter by theme. They are distinct for
# every kind of colour vision, and by lightness in print.
STYLE = """
:root { color-scheme: light dark; --ink: #1a1d21; --soft: #59636e; --paper: #fafaf8;
  --card: #ffffff; --line: #e1e4e8; --grid: #eceef0; --removed: #b8430a; --removed-bar: #e07b39;
  --band: #fbeee4; --kept: #2b6ca3; --dense-bar: #7fa8cc; --recovered-bar: #56a98a;
  --peak: #8b949e; --on-bar: #10151a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a0a9b4; --paper: #14171a;
  --card: #1b1f23; --line: #31373e; --grid: #2a2f35; --removed: #ff9a5c; --removed-bar: #d9773a;
  --band: #3a2a1e; --kept: #7db8ea; --dense-bar: #6b9cc7; --recovered-bar: #4fa386;
  --peak: #87919c; --on-bar: #0c0f12; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0.5rem 0 0.4rem; letter-spacing: -0.01em;
  overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 3rem 0 0.7rem; padding-top: 0.9rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 0.95rem; margin: 0 0 0.4rem; }
p, li { overflow-wrap: anywhere; max-width: 46rem; }
p.lead { color: var(--soft); margin-top: 0; }
p.caption, figcaption { color: var(--soft); font-size: 0.86rem; line-height: 1.45;
  margin: 0.6rem 0 0; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono",
  monospace; font-size: 0.86em; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin: 0.7rem 0;
  padding: 0.7rem 0.9rem; overflow-x: auto; line-height: 1.5; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 0.8rem;
  margin: 1.1rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 0.7rem 0.85rem; min-width: 0; }
.tile .name, .tile .detail { color: var(--soft); font-size: 0.84rem; line-height: 1.4; }
.tile .value { font-size: 1.14rem; font-weight: 600; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; line-height: 1.35; letter-spacing: -0.01em; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; margin: 0.8rem 0;
  background: var(--card); }
.scroll:focus-visible, pre:focus-visible { outline: 2px solid var(--kept); }
table { border-collapse: collapse; width: 100%; font-size: 0.84rem; line-height: 1.4;
  font-variant-numeric: tabular-nums; }
th, td { padding: 0.34rem 0.5rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td, tr:last-child th[scope=row] { border-bottom: 0; }
th { color: var(--soft); font-weight: 600; }
th[scope=row] { color: var(--ink); font-weight: 400; white-space: normal; min-width: 8.5rem; }
td.text, th.text { text-align: left; }
td.wrap { white-space: normal; overflow-wrap: anywhere; min-width: 8rem; }
.pair td.wrap { min-width: 7rem; }
.filter { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0.3rem 0.7rem;
  font-size: 0.86rem; color: var(--soft); margin: 0.8rem 0 -0.4rem; }
.filter input { font: inherit; color: var(--ink); background: var(--card); width: 15rem;
  max-width: 100%; border: 1px solid var(--line); border-radius: 6px; padding: 0.3rem 0.5rem; }
th button { all: unset; cursor: pointer; font: inherit; color: inherit; }
th button::after { content: "\\2195"; opacity: 0.45; margin-left: 0.25em; }
th[aria-sort=ascending] button::after { content: "\\2191"; opacity: 1; }
th[aria-sort=descending] button::after { content: "\\2193"; opacity: 1; }
th button:focus-visible, .filter input:focus-visible { outline: 2px solid var(--kept); }
@media print { .filter { display: none; } th button::after { content: none; } }
tr.removed td { color: var(--removed); font-weight: 600; }
tr.strong td, tr.strong th { font-weight: 600; }
.notes { padding-left: 1.1rem; margin: 0.7rem 0; }
.notes li { margin: 0.3rem 0; }
.note { border-left: 3px solid var(--removed); padding: 0.1rem 0.9rem; margin: 0.6rem 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr));
  gap: 0.8rem; align-items: start; margin: 0.8rem 0; }
.pair > * { margin: 0; min-width: 0; }
figure { margin: 0.8rem 0; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: 0.8rem 0.9rem; }
figure.narrow { max-width: 34rem; }
figure svg { width: 100%; height: auto; display: block; }
figure .wide { overflow-x: auto; }
figure .wide > * { min-width: 40rem; }
summary { cursor: pointer; margin: 0.5rem 0; color: var(--soft); }
blockquote { margin: 0.8rem 0; padding: 0.2rem 0.9rem; border-left: 3px solid var(--line);
  overflow-wrap: anywhere; }
.strip { list-style: none; display: grid; padding: 0; gap: 3px; max-width: none; margin: 0.9rem 0;
  grid-template-columns: repeat(auto-fill, minmax(1.72rem, 1fr)); }
.strip li { position: relative; background: var(--card); border: 1px solid var(--line);
  border-radius: 4px; text-align: center; padding: 0.4rem 0; font-size: 0.78rem; line-height: 1.2;
  font-variant-numeric: tabular-nums; }
.strip .removed { background: var(--removed-bar); border-color: var(--removed-bar);
  color: var(--on-bar); text-decoration: line-through; font-weight: 600; }
.strip .protected { border: 2px dashed var(--kept); padding: calc(0.4rem - 1px) 0; }
.legend { display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; color: var(--soft);
  font-size: 0.86rem; margin: 0.5rem 0; padding: 0; list-style: none; }
.legend i { display: inline-block; width: 0.95em; height: 0.95em; border-radius: 3px;
  vertical-align: -0.1em; margin-right: 0.35em; border: 1px solid var(--line); }
.legend .removed { background: var(--removed-bar); border-color: var(--removed-bar); }
.legend .protected { border: 2px dashed var(--kept); }
.legend .trained { background: var(--dense-bar); border-radius: 50%; }
.legend .apart { background: var(--removed-bar); }
.legend .kept { background: var(--card); }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
  white-space: nowrap; }
svg text { font-size: 12.5px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg text.value { fill: var(--ink); }
svg .track { fill: var(--grid); }
svg .grid { stroke: var(--grid); }
svg .base { stroke: var(--peak); }
svg .band { fill: var(--band); shape-rendering: crispEdges; }
svg .kept { fill: var(--kept); }
svg .gone { stroke: var(--removed); stroke-width: 2.4; fill: none; }
svg .peak { stroke: var(--peak); stroke-width: 1.6; }
svg .whisker { stroke: var(--ink); stroke-width: 1.3; }
svg .stem { stroke: var(--kept); stroke-width: 1.4; opacity: 0.6; }
svg .ideal { stroke: var(--ink); stroke-width: 3; }
svg .cells { shape-rendering: crispEdges; }
svg .halo { fill: none; stroke: #ffffff; stroke-width: 4.5; }
svg .chosen { fill: none; stroke: #c0300a; stroke-width: 2.5; }
svg .bar.dense { fill: var(--dense-bar); }
svg .bar.pruned { fill: var(--removed-bar); }
svg .bar.recovered { fill: var(--recovered-bar); }
svg .curve { fill: none; stroke-width: 2; }
svg .curve.dense { stroke: var(--dense-bar); }
svg .curve.pruned { stroke: var(--removed-bar); }
svg .line { fill: none; stroke-width: 1.4; }
svg .line.strong { stroke-width: 2.6; }
svg .line.marker { stroke-width: 1; }
svg .interval { stroke: none; opacity: 0.14; }
svg .ideal.thin { stroke-width: 1; stroke-dasharray: 6 3; }
svg .ours { stroke: var(--removed-bar); }
svg .ours:is(.marker, .interval) { fill: var(--removed-bar); }
svg .paper { stroke: #b98a1d; } svg .paper.marker { fill: #b98a1d; }
svg .cosine { stroke: var(--kept); } svg .cosine.marker { fill: var(--kept); }
svg .length { stroke: var(--recovered-bar); } svg .length.marker { fill: var(--recovered-bar); }
svg .blind { stroke: var(--peak); } svg .blind.marker { fill: var(--peak); }
svg .search { stroke: var(--ink); } svg .search:is(.marker, .interval) { fill: var(--ink); }
svg .ring { fill: none; stroke: var(--ink); stroke-width: 1.5; }
@media (max-width: 30rem) { main { padding: 1rem 0.8rem 3rem; } h1 { font-size: 1.4rem; }
  figure { padding: 0.6rem 0.5rem; } svg text { font-size: 13.5px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 0.5rem; }
  .tile { padding: 0.55rem 0.65rem; } .tile .value { font-size: 1.05rem; }
  .tile .name, .tile .detail { font-size: 0.78rem; } }
@media print { body { background: none; } figure, .tile, tr { break-inside: avoid; } }
"""


# Where a page has tables of class "sortable": their heads become buttons, and a field above shows
# the rows whose marked cells hold every word, a number as a whole cell. Nothing is fetched.
SCRIPT = """
for (const table of document.querySelectorAll('table.sortable')) {
  const rows = [...table.tBodies[0].rows], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement('button');
    button.type = 'button';
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener('click', () => {
      const sign = head.getAttribute('aria-sort') === 'ascending' ? -1 : 1;
      heads.forEach(other => other.removeAttribute('aria-sort'));
      head.setAttribute('aria-sort', sign > 0 ? 'ascending' : 'descending');
      const key = row => row.cells[column].dataset.sort;
      const compare = (a, b) => key(a) === undefined
        ? a.cells[column].textContent.localeCompare(b.cells[column].textContent)
        : key(a) - key(b);
      const last = row => key(row) === '';
      rows.sort((a, b) => last(a) - last(b) || (last(a) ? 0 : sign * compare(a, b)));
      table.tBodies[0].append(...rows);
    });
  });
  const field = document.createElement('label'), input = document.createElement('input');
  const count = document.createElement('output');
  field.className = 'filter';
  input.type = 'search';
  input.placeholder = table.dataset.hint;
  field.append('Filter', input, count);
  table.parentElement.before(field);
  input.addEventListener('input', () => {
    const words = input.value.toLowerCase().split(/\\s+/).filter(Boolean);
    for (const row of rows) {
      const cells = [...row.querySelectorAll('[data-find]')].map(c => c.textContent.toLowerCase());
      row.hidden = !words.every(w => cells.some(c => isNaN(w) ? c.includes(w) : c === w));
    }
    const shown = rows.filter(row => !row.hidden).length;
    count.textContent = words.length ? `${shown} of ${rows.length} rows` : '';
  });
}
"""


def document(title: str, sections: Iterable[str]) -> str:
    """A whole page around sections of HTML; `title` must be escaped already."""
    body = "\n".join(sections)
    script = f"<script>{SCRIPT}</script>" if "<table class='sortable'" in body else ""
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f"{GENERATOR}"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<link rel='icon' href='data:,'><title>simdiff: {title}</title><style>{STYLE}</style>"
        f"</head><body><main>\n{body}\n</main>{script}</body></html>\n"
    )


def tile(name: str, value: str, detail: str) -> str:
    """A tile with a number, its name and a detail; all must be escaped already."""
    return (
        f"<div class='tile'><div class='name'>{name}</div><div class='value'>{value}</div>"
        f"<div class='detail'>{detail}</div></div>"
    )


def figure(picture: str, caption: str, *, title: str = "", kind: str = "") -> str:
    """A picture with its caption; one of kind "wide" scrolls on a narrow screen."""
    head = f"<h3>{title}</h3>" if title else ""
    if kind == "wide":
        picture = f"<div class='wide' tabindex='0'>{picture}</div>"
    name = f" class='{kind}'" if kind and kind != "wide" else ""
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure{name}>{head}{picture}{below}</figure>"


def scrolled(table: str) -> str:
    """A table that scrolls horizontally if the screen is narrower."""
    return f"<div class='scroll' tabindex='0'><table>{table}</table></div>"


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    text: Iterable[int] = (0,),
    wrap: Iterable[int] = (),
) -> str:
    """A table of plain text, which is escaped here.

    Args:
        columns: heads of the columns.
        rows: cells, row by row.
        text: indices of columns aligned to the left.
        wrap: indices of columns whose text may break into lines.
    """
    left, broken = {*text, *wrap}, set(wrap)

    def cell(tag: str, index: int, value: str) -> str:
        kinds = ["text"] * (index in left) + ["wrap"] * (index in broken and tag == "td")
        kind = f" class='{' '.join(kinds)}'" if kinds else ""
        scope = " scope='col'" if tag == "th" else ""
        return f"<{tag}{kind}{scope}>{html.escape(value)}</{tag}>"

    head = "".join(cell("th", index, name) for index, name in enumerate(columns))
    body = "".join(
        f"<tr>{''.join(cell('td', index, value) for index, value in enumerate(row))}</tr>"
        for row in rows
    )
    return scrolled(f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>")


def sortable(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    keys: Iterable[Sequence[float | None]],
    *,
    text: Iterable[int] = (0,),
    find: Iterable[int] = (0,),
) -> str:
    """A table that sorts by a column and filters its rows where scripts run; else as it is.

    Args:
        columns: heads of the columns.
        rows: cells, row by row.
        keys: numbers by which the cells sort; a column without any sorts by its text, and a cell
            without one stands last.
        text: indices of columns aligned to the left.
        find: indices of columns that the filter searches.
    """
    rows, keys, left, found = list(rows), list(keys), {*text}, {*find}
    numeric = {c for c in range(len(columns)) if any(row[c] is not None for row in keys)}

    def cell(index: int, value: str, key: float | None) -> str:
        sort = f" data-sort='{'' if key is None else repr(float(key))}'" if index in numeric else ""
        mark = " data-find" if index in found else ""
        kind = " class='text'" if index in left else ""
        return f"<td{kind}{sort}{mark}>{html.escape(value)}</td>"

    head = "".join(
        f"<th{' class=text' if index in left else ''} scope='col'>{html.escape(name)}</th>"
        for index, name in enumerate(columns)
    )
    body = "".join(
        f"<tr>{''.join(map(cell, range(len(row)), row, key))}</tr>"
        for row, key in zip(rows, keys, strict=True)
    )
    hint = " or ".join(columns[index] for index in sorted(found))
    return (
        f"<div class='scroll' tabindex='0'><table class='sortable' data-hint='{html.escape(hint)}'>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def facts_table(facts: Mapping[str, Any]) -> str:
    """A table of names and values."""
    rows = "".join(
        f"<tr><th class='text' scope='row'>{html.escape(key.replace('_', ' '))}</th>"
        f"<td class='text wrap'>{html.escape(str(value))}</td></tr>"
        for key, value in facts.items()
    )
    return scrolled(f"<tbody>{rows}</tbody>")


def notes_list(notes: Iterable[str]) -> str:
    """A list of plain sentences, which are escaped here; empty without notes."""
    items = "".join(f"<li>{html.escape(note.rstrip('.'))}.</li>" for note in notes)
    return f"<ul class='notes'>{items}</ul>" if items else ""


def legend(entries: Mapping[str, str]) -> str:
    """A legend that explains CSS classes."""
    items = "".join(
        f"<li><i class='{kind}'></i>{html.escape(text)}</li>" for kind, text in entries.items()
    )
    return f"<ul class='legend'>{items}</ul>"
