"""Synthetic protocols (the papers' and ours), seedable, as AnnData with the truth beside it.

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

``spatial_field`` (a dissociated reference and a spatial target over one latent state; for VISTA, SpaIM, SpaGene):

    fields     f_1 .. f_{h + d}: independent smooth Gaussian random fields over the tissue, unit variance, kernel exp(-|u - v|^2 / 2 length^2)
    noise      e_ic ~ Normal(0, 1);  c_ic = sqrt(spatial) f_c(xy_i) + sqrt(1 - spatial) e_ic in the target,  c_ic = e_ic in the reference
    type       argmax of the first h of c_i;  state z_i = center_type + c_i,h+1..h+d  [d]
    profile    log rho_ig = log base_g + contrast (W z_i)_g, rows normalised to sum 1 over all G genes
    reference  x_ig ~ NB(l_i rho_ig, theta_g),  log l_i ~ Normal(log depth_reference, 0.4)
    target     x_ig ~ NB(l_i exp(delta_g) rho_ig, theta'_g),  delta_g ~ Normal(0, platform_sd),  log l_i ~ Normal(log(150 rho), 0.4)

Both sides have the same distribution of states; ``spatial = 0`` removes every trace of space and changes nothing else.
"""

from dataclasses import dataclass

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from ppl_st.errors import UserError

PITCH = 100.0  # um, Visium
MANY, SCALES = 1e8, (1e-6, 1e6)  # most cells or genes; range of a positive knob
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Simulation:
    """A simulated pair and what generated it.

    Attributes
    ----------
    target, reference
        Cells x panel genes and spots (or dissociated cells) x all genes, raw counts, ``obsm["spatial"]`` in micrometers.
    truth
        Cells x held-out genes: counts in ``X``, noise-free means in ``layers["rate"]``; ``obsm["composition"]`` [n, h]; ``var["theta"]`` inverse
        dispersion of the counts where they are not Poisson.
    proportions
        Count-weighted composition of every spot [s, h]; None where the reference holds dissociated cells.
    """

    target: ad.AnnData
    reference: ad.AnnData
    truth: ad.AnnData
    proportions: FloatArray | None


def within(protocol: str, **knobs: tuple[float, float, float]) -> None:
    """Refuse a knob (value, lowest, highest) that is not a number in its range; NaN and infinity never are."""
    for name, (value, low, high) in knobs.items():
        if not low <= value <= high:
            raise UserError(f"{protocol}: {name}={value:g} cannot be simulated; it must lie between {low:g} and {high:g}")


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
    within(
        "checkerboard", n_types=(n_types, 2, 200), n_genes=(n_genes, 2, MANY), n_panel=(n_panel, 1, n_genes - 1), n_cells=(n_cells, 1, MANY),
        side=(side, 2, 1000), squares=(squares, 1, 1000), rho=(rho, *SCALES), contrast=(contrast, 0, 10), mixing=(mixing, 0, 1e6),
        platform_sd=(platform_sd, 0, 5), shift=(shift, -1e6, 1e6),
    )  # fmt: skip
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
    within(
        "blocks", n_types=(n_types, 1, 200), n_genes=(n_genes, 2, MANY), n_panel=(n_panel, 1, n_genes - 1), n_cells=(n_cells, 1, MANY),
        n_spots=(n_spots, 1, n_cells), zeros=(zeros, 0, 1), cell_scale=(cell_scale, *SCALES), spot_scale=(spot_scale, *SCALES),
    )  # fmt: skip
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


def spatial_field(
    *,
    seed: int = 0,
    n_cells: int = 3000,
    n_reference: int = 2000,
    n_types: int = 8,
    rho: float = 1.0,
    depth_reference: float = 2000.0,
    n_genes: int = 200,
    n_panel: int = 60,
    states: int = 4,
    contrast: float = 0.6,
    spatial: float = 0.8,
    length: float = 120.0,
    platform_sd: float = 0.5,
    theta: float = 4.0,
) -> Simulation:
    """Simulate a dissociated reference and a spatial target that share one latent state.

    Parameters
    ----------
    seed
        Seed of the one generator used.
    n_cells, n_reference
        Cells of the target (in a square of 1600 um) and of the reference.
    n_types, states
        h: cell types; d: dimensions of the state within and between types.
    rho, depth_reference
        Depth of the target relative to 150 counts over all genes; median counts of a reference cell.
    n_genes, n_panel
        Genes of the reference; the first ``n_panel`` of them are measured in the target.
    contrast
        Standard deviation over genes of the log fold change per unit of state.
    spatial, length
        Share of the variance of types and states that is a smooth function of place, and its length scale in micrometers.
    platform_sd
        Standard deviation of the log gain delta of a gene, target over reference.
    theta
        Median inverse dispersion of a gene, log sd 0.5, drawn anew for either side.

    Returns
    -------
    Simulation
        ``obs["type"]`` on all three tables; ``truth.var``: ``theta`` and ``log_gain``; ``truth.obsm["latent"]`` [n, d].
    """
    within(
        "spatial_field", n_types=(n_types, 2, 200), n_genes=(n_genes, 2, MANY), n_panel=(n_panel, 1, n_genes - 1), n_cells=(n_cells, 2, MANY),
        n_reference=(n_reference, 1, MANY), states=(states, 1, 1000), rho=(rho, *SCALES), depth_reference=(depth_reference, *SCALES),
        contrast=(contrast, 0, 10), spatial=(spatial, 0, 1), length=(length, *SCALES), platform_sd=(platform_sd, 0, 5), theta=(theta, *SCALES),
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    xy = rng.uniform(0, 16 * PITCH, size=(n_cells, 2))
    centers = 1.5 * rng.standard_normal((n_types, states))
    loadings = contrast / np.sqrt(states) * rng.standard_normal((states, n_genes))
    base = rng.gamma(0.5, 1.0, n_genes) + 0.02
    gain = np.exp(platform_sd * rng.standard_normal(n_genes))
    log_theta = np.log(theta) + 0.5 * rng.standard_normal((2, n_genes))
    fields = _random_fields(xy / length, n_types + states, rng)

    def side(code: FloatArray, depth: float, gains: FloatArray | float, inverse: FloatArray) -> tuple[FloatArray, ...]:
        kind = code[:, :n_types].argmax(1)
        latent = centers[kind] + code[:, n_types:]
        profile = base * np.exp(latent @ loadings)
        profile /= profile.sum(1, keepdims=True)
        mean = np.exp(rng.normal(np.log(depth), 0.4, len(code)))[:, None] * profile * gains
        return kind, latent, mean, rng.poisson(mean * rng.gamma(inverse, 1 / inverse, mean.shape))

    noise = rng.standard_normal(fields.shape)
    code = np.sqrt(spatial) * fields + np.sqrt(1 - spatial) * noise
    kind, latent, mean, counts = side(code, 150.0 * rho, gain, np.exp(log_theta[1]))
    other = rng.standard_normal((n_reference, n_types + states))
    other_kind, _, _, other_counts = side(other, depth_reference, 1.0, np.exp(log_theta[0]))
    tables = (counts.astype(np.float32), other_counts.astype(np.float32), mean, np.eye(n_types)[kind])
    world = _simulation(*tables, xy, np.zeros((n_reference, 2)), n_panel, None, f"spatial_field, seed {seed}")
    world.reference.obs_names = [f"reference{i}" for i in range(n_reference)]
    del world.reference.obsm["spatial"]
    for table, kinds in ((world.target, kind), (world.truth, kind), (world.reference, other_kind)):
        table.obs["type"] = pd.Categorical([f"type{k}" for k in kinds])
    world.truth.obsm["latent"] = latent
    world.truth.var["theta"], world.truth.var["log_gain"] = np.exp(log_theta[1, n_panel:]), np.log(gain[n_panel:])
    return world


PROTOCOLS = {"checkerboard": checkerboard, "blocks": blocks, "spatial_field": spatial_field}


def _random_fields(xy: FloatArray, number: int, rng: np.random.Generator, waves: int = 200) -> FloatArray:
    """``number`` smooth Gaussian random fields of unit length and variance at xy [n, 2], by random Fourier features; [n, number]."""
    fields = np.empty((len(xy), number))
    for c in range(number):
        angle = xy @ rng.standard_normal((2, waves)) + rng.uniform(0, 2 * np.pi, waves)
        fields[:, c] = np.sqrt(2 / waves) * np.cos(angle) @ rng.standard_normal(waves)
    return (fields - fields.mean(0)) / fields.std(0)


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
    proportions: FloatArray | None,
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
    if proportions is not None:
        reference.obsm["proportions"] = proportions
    return Simulation(target, reference, truth, proportions)
