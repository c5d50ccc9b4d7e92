"""One self-contained HTML page: text, warnings, tables with units, figures as inline PNG, a gene browser, reading aid, manifest.

Nothing comes from elsewhere, and a content security policy in the page forbids it: the file can be mailed and opened offline. Everything
that came from the user is escaped. `write_report` lays out what the caller decides; `evaluation_report` makes the report of an evaluation
from its files, `ppl_st.report_run` that of a run. `overview` puts a long summary into tables that fit a terminal.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ppl_st.evaluation_folder import read_scores, read_summary
from ppl_st.run_folder import read_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Section", "Table", "evaluation_report", "overview", "write_report"]

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
    links
        Entry of the first column -> address within the page.
    folded
        Whether the reader opens the table by a click on its caption.
    """

    caption: str
    frame: pd.DataFrame
    units: Mapping[str, str] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """One section: paragraphs (split at blank lines), warnings, ``html`` of this package's own making (a gene browser; not escaped), then
    tables, then figures (caption -> figure).
    """

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    figures: "Mapping[str, Figure]" = field(default_factory=dict)
    warnings: Sequence[str] = ()
    html: str = ""


HOW_TO_READ = {
    "Where to start": "Read the warnings first. Then look up your gene and its trust: how far its predicted pattern stands out of counting noise. "
    "A wide interval need not speak against a pattern: doubt about the level of a gene is shared by all cells and moves them together.",
    "predicted mean (rate)": "The expected count of a gene in a cell, without observation noise: what to plot, and what to hand on as the "
    "imputed value. It is smoother than any observed map, because it holds no noise.",
    "doubt about the mean (sd of the rate)": "What the model does not know about the expected count: the state of the cell, the level of "
    "the gene. More counts in the cell or a better reference would make it smaller.",
    "interval of the count": "Where an observed count should lie: the doubt about the mean plus the noise of counting, which no model can "
    "remove. Only this interval should be held against data. It is wide where a gene is high; compare it with the mean.",
    "trust": "How far the predicted pattern of a gene stands out of counting noise: the share of the counts' variance over cells that the "
    "prediction could explain at best, 0 to 1. It ranks genes before there is any truth; it is no accuracy, and where a truth is given, "
    "look how well it ranks.",
    "held-out genes": "Genes that were hidden from the fit; every score is computed on them only.",
    "coverage": "Share of held-out counts inside the interval, randomised because counts are discrete. A 90 % interval should hold 90 %: "
    "less is over-confident, more is needlessly wide. Look at the spread over genes as well as at the overall number.",
    "PIT": "Where a held-out count lies within its forecast: 0 at the lower end, 1 at the upper one, spread at random over the probability of its "
    "own value. Flat is right; high at both ends means intervals that are too short, a hill ones that are too wide, a slope a level that is off.",
    "variance: pattern, doubt, noise": "Where the predicted variance of a gene's counts comes from: differences between cells that are predicted, "
    "what is not known of the expected counts, and counting. The three shares add up to 1. Doubt about a gene's level is part of the second and "
    "does not blur its pattern, so a large second share alone is no reason to dismiss a gene.",
    "predictive checks": "Statistics of measured counts among those of counts that the model makes up. A statistic outside its band is a side of the "
    "data that the model does not reproduce.",
    "between fits": "The part of the doubt about the mean that comes from fits (other seeds, other starts) that disagree. Where it is large, a "
    "single fit would have been surer than it had a right to be.",
    "recalibrated": "Forecasts corrected by what went wrong on genes of the panel that were hidden from further fits. The aim is the coverage "
    "on average over new genes, not of each single gene.",
    "PCC, SCC": "Pearson and Spearman correlation over cells, per gene; 1 is perfect, a constant prediction counts as 0.",
    "depth-controlled": "Correlation after the total count of the cell is accounted for. Cell size alone can explain much of a plain correlation.",
    "noise ceiling": "About the correlation that the true rate would reach if counts were Poisson around it. Compare with it, not with 1; it is an "
    "estimate, and noise beyond Poisson lowers it.",
    "log score, CRPS": "Proper scores of the whole predictive distribution. A higher log score and a lower CRPS are better; only differences "
    "on the same genes and cells mean something.",
    "baselines": "Cheap methods on the same split. Rows marked as upper reference have seen the truth on other cells.",
}

_POLICY = "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; overflow-wrap: anywhere; } h2 { margin-top: 2.5rem; } p, dd, li { max-width: 46rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
figcaption, summary { text-align: left; color: #555; padding: .4rem 0; max-width: 46rem; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #eee; }
th:first-child, td:first-child { text-align: left; } td { white-space: pre-line; }
.wide { overflow-x: auto; } .unit { font-weight: normal; color: #555; }
summary { cursor: pointer; } details { max-height: 30rem; overflow: auto; margin: 1rem 0; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; } @media (max-width: 40rem) { img.broad { max-width: none; } } a { color: #0060a8; }
dt { font-weight: 600; } dd { margin: 0 0 .6rem 0; }
pre { overflow-x: auto; background: #f6f6f6; padding: 1rem; }
.warning { border-left: 4px solid #d55e00; background: #fdf3ec; padding: .5rem .8rem; margin: .5rem 0; max-width: 46rem; }
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 0 2rem; align-items: start; }
.figures figure { min-width: 0; } .across { grid-column: 1 / -1; }
.maps figure { margin: 0; min-width: 0; }
#gene-browser input, #gene-browser button { font: inherit; padding: .3rem .5rem; min-height: 2.4rem; }
#gene-browser input { width: 12rem; max-width: 50%; } #gene-facts { display: flex; flex-wrap: wrap; gap: .3rem 1.6rem; margin: .5rem 0; }
#gene-facts dt { font-weight: normal; color: #555; font-size: .85rem; } #gene-facts dd { margin: 0; } #gene-status { color: #555; margin: .3rem 0; }
#readout { min-height: 3rem; max-width: none; margin: .5rem 0; padding: .3rem 0; position: sticky; bottom: 0; background: #fff;
  border-top: 1px solid #eee; }
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
{% for warning in section.warnings %}
<p class="warning">{{ warning }}</p>
{% endfor %}
{{ section.html | safe }}
{% for table in section.tables %}
{% if table.folded %}<details><summary>{{ table.caption }}</summary>{% else %}<figure><figcaption>{{ table.caption }}</figcaption>{% endif %}
<div class="wide"><table>
<thead><tr>
{% for name, unit in table.columns %}
<th>{{ name }}{% if unit %} <span class="unit">({{ unit }})</span>{% endif %}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in table.rows %}
<tr>
{%- for cell in row %}<td>
{%- if loop.first and cell in table.links %}<a href="{{ table.links[cell] }}">{{ cell }}</a>{% else %}{{ cell }}{% endif -%}
</td>{% endfor -%}
</tr>
{% endfor %}
</tbody>
</table></div>
{% if table.folded %}</details>{% else %}</figure>{% endif %}

{% endfor %}
{% if section.figures %}<div class="figures">{% endif %}

{% for caption, png, width in section.figures %}
<figure{% if width > 600 %} class="across"{% endif %}>
<div class="wide"><img alt="{{ caption }}" style="width: {{ width }}px" src="data:image/png;base64,{{ png }}"
{%- if width > 600 %} class="broad"{% endif %}></div>
<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
{% if section.figures %}</div>{% endif %}

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
        policy=_POLICY,
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
    tables, titles = {}, {title: title for title in OVERVIEW}
    # best raw PCC first, the upper reference (no rank) last
    first = summary[summary["metric"] == "raw_pcc"].sort_values("rank", na_position="last", kind="stable")
    if "log_partial_pcc" not in set(summary["metric"]):  # hidden spots: their depth is part of what was asked
        titles["Log scale (per depth)"] = "log(1 + count)"
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
            tables[titles[title]] = table.set_axis(pd.Index(names, name="method"))
    return tables


def _interval(row: "pd.Series[Any]") -> str:
    if pd.isna(row["lo"]):
        return _cell(float(row["mean"]))
    rank = "" if pd.isna(row["rank"]) else f" #{int(row['rank'])}"
    return f"{row['mean']:.3f} / {row['median']:.3f}\n[{row['lo']:.3f}, {row['hi']:.3f}]{rank}"


def evaluation_report(folder: Path, path: str | Path) -> None:
    """Write the report of an evaluation folder to ``path``."""
    write_report(path, f"Evaluation {folder.name}", _evaluation(folder), manifest=read_json(folder / "evaluation.json"))


def _evaluation(folder: Path) -> list[Section]:
    from ppl_st.plots import metric_strip

    scores, summary = read_scores(folder), read_summary(folder)
    tables = [
        Table(f"{title}: mean / median over genes, [95 % interval of the mean], #rank", table)
        for title, table in overview(summary).items()
    ]
    panels = {"raw_pcc": "PCC, raw counts", "raw_partial_pcc": "PCC given depth", "log_pcc": "PCC, log scale"}
    figures = {
        "Correlation with the held-out counts (no unit, 1 is perfect): one dot per gene, bar and number at the median. The further right, the "
        "better; methods whose clouds overlap differ less than their genes do.": metric_strip(scores, panels)
    }
    genes, folds = scores["gene"].nunique(), scores["fold"].nunique()
    text = f"{genes} held-out genes in {folds} fold{'s' if folds > 1 else ''}. Every row saw the same split."
    return [Section("Scores", text, tables, figures)]


def _section(section: Section) -> dict[str, Any]:
    return {
        "title": section.title,
        "paragraphs": [part.strip() for part in section.text.split("\n\n") if part.strip()],
        "warnings": section.warnings,
        "html": section.html,
        "tables": [_table(table) for table in section.tables],
        "figures": [(caption, _png(figure), round(80 * figure.get_figwidth())) for caption, figure in section.figures.items()],
    }


def _table(table: Table) -> dict[str, Any]:
    frame = table.frame
    if not isinstance(frame.index, pd.RangeIndex):
        frame = frame.reset_index()
    return {
        "caption": table.caption,
        "columns": [(name, table.units.get(name, "")) for name in map(str, frame.columns)],
        "rows": [[_cell(value) for value in row] for row in frame.itertuples(index=False)],
        "links": table.links,
        "folded": table.folded,
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
