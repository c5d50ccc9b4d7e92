"""The zoo: one file or folder per method, listed in ``METHODS``.

The folder lives at the top of the repository and is imported as ``ppl_st.models``. This file imports no
method (each loads torch), so the list of methods can be shown at once; ``load_method`` imports the one that
is asked for. Adding a method is its file here, its file in ``ppl_st/prepare``, and a line in ``METHODS``.
Its module offers

    PRESETS                                     name -> Config; a Config has ``fit: FitConfig``, ``layer`` and ``gene_key``
    Model, Guide                                the pair; ``Model.DIMS`` names the dimensions of global sites, ``guide.globals()`` draws them
    start(data, config, seed, say)              -> (pair, spec): settings chosen by the data, initialised ensemble; training ends after ``spec.steps``
                                                   of the steps in the settings, if there is such a number (their schedule stays)
    empty(config, spec, data, chains)           -> pair with every parameter in place, to read weights into
    spec_to(spec), spec_from(stored)            specification <-> plain JSON
    batches(data, config, seed)                 -> minibatches (`ppl_st.inference.svi.Batches`)
    select(pair, data, config, seed)            -> the chains to keep, in order
    Predictor(pair, data, config, spec)         -> `ppl_st.inference.predict.Predictor`
    quantities(pair, data, config, spec)        -> (obsm, obs): what else it knows of the target's cells
    profiles(pair, config)                      -> (varm, units): tables [genes, programs] and their units; only of methods whose programs have them
    proportions(pair, data, config, draws, seed)   -> ({mean, sd, q05, q95: [spots, factors]}, profiles [factors, genes]), and
    factor_names(data, factors)                    -> names of the factors; only of methods that deconvolve spots
    alignment(pair, data, config, seed)   -> {name: number}, diagnostics kept in the record; only of methods that align two sides
    as_reference(pair, data, inside, library)   -> method that decodes spatial cells in the style of these reference cells; only of methods that can
    turned(pair, data)        -> (method, data) of the other direction; only of methods that have one
    adversary(pair, config)                     -> `ppl_st.inference.adversary.Adversary` or None; only of methods with a second player
    edit(pair, data, config, seed)              -> what changes the pair between steps (`fit`), or None; only of methods that grow or prune
    watch(pair, config, seed)                   -> function of a minibatch that says what the log shows of the factors, or None; only of methods
                                                   that bring two sides together
    loss_scale(data, config)                    -> what the loss is multiplied by; without it one over the entries of the target
    maps(predictor, genes, draws, seed, sections)  -> joint draws of whole sections; only of methods of images

where ``data`` comes from the method's file in ``ppl_st/prepare`` and chains are those of `ppl_st.inference.ensemble`.
"""

if __name__ != "ppl_st.models":
    raise ImportError("import ppl_st.models, not models: the bare name would load a second copy of every module")

from difflib import get_close_matches
from importlib import import_module
from types import ModuleType
from typing import Literal, NamedTuple

from ppl_st.errors import UserError

__all__ = ["METHODS", "Method", "load_method"]


class Method(NamedTuple):
    """What a reader of ``ppl-st methods`` wants to know about one method, and where its file is."""

    module: str
    summary: str
    needs: str
    gives: str
    reference: Literal["cells", "spots", "image"]  # dissociated cells, spots of a second spatial platform, or none but an image


METHODS = {
    "siid": Method(
        module="ppl_st.models.siid",
        summary="joint factor model of a single-cell and a spot-based platform in one coordinate frame",
        needs="target: cells with a gene panel (Xenium-like); reference: spots with more genes (Visium-like)",
        gives="unmeasured genes in every cell, cell-to-factor assignment, proportions of every spot",
        reference="spots",
    ),
    "vista": Method(
        module="ppl_st.models.vista",
        summary="one latent state for dissociated and spatial cells, with a neighbor graph that reaches the prediction",
        needs="target: cells with a gene panel and coordinates (without them: graph=none); reference: scRNA-seq with more genes",
        gives="unmeasured genes in every cell, latent state of every cell; graph=none is gimVI",
        reference="cells",
    ),
    "spaim": Method(
        module="ppl_st.models.spaim",
        summary="spatial expression of a gene from its profile over the clusters of a single-cell reference",
        needs="target: cells or spots with some genes; reference: scRNA-seq with more genes",
        gives="unmeasured genes in every cell or spot",
        reference="cells",
    ),
    "spagene": Method(
        module="ppl_st.models.spagene",
        summary="two autoencoders and translators between their codes, in both directions, aligned by cycle, moments and critics",
        needs="target: cells or spots with some genes, the more the better; reference: scRNA-seq with more genes",
        gives="unmeasured genes in every cell or spot; reference cells as the target's platform would show them (--turned)",
        reference="cells",
    ),
    "xfuse": Method(
        module="ppl_st.models.xfuse",
        summary="histology and spot counts fused into expression at the resolution of the image",
        needs="target: spots with positions in pixels of --image (or a Space Ranger folder or SpatialData store that has one); several sections",
        gives="expression at every pixel, other spots, areas, cells, and in images without counts; differences between annotated regions",
        reference="image",
    ),
}


def load_method(name: str) -> ModuleType:
    """Import and return the file of one method.

    Raises
    ------
    UserError
        If ``name`` is not in ``METHODS``; the message names the closest one.
    """
    if name not in METHODS:
        close = get_close_matches(name.lower(), METHODS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise UserError(f"unknown method {name!r}{hint} Available: {', '.join(METHODS)} (see `ppl-st methods`)")
    return import_module(METHODS[name].module)
