"""Accuracy and speed of the count likelihoods beside Pyro's and torch's, as two Markdown tables.

    OMP_NUM_THREADS=1 python tests/benchmarks/likelihoods.py        # scvi-tools' rows where it is installed (the extra `peers`)

Accuracy: float32 parameters on a grid of counts 0..1e6, means 1e-12..1e8, thetas 1e-8..1e8 (gates -200..200) against mpmath at the rounded
parameters: largest absolute error where x <= 1e3, mean 1e-6..1e4 and theta >= 1e-4; share of all points with a relative error above 1e-3 (value)
or 1e-2 (gradient by the log-mean, log-theta and gate). Speed: processor time of forward and backward, median of interleaved runs, one thread,
validation off, float32, parameters log-mean [n, G], log-theta and gate [G]. Last: what reading the mean does to a zero-inflated log_prob.
"""

import importlib.util
import itertools
import os
import statistics
import time
import warnings
from collections.abc import Callable

import mpmath
import pyro.distributions as dist
import torch
from torch import Tensor

from ppl_st.count_likelihoods import SharedOddsNegativeBinomial, ZeroInflatedNegativeBinomial
from ppl_st.likelihoods import NegativeBinomial, Poisson
from ppl_st.product import ProductNegativeBinomial, ProductSharedOddsNegativeBinomial

LogProb = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # counts, log-mean, log-theta, gate logits

# Theirs get what a user would write: total_count = theta, logits = log(mean / theta).
FORMS: dict[str, dict[str, LogProb]] = {
    "Poisson": {
        "ours": lambda x, m, t, g: Poisson(log_mean=m, validate_args=False).log_prob(x),
        "pyro": lambda x, m, t, g: dist.Poisson(m.exp(), validate_args=False).log_prob(x),
    },
    "NB": {
        "ours": lambda x, m, t, g: NegativeBinomial(log_mean=m, log_theta=t, validate_args=False).log_prob(x),
        "torch NegativeBinomial": lambda x, m, t, g: torch.distributions.NegativeBinomial(
            t.exp(), logits=m - t, validate_args=False
        ).log_prob(x),
        "pyro GammaPoisson": lambda x, m, t, g: dist.GammaPoisson(t.exp(), (t - m).exp(), validate_args=False).log_prob(
            x
        ),
    },
    "ZINB": {
        "ours": lambda x, m, t, g: ZeroInflatedNegativeBinomial(
            log_mean=m, log_theta=t, gate_logits=g, validate_args=False
        ).log_prob(x),
        "pyro": lambda x, m, t, g: dist.ZeroInflatedNegativeBinomial(
            t.exp(), logits=m - t, gate_logits=g, validate_args=False
        ).log_prob(x),
    },
}


if importlib.util.find_spec("scvi"):  # pip install -c constraints.txt '.[peers]'
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import scvi.distributions as scvi

    FORMS["NB"]["scvi-tools"] = lambda x, m, t, g: scvi.NegativeBinomial(
        mu=m.exp(), theta=t.exp(), validate_args=False
    ).log_prob(x)
    FORMS["ZINB"]["scvi-tools"] = lambda x, m, t, g: scvi.ZeroInflatedNegativeBinomial(
        mu=m.exp(), theta=t.exp(), zi_logits=g, validate_args=False
    ).log_prob(x).view_as(x)  # it adds a dimension to flat values


def exact(kind: str, x: float, log_mean: float, log_theta: float, gate: float) -> list[mpmath.mpf]:
    """log p and its derivatives by log-mean, log-theta and gate."""
    x, mu, theta = mpmath.mpf(x), mpmath.exp(log_mean), mpmath.exp(log_theta)
    if kind == "Poisson":
        return [x * log_mean - mu - mpmath.loggamma(x + 1), x - mu]
    value = mpmath.loggamma(x + theta) - mpmath.loggamma(theta) - mpmath.loggamma(x + 1)
    value += -theta * mpmath.log1p(mu / theta) + x * mpmath.log(mu / (mu + theta))
    by_mean = (x - mu) * theta / (mu + theta)
    by_theta = theta * (mpmath.digamma(x + theta) - mpmath.digamma(theta) - mpmath.log1p(mu / theta)) - by_mean
    if kind == "NB":
        return [value, by_mean, by_theta]
    g = 1 / (1 + mpmath.exp(-mpmath.mpf(gate)))
    if x > 0:
        return [value + mpmath.log(1 - g), by_mean, by_theta, -g]
    p = g + (1 - g) * mpmath.exp(value)
    share = (1 - g) * mpmath.exp(value) / p
    return [mpmath.log(p), by_mean * share, by_theta * share, g * (1 - g) * (1 - mpmath.exp(value)) / p]


def accuracy() -> None:
    """Print the first table."""
    counts, means, thetas = (
        [0, 1, 2, 7, 100, 1000, 10**6],
        [1e-12, 1e-6, 1e-2, 1, 5, 1e4, 1e8],
        [1e-8, 1e-4, 0.3, 1, 50, 1e4, 1e8],
    )
    print(
        "| likelihood | implementation | largest error, realistic range | value off by > 1e-3 | gradient off by > 1e-2 |\n|---|---|---|---|---|"
    )
    for kind, forms in FORMS.items():
        grid = itertools.product(
            counts, means, thetas if kind != "Poisson" else [1], [-200, -2, 3, 200] if kind == "ZINB" else [0]
        )
        x, mean, theta, gate = torch.tensor(list(grid), dtype=torch.float64).T
        inputs = [mean.log().float(), theta.log().float(), gate.float()][: {"Poisson": 1, "NB": 2, "ZINB": 3}[kind]]
        rounded = [a.tolist() for a in (x, mean.log().float(), theta.log().float(), gate)]
        with mpmath.workdps(120):
            truth = [exact(kind, *row) for row in zip(*rounded, strict=True)]
        realistic = (x <= 1e3) & (mean >= 1e-6) & (mean <= 1e4) & (theta >= 1e-4)
        for name, form in forms.items():
            leaves = [a.clone().requires_grad_() for a in inputs]
            spare = [torch.zeros_like(mean).float()] * (3 - len(leaves))
            value = form(x.float(), *leaves, *spare)
            got = torch.stack([value, *torch.autograd.grad(value.sum(), leaves)]).detach().tolist()
            worst, bad_value, bad_slope = 0.0, 0, 0
            for i, want in enumerate(truth):
                if realistic[i]:
                    error = abs(got[0][i] - want[0])
                    worst = max(worst, float(error) if mpmath.isfinite(error) else float("inf"))
                off = [
                    not abs(a[i] - w) <= limit * abs(w) + mpmath.mpf(1e-30)
                    for a, w, limit in zip(got, want, [1e-3, *[1e-2] * 3], strict=False)
                ]
                # where the truth is a difference of equal numbers the rounded parameter decides, not the formula
                bad_value += off[0]
                bad_slope += any(off[1:]) and abs(x[i] - mean[i]) > 1e-5 * x[i]
            n = len(truth)
            print(
                f"| {kind} | {name} | {worst:.1e} | {bad_value}/{n} ({bad_value / n:.0%}) | {bad_slope}/{n} ({bad_slope / n:.0%}) |"
            )


def speed(cells: int, genes: int, repeats: int) -> dict[tuple[str, str], float]:
    """Milliseconds of forward and backward."""
    generator = torch.Generator().manual_seed(0)
    log_mean = torch.randn(cells, genes, generator=generator) - 3.0
    log_theta, gate = torch.randn(genes, generator=generator), torch.randn(genes, generator=generator) - 2
    counts = torch.poisson(log_mean.exp(), generator=generator)
    counts *= torch.rand(cells, genes, generator=generator) < 0.08 / (counts > 0).float().mean()
    share = (counts > 0).float().mean().item()
    assert 0.06 < share < 0.1, share
    leaves = [a.requires_grad_() for a in (log_mean, log_theta, gate)]
    times: dict[tuple[str, str], list[float]] = {(kind, name): [] for kind, forms in FORMS.items() for name in forms}
    for _ in range(repeats + 1):
        for kind, name in times:
            before = time.process_time()
            value = FORMS[kind][name](counts, *leaves).sum()
            torch.autograd.grad(value, leaves, allow_unused=True)
            times[kind, name].append(time.process_time() - before)
    return {key: 1e3 * statistics.median(values[1:]) for key, values in times.items()}


def milliseconds(f: Callable[[], Tensor], leaves: list[Tensor], repeats: int = 7) -> float:
    """Of forward and backward of the sum: median."""
    times = []
    for _ in range(repeats + 1):
        before = time.process_time()
        torch.autograd.grad(f().sum(), leaves)
        times.append(time.process_time() - before)
    return 1e3 * statistics.median(times[1:])


def products() -> None:
    """Rates activity @ loadings, 20 (40) factors; and what a plate's `expand` costs."""
    print("\n| rates of product form | density | ours, ms | dense torch form, ms |\n|---|---|---|---|")
    for cells, genes, factors, level in ((2000, 500, 20, 8.0), (2000, 500, 20, 0.3), (2000, 500, 20, 0.03)):
        generator = torch.Generator().manual_seed(0)
        activity = torch.rand(cells, factors, generator=generator).requires_grad_()
        loadings = (torch.rand(factors, genes, generator=generator) * level / factors * 4).requires_grad_()
        gene = torch.randn(genes, generator=generator).requires_grad_()
        leaves, rate = [activity, loadings, gene], (activity @ loadings).detach()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for name, draw, form, plain in (
                (
                    "NB, theta per gene", NegativeBinomial(rate, log_theta=gene.detach()), ProductNegativeBinomial,
                    lambda r, t: torch.distributions.NegativeBinomial(t.exp(), logits=r.log() - t, validate_args=False),
                ),
                (
                    "NB, shared odds", SharedOddsNegativeBinomial(rate, gene.detach()), ProductSharedOddsNegativeBinomial,
                    lambda r, u: torch.distributions.NegativeBinomial(r, logits=u, validate_args=False),
                ),
            ):  # fmt: skip
                x = draw.sample()
                density = (x > 0).float().mean()
                value = x if density > 0.5 else x.to_sparse_csr()
                a = milliseconds(lambda: form(*leaves, validate_args=False).log_prob(value), leaves)  # noqa: B023
                b = milliseconds(lambda: plain(activity @ loadings, gene).log_prob(x), leaves)  # noqa: B023
                print(f"| {name}, {cells} x {genes} | {density:.0%} | {a:.0f} | {b:.0f} |")
    mean, theta = torch.rand(512, 1000).requires_grad_(), torch.rand(1000).requires_grad_()
    x = torch.poisson(mean.detach() * 0.1)
    print("\nNB inside a plate (after `expand` to 512 x 1000) against without, ms:")
    for name, make in (
        ("ours", lambda: NegativeBinomial(mean, theta, validate_args=False)),
        ("pyro", lambda: dist.NegativeBinomial(theta, logits=mean.log() - theta.log(), validate_args=False)),
    ):
        plain, wide = (milliseconds(f, [mean, theta], 25) for f in (lambda: make().log_prob(x), lambda: make().expand((512, 1000)).log_prob(x)))  # noqa: B023
        print(f"  {name}: {plain:.1f} without, {wide:.1f} with")


def main() -> None:
    torch.set_num_threads(1)
    print(f"load average {os.getloadavg()[0]:.1f}")
    accuracy()
    small, large = speed(512, 1000, 25), speed(4096, 2000, 5)
    print("\n| likelihood | implementation | 512 x 1000, ms | 4096 x 2000, ms |\n|---|---|---|---|")
    for kind, name in small:
        print(f"| {kind} | {name} | {small[kind, name]:.1f} | {large[kind, name]:.0f} |")
    products()
    x, r, gate = torch.tensor([5.0, 0.0]), torch.tensor([2.0, 200.0]), torch.tensor([30.0, -200.0])
    logits = torch.tensor([0.0, 10.0])
    print("\nlog_prob before and after reading .mean (x = 5 with gate logit 30; x = 0 with gate logit -200):")
    for name, d in (
        ("pyro", dist.ZeroInflatedNegativeBinomial(r, logits=logits, gate_logits=gate)),
        ("ours", ZeroInflatedNegativeBinomial(r * logits.exp(), r, gate)),
    ):
        before = d.log_prob(x).tolist()
        _ = d.mean
        print(f"  {name}: {before} -> {d.log_prob(x).tolist()}")


if __name__ == "__main__":
    main()
