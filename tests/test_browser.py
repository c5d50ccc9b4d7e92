"""The gene browser: what is stored is what was predicted, the page asks for nothing, and a reader can search, hover, tap and zoom."""

import re
from dataclasses import replace
from html import unescape

import chromium
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ppl_st import browser
from ppl_st.browser import RELATIVE_ERROR, GeneMaps, decode, encode, gene_browser
from ppl_st.errors import UserError
from ppl_st.report import Section, write_report

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:bokeh")


@settings(max_examples=200, deadline=None)
@given(
    arrays(np.float32, st.integers(1, 40), elements=st.floats(0, 2.0**60, width=32)),
    st.sampled_from([1.0, 1e-6, 1e-20]),
    st.sets(st.integers(0, 39)),
)
def test_stored_values_are_as_close_as_the_page_says(values, scale, missing):
    x = values.astype(np.float64) * scale
    for at in missing:
        if at < len(x):
            x[at] = np.nan if at % 2 else np.inf
    back = decode(encode(x))
    known = np.isfinite(x)
    assert np.isnan(back[~known]).all()
    top = x[known].max(initial=0.0)
    error = np.abs(back - x)[known]
    assert (error <= np.maximum(1.0001 * RELATIVE_ERROR * x[known], top / 4096 / 2) + 1e-300).all()


@pytest.mark.parametrize("top, bits", [(254, 8), (255, 16), (65534, 16)])
def test_counts_are_stored_exactly(top, bits):
    x = np.array([0.0, 1, 7, top, np.nan])
    stored = encode(x)
    assert stored["bits"] == bits and "floor" not in stored
    np.testing.assert_array_equal(decode(stored), x)


def test_negative_values_and_wrong_shapes_are_refused(world):
    with pytest.raises(UserError, match="negative"):
        encode([-1.0, 2.0])
    for name, value in {"mean": world.mean[:-1], "sd": world.sd[:, :2], "xy": world.xy[1:], "facts": [{}]}.items():
        with pytest.raises(UserError, match="gene browser"):
            gene_browser(GeneMaps(**{**vars(world), name: value}))


def test_upper_limit_ignores_zeros_and_single_cells():
    x = np.r_[np.zeros(10_000), np.full(999, 2.0), 1e6]
    assert browser.upper_limit(x) == 2.0
    assert browser.upper_limit(np.zeros(5)) == 1.0 and browser.upper_limit(np.array([np.nan, np.inf])) == 1.0


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    xy = rng.random((400, 2)) * [2000, 1500]
    mean = np.exp(np.stack([np.sin(xy[:, 0] / 300), np.cos(xy[:, 1] / 200), xy[:, 0] / 1000, xy[:, 1] / 1000], 1))
    truth = rng.poisson(mean).astype(float)
    truth[:, 2] = np.nan  # a gene without a truth
    width = np.rint(3 * np.sqrt(mean))
    width[0, 0] = np.inf
    facts = [{"trust": "0.5"}, {"trust": "0.01 (low)"}, {}, {}]
    names = [f"cell<{i}>" for i in range(400)]
    return GeneMaps(xy, names, ["Gad1", "Gad2", "</script>x", "GAD2"], mean, 0.3 * mean, width, truth, facts, "90 % interval (raw)")


@pytest.fixture(scope="module")
def page(world, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(path, "A run", [Section("Gene browser", "About.", html=gene_browser(world))])
    return path


def test_every_map_has_a_sentence_and_the_unit_of_places(world):
    html = gene_browser(replace(world, xy_unit="um", noun="spot"))
    found = re.findall(r"<figcaption>(.*?)</figcaption></figure>", html)
    assert len(found) == 4 and all(one.endswith(".") and "per spot" in one for one in found)
    assert html.count('"@{value} um"') == 4  # at the scale bars


def test_nothing_in_the_page_is_elsewhere(page):
    html = page.read_text(encoding="utf-8")
    assert "Content-Security-Policy" in html and "default-src 'none'" in unescape(html)
    markup = re.sub(r"<script[^>]*>.*?</script>", "", html, flags=re.DOTALL)
    assert not re.search(r"https?://|src=\"(?!data:)|<link|@import", markup)
    assert not re.search(r"<script[^>]+src", html)
    assert "</script>x" not in html  # a gene's name cannot end a script


needs_chromium = pytest.mark.skipif(chromium.find() is None, reason="no Chromium on this machine (chromium, google-chrome or $CHROMIUM)")

TIP = """(() => { const found = [];
  const walk = (node) => { if (node.shadowRoot) walk(node.shadowRoot);
    for (const child of node.children || []) {
      if (child.classList.contains("bk-tooltip-content")) found.push(child.innerText);
      walk(child); } };
  walk(document.body); return found.join(" ").replace(/\\s+/g, " "); })()"""
SHOWN = "document.getElementById('gene-browser').dataset.shown"
DATA = "Bokeh.documents[0].get_model_by_name('cells').data"


@needs_chromium
def test_a_reader_searches_hovers_taps_and_zooms(world, page):
    with chromium.Chromium(1400, 1000) as reader:
        reader.open(page)
        reader.until(f"{SHOWN} === 'Gad1'")
        first = reader.js(f"Array.from({DATA}.mean)")
        np.testing.assert_allclose(first, world.mean[:, 0], rtol=1.01 * RELATIVE_ERROR, atol=world.mean[:, 0].max() / 8192)
        np.testing.assert_array_equal(reader.js(f"Array.from({DATA}.truth)"), world.truth[:, 0])
        assert reader.js(f"Number.isNaN({DATA}.width[0])")
        np.testing.assert_allclose(reader.js(f"Array.from({DATA}.x)"), world.xy[:, 0], atol=2000 / 65535)
        # search by a part of the name and Enter
        reader.js("document.getElementById('gene').focus()")
        reader.type("ad2\n")
        reader.until(f"{SHOWN} === 'Gad2'")
        second = reader.js(f"Array.from({DATA}.mean)")
        np.testing.assert_allclose(second, world.mean[:, 1], rtol=1.01 * RELATIVE_ERROR, atol=world.mean[:, 1].max() / 8192)
        assert reader.js("location.hash") == "#gene=Gad2" and "0.01 (low)" in reader.js("document.getElementById('gene-facts').textContent")
        high = reader.js("Bokeh.documents[0].get_model_by_name('color-mean').high")
        assert high == pytest.approx(browser.upper_limit(np.r_[world.mean[:, 1], world.truth[:, 1]]))
        # a name that is not there
        reader.js("document.getElementById('gene').focus()")
        reader.type("Sox10\n")
        reader.until("document.getElementById('gene-status').textContent.includes('not among the 4 genes')")
        # a name that differs from another one in capitals alone, and half of a name where that gene is shown already
        for typed in ("GAD2\n", "GAD2 \n"):
            reader.js("document.getElementById('gene').focus()")
            reader.type(typed)
            reader.until(f"{SHOWN} === 'GAD2' && document.getElementById('gene').value === 'GAD2'")
        reader.js("location.hash = '#gene=Gad2'")
        reader.until(f"{SHOWN} === 'Gad2'")
        # hover over one cell
        reader.js("document.querySelector('.maps').scrollIntoView()")
        x, y = cell_on_screen(reader, 7)
        reader.mouse("mouseMoved", x - 3, y)
        reader.mouse("mouseMoved", x, y)
        reader.until(f"{TIP}.includes('cell<7>')")
        tip = reader.js(TIP)
        assert f"observed count: {world.truth[7, 1]:.0f}" in tip and "predicted mean:" in tip and "interval width:" in tip
        # tap it: the reading stays
        reader.click(x, y)
        reader.until("document.getElementById('readout').textContent.startsWith('cell cell<7>: observed')")
        # zoom one map: all move together
        reader.mouse("mouseWheel", x, y, deltaX=0, deltaY=-300, modifiers=2)
        ranges = "['truth', 'mean', 'sd', 'width'].map((n) => Bokeh.documents[0].get_model_by_name('map-' + n).x_range)"
        reader.until(f"{ranges}.every((r) => r.end - r.start < 1800 && r.start === {ranges}[0].start)")
        # a link of a table, the buttons
        reader.js("location.hash = '#gene=Gad1'")
        reader.until(f"{SHOWN} === 'Gad1'")
        for before in ("GAD2", "</script>x"):
            reader.js("document.getElementById('previous').click()")
            reader.until(f"{SHOWN} === '{before}'")
        assert reader.js(f"{DATA}.truth.every(Number.isNaN)")
        assert reader.errors == []
        assert all(url.startswith(("file:", "data:", "blob:")) for url in reader.requests)


@needs_chromium
def test_page_fits_a_phone(page):
    with chromium.Chromium(390, 844, mobile=True) as reader:
        reader.open(page)
        reader.until(f"{SHOWN} === 'Gad1'")
        assert reader.js("document.documentElement.scrollWidth") <= 390
        assert reader.errors == []


def cell_on_screen(reader, row):
    """Middle of a cell in the first map, in pixels of the window."""
    return reader.js(f"""(() => {{
      const model = Bokeh.documents[0].get_model_by_name("map-truth");
      let view; const walk = (v) => {{ if (v.model === model) view = v; for (const c of v.children?.() ?? []) walk(c); }};
      for (const root of Object.values(Bokeh.index.roots ?? Bokeh.index)) walk(root);
      const box = view.el.getBoundingClientRect(), data = {DATA};
      return [box.x + view.frame.x_scale.compute(data.x[{row}]), box.y + view.frame.y_scale.compute(data.y[{row}])];
    }})()""")
