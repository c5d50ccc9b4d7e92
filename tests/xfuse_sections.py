"""Small sections with images and their start, for the tests of XFuse."""

import numpy as np
import scipy.sparse as sp

from ppl_st.config import with_overrides
from ppl_st.models import xfuse
from ppl_st.models.xfuse.data import Data, Section

SMALL = ["patch=48", "metagenes=4", "functions=32", "depth=2", "channels=4", "fit.steps=4"]


def section(name="a", *, seed=0, size=(64, 80), genes=12, code=0, virtual=True, spots=True):
    """Spots on a grid over an image whose right half is darker and expresses other genes."""
    rng = np.random.default_rng(seed)
    height, width = size
    image = rng.integers(110, 170, (height, width, 3)).astype(np.uint8)
    image[:, width // 2 :] //= 2
    mask = np.ones(size, bool)
    mask[:6] = False
    label, centers = np.zeros(size, np.int64), []
    rows, columns = np.mgrid[:height, :width] + 0.5
    for y in range(14, height - 5, 11) if spots else []:
        for x in range(7, width - 5, 11):
            centers.append((x, y))
            label[(rows - y) ** 2 + (columns - x) ** 2 <= 16] = len(centers)
    where = np.array(centers, float).reshape(-1, 2)
    high = np.arange(genes) < genes // 2
    mean = np.where((where[:, :1] < width / 2) == high, 6.0, 1.0)
    counts = rng.negative_binomial(mean, 0.5)
    off = -1
    if virtual and spots:
        off = len(counts)
        label[:5] = off + 1
        counts = np.vstack([counts, np.zeros((1, genes), int)])
        where = np.vstack([where, [np.nan, np.nan]])
    matrix = sp.csr_matrix(counts.astype(np.float32).reshape(-1, genes))
    return Section(name, image, label, matrix, off, mask, where, 4.0, np.array([code]), None)


def data_of(*sections, levels=("a", "b")):
    genes = np.array([f"g{i}" for i in range(sections[0].counts.shape[1])])
    return Data(sections, genes, {"section": levels})


def two_sections():
    return data_of(section(), section("b", seed=1, size=(70, 66), code=1))


def settings(*overrides):
    return with_overrides(xfuse.PRESETS["default"], [*SMALL, *overrides])


def quiet(line):
    pass


def start_of(data):
    pair, spec = xfuse.start(data, settings(), 0, quiet)
    for side in pair:
        side.eval()
    return pair, spec
