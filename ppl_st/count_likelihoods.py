r"""Observation models of counts beyond Poisson and negative binomial: zero-inflated, and closed under summation.

    ZeroInflatedNegativeBinomial   p(x) = g [x = 0] + (1 - g) NB(x; mu, theta),   logit g = gate_logits
    SharedOddsNegativeBinomial     log p(x) = log G(x + r) - log G(r) - log x! + r log s(-u) + x log s(u)

with s the logistic function. The second is the negative binomial of r "failures" and log-odds u: mean r e^u,
variance mean (1 + e^u), hence ``NegativeBinomial(mean=r * exp(u), theta=r)``. Sums of such counts with one u
are of the same kind, their r added up, which is what lets a count of a spot be the sum over its pixels
(XFuse); a negative binomial with a fixed theta has no such property (theta must grow with the mean).

Zeros. With L = log NB(0), log p(0) = log1p((1 - g)(e^L - 1)) where that is above log(1/2), and
logaddexp(gate_logits, L) + log(1 - g) below; its slopes are (1 - w) by L and w (1 - g)(1 - e^L) by the gate,
w = s(gate_logits - L). None of these cancels, so gates from -inf (no inflation) to +inf (all mass at zero) have
the right value and gradient; gates are not clamped.

Means, thetas, float64 arithmetic, state and shapes: as in `ppl_st.likelihoods`, whose classes these extend.

Not here: zero inflation of other families, rates of product form, second derivatives, gradients with respect
to the data.
"""

from collections.abc import Sequence

import scipy.special
import torch
from torch import Tensor
from torch.distributions import constraints

from ppl_st.likelihood_math import (
    THETA_RANGE,
    Elementwise,
    Terms,
    common_shape,
    nb_hits,
    nb_hits_slope,
    nb_terms,
    positions,
    result_dtype,
)
from ppl_st.likelihoods import (
    NegativeBinomial,
    _mean_parameter,
    _Observation,
    _one_of,
    _tensors,
    check_shape,
    count_quantile,
)
from ppl_st.sampling import negative_binomial

LOGITS_RANGE = (-50.0, 40.0)  # means from 1e-14 to 1e8 at every shape from 1e-8 to 1e8


def zero_inflated_terms(log_mean: bool, log_theta: bool) -> Terms:
    """Blocks of zero-inflated NB log p and of its derivatives by the parameters as given (the gate in logits)."""
    negative_binomial = nb_terms(log_mean, log_theta)

    def terms(
        wants: Sequence[bool], x: Tensor, m: Tensor, t: Tensor, gate: Tensor
    ) -> tuple[Tensor, list[Tensor | None]]:
        x, gate = x.double(), gate.double()
        base, by_base = negative_binomial(wants[:2], x, m, t)
        shape = common_shape(base.shape, gate.shape)
        hit = positions(x.expand(shape).reshape(-1))
        gate_hits = _at(gate, shape, hit)
        zero = base.expand(shape).contiguous()  # log NB where x = 0; at the hits 0 stands in
        hits = zero.view(-1).index_select(0, hit) + torch.nn.functional.logsigmoid(-gate_hits)
        zero.view(-1).index_fill_(0, hit, 0.0)
        change = torch.expm1(zero).mul_(torch.sigmoid(-gate))  # p(0) - 1
        out = torch.log1p(change)
        low = positions(change.view(-1) < -0.5)
        if len(low):
            logits = _at(gate, shape, low)
            rare = torch.logaddexp(logits, zero.view(-1).index_select(0, low))
            out.view(-1).scatter_(0, low, rare + torch.nn.functional.logsigmoid(-logits))
        out.view(-1).scatter_(0, hit, hits)
        if not any(wants):
            return out, [None, None, None]
        odds = zero.sub_(gate).clamp_(-700, 700).exp_()  # NB : gate among zeros
        of_gate = 1 / (1 + odds)
        by_gate = None
        if wants[2]:
            by_gate = change.mul_(of_gate).neg_()
            by_gate.view(-1).scatter_(0, hit, -torch.sigmoid(gate_hits))
        of_base = odds.mul_(of_gate)
        of_base.view(-1).index_fill_(0, hit, 1.0)
        return out, [*(None if slope is None else slope * of_base for slope in by_base), by_gate]

    return terms


def shared_odds_terms(wants: Sequence[bool], x: Tensor, r: Tensor, u: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """Blocks of log p by (shape, logits) and of its derivatives by both."""
    x, r, u = x.double(), r.double(), u.double()
    shape = common_shape(x.shape, r.shape, u.shape)
    odds, chance = u.exp(), torch.sigmoid(u)
    log1p = torch.log1p(odds)
    out = (-r * log1p).expand(shape).contiguous()
    by_r = (-log1p).expand(shape).contiguous() if wants[0] else None
    by_u = (-r * chance).expand(shape).contiguous() if wants[1] else None
    hit = positions(x.expand(shape).reshape(-1))
    if len(hit):
        xs, raw = _at(x, shape, hit), _at(r, shape, hit)
        rs = raw.clamp(min=THETA_RANGE[0])
        mus = rs * _at(odds, shape, hit)
        out.view(-1).scatter_add_(0, hit, nb_hits(xs, mus, rs))
        if by_r is not None:  # at fixed odds, where nb_hits_slope has the mean fixed
            at_hits = nb_hits_slope(xs, mus, rs) + (xs - mus) / (rs + mus)
            floored = raw < THETA_RANGE[0]
            if floored.any():  # the logarithm of the shape is constant there
                at_hits = torch.where(floored, by_r.view(-1).index_select(0, hit), at_hits)
            by_r.view(-1).scatter_(0, hit, at_hits)
        if by_u is not None:
            by_u.view(-1).scatter_add_(0, hit, xs * _at(torch.sigmoid(-u), shape, hit))
    return out, [by_r, by_u]


def _at(a: Tensor, shape: torch.Size, index: Tensor) -> Tensor:
    """The entries at these flat positions of the common shape."""
    return a.expand(shape).reshape(-1).index_select(0, index)


class ZeroInflatedNegativeBinomial(_Observation):
    """Negative binomial counts of which a share, the gate, is replaced by zeros.

    Parameters
    ----------
    mean, log_mean
        Mean of the negative binomial part (exactly one of them), as for `NegativeBinomial`. The property
        ``mean`` is that of the counts: (1 - gate) times it.
    theta, log_theta
        Its inverse dispersion (exactly one), as for `NegativeBinomial`.
    gate_logits
        Log-odds of an extra zero; any real number, -inf and +inf included. A single value, per gene or per
        entry; never expanded.

    The limits are `NegativeBinomial` for gate_logits -> -inf, and all mass at zero for +inf. Results have the
    parameters' dtype; arithmetic is float64.
    """

    arg_constraints = {**NegativeBinomial.arg_constraints, "gate_logits": constraints.real}  # noqa: RUF012
    support = constraints.nonnegative_integer

    def __init__(
        self,
        mean: Tensor | float | None = None,
        theta: Tensor | float | None = None,
        gate_logits: Tensor | float | None = None,
        *,
        log_mean: Tensor | float | None = None,
        log_theta: Tensor | float | None = None,
        validate_args: bool | None = None,
    ) -> None:
        kind = "ZeroInflatedNegativeBinomial"
        mean_name, m = _one_of(kind, mean=mean, log_mean=log_mean)
        theta_name, t = _one_of(kind, theta=theta, log_theta=log_theta)
        _, g = _one_of(kind, gate_logits=gate_logits)
        m, t, g = _tensors(m, t, g)
        self._start({mean_name: m, theta_name: t, "gate_logits": g}, validate_args)

    @property
    def base(self) -> NegativeBinomial:
        """The counts before zeros are put in, on the parameters' own shape."""
        return NegativeBinomial(**{k: v for k, v in self._given.items() if k != "gate_logits"}, validate_args=False)

    @property
    def gate_logits(self) -> Tensor:
        """Log-odds of an extra zero, in the shape in which they were given."""
        return self._given["gate_logits"]

    @property
    def gate(self) -> Tensor:
        """Probability of an extra zero."""
        return torch.sigmoid(self.gate_logits)

    @property
    def mean(self) -> Tensor:
        return (torch.sigmoid(-self.gate_logits) * self.base.mean).expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        mu, theta = self.base.mean, self.base.theta
        return (torch.sigmoid(-self.gate_logits) * mu * (1 + mu * (1 / theta + self.gate))).expand(self.batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value), shape sample + batch."""
        self._check(value)
        mean_log, m = _mean_parameter(self._given)
        theta_log = "log_theta" in self._given
        t = self.base.log_theta if theta_log else self.base.theta
        result = Elementwise.apply(
            zero_inflated_terms(mean_log, theta_log), torch.is_grad_enabled(), value, m, t, self.gate_logits
        )
        return self._whole(result, value)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Counts as floats, from torch's global generator."""
        counts = self.base.expand(self.batch_shape).sample(sample_shape)
        gate = self.gate_logits.detach().double().sigmoid()
        extra = torch.rand(counts.shape, dtype=torch.float64, device=counts.device) < gate
        return counts.masked_fill(extra, 0.0).to(result_dtype(*self._given.values()))

    def cdf(self, value: Tensor) -> Tensor:
        """P(X <= value), by scipy in float64; no gradient."""
        check_shape(value, self.batch_shape, "ZeroInflatedNegativeBinomial.cdf")
        logits = self.gate_logits.detach().double()
        below = self.base.expand(self.batch_shape).cdf(value).double()
        out = torch.where(value < 0, 0.0, torch.sigmoid(logits) + torch.sigmoid(-logits) * below)
        return out.to(result_dtype(*self._given.values()))

    def icdf(self, q: Tensor) -> Tensor:
        """The smallest count k with P(X <= k) >= q; q in [0, 1)."""
        return count_quantile(self, q)


class SharedOddsNegativeBinomial(_Observation):
    """Negative binomial counts by shape and log-odds; closed under summation where the log-odds are shared.

    Mean ``shape * exp(logits)``, variance ``mean * (1 + exp(logits))``: in the house's form
    ``NegativeBinomial(mean=shape * exp(logits), theta=shape)``. If X_i have shapes r_i and one value of logits,
    their sum has shape r_1 + r_2 + ... and those logits.

    Parameters
    ----------
    shape
        >= 0 (accurate from 1e-8 to 1e8); carries everything that adds up, usually [n, G]. At counts > 0 it is floored
        at 1e-12, and the floored part has no slope.
    logits
        Log-odds, clamped to `LOGITS_RANGE`; usually per gene, [G], and never expanded over cells.

    Pyro has a method ``shape``, so the parameter is read back as ``total_count`` (torch's name for it). Results
    have the parameters' dtype; arithmetic is float64.
    """

    arg_constraints = {"shape": constraints.nonnegative, "logits": constraints.real}  # noqa: RUF012
    support = constraints.nonnegative_integer

    def __init__(self, shape: Tensor | float, logits: Tensor | float, *, validate_args: bool | None = None) -> None:
        r, u = _tensors(shape, logits)
        self._start({"shape": r, "logits": u}, validate_args)

    @property
    def total_count(self) -> Tensor:
        """The shape parameter, in the shape in which it was given."""
        return self._given["shape"]

    @property
    def logits(self) -> Tensor:
        """Log-odds as they are used, in the shape in which they were given."""
        return self._given["logits"].clamp(*LOGITS_RANGE)

    @property
    def mean(self) -> Tensor:
        return (self.total_count * self.logits.exp()).expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        return self.mean * (1 + self.logits.exp())

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value), shape sample + batch."""
        self._check(value)
        result = Elementwise.apply(shared_odds_terms, torch.is_grad_enabled(), value, self._given["shape"], self.logits)
        return self._whole(result, value)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Counts as floats, drawn in float64 from torch's global generator."""
        r, u = self.total_count.detach(), self.logits.detach()
        wide = torch.Size(sample_shape) + self.batch_shape
        return negative_binomial(r.double().expand(wide), u.double().exp().expand(wide)).to(result_dtype(r, u))

    def cdf(self, value: Tensor) -> Tensor:
        """P(X <= value) = I_{s(-logits)}(shape, value + 1), by scipy in float64; no gradient."""
        check_shape(value, self.batch_shape, "SharedOddsNegativeBinomial.cdf")
        r, u = self.total_count.detach(), self.logits.detach()
        k, size, logits = (a.detach().cpu().double() for a in torch.broadcast_tensors(value, r, u))
        k = k.floor()
        above, odds = k.clamp(min=0).numpy() + 1, logits.numpy()
        # The small one of the two probabilities goes in, so that neither tail is rounded to 0 or 1.
        low = scipy.special.betaincc(above, size.numpy(), scipy.special.expit(odds))
        high = scipy.special.betainc(size.numpy(), above, scipy.special.expit(-odds))
        out = torch.where(k < 0, 0.0, torch.where(logits < 0, torch.as_tensor(low), torch.as_tensor(high)))
        return self._whole(out.to(device=r.device, dtype=result_dtype(r, u)), value)

    def icdf(self, q: Tensor) -> Tensor:
        """The smallest count k with P(X <= k) >= q; q in [0, 1)."""
        return count_quantile(self, q)
