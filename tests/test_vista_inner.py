"""What VISTA learns on inner genes does not depend on how many counts they have."""

import numpy as np

from ppl_st.models.vista.inner import CENTER, _regressions, _trend


def test_slopes_and_exponents_of_faint_genes_are_those_of_bright_ones():
    """The prior of a single gene's regression pulls faint ones towards slope 0 and exponent 1; a trend by level must not come of that."""
    rng = np.random.default_rng(0)
    genes, cells = 600, 800
    level = np.linspace(-6.0, 1.0, genes)
    depth = np.repeat(rng.normal(0, 0.6, (cells, 1)), genes, 1)
    score = rng.standard_normal((cells, genes))
    counts = rng.poisson(np.exp(level + 0.8 * score + 0.5 * depth)).astype(float)
    found, variance, kept = _regressions(counts, score, depth, level)
    free, variance = CENTER + (found - CENTER) / kept, variance / kept
    design = np.column_stack([np.ones(genes), level - level.mean()])
    for column, truth in ((1, 0.8), (2, 0.5)):
        ends = np.array([[1, -3.5], [1, 3.5]]) @ _trend(design, free[:, column], variance[:, column])
        np.testing.assert_allclose(ends, truth, atol=0.06)
        shrunk = np.array([1, -3.5]) @ _trend(design, found[:, column], variance[:, column])
        assert abs(shrunk - truth) > 0.05
