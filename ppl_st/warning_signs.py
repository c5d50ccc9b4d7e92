"""Reasons not to trust the predictions of a run, each with its number and, where there is one, a remedy."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from ppl_st.checks import Checks
from ppl_st.models import METHODS
from ppl_st.models.xfuse.data import FEW_SPOTS
from ppl_st.posterior import Run

__all__ = ["LOW_TRUST", "UPPER", "reference_kind", "warning_signs"]

UPPER = "upper reference: ridge that saw the truth of other cells"
FEW_GENES, FEW_ROWS, FEW_COUNTS = 50, 200, 10  # below: a warning
POOR_REFERENCE, LOW_TRUST = 0.5, 0.05
LEAST_TOGETHER = 0.8  # of the cells have their library inside the middle 90 %; below: a warning


def warning_signs(
    run: Run, scores: pd.DataFrame, methods: Mapping[str, pd.DataFrame], noun: str, boundless: int, checks: Checks | None = None
) -> list[str]:
    """What should lower the reader's trust, with its number and, where there is one, a remedy. ``boundless``: genes with an infinite ``upper``."""
    found = []
    if reference_kind(run) != "image":
        found += _reference_warnings(run)
    elif len(run.target.names) < FEW_SPOTS:
        found.append(f"Few spots: {len(run.target.names)} in all. Variances are learned from them alone; intervals can be too short.")
    shallow = float((run.target.totals < FEW_COUNTS).mean())
    if shallow > 0.05:
        found.append(f"Shallow {noun}s: {shallow:.0%} have fewer than {FEW_COUNTS} counts; what is predicted there is mostly the average.")
    weak = scores["trust"] < LOW_TRUST
    if weak.any():
        found.append(
            f"Low trust: for {int(weak.sum())} of {len(scores)} genes looked at (e.g. {', '.join(scores.index[weak][:3])}) the squared correlation "
            f"that Poisson counts around the predicted rates would have, an upper bound, is below {LOW_TRUST:.0%}. Their maps say little."
        )
    unseen = scores.index.isin(run.genes[~run.measured])
    if unseen.any() and not methods:
        found.append(
            f"Off the panel: {int(unseen.sum())} of {len(scores)} genes looked at are not among the counts of this fit, so these do not say "
            "how right their maps are. Trust ranks them; genes of the panel that a fit does not see (--hold-out, `ppl-st evaluate`) show how well "
            "they do."
        )
    if run.record.get("skipped"):
        found.append(f"{len(run.record['skipped'])} steps of the fit were not finite and were skipped.")
    layer = run.recalibration
    if reference_kind(run) == "image":
        found.append("Every gene here was fitted: the maps show how the model sees its own data. New spots or a new image are the test.")
    if layer is None:
        where = "hidden spots" if reference_kind(run) == "image" else "genes of the panel"
        found.append(
            f"The intervals are raw. Their coverage was about right on the data that it was measured on; to know it here, `ppl-st recalibrate` hides "
            f"{where} in turn and corrects them."
        )
    else:
        if boundless:
            found.append(
                f"No finite interval, as far as the draws reach, would cover {layer.level:.0%} for {boundless} of {len(scores)} genes: "
                "their width is drawn grey."
            )
    if methods:
        covered = scores["coverage_90"]
        bad = ~covered.between(0.8, 0.97)
        if bad.mean() > 0.2:
            found.append(
                f"Coverage: raw 90 % intervals hold {covered.mean():.0%} of the held-out counts overall, and for {int(bad.sum())} of {len(covered)} "
                "genes less than 80 % or more than 97 %."
            )
        together = 1.0 if checks is None else float(checks.library["inside"].mean())
        if together < LEAST_TOGETHER:
            found.append(
                f"Sums over genes: the library over the held-out genes lies in the middle 90 % of the model's for {together:.0%} of the {noun}s. "
                f"Errors that the genes of a {noun} share are larger than drawn, or a gene's level is far off: sums over genes (signature scores) "
                "are surer than they should be."
            )
        means = {name: float(table["raw_pcc"].mean()) for name, table in methods.items()}
        better = [f"{name} ({value:.3f})" for name, value in means.items() if name != UPPER and value > means[run.method]]
        if better:
            found.append(f"No better than a cheap baseline: mean PCC {means[run.method]:.3f}, against {', '.join(better)}.")
    return found


def _reference_warnings(run: Run) -> list[str]:
    """What the panel and the reference say against the predictions of other genes."""
    found = []
    shared = run.target.genes[np.isin(run.target.genes, run.genes)]
    if len(shared) < FEW_GENES:
        found.append(f"Few shared genes: target and reference have {len(shared)} in common. Every prediction hangs on them.")
    if len(run.reference.names) < FEW_ROWS:
        found.append(f"Small reference: {len(run.reference.names)} rows. What it does not hold cannot be predicted.")
    target = np.asarray(run.target.take_genes(shared).matrix.mean(0)).ravel()
    other = run.reference_mean[pd.Index(run.genes).get_indexer(pd.Index(shared))]
    rank = float(spearmanr(target, other)[0]) if len(shared) > 2 else np.nan
    if rank < POOR_REFERENCE:
        found.append(
            f"Poor reference: the mean counts of the shared genes have a rank correlation of {rank:.2f} between target and reference. The levels "
            "of predicted genes are little more than guesses; look at patterns, not at levels."
        )
    return found


def reference_kind(run: Run) -> str:
    """Kind of the reference: cells, spots, image (none); a stack of runs is of the kind of its runs."""
    return METHODS[run.manifest["runs"][0]["method"] if run.method == "stack" else run.method].reference
