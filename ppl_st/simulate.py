"""The papers' synthetic protocols, seedable, as AnnData with the truth beside it.

``checkerboard`` (SIID, Genome Res 2025, figure 2; the stand-in of this project for the parts that only its supplement holds):

    types      l x l squares over a square domain; each square's type differs from its upper and left neighbors
    profiles   base_g ~ Gamma(0.3, 1) + 1e-3;  q_kg proportional to base_g exp(contrast * Normal(0, 1));  rows sum to 1 over all G genes
    cells      uniform positions;  composition P_i one-hot at its square's type, or Dirichlet(mixing) centered there
    totals     N_i = rho * exp(Normal(log 150, 0.6)) [counts per cell]
    cells      x_ig ~ Poisson(N_i sum_k P_ik q_kg), the first ``n_panel`` genes are the panel, the rest is the truth to impute
    spots      v_jg ~ Poisson(phi_g sum_{i in spot j} N_i sum_k P_ik q_kg),  phi_g ~ LogNormal(0, platform_sd)

Spots lie on a 16 x 16 grid of pitch 100 um and every cell belongs to its nearest spot (spots without gaps).

``blocks`` (second protocol of the released SIID code, no space): consecutive blocks of cells are the spots; factors and loadings are
uniform with a share of zeros; both sides Poisson. An exact-recovery test bed.
"""

from dataclasses import dataclass

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from ppl_st.errors import UserError

PITCH = 100.0  # um, Visium
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Simulation:
    """A simulated pair and what generated it.

    Attributes
    ----------
    target, reference
        Cells x panel genes and spots x all genes, raw counts, ``obsm["spatial"]`` in micrometers.
    truth
        Cells x held-out genes: counts in ``X``, noise-free means in ``layers["rate"]``; ``obsm["composition"]`` [n, h].
    proportions
        Count-weighted composition of every spot [s, h].
    """

    target: ad.AnnData
    reference: ad.AnnData
    truth: ad.AnnData
    proportions: FloatArray


def checkerboard(
    *,
    seed: int = 0,
    n_cells: int = 6000,
    side: int = 16,
    squares: int = 20,
    n_types: int = 8,
    rho: float = 1.0,
    n_genes: int = 300,
    n_panel: int = 270,
    contrast: float = 0.5,
    mixing: float = 0.0,
    platform_sd: float = 0.0,
    shift: float = 0.0,
) -> Simulation:
    """Simulate the SIID checkerboard.

    Parameters
    ----------
    seed
        Seed of the one generator used.
    n_cells, side
        Number of cells; spots per side (s = side^2).
    squares, n_types, rho
        The paper's knobs: l squares per side, h cell types, sequencing depth of the cells relative to 150 counts.
    n_genes, n_panel
        Genes on the spots; the first ``n_panel`` of them are measured in the cells.
    contrast
        Standard deviation of the log fold changes between types (0.5 hard, 1 easy).
    mixing
        0: pure cells. Otherwise the Dirichlet concentration of mixed cells (0.2 in the specs), the square's type getting the largest share.
    platform_sd
        Standard deviation of the log platform factor phi of a gene.
    shift
        Displacement of all spots along x in micrometers that the coordinates do not show.

    Returns
    -------
    Simulation
    """
    if not 2 <= n_types <= 200 or not 1 <= n_panel < n_genes or n_cells < 1 or side < 2:
        raise UserError(
            f"checkerboard: n_types={n_types}, n_panel={n_panel}, n_genes={n_genes}, n_cells={n_cells}, side={side} cannot be simulated; "
            "need 2 <= n_types <= 200, 1 <= n_panel < n_genes, n_cells >= 1, side >= 2"
        )
    rng = np.random.default_rng(seed)
    xy = rng.uniform(0, side * PITCH, size=(n_cells, 2))
    grid = (np.arange(side) + 0.5) * PITCH
    spots = np.stack(np.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, 2)

    tiles = _tiles(squares, n_types, rng)
    cell_tile = np.minimum((xy / (side * PITCH) * squares).astype(int), squares - 1)
    cell_type = tiles[cell_tile[:, 0], cell_tile[:, 1]]
    composition = _compositions(cell_type, n_types, mixing, rng)  # [n, h]

    base = rng.gamma(0.3, 1.0, n_genes) + 1e-3
    profiles = base * np.exp(contrast * rng.standard_normal((n_types, n_genes)))
    profiles /= profiles.sum(1, keepdims=True)  # [h, G]
    totals = rho * np.exp(rng.normal(np.log(150.0), 0.6, n_cells))
    mean = totals[:, None] * (composition @ profiles)  # [n, G]

    member = np.minimum(((xy - [shift, 0.0]) / PITCH).astype(int).clip(0), side - 1)
    spot = member[:, 0] * side + member[:, 1]
    mapping = sp.csr_matrix((np.ones(n_cells), (np.arange(n_cells), spot)), shape=(n_cells, side * side))
    phi = np.exp(platform_sd * rng.standard_normal(n_genes))
    spot_counts = rng.poisson(phi * (mapping.T @ mean)).astype(np.float32)
    cell_counts = rng.poisson(mean).astype(np.float32)

    weight = np.asarray(mapping.T @ (totals[:, None] * composition))  # [s, h]
    proportions = weight / np.maximum(weight.sum(1, keepdims=True), 1e-300)
    return _simulation(
        cell_counts, spot_counts, mean, composition, xy, spots, n_panel, proportions, f"checkerboard, seed {seed}"
    )


def blocks(
    *,
    seed: int = 0,
    n_cells: int = 1000,
    n_spots: int = 100,
    n_types: int = 5,
    n_genes: int = 60,
    n_panel: int = 40,
    zeros: float = 0.5,
    cell_scale: float = 200.0,
    spot_scale: float = 5.0,
) -> Simulation:
    """Simulate the space-free protocol: cells in consecutive blocks of ``n_cells / n_spots`` form the spots.

    Parameters are as in `checkerboard`; ``zeros`` is the share of zeros in both factor matrices, ``cell_scale`` the counts per cell over
    all genes and ``spot_scale`` the capture of a spot relative to its cells.
    """
    if n_cells % n_spots:
        raise UserError(f"blocks: n_cells={n_cells} must be a multiple of n_spots={n_spots}")
    rng = np.random.default_rng(seed)
    composition = rng.uniform(size=(n_cells, n_types)) * (rng.uniform(size=(n_cells, n_types)) >= zeros) + 1e-9
    composition /= composition.sum(1, keepdims=True)
    profiles = rng.uniform(size=(n_types, n_genes)) * (rng.uniform(size=(n_types, n_genes)) >= zeros) + 1e-9
    profiles /= profiles.sum(1, keepdims=True)
    mean = cell_scale * composition @ profiles
    spot = np.arange(n_cells) // (n_cells // n_spots)
    weight = np.zeros((n_spots, n_types))
    np.add.at(weight, spot, cell_scale * composition)
    spots = np.stack([np.arange(n_spots) * PITCH, np.zeros(n_spots)], 1)
    xy = spots[spot] + rng.uniform(-0.2 * PITCH, 0.2 * PITCH, size=(n_cells, 2))
    spot_counts = rng.poisson(spot_scale * (weight @ profiles)).astype(np.float32)
    cell_counts = rng.poisson(mean).astype(np.float32)
    proportions = weight / weight.sum(1, keepdims=True)
    return _simulation(
        cell_counts, spot_counts, mean, composition, xy, spots, n_panel, proportions, f"blocks, seed {seed}"
    )


PROTOCOLS = {"checkerboard": checkerboard, "blocks": blocks}


def _tiles(squares: int, n_types: int, rng: np.random.Generator) -> NDArray[np.int64]:
    tiles = np.zeros((squares, squares), dtype=np.int64)
    for row in range(squares):
        for column in range(squares):
            taken = {tiles[row - 1, column]} if row else set()
            if column:
                taken.add(tiles[row, column - 1])
            tiles[row, column] = rng.choice([k for k in range(n_types) if k not in taken] or range(n_types))
    return tiles


def _compositions(cell_type: NDArray[np.int64], n_types: int, mixing: float, rng: np.random.Generator) -> FloatArray:
    if mixing == 0:
        return np.eye(n_types)[cell_type]
    composition = rng.dirichlet(np.full(n_types, mixing), size=len(cell_type))
    top = composition.argmax(1)
    rows = np.arange(len(cell_type))
    composition[rows, top], composition[rows, cell_type] = composition[rows, cell_type], composition[rows, top]
    return composition


def _simulation(
    cell_counts: NDArray[np.float32],
    spot_counts: NDArray[np.float32],
    mean: FloatArray,
    composition: FloatArray,
    xy: FloatArray,
    spots: FloatArray,
    n_panel: int,
    proportions: FloatArray,
    source: str,
) -> Simulation:
    genes = np.array([f"gene{g:04d}" for g in range(mean.shape[1])])
    cells = pd.DataFrame(index=[f"cell{i}" for i in range(len(xy))])
    target = ad.AnnData(
        sp.csr_matrix(cell_counts[:, :n_panel]), obs=cells.copy(), var=pd.DataFrame(index=genes[:n_panel])
    )
    truth = ad.AnnData(
        sp.csr_matrix(cell_counts[:, n_panel:]), obs=cells.copy(), var=pd.DataFrame(index=genes[n_panel:])
    )
    truth.layers["rate"] = mean[:, n_panel:].astype(np.float32)
    truth.obsm["composition"] = composition
    reference = ad.AnnData(
        sp.csr_matrix(spot_counts),
        obs=pd.DataFrame(index=[f"spot{j}" for j in range(len(spots))]),
        var=pd.DataFrame(index=genes),
    )
    for table, positions in ((target, xy), (truth, xy), (reference, spots)):
        table.obsm["spatial"] = positions
        table.uns["source"] = f"simulated: {source}"
    reference.obsm["proportions"] = proportions
    return Simulation(target, reference, truth, proportions)
