"""Settings of VISTA and their presets.

"paper", "released" and "gimvi" have the published objective (term by term, `tests/test_vista.py`), widths and settings. Their networks
(``map="learned"``) are not the published ones layer by layer:

    encoder      two linear layers for either modality, then the shared ones; gimVI: one. LayerNorm where gimVI has BatchNorm.
    library      of a reference cell: its observed total with one shift and one sd for all cells; gimVI: an encoder network.
    dispersion   one theta per gene and modality; gimVI: per gene and batch.
    graph        "paper": location + V relu(GAT(location)), V = 0 at the start; the paper (eq. 9, 10) has a second network F_s of the counts x' beside
                 the encoder, relu(GAT(W F_s(x'))). "released": the same, for the location of the term that the graph alters; the released code adds
                 GAT(location) to the location and exp(GAT(scale)) to the scale, without V.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from ppl_st.inference.svi import FitConfig
from ppl_st.observation import check_name


@dataclass(frozen=True)
class Config:
    """Settings of VISTA. `PRESETS` has the default, the paper's, the released code's and gimVI's values."""

    # none = gimVI; kl_only = the released code; posterior = the paper; prior = neighbors inform p(z)
    graph: Literal["none", "kl_only", "posterior", "prior"] = "prior"
    neighbors: int = field(default=20, metadata={"ge": 1})  # of a cell, within its section
    heads: int = field(default=1, metadata={"ge": 1})  # of the attention
    # closed: map in closed form from standardised genes; learned: networks much like the published ones (above), by gradient
    map: Literal["closed", "learned"] = "closed"
    latent: int = field(default=48, metadata={"ge": 1})  # d
    hidden: int = field(default=64, metadata={"ge": 1})  # units of the learned networks
    dropout: float = field(default=0.2, metadata={"ge": 0, "lt": 1})  # in the learned networks
    # several: Bayesian bootstraps of the reference (closed), which cost a little accuracy each, or starts (learned)
    chains: int = field(default=1, metadata={"ge": 1})
    # of the spatial counts: "nb", "poisson", "zinb" or "module:function" (`ppl_st.observation`)
    likelihood: str = "nb"
    reference_likelihood: Literal["nb", "zinb"] = "nb"
    platform: Literal["hierarchical", "none"] = "hierarchical"  # gain and slope of a gene; none fixes them
    adversary: Literal["off", "cross_entropy", "density_ratio", "hinge"] = "off"
    adversary_weight: float = field(default=5.0, metadata={"ge": 0})  # kappa of the two sides' mean losses, added
    visible: float = field(default=0.75, metadata={"gt": 0, "le": 1})  # share of panel genes the encoder sees in training
    penalty: float | Literal["auto"] = field(default="auto", metadata={"gt": 0})  # ridge penalty of the closed map
    others: bool = True  # genes that only the target has help to place its cells and give their depth (closed map)
    reweight: bool | Literal["auto"] = "auto"  # weight the reference towards the target's composition
    # share of the panel read off the directions of all genes of the target (closed map)
    denoise: float | Literal["auto"] = field(default="auto", metadata={"ge": 0, "le": 1})
    # weight of what all genes of a spatial cell have in common, in standard deviations of a gene's log-normalised counts (closed map)
    common: float | Literal["auto"] = field(default="auto", metadata={"ge": 0})
    # share of the process over the reference's cells in the score of an unmeasured gene (closed map)
    process: float | Literal["auto"] = field(default="auto", metadata={"ge": 0, "le": 1})
    reference_weight: float = field(default=1.0, metadata={"gt": 0})  # of the reference's log-likelihood
    batch_cells: int = field(default=256, metadata={"ge": 0})  # spatial cells per minibatch; 0 = all
    # reference cells per minibatch; the closed map leaves little to learn from them by gradient
    batch_reference: int = field(default=32, metadata={"ge": 0})
    library_key: str | None = None  # obs column of the section: no neighbors across sections
    batch_key: str | None = None  # obs column of the batch, on both sides
    # obs column of the cell type, on both sides: train on the paper's anchor genes only (intervals are then those of genes that agree)
    anchor_key: str | None = None
    layer: str | None = None  # layer with the counts
    reference_layers: tuple[str, ...] = ()  # further layers of the reference to impute, as genes GENE:layer (`ppl_st.layers`)
    gene_key: str | None = None  # var column with the gene names, of each file that has it; none = var_names
    fit: FitConfig = FitConfig(
        steps=100, lr=0.03, schedule="cosine", final_lr_factor=0.05, clip_norm=1e3, kl_warmup_steps=20, elbo="meanfield", checkpoint_every=100,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_name(self.likelihood)


_GIMVI = Config(  # the published kappa is 5, of one mean over the codes of both sides
    graph="none", map="learned", latent=10, hidden=64, chains=1, reference_likelihood="zinb", platform="none", adversary="cross_entropy",
    adversary_weight=2.5, visible=1.0, batch_cells=128, batch_reference=128, reweight=False, penalty=3.0, others=False,
    fit=FitConfig(steps=4000, lr=1e-3, eps=0.01, weight_decay=1e-6, clip_norm=1e3, kl_warmup_steps=8000, elbo="meanfield"),
)  # fmt: skip
PRESETS = {
    "default": Config(),
    "paper": replace(_GIMVI, graph="posterior", latent=32, neighbors=20),
    "released": replace(_GIMVI, graph="kl_only", latent=32, neighbors=20),
    "gimvi": _GIMVI,
}
