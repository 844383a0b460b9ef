"""How the pages are made: one self-contained file of a template, whose only script sorts tables.

A page loads nothing: pictures are data URIs, and its policy lets no script run but the page's own, known by its hash.
"""

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from brainscale.provenance import write_text

SORT = """
for (const table of document.querySelectorAll("table")) {
  if (!table.tHead || table.tBodies.length != 1 || table.tBodies[0].rows.length < 2) continue;
  const body = table.tBodies[0], heads = Array.from(table.tHead.rows[0].cells);
  const key = (row, at, isNumber) => {
    const cell = row.cells[at];
    if (row.cells.length != heads.length) return null;
    const text = (cell.dataset.value ?? cell.textContent).trim();
    if (!isNumber) return text || null;
    const found = parseFloat(text.replace(/[,<≥ ]/g, "").replace("−", "-"));
    return isNaN(found) ? null : found;
  };
  heads.forEach((head, at) => {
    if (!head.textContent.trim()) return;
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const down = head.getAttribute("aria-sort") == "ascending", isNumber = head.classList.contains("n");
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const keyed = Array.from(body.rows, row => [key(row, at, isNumber), row]);
      keyed.sort(([a], [b]) => {
        if (a === null || b === null) return (a === null) - (b === null);
        const order = isNumber ? a - b : a.localeCompare(b, "en", {numeric: true});
        return down ? -order : order;
      });
      body.append(...keyed.map(([, row]) => row));
    };
  });
}
"""
"""Sorts a table by the column whose head is clicked, the other way when clicked again; the page is complete without it.

Heads of class n have numbers. A cell's data-value counts before its text; cells without a value, and rows that span
columns, come last either way.
"""


def render(template: str, script: str = SORT, **values: Any) -> str:
    """A template of this folder, filled; what is not markup is escaped. script: all that may run on the page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.globals |= {
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "zip": zip,
    }
    return environment.get_template(template).render(**values)


def put(page: str, path: Path) -> Path:
    """Write a page in one step; bytes of names that are not UTF-8 become escapes."""
    write_text(path, page.encode("utf-8", "backslashreplace").decode())
    return path
