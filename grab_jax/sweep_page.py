"""The page of a sweep: curves of leakage against the swept values, a heat map of two of them, a table of cells.

`render` needs the folder only. The page shows numbers and no text of anybody; it links to the pages of its cells.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from grab_jax import folder as folders
from grab_jax import report, sweep_chart, sweep_table


def render(base: Path) -> Path:
    """Rebuild `report.html` of a sweep from what its cells have so far, and return its path.

    Raises:
      InputError: the folder is not that of a sweep, or a file of it is damaged.
    """
    listed, rows = sweep_table.listed(base), sweep_table.collect(base)
    first = next((base / row["id"] / "run.json" for row in rows if (base / row["id"] / "run.json").is_file()), None)
    swept = listed["swept"]
    text = report.template("sweep.html.jinja").render(
        run=folders.read_json(first) if first else {},
        swept={name: ", ".join(map(sweep_table.word, values)) for name, values in swept.items()},
        rows=rows,
        columns=list(swept),
        states=Counter(row["state"] for row in rows),
        leaks=sum(row.get("outcome") == "leak shown" for row in rows),
        charts=sweep_chart.charts(swept, rows),
        heat=sweep_chart.heat(swept, rows),
        pages={row["id"] for row in rows if (base / row["id"] / "report.html").is_file()},
        compiled=sum(row["compiled"] or 0 for row in rows),
        cached=sum(row["from_cache"] or 0 for row in rows),
        word=sweep_table.word,
        span=sweep_table.span,
    )
    return report.write(base / "report.html", text)
