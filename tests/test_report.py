"""The report: one file, self-contained, escaped, complete or absent."""

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from ppl_st import plots
from ppl_st.errors import UserError

report = pytest.importorskip("ppl_st.report")
pytest.importorskip("ppl_st.io")


class Page(HTMLParser):
    """Collects tags and text, and fails on tags that do not nest."""

    VOID = ("meta", "img", "link", "br")

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def sections():
    frame = pd.DataFrame({"method": ["siid", "<b>x</b>"], "pcc": [0.123456, np.nan], "genes": [124, 3]})
    return [
        report.Section(
            "Accuracy & fit",
            "First.\n\nSecond <script>alert(1)</script>.",
            tables=[report.Table("Per method", frame, {"pcc": "Pearson r"}), report.Table("Plain", frame)],
            figures={'Loss "curve"': plots.loss_curve(np.linspace(5, 1, 50))},
        )
    ]


def test_page_is_well_formed_self_contained_and_escaped(tmp_path, sections):
    file = tmp_path / "report.html"
    report.write_report(file, "Run <1>", sections, manifest={"seed": 7, "command": None})
    html = file.read_text(encoding="utf-8")
    page = Page()
    page.feed(html)
    assert page.stack == []
    names = [tag for tag, _ in page.tags]
    assert "script" not in names and "link" not in names and "b" not in names
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 1 and images[0]["alt"] == 'Loss "curve"'
    kind, data = images[0]["src"].split(",")
    assert kind == "data:image/png;base64" and base64.b64decode(data).startswith(b"\x89PNG")
    assert not re.search(r"https?://", html)
    for words in ("Run <1>", "How to read this", "Pearson r", "0.1235", '"seed": 7', "<b>x</b>", "124"):
        assert words in page.text
    assert "nan" not in page.text.lower()
    assert names.count("p") == 2 and names.count("tr") == 2 * 3


def test_named_index_is_a_column_and_plain_index_is_not(tmp_path):
    frame = pd.DataFrame({"pcc": [0.5]})
    named = frame.set_index(pd.Index(["siid"], name="method"))
    for table, head in ((frame, ["pcc"]), (named, ["method", "pcc"])):
        section = report.Section("s", tables=[report.Table("c", table)])
        report.write_report(tmp_path / "r.html", "t", [section])
        found = re.search(r"<thead>.*</thead>", (tmp_path / "r.html").read_text(), re.DOTALL)
        assert re.findall(r"<th>([^<]*)</th>", found.group()) == head


def test_a_failing_figure_leaves_the_old_report_alone(tmp_path, sections):
    file = tmp_path / "report.html"
    file.write_text("old")

    class Broken:
        def savefig(self, *args, **kwargs):
            raise RuntimeError("no")

    bad = [*sections, report.Section("bad", figures={"x": Broken()})]
    with pytest.raises(RuntimeError):
        report.write_report(file, "t", bad)
    assert file.read_text() == "old" and [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_unwritable_place_is_a_user_error(tmp_path, sections):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"report\.html"):
        report.write_report(tmp_path / "file" / "report.html", "t", sections)
