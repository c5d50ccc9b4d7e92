"""ppl_st: spatial-transcriptomics methods as explicit Pyro model/guide pairs.

The public face. Names are looked up on first use (PEP 562), so ``import ppl_st`` costs milliseconds and loads
neither torch nor anndata.

Examples
--------
>>> import ppl_st
>>> run = ppl_st.fit("siid", target="cells.h5ad", reference="spots.h5ad", seed=0)  # doctest: +SKIP
>>> imputed = run.predict(genes=["Gad1"])  # doctest: +SKIP
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppl_st.api import fit, load
    from ppl_st.errors import UserError
    from ppl_st.models import METHODS
    from ppl_st.posterior import Run
    from ppl_st.refit import recalibrate

__version__ = "0.2.0"

# torch's threads spin while they wait; on a shared machine that cost a factor of seven (tests/benchmarks/RECORD.md). Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__all__ = ["METHODS", "Run", "UserError", "__version__", "fit", "load", "recalibrate"]

# `evaluate` is absent on purpose: a function of that name would be hidden by the submodule as soon as that is
# imported.
_HOME = {
    "METHODS": "ppl_st.models",
    "Run": "ppl_st.posterior",
    "UserError": "ppl_st.errors",
    "fit": "ppl_st.api",
    "load": "ppl_st.api",
    "recalibrate": "ppl_st.refit",
}

# Modules that users call by name: there without an import of their own.
_MODULES = ("layers", "neighbor_score", "observation", "pooling", "stack")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"ppl_st.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'ppl_st' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
