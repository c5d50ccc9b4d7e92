r"""A spatial cell in the reference's style: the counts that its state would show as a reference cell, also as one of a condition.

    log rate_ig = log L + log softmax_g(b_g + s_g (z_i A)_g) + sum_k r_k(z_i) e_kg           L: library, the total over all genes of the reference

z_i is the state that the neighbors inform, without the process over the reference's cells. The reference's decoder knows no conditions (disease,
perturbation: batches of the reference). What one of them adds is read off the reference's cells around K places among the states, r_k(z) the
shares of a state in them. With x_kg the counts of the condition's cells there and m_kg what the decoder expects of them, x', m' of all cells,

    e_kg = log x_kg / m_kg - log x'_kg / m'_kg      in two parts: of the gene everywhere, and what is left at a place

each shrunk by its sampling variance, over-dispersion included: the first as Normal(0, `CHANGE`^2), the second as Normal(0, tau_g^2) over the places
of the gene, tau_g^2 by moments. What is not known of the first part is drawn once per gene and draw, of the second once per place as well. A
condition that is the whole reference adds nothing. All of it is a model's answer, not a measurement.

n spatial cells, R reference cells, G genes, d latent dimensions.
"""

from collections.abc import Iterator
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppl_st.inference.ensemble import chains_of
from ppl_st.inference.pair import Pair
from ppl_st.inference.randomness import gene_noise
from ppl_st.models.vista.batches import Batch, Batches, Data
from ppl_st.models.vista.model import LOG_RATE, Guide, Model, sides

PLACES, PLACE_CELLS = 20, 50  # K at most; cells of the condition for each, on average at least
CELLS, ROWS = 2000, 1024  # cells among which places are sought; cells made dense together
CHANGE = 1.0  # of a gene by a condition, in log rate


class Effect(NamedTuple):
    """What a condition adds to the log rates of one chain."""

    scale: Tensor  # [d] of the coordinates of a state: one over their sd around a place
    places: Tensor  # [K, d] in these units
    mean: Tensor  # [K, G]
    everywhere: Tensor  # [G] sd of what it does everywhere
    sd: Tensor  # [K, G] of what it does at one place beside that

    def shares(self, z: Tensor) -> Tensor:
        """r(z) of states z [n, d], [n, K]: posterior of a mixture of normals, all alike but for their means."""
        return torch.softmax(-0.5 * torch.cdist(z * self.scale, self.places).square(), 1)


def effect_of(model: Model, guide: Guide, data: Data, inside: NDArray[np.bool_]) -> Effect:
    """Of the condition whose cells are those ``inside`` [R] of the reference."""
    batches, own = Batches(data, 0, 0, 0), np.flatnonzero(inside)
    with torch.no_grad():
        width = (model.decoder * (model.reference_slope if model.closed else 1.0)).norm(dim=1)  # how much a unit of a coordinate moves the log rates
        if model.closed:
            width[-1] = 0.0  # what genes have in common in the target
        some = np.random.default_rng(0).permutation(own)[:CELLS]
        points = guide.encode_reference(batches.of_reference(some))[0] * width
        places = points[: int(np.clip(len(own) // PLACE_CELLS, 1, PLACES))]
        for _ in range(20):
            member = torch.nn.functional.one_hot(torch.cdist(points, places).argmin(1), len(places)).float()
            size = member.sum(0)[:, None]
            places = torch.where(size > 0, member.T @ points / size.clamp_min(1.0), places)
        sd = (points - places[torch.cdist(points, places).argmin(1)]).square().mean(0).sqrt()
        sd = sd.clamp_min(max(1e-3 * float(sd.max()), 1e-6))
        unknown = torch.zeros(len(places), model.spec.n_genes)
        effect = Effect(width / sd, places / sd, unknown, unknown[0], unknown)
        sums = torch.zeros(2, 3, *unknown.shape, dtype=torch.float64)  # of the condition and of all: counts, their mean and variance
        for start in range(0, len(inside), ROWS):
            rows = np.arange(start, min(start + ROWS, len(inside)))
            batch = batches.of_reference(rows)
            z = guide.encode_reference(batch)[0]
            law = model.reference_law(z, model.reference_log_rate(z, batch.reference.sum(1).clamp_min(1.0).log()))
            for side, kept in zip(sums, (torch.from_numpy(inside[rows]), torch.ones(len(rows))), strict=True):
                share = effect.shares(z) * kept[:, None]
                side += torch.stack([share.T @ batch.reference, share.T @ law.mean, share.square().T @ law.variance])
    (x, m, v), (x_all, m_all, _) = sums.numpy()

    def compared(x: Any, m: Any, v: Any, x_all: Any, m_all: Any) -> tuple[Any, Any]:
        value = np.log((x + 0.5) / (m + 0.5)) - np.log((x_all + 0.5) / (m_all + 0.5))
        return value, np.maximum((v + 0.5) / (m + 0.5) ** 2 * (1 - m / np.maximum(m_all, 1e-9)), 1e-9)  # the condition is a part of all

    found, noise = compared(*(one.sum(0) for one in (x, m, v, x_all, m_all)))
    here, own_noise = compared(x, m, v, x_all, m_all)
    tau = np.maximum((((here - found) ** 2 / own_noise).sum(0) - len(x)) / (1 / own_noise).sum(0), 0.0)  # squared
    keep, own_keep = CHANGE**2 / (CHANGE**2 + noise), tau / (tau + own_noise)
    known = keep * found + own_keep * (here - found), np.sqrt(keep * noise), np.sqrt(own_keep * own_noise)
    return effect._replace(**{name: torch.from_numpy(one).float() for name, one in zip(("mean", "everywhere", "sd"), known, strict=True)})


def as_reference(pair: Pair, data: Data, inside: NDArray[np.bool_] | None, library: float) -> Any:
    """What `ppl_st.posterior.Run.as_reference` needs: a method that decodes spatial cells as reference cells with the total ``library``, of the
    condition that the cells ``inside`` [R] of the reference have (None: as its decoder says)."""
    effects = [None if inside is None else effect_of(*sides(chain), data, inside) for chain in chains_of(pair)]

    def predictor(pair: Pair, data: Data, config: Any, spec: Any) -> StylePredictor:
        return StylePredictor(pair, data, effects, library)

    return SimpleNamespace(Predictor=predictor, Model=Model, quantities=lambda *_: ({}, {}))


class Local(NamedTuple):
    """Cells of a block before the draws."""

    loc: Tensor  # [n, d] of q(z)
    scale: Tensor
    total: dict[int, Tensor]  # by draw: log of the sum over all genes of what is normalised, [n, 1]


class StylePredictor:
    """Posterior predictive of spatial cells as reference cells; see `ppl_st.inference.predict.Predictor`."""

    def __init__(self, pair: Pair, data: Data, effects: list[Effect | None], library: float) -> None:
        self.chains, self.effects, self.log_library = chains_of(pair), effects, float(np.log(library))
        self.n_cells, self.batches = data.counts.shape[0], Batches(data, 0, 0, 0)
        self.noise = lru_cache(maxsize=512)(lambda key, genes, size: gene_noise(torch.tensor(key), torch.tensor(genes), size))

    def blocks(self, max_cells: int) -> Iterator[Batch]:
        """Batches that own every cell once."""
        return self.batches.in_order(max_cells)

    def at(self, rows: NDArray[np.int64]) -> Batch:
        """Any cells as a batch."""
        return self.batches.of(rows)

    def rows(self, batch: Batch) -> NDArray[np.int64]:
        """Rows of the result that the batch owns."""
        return batch.rows.numpy()

    def local(self, batch: Batch, chain: int) -> Local:
        """States of the owned cells before the draws."""
        with torch.no_grad():
            return Local(*sides(self.chains[chain])[1].states(batch), {})

    def count_dist(self, batch: Batch, chain: int, drawn: dict[str, Tensor], local: Local, genes: Tensor) -> Any:
        """p(count | draw) of ``genes`` [g]; states, drawn here, are the same for all blocks of genes."""
        model, effect, key = sides(self.chains[chain])[0], self.effects[chain], int(drawn["gene_key"])
        z = local.loc + local.scale * torch.randn_like(local.loc)
        if key not in local.total:
            local.total[key] = torch.logsumexp(model.reference_logits(z), 1, keepdim=True)
        log_rate = self.log_library - local.total[key] + model.reference_logits(z, genes)
        if effect is not None:
            noise = self.noise(key, tuple(genes.tolist()), 1 + len(effect.places))
            log_rate = log_rate + effect.everywhere[genes] * noise[0] + effect.shares(z) @ (effect.mean[:, genes] + effect.sd[:, genes] * noise[1:])
        return model.reference_law(z, log_rate.clamp(*LOG_RATE), genes)
