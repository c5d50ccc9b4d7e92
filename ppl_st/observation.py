r"""The likelihood of a method's counts as a setting: ``likelihood="nb"``, "poisson", "zinb", or a function of your own.

The contract. A likelihood is a function from a mean and parameters per gene to a distribution::

    def my_counts(mean, log_theta=(1.0, 1.0)):
        return MyDistribution(mean, log_theta.exp())

    ppl_st.fit("siid", target=..., reference=..., likelihood=my_counts)

    mean      the method's rate, [..., g] and > 0, one column per gene
    others    any number of further arguments, each one real number per gene, shape [g]. The default is not a value but a
              prior, Normal(location, scale): a positive parameter is given by its logarithm, a probability by its
              log-odds, and transformed in the function.
    returns   a Pyro distribution over counts, batch shape [..., g], no event shape, with `log_prob`, `sample`, `mean`
              and `variance`, whose `support` (if it tells one) is of integers >= 0. Its mean must be finite and > 0, and may differ from
              the argument (zero inflation): SIID and VISTA divide by the factor between them (`of_mean`),
              so that their rate is the mean of the counts. `log_prob` must be differentiable by
              all arguments; `ppl_st.testing.check_likelihood` tests that and much more.

What a method does with the parameters. Each is a global site of its own name with the prior Normal(a + b z_g, s), z_g a
covariate of the gene (SIID: its centred log share of the reference's counts). a, b, s are learned on inner held-out genes,
one parameter after the other, each gene's value integrated over `GRID_REACH` declared scales to either side; where nothing
can be held out, a and s are the declared ones and b = 0. Genes that the target measured get their own value, a point; for
others the parameter is drawn from Normal(a + b z_g, s) in every posterior draw, so its uncertainty is in the predictive.
"nb" and "zinb" are two such functions, below.

What it does not reach. Closed-form steps before and around the gradient steps keep their own working likelihood: in SIID the EM start and the
posterior of each cell's activities are Poisson, in VISTA the map from reference to target is a penalised regression (their docstrings say more). The
objective of every SVI step, the learned parameters and every predictive draw use the function.

By name. Settings hold text: "nb", "poisson", "zinb" or "module:function". A function given in Python is stored under its
own name and must be found under that name again: defined at the top level of an importable module, script or notebook, not
inside another function. To load a run in another process its module must be importable there, or (a notebook) the function
defined again before `ppl_st.load`. Nothing is unpickled; that the function is still the same is yours to see to (only the
names of its parameters are checked).

Not here: likelihoods of transformed counts, parameters per cell.
"""

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppl_st.count_likelihoods import ZeroInflatedNegativeBinomial
from ppl_st.errors import UserError
from ppl_st.likelihoods import NegativeBinomial, Poisson

Prior = tuple[float, float]  # location and scale of a Normal
GRID_REACH = 5.0  # declared scales to either side of the declared location within which a parameter is sought


class Likelihood(NamedTuple):
    """A likelihood and the priors of its parameters; call it with a mean [..., g] and {parameter: [g]}."""

    name: str
    make: Callable[..., Any]
    priors: dict[str, Prior]

    def __call__(self, mean: Tensor, parameters: Mapping[str, Tensor]) -> Any:
        """The distribution of counts with batch shape [..., g]; other entries of `parameters` are ignored."""
        return self.make(mean, **{name: parameters[name] for name in self.priors})

    def grid(self, parameter: str, points: int = 41) -> Tensor:
        """Values of a parameter at which it is tried, float64 [points]."""
        location, scale = self.priors[parameter]
        reach = GRID_REACH * scale
        return torch.linspace(location - reach, location + reach, points, dtype=torch.float64)


def poisson(mean: Tensor) -> Poisson:
    """Poisson counts."""
    return Poisson(mean)


def nb(mean: Tensor, log_theta: Any = (1.0, 1.0)) -> NegativeBinomial:
    """Negative binomial counts, Var = mean + mean^2 / theta."""
    return NegativeBinomial(mean, log_theta=log_theta)


def zinb(mean: Tensor, log_theta: Any = (1.0, 1.0), gate_logits: Any = (-2.0, 1.0)) -> ZeroInflatedNegativeBinomial:
    """Negative binomial counts of which the share sigmoid(gate_logits) is replaced by zeros."""
    return ZeroInflatedNegativeBinomial(mean, log_theta=log_theta, gate_logits=gate_logits)


BUILT_IN = {"nb": nb, "poisson": poisson, "zinb": zinb}


def check_name(text: str) -> None:
    """Refuse, as a ``ValueError``, a setting that is neither a known name nor of the form "module:function"."""
    module, colon, function = text.partition(":")
    if text not in BUILT_IN and not (colon and module and function):
        close = get_close_matches(text, BUILT_IN, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        known = ", ".join(map(repr, BUILT_IN))
        raise ValueError(f"likelihood must be one of {known} or 'module:function', got {text!r}{hint}")


def find(text: str, reserved: tuple[str, ...] = ()) -> Likelihood:
    """The likelihood of that name, tried once on a small example.

    Parameters
    ----------
    text
        "nb", "poisson", "zinb" or "module:function".
    reserved
        Names of the method's own sites, which a parameter must not have.

    Raises
    ------
    UserError
        It cannot be found, an argument has no prior, or what it returns lacks something that a method needs.
    """
    make: Any = BUILT_IN.get(text) or _imported(text)
    priors: dict[str, Prior] = {}
    for name, argument in list(inspect.signature(make).parameters.items())[1:]:
        try:
            location, scale = argument.default
            priors[name] = float(location), float(scale)
        except (TypeError, ValueError):
            raise UserError(
                f"likelihood {text!r}: the default of argument {name!r} must be its prior (location, scale), e.g. {name}=(0.0, 1.0)"
            ) from None
        if not priors[name][1] > 0 or name in reserved:
            what = "the name is taken by the method" if name in reserved else "the scale of its prior is not positive"
            raise UserError(f"likelihood {text!r}: argument {name!r}: {what}")
    likelihood = Likelihood(text, make, priors)
    if text not in BUILT_IN:
        _try(likelihood)
    return likelihood


def of_mean(likelihood: Likelihood) -> Likelihood:
    """The likelihood as a function of the mean of its counts, also where the mean that it takes is another one (before zero inflation, say).

    The given mean is divided by what the counts of mean 1 have on average; a likelihood whose mean is proportional to the one that it takes then has
    it. Levels that were learned as ratios of counts are such means.
    """
    if likelihood.name in ("nb", "poisson"):
        return likelihood

    def make(mean: Tensor, **parameters: Tensor) -> Any:
        return likelihood.make(mean / likelihood.make(mean.new_ones(mean.shape[-1]), **parameters).mean, **parameters)

    return likelihood._replace(make=make)


def name_of(function: Callable[..., Any]) -> str:
    """The name "module:function" under which `find` gets this very function back.

    Raises
    ------
    UserError
        There is no such name: a lambda, a function inside a function, an object without a name.
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    text = f"{module}:{name}"
    try:
        found = _imported(text)
    except UserError:
        found = None
    if found is not function:
        raise UserError(
            f"likelihood {text!r} could not be found again when the run is loaded: define it with `def` at the top level of a "
            "module, script or notebook"
        )
    return text


def _imported(text: str) -> Any:
    module, _, name = text.partition(":")
    remedy = (
        f"make module {module!r} importable (its folder on PYTHONPATH)"
        if module != "__main__"
        else "define the function in this session first, or keep it in a module"
    )
    try:
        found: Any = import_module(module)
    except ImportError as error:
        raise UserError(f"likelihood {text!r} cannot be imported ({error}); {remedy}") from error
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise UserError(f"likelihood {text!r}: module {module!r} has no function {name!r}; {remedy}")
    return found


def _try(likelihood: Likelihood) -> None:
    """Two cells, three genes, parameters at their prior's location: everything that a method will ask for."""
    mean = torch.tensor([[0.1, 1.0, 5.0], [0.5, 2.0, 0.01]], requires_grad=True)
    parameters = {name: torch.full((3,), location) for name, (location, _) in likelihood.priors.items()}
    asked = "calling it"
    try:
        d = likelihood(mean, parameters)
        if d is None:
            raise TypeError("it returned None, not a distribution; end it with `return`")
        for asked in ("to_event", "mask", "expand"):  # what Pyro adds to torch's distributions
            getattr(d, asked)
        shapes = {"batch_shape": torch.Size(d.batch_shape), "event_shape": torch.Size(d.event_shape)}
        for asked in ("mean", "variance"):
            shapes[asked] = getattr(d, asked).shape
        expected = d.mean
        asked = "log_prob"
        log_p = d.log_prob(torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 1.0]]))
        (slope,) = torch.autograd.grad(log_p.sum(), mean)
        shapes[asked] = log_p.shape
        asked = "sample"
        with torch.random.fork_rng(devices=[]):
            shapes[asked] = d.sample().shape
    except Exception as error:
        raise UserError(
            f"likelihood {likelihood.name!r}: {asked} fails on a mean of shape (2, 3) and parameters of shape (3,): {type(error).__name__}: {error}"
        ) from error
    wrong = [f"{k} {tuple(v)}" for k, v in shapes.items() if v != ((2, 3) if k != "event_shape" else ())]
    if wrong:
        raise UserError(
            f"likelihood {likelihood.name!r}: for a mean of shape (2, 3): {', '.join(wrong)}; expected (2, 3), event_shape ()"
        )
    if not (log_p.isfinite().all() and slope.isfinite().all()):
        raise UserError(
            f"likelihood {likelihood.name!r}: log_prob or its gradient by the mean is not finite at the prior's location"
        )
    if not (expected.isfinite() & (expected > 0)).all():
        raise UserError(
            f"likelihood {likelihood.name!r}: its mean is not finite and positive at the prior's location; SIID and VISTA need one, because they "
            "divide by what the counts of mean 1 have on average: choose a likelihood that has a mean"
        )
    if not _of_counts(d):
        raise UserError(
            f"likelihood {likelihood.name!r}: {type(d).__name__} has support {d.support}, which holds more than the counts 0, 1, 2, ...; return a "
            "distribution over these, such as pyro.distributions.NegativeBinomial"
        )


def _of_counts(d: Any) -> bool:
    """Whether the support of a distribution over [2, 3] values is of integers >= 0; what does not tell is believed."""
    try:
        return not any(bool(d.support.check(torch.full((2, 3), odd)).any()) for odd in (-1.0, 0.5))
    except Exception:  # constraints of all kinds of authors
        return True
