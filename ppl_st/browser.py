"""The gene browser of a report: type a gene, see its maps side by side; one HTML fragment that needs no network.

Bokeh draws (linked pan and zoom, hover, WebGL where there is one); its script is written into the page. Data are written compactly, one gene at a
time, and unpacked by the browser only when the gene is asked for: deflated bytes in base64, coordinates and names of the cells once.

A map is stored as whole numbers up to 65534 exactly (observed counts, interval widths), anything else as one byte k per cell on a logarithmic scale:

    k = 0: 0      k = 1..254: floor x (top / floor)^((k - 1) / 253)      255: no value

with top the largest value of the gene and floor its smallest positive value, at least top / 4096. A value is thus off by a factor of at most
4096^(1 / 506) = 1.0166, one below floor by at most floor / 2. Coordinates are rounded to 1 / 65535 of the extent.
"""

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from ppl_st.errors import UserError

__all__ = ["MAX_CELLS", "RELATIVE_ERROR", "GeneMaps", "decode", "encode", "gene_browser"]

MAX_CELLS = 50_000  # a page with more is slow to draw
STEPS, RANGE = 253, 4096.0
RELATIVE_ERROR = RANGE ** (1 / (2 * STEPS)) - 1
_FIGURE = 520  # px, width that figures are laid out for; they scale with the page


@dataclass(frozen=True)
class GeneMaps:
    """What the browser shows: n cells (or spots) x g genes, every matrix [n, g] in counts.

    Attributes
    ----------
    xy, names
        Positions [n, 2] in ``xy_unit``, which is written at the maps' scale bars, and names [n] of the cells.
    genes
        Names, [g].
    mean, sd, width
        Posterior mean and sd of the rate; width of the interval of the count (infinite: no finite interval).
    truth
        Observed counts, NaN columns where a gene has none; None without any.
    facts
        Per gene, what to write beside the maps: name -> text.
    interval
        What ``width`` is the width of: "90 % interval, not recalibrated".
    noun
        "cell" or "spot".
    """

    xy: NDArray[np.floating]
    names: Sequence[str]
    genes: Sequence[str]
    mean: ArrayLike
    sd: ArrayLike
    width: ArrayLike
    truth: ArrayLike | None
    facts: Sequence[Mapping[str, str]]
    interval: str
    noun: str = "cell"
    xy_unit: str = "units of the file"


def gene_browser(maps: GeneMaps) -> str:
    """The browser as an HTML fragment: controls, figures, data and scripts.

    Raises
    ------
    UserError
        If a matrix does not fit the cells and genes, there is nothing to show, or there are more than `MAX_CELLS` cells.
    """
    matrices = {name: _matrix(maps, name) for name in ("truth", "mean", "sd", "width") if getattr(maps, name) is not None}
    if not 1 <= len(maps.names) <= MAX_CELLS or not maps.genes:
        raise UserError(
            f"gene browser: {len(maps.names)} {maps.noun}s, {len(maps.genes)} genes; it shows 1 to {MAX_CELLS} {maps.noun}s and 1 gene or more"
        )
    xy = np.asarray(maps.xy, dtype=np.float64)
    low, extent = xy.min(0), max(float(np.ptp(xy, axis=0).max()), 1e-12)
    grid = np.rint((xy - low) / extent * 65535).astype("<u2")
    data = {
        "noun": maps.noun,
        "names": _pack("\n".join(map(str, maps.names)).encode()),
        "xy": {"data": _pack(grid.T.tobytes()), "low": low.tolist(), "step": extent / 65535},
        "genes": [_gene(maps, matrices, g) for g in range(len(maps.genes))],
    }
    script, divs = _figures(maps, list(matrices), xy, extent)
    captions = [escape(_captions(maps)[name]) for name in matrices]
    figures = "".join(f"<figure>{div}<figcaption>{caption}</figcaption></figure>" for div, caption in zip(divs, captions, strict=True))
    options = "".join(f'<option value="{escape(str(gene))}">' for gene in maps.genes)
    drag = f"Drag to move, Ctrl and wheel (or pinch) to zoom: all maps go together. Hover or tap to read a {maps.noun}."
    return f"""<div id="gene-browser" role="group" aria-label="Gene browser">
<p><label for="gene">Gene</label> <input id="gene" type="search" list="genes" autocomplete="off" spellcheck="false"
 placeholder="type a gene"><datalist id="genes">{options}</datalist>
<button type="button" id="previous" aria-label="previous gene">&#8592;</button>
<button type="button" id="next" aria-label="next gene">&#8594;</button>
<span class="unit" style="white-space: nowrap">{len(maps.genes)} genes</span></p>
<dl id="gene-facts"></dl>
<p id="gene-status" role="status">Opening ...</p>
<div class="maps">{figures}</div>
<p id="readout" class="unit">{drag}</p>
</div>
<script type="application/json" id="gene-data">{_json(data)}</script>
<script>{_bokeh()}</script>
<script>{script}</script>
<script>{files("ppl_st").joinpath("browser.js").read_text(encoding="utf-8")}</script>"""


def encode(values: ArrayLike) -> dict[str, Any]:
    """One map as JSON: ``data`` (base64 of deflated bytes), ``bits`` of a code, and ``floor`` and ``ratio`` of the logarithmic scale (see the
    module's docstring; without them codes are the values). The largest code is "no value".
    """
    x = np.asarray(values, dtype=np.float64)
    known = np.isfinite(x)
    positive = x[known & (x > 0)]
    top = float(positive.max()) if positive.size else 0.0
    if (x[known] < 0).any():
        raise UserError(f"gene browser: a map holds negative values, e.g. {x[known].min():g}")
    if (x[known] == np.rint(x[known])).all() and top < 65535:
        bits = 8 if top < 255 else 16
        code = np.where(known, x, 2**bits - 1).astype(f"<u{bits // 8}")
        return {"data": _pack(code.tobytes()), "bits": bits}
    floor = max(float(positive.min()), top / RANGE)
    ratio = max((top / floor) ** (1 / STEPS), 1 + 1e-9)
    safe = np.where(known & (x > floor / 2), x, floor)
    step = np.clip(1 + np.rint(np.log(safe / floor) / np.log(ratio)), 1, STEPS + 1)
    code = np.where(known, np.where(x > floor / 2, step, 0), 255).astype(np.uint8)
    return {"data": _pack(code.tobytes()), "bits": 8, "floor": floor, "ratio": ratio}


def decode(stored: Mapping[str, Any]) -> NDArray[np.float64]:
    """The values of `encode`, as the page's script decodes them."""
    bits = stored["bits"]
    code = np.frombuffer(zlib.decompress(base64.b64decode(stored["data"])), f"<u{bits // 8}").astype(np.float64)
    if "floor" not in stored:
        return np.where(code == 2**bits - 1, np.nan, code)
    return np.where(code == 255, np.nan, np.where(code == 0, 0.0, stored["floor"] * stored["ratio"] ** (code - 1)))


def upper_limit(values: NDArray[np.floating]) -> float:
    """Top of a colour scale: the 99.5 % quantile of the positive values, so that one extreme cell does not blank the map; 1 without any."""
    positive = values[np.isfinite(values) & (values > 0)]
    return float(np.quantile(positive, 0.995)) if positive.size else 1.0


# ---- helpers ----


def _matrix(maps: GeneMaps, name: str) -> NDArray[np.float64]:
    matrix = np.asarray(getattr(maps, name), dtype=np.float64)
    if matrix.shape != (len(maps.names), len(maps.genes)) or len(maps.xy) != len(maps.names) or len(maps.facts) != len(maps.genes):
        raise UserError(
            f"gene browser: {name} has shape {matrix.shape}; there are {len(maps.names)} {maps.noun}s, {len(maps.xy)} positions, "
            f"{len(maps.genes)} genes, {len(maps.facts)} facts"
        )
    return matrix


def _gene(maps: GeneMaps, matrices: Mapping[str, NDArray[np.float64]], g: int) -> dict[str, Any]:
    columns = {name: matrix[:, g] for name, matrix in matrices.items()}
    shared = np.concatenate([columns[name] for name in ("truth", "mean") if name in columns])
    high = {name: upper_limit(shared if name in ("truth", "mean") else column) for name, column in columns.items()}
    return {
        "name": str(maps.genes[g]),
        "facts": [[name, text] for name, text in maps.facts[g].items()],
        "high": high,
        "cut": {name: int((column[np.isfinite(column)] > high[name]).sum()) for name, column in columns.items()},
        "maps": {name: encode(column) for name, column in columns.items()},
    }


def _captions(maps: GeneMaps) -> dict[str, str]:
    """What each map shows, in a sentence."""
    return {
        "truth": f"Observed counts per {maps.noun}, grey where the gene was not measured.",
        "mean": f"Expected counts per {maps.noun}, without the noise of counting, on the scale of the observed map if there is one.",
        "sd": f"What the model does not know of the expected count, as a standard deviation in counts per {maps.noun}.",
        "width": f"Width of the {maps.interval} of the count in counts per {maps.noun}, noise of counting included, grey where it has no finite end.",
    }


def _figures(maps: GeneMaps, names: list[str], xy: NDArray[np.float64], extent: float) -> tuple[str, list[str]]:
    """Script that makes the empty figures, and their places in the page."""
    from bokeh.embed import components
    from bokeh.models import ColumnDataSource, DataRange1d, HoverTool, LinearColorMapper, ScaleBar, WheelZoomTool
    from bokeh.models.annotations import ColorBar
    from bokeh.models.annotations.dimensional import ImperialLength
    from bokeh.palettes import Cividis256, Viridis256
    from bokeh.plotting import figure

    titles = {
        "truth": ("Observed", "counts", "observed count"),
        "mean": ("Predicted mean", f"expected counts per {maps.noun}", "predicted mean"),
        "sd": ("Doubt about the mean (sd)", f"sd of the expected counts per {maps.noun}", "sd of the mean"),
        "width": (f"Width of the {maps.interval}", f"counts per {maps.noun}, noise of a count included", "interval width"),
    }
    source = ColumnDataSource({name: [] for name in ("x", "y", "name", *names)}, name="cells")
    ranges = DataRange1d(range_padding=0.02), DataRange1d(range_padding=0.02, flipped=True)
    spread = np.ptp(xy, axis=0) / extent
    radius = _radius(xy, extent)
    height = int(_FIGURE * np.clip(spread[1] / max(spread[0], 1e-3), 0.5, 1.15)) + 90
    shared = LinearColorMapper(palette=Viridis256, low=0, high=1, nan_color="#cccccc", name="color-mean")
    drawn = []
    for name in names:
        title, unit, _ = titles[name]
        mapper = shared
        if name in ("sd", "width"):
            mapper = LinearColorMapper(palette=Cividis256, low=0, high=1, nan_color="#cccccc", name=f"color-{name}")
        one: Any = figure(
            name=f"map-{name}", title=title, width=_FIGURE, height=height, sizing_mode="scale_width", x_range=ranges[0], y_range=ranges[1],
            match_aspect=True, tools="pan,box_zoom,reset,tap", output_backend="webgl", toolbar_location="above",
        )  # fmt: skip
        dots = one.circle(
            "x", "y", radius=radius, source=source, fill_color={"field": name, "transform": mapper}, line_color=None,
            nonselection_fill_alpha=1.0, selection_line_color="#d55e00", selection_line_width=3, selection_fill_alpha=1.0,
        )  # fmt: skip
        dots.nonselection_glyph = dots.glyph
        tips = [(titles[other][2], f"@{other}{{0.[0000]}}") for other in names]
        one.add_tools(
            WheelZoomTool(modifiers={"ctrl": True}),
            HoverTool(renderers=[dots], tooltips=[(maps.noun, "@name"), *tips], limit=1),
        )
        one.add_layout(ColorBar(color_mapper=mapper, title=unit, height=10, orientation="horizontal"), "below")
        # of the classes with a basis of one's own Bokeh's script (3.9) knows only this one
        length = ImperialLength(basis={maps.xy_unit: (1.0, maps.xy_unit)}, ticks=[1, 2, 5, 10, 20, 50, 100, 200, 500])
        bar = {"unit": maps.xy_unit, "dimensional": length, "label": f"@{{value}} {maps.xy_unit}", "orientation": "horizontal"}
        one.add_layout(ScaleBar(**bar, location="bottom_left", background_fill_alpha=0.8))
        one.xaxis.visible = one.yaxis.visible = False
        one.grid.visible = False
        one.toolbar.logo = None
        one.toolbar.autohide = False
        drawn.append(one)
    script, divs = components(drawn, wrap_script=False)
    return script, list(divs)


def _radius(xy: NDArray[np.float64], extent: float) -> float:
    """Half of the median distance to the fourth neighbour: spots of a grid touch, cells of a tissue nearly do."""
    if len(xy) < 5:
        return extent / 20
    some = xy[:: max(1, len(xy) // 5000)]
    distance = np.asarray(cKDTree(xy).query(some, k=5)[0])
    return max(float(np.median(distance[:, 4])) / 2, extent / 2000)


def _bokeh() -> str:
    from bokeh.resources import Resources

    return "\n".join(Resources(mode="inline", components=["bokeh", "bokeh-gl"]).js_raw)


def _pack(raw: bytes) -> str:
    return base64.b64encode(zlib.compress(raw, 9)).decode("ascii")


def _json(content: Any) -> str:
    """JSON that cannot end the script element that it stands in."""
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
