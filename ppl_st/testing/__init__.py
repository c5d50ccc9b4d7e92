"""Property-based tests of likelihoods and of model/guide pairs, for any torch or Pyro distribution.

    from ppl_st.testing import Subject, check_likelihood, means

    subject = Subject(lambda mean: dist.Poisson(mean), {"mean": means(1e-8, 100)}, name="Pyro's Poisson")
    for finding in check_likelihood(subject):
        print(finding)

`strategies` draws numbers and tables, `laws` and `shape_laws` hold the laws of one likelihood, `check` runs and shrinks
them, `model_laws` holds those of a pair and its minibatches, `exact` the sums and integrals, `subject` what a law is
about. Install with ``pip install 'ppl-st[test]'``.
"""

from ppl_st.testing.check import ALL_LAWS, Finding, applicable, check_likelihood
from ppl_st.testing.exact import Inconclusive
from ppl_st.testing.model_laws import check_pair, minibatches_unbiased, plates_scale, simulation_obeys, sites_agree
from ppl_st.testing.strategies import (
    counts,
    dispersions,
    gate_logits,
    means,
    positive,
    real,
    shapes,
    sparse_counts,
    tables,
)
from ppl_st.testing.subject import LawBroken, Limit, Subject

__all__ = [
    "ALL_LAWS",
    "Finding",
    "Inconclusive",
    "LawBroken",
    "Limit",
    "Subject",
    "applicable",
    "check_likelihood",
    "check_pair",
    "counts",
    "dispersions",
    "gate_logits",
    "means",
    "minibatches_unbiased",
    "plates_scale",
    "positive",
    "real",
    "shapes",
    "simulation_obeys",
    "sites_agree",
    "sparse_counts",
    "tables",
]
