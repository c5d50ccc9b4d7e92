"""One self-contained HTML page: text, tables with units, figures as inline PNG, reading aid, manifest.

No JavaScript, no links, no fonts from elsewhere: the file can be mailed. Everything that came from the user
is escaped. `write_report` lays out what the caller decides; `report_folder` makes the plain report of a run
folder or an evaluation from the files in it, without loading the model. `overview` puts a long summary into
tables that fit a terminal.
"""

import base64
import io
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ppl_st.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Section", "Table", "overview", "report_folder", "write_report"]

# Metrics of an evaluation that are worth a column, by table: column of summary.csv -> name and direction.
OVERVIEW = {
    "Raw counts": {"raw_pcc": "PCC", "raw_scc": "SCC", "raw_partial_pcc": "PCC given depth"},
    "Log scale (per depth)": {"log_pcc": "PCC", "log_scc": "SCC", "log_partial_pcc": "PCC given depth"},
    "Predictive distribution": {"log_score": "log score", "crps": "CRPS", "coverage_90": "coverage 90 %"},
    "Other": {"raw_r2": "R2", "log_ssim": "SSIM (log)", "seconds": "seconds", "peak_gb": "peak GB"},
}


@dataclass(frozen=True)
class Table:
    """A table of a report.

    Parameters
    ----------
    caption
        What the rows are and what to see in them.
    frame
        The numbers; a meaningful index becomes the first column, the default 0..n-1 index is left out.
    units
        Column -> unit, set behind the column name.
    """

    caption: str
    frame: pd.DataFrame
    units: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """One section: paragraphs (split at blank lines), then tables, then figures (caption -> figure)."""

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    figures: "Mapping[str, Figure]" = field(default_factory=dict)


HOW_TO_READ = {
    "rate": "The expected count of a gene in a cell, without observation noise. Its sd is what the model "
    "does not know.",
    "count": "A count that could be observed: the rate plus observation noise. Its sd is larger, and only "
    "its intervals should be held against data.",
    "held-out genes": "Genes that were hidden from the fit; every score is computed on them only.",
    "coverage": "Share of held-out counts inside the interval, randomised because counts are discrete. A "
    "90 % interval should hold 90 %: less is over-confident, more is needlessly wide. Look at the spread "
    "over genes as well as at the overall number.",
    "PCC, SCC": "Pearson and Spearman correlation over cells, per gene; 1 is perfect, a constant "
    "prediction counts as 0.",
    "depth-controlled": "Correlation after the total count of the cell is accounted for. Cell size alone "
    "can explain much of a plain correlation.",
    "noise ceiling": "The best correlation any rate could reach against counts with Poisson noise. Compare "
    "with it, not with 1.",
    "log score, CRPS": "Proper scores of the whole predictive distribution. A higher log score and a lower "
    "CRPS are better; only differences on the same genes and cells mean something.",
    "baselines": "Cheap methods on the same split. Rows marked as upper reference have seen the truth on "
    "other cells.",
}

_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 70rem; margin: 2rem auto; }
body { padding: 0 1rem; } h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption, figcaption { text-align: left; color: #555; padding: .4rem 0; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #eee; }
th:first-child, td:first-child { text-align: left; } td { white-space: pre-line; }
.wide { overflow-x: auto; margin: 1rem 0; } .unit { font-weight: normal; color: #555; }
figure { margin: 1.5rem 0; } img { max-width: 100%; }
dt { font-weight: 600; } dd { margin: 0 0 .6rem 0; }
pre { overflow-x: auto; background: #f6f6f6; padding: 1rem; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for section in sections %}
<section>
<h2>{{ section.title }}</h2>
{% for paragraph in section.paragraphs %}
<p>{{ paragraph }}</p>
{% endfor %}
{% for table in section.tables %}
<div class="wide"><table>
<caption>{{ table.caption }}</caption>
<thead><tr>
{% for name, unit in table.columns %}
<th>{{ name }}{% if unit %} <span class="unit">({{ unit }})</span>{% endif %}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in table.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% endfor %}
{% for caption, png in section.figures %}
<figure><img alt="{{ caption }}" src="data:image/png;base64,{{ png }}">
<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
</section>
{% endfor %}
<section>
<h2>How to read this</h2>
<dl>
{% for term, meaning in how_to_read.items() %}
<dt>{{ term }}</dt><dd>{{ meaning }}</dd>
{% endfor %}
</dl>
</section>
{% if manifest %}
<section>
<h2>How this was made</h2>
<pre>{{ manifest }}</pre>
</section>
{% endif %}
</body>
</html>
"""


def write_report(
    path: str | Path, title: str, sections: Sequence[Section], *, manifest: Mapping[str, Any] | None = None
) -> None:
    """Write the sections as one HTML file: the whole file or nothing.

    Parameters
    ----------
    path
        The file to write.
    manifest
        What ``config.manifest`` made; shown at the end, so that the numbers can be repeated.

    Raises
    ------
    UserError
        If ``path`` cannot be written.
    """
    from jinja2 import Environment, StrictUndefined

    from ppl_st.io import atomic

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    html = environment.from_string(_TEMPLATE).render(
        title=title,
        sections=[_section(section) for section in sections],
        how_to_read=HOW_TO_READ,
        manifest=json.dumps(manifest, indent=2) if manifest else None,
    )
    with atomic(path) as temporary:
        Path(temporary).write_text(html, encoding="utf-8")


def overview(summary: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The summary of an evaluation as small tables of text, methods by rank: title -> methods x metrics.

    A cell holds mean / median, then [95 % bootstrap interval over genes] of the mean and #rank.
    """
    tables = {}
    # best raw PCC first, the upper reference (no rank) last
    first = summary[summary["metric"] == "raw_pcc"].sort_values("rank", na_position="last", kind="stable")
    for title, columns in OVERVIEW.items():
        cells = {}
        for metric, name in columns.items():
            rows = summary[summary["metric"] == metric].set_index("method")
            if len(rows):
                texts = [_interval(row) for _, row in rows.iterrows()]
                cells[name] = pd.Series(texts, index=rows.index, dtype=object)
        if cells:
            table = pd.DataFrame(cells)
            table = table.reindex([method for method in first["method"] if method in table.index]).fillna("")
            kinds = first.set_index("method")["kind"]
            names = [f"{name}\n({kinds[name]})" for name in table.index]
            tables[title] = table.set_axis(pd.Index(names, name="method"))
    return tables


def _interval(row: "pd.Series[Any]") -> str:
    if pd.isna(row["lo"]):
        return _cell(float(row["mean"]))
    rank = "" if pd.isna(row["rank"]) else f" #{int(row['rank'])}"
    return f"{row['mean']:.3f} / {row['median']:.3f}\n[{row['lo']:.3f}, {row['hi']:.3f}]{rank}"


def report_folder(folder: str | Path, path: str | Path) -> None:
    """Write the plain report of a run folder or of an evaluation folder to ``path``.

    Raises
    ------
    UserError
        If ``folder`` is neither, or an unfinished run.
    """
    folder = Path(folder)
    if (folder / "summary.csv").is_file() and (folder / "scores.csv").is_file():
        title, sections, record = f"Evaluation {folder.name}", _evaluation(folder), "evaluation.json"
    elif (folder / "manifest.json").is_file():
        title, sections, record = f"Run {folder.name}", _run(folder), "manifest.json"
    else:
        inner = f"; it holds a run: give {folder / 'run'}" if (folder / "run").is_dir() else ""
        missing = "" if folder.exists() else " (it does not exist)"
        raise UserError(f"{folder}: neither a run folder nor an evaluation{missing}{inner}")
    write_report(path, title, sections, manifest=_json(folder / record))


def _evaluation(folder: Path) -> list[Section]:
    from ppl_st.plots import metric_strip

    summary, scores = (pd.read_csv(folder / f"{name}.csv") for name in ("summary", "scores"))
    tables = [
        Table(f"{title}: mean / median over genes, [95 % interval of the mean], #rank", table)
        for title, table in overview(summary).items()
    ]
    panels = {"raw_pcc": "PCC, raw counts", "raw_partial_pcc": "PCC given depth", "log_pcc": "PCC, log scale"}
    figures = {"One dot per held-out gene, the bar is the median": metric_strip(scores, panels)}
    genes, folds = scores["gene"].nunique(), scores["fold"].nunique()
    text = f"{genes} held-out genes in {folds} fold{'s' if folds > 1 else ''}. Every row saw the same split."
    return [Section("Scores", text, tables, figures)]


def _run(folder: Path) -> list[Section]:
    from ppl_st.plots import loss_curve

    record = _json(folder / "fit.json") if (folder / "fit.json").is_file() else {}
    if record.get("status") != "done":
        raise UserError(f"{folder}: the fit is not finished; continue it with `ppl-st fit ... --resume`")
    manifest = _json(folder / "manifest.json")
    facts = {
        "method": manifest.get("method"),
        "preset": manifest.get("preset"),
        "seed": manifest.get("seed"),
        "chains": record.get("chains"),
        "steps": record.get("steps"),
        "stopped": record.get("stop_reason"),
        "seconds of training": record.get("seconds"),
        "peak memory (GB)": record.get("peak_memory_bytes", float("nan")) / 1e9,
        "skipped steps (not finite)": len(record.get("skipped", [])),
    }
    settings = _flat(tomllib.loads((folder / "config.toml").read_text(encoding="utf-8")))
    tables = [
        Table(caption, pd.DataFrame({"value": list(rows.values())}, index=pd.Index(list(rows), name="name")))
        for caption, rows in (("The fit", facts), ("Settings", settings))
    ]
    figures = {"Loss of the variational fit": loss_curve(record["losses"], unit="loss per entry")}
    return [Section("Fit", tables=tables, figures=figures)]


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: str(value)}
    return flat


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); the folder is damaged, make it again") from error
    assert isinstance(content, dict)
    return content


def _section(section: Section) -> dict[str, Any]:
    return {
        "title": section.title,
        "paragraphs": [part.strip() for part in section.text.split("\n\n") if part.strip()],
        "tables": [_table(table) for table in section.tables],
        "figures": [(caption, _png(figure)) for caption, figure in section.figures.items()],
    }


def _table(table: Table) -> dict[str, Any]:
    frame = table.frame
    if not isinstance(frame.index, pd.RangeIndex):
        frame = frame.reset_index()
    return {
        "caption": table.caption,
        "columns": [(name, table.units.get(name, "")) for name in map(str, frame.columns)],
        "rows": [[_cell(value) for value in row] for row in frame.itertuples(index=False)],
    }


def _cell(value: Any) -> str:
    """Four significant digits for a float, nothing for a missing value, everything else as it prints."""
    if pd.isna(value):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _png(figure: "Figure") -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130)
    return base64.b64encode(stream.getvalue()).decode("ascii")
