"""SpaIM's problem from checked counts: shared genes, normalised reference, its clusters and their profiles, spatial neighbors."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from ppl_st.data import CLUSTER, Counts, shared_genes
from ppl_st.errors import UserError
from ppl_st.models.common.cells import log_normalise, log_shares, median_depth
from ppl_st.models.spaim import Config, Data
from ppl_st.prepare import MIN_SHARED, refuse_single, relative_depths, same_genes
from ppl_st.spatial import neighbor_mean

CELLS_PER_CLUSTER = 5  # fewer on average give no standard error worth the name
MEDIAN_INEFFICIENCY = 1.2533  # standard error of a median over that of a mean, normal data
BLOCK = 512


def problem(target: Counts, reference: Counts, config: Config, say: Callable[[str], None]) -> tuple[Data, Counts, Counts]:
    """SpaIM's problem; returns it with the counts that it uses.

    All genes of the target place its cells, also those that the reference lacks; the shared ones teach the map from reference to target. All genes
    of the reference can be predicted. Target cells stay, also empty ones; reference cells without a count in the shared genes, or without a
    label in ``cluster_key``, are dropped.
    """
    refuse_single(target, "target")
    shared = shared_genes(target, reference, minimum=MIN_SHARED)
    at = pd.Index(reference.genes).get_indexer(pd.Index(shared)).astype(np.int64)
    usable = np.asarray(reference.matrix[:, at].sum(1)).ravel() > 0
    if config.cluster_key is not None:
        if config.cluster_key not in reference.obs:
            columns = ", ".join(map(str, reference.obs.columns[:5])) or "no columns"
            raise UserError(f"reference ({reference.source}): no obs column {config.cluster_key!r} (cluster_key); it has {columns}")
        usable &= reference.obs[config.cluster_key].notna().to_numpy()
    if usable.sum() < 2 * CELLS_PER_CLUSTER:
        raise UserError(
            f"reference ({reference.source}): {int(usable.sum())} of {len(usable)} cells have counts in the {len(shared)} shared genes"
            + ("" if config.cluster_key is None else f" and a label in {config.cluster_key!r}")
            + f"; at least {2 * CELLS_PER_CLUSTER} are needed"
        )
    if not usable.all():
        say(f"{int((~usable).sum())} reference cells without counts in the shared genes or without a label are left out")
        reference = reference.take_rows(usable)
    totals = np.asarray(reference.matrix[:, at].sum(1), dtype=np.float64).ravel()
    logs = log_normalise(reference.matrix, totals if config.normalise else np.ones_like(totals), median_depth(totals) if config.normalise else 1.0)
    codes, reference = _clusters(reference, config, say)
    profiles, errors = cluster_profiles(logs, codes, config.profile)
    log_share, variance = log_shares(reference.matrix, at)
    data = Data(
        counts=target.matrix,
        columns=pd.Index(target.genes).get_indexer(pd.Index(shared)).astype(np.int64),
        panel=at,
        reference=logs,
        profiles=profiles,
        errors=errors,
        log_share=log_share,
        share_variance=variance if config.reference_errors else np.zeros_like(variance),
        neighbors=neighbor_mean(target, config.neighbors, config.library_key),
        relative=relative_depths(target, target, config.library_key),
    )
    return data, target, reference


def new_cells(target: Counts, fitted: Counts, data: Data, config: Config) -> tuple[Data, Counts]:
    """The same problem for other cells, measured with all the genes of the target of the fit (``fitted``)."""
    if config.features == "network":
        raise UserError("features='network' has a row of weights for every cell of the fit: it cannot predict others; take features='kernel'")
    target = same_genes(target, fitted)
    near = neighbor_mean(target, config.neighbors, config.library_key)
    return data._replace(counts=target.matrix, neighbors=near, relative=relative_depths(target, fitted, config.library_key)), target


def cluster_profiles(
    logs: sp.csr_matrix, codes: NDArray[np.int64], kind: str
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean (or median) of every gene in every cluster [G, K], and its standard error; small clusters borrow the sd within all of them."""
    n, genes = logs.shape
    k = int(codes.max()) + 1
    member = sp.csr_matrix((np.ones(n, np.float32), (codes, np.arange(n))), shape=(k, n))
    size = np.bincount(codes, minlength=k).astype(np.float64)[:, None]
    mean = np.asarray((member @ logs).todense(), dtype=np.float64) / size
    square = np.asarray((member @ logs.multiply(logs)).todense(), dtype=np.float64) / size
    within = np.maximum(square - mean**2, 0.0)
    pooled = (size * within).sum(0) / max(n - k, 1)
    # Small clusters have no variance of their own to speak of: shrink towards the pooled one by ten cells.
    variance = (size * within + 10.0 * pooled) / (size + 9.0)
    errors = np.sqrt(variance / size)
    if kind == "median":
        for start in range(0, genes, BLOCK):
            columns = slice(start, start + BLOCK)
            block = logs[:, columns].toarray()
            for c in range(k):
                mean[c, columns] = np.median(block[codes == c], axis=0)
        errors = errors * MEDIAN_INEFFICIENCY
    return mean.T.astype(np.float32), errors.T.astype(np.float32)


def _clusters(reference: Counts, config: Config, say: Callable[[str], None]) -> tuple[NDArray[np.int64], Counts]:
    """Cluster of every reference cell, and the reference that remembers it."""
    key = config.cluster_key or CLUSTER
    if key in reference.obs:
        codes, names = pd.factorize(reference.obs[key].astype("object"), sort=True)
        if len(names) < 2 and config.cluster_key is not None:
            raise UserError(f"reference ({reference.source}): obs column {key!r} (cluster_key) has {len(names)} label; at least two are needed")
        if config.cluster_key is not None:
            say(f"reference clusters: {len(names)} labels of {key!r}")
        return codes.astype(np.int64), reference
    codes = leiden(reference.matrix, config.clusters, config.resolution, config.fit.seed)
    if codes.max() == 0 and config.resolution is not None:  # a few cells may well be one cluster where nobody asks for more
        asked = f"set resolution {config.resolution:g}, which has to be larger, or clusters, or cluster_key to labels"
        raise UserError(f"reference ({reference.source}): Leiden finds one cluster and at least two are needed; {asked}")
    say(f"reference clusters: {codes.max() + 1} by Leiden, {np.bincount(codes).min()} to {np.bincount(codes).max()} cells")
    return codes, replace(reference, obs=reference.obs.assign(**{CLUSTER: codes}))


def leiden(counts: sp.csr_matrix, clusters: int, resolution: float | None, seed: int) -> NDArray[np.int64]:
    """Leiden communities (modularity) of the 15-nearest-neighbor graph in 30 principal components of the log-normalised cells.

    Without a ``resolution`` it is searched, by bisection on its logarithm, for the number of ``clusters`` (at most one per five cells); the
    nearest number found is taken.
    """
    import random

    import igraph
    from sklearn.decomposition import TruncatedSVD
    from sklearn.neighbors import kneighbors_graph

    n, genes = counts.shape
    totals = np.asarray(counts.sum(1), dtype=np.float64).ravel()
    logs = log_normalise(counts, totals, median_depth(totals))
    components = min(30, n - 1, genes - 1)
    points = TruncatedSVD(components, random_state=seed).fit_transform(logs)
    graph = kneighbors_graph(points - points.mean(0), min(15, n - 1)).tocoo()
    network = igraph.Graph(n=n, edges=np.column_stack([graph.row, graph.col])).simplify()
    wanted = max(2, min(clusters, n // CELLS_PER_CLUSTER))

    def communities(value: float) -> NDArray[np.int64]:
        igraph.set_random_number_generator(random.Random(seed))
        try:
            found = network.community_leiden(objective_function="modularity", resolution=value, n_iterations=3)
        finally:
            igraph.set_random_number_generator(random)
        sizes = np.bincount(found.membership)
        return np.argsort(np.argsort(-sizes, kind="stable"), kind="stable")[found.membership]  # largest first

    if resolution is not None:
        return communities(resolution)
    low, high, best = -4.0, 5.0, communities(1.0)
    for _ in range(14):
        number = int(best.max()) + 1
        if number == wanted:
            break
        middle = (low + high) / 2
        found = communities(float(np.exp(middle)))
        if abs(int(found.max()) + 1 - wanted) < abs(number - wanted):
            best = found
        low, high = (middle, high) if found.max() + 1 < wanted else (low, middle)
    return best
