"""The paper's 24 checkerboard configurations: plain Adam at the paper's settings beside EM and the full fit. One thread, process time.

    OMP_NUM_THREADS=1 python tests/benchmarks/siid_configurations.py OUT.jsonl [STEPS]

One JSON line per configuration: oracle and reached R2, argmax accuracy, spot JS (bits), coverage, Poisson losses (sum of rate - x log rate over
cells and spots, lower is better) and seconds; ``adam["trace"]`` holds (step, seconds, loss).
"""

import itertools
import json
import sys
import time
from typing import Any

import numpy as np
import torch

from ppl_st import api, compositions, metrics
from ppl_st.data import read_counts
from ppl_st.models.siid import Config
from ppl_st.models.siid.warm_start import run_em
from ppl_st.prepare.siid import problem
from ppl_st.simulate import PITCH, Simulation, checkerboard


def judge(world: Simulation, estimate: np.ndarray, cells: np.ndarray, spots: np.ndarray) -> dict[str, float]:
    """Accuracy of imputation and deconvolution."""
    truth = world.truth.obsm["composition"]
    matched = compositions.match_factors(truth, cells)
    return {
        "r2": float(metrics.r2(world.truth.X.toarray(), estimate).mean()),
        "accuracy": compositions.matched_accuracy(truth, cells),
        "js": float(compositions.proportion_js(world.proportions, spots, matched).mean()),
    }


def adam(world: Simulation, h: int, steps: int, entropy_lambda: float = 500.0) -> dict[str, Any]:
    """Equation 2 with platform scaling by full-batch Adam: released start, lr 0.05, entropy (mean over cells), L2 1e-5."""
    torch.manual_seed(0)
    x, v = torch.tensor(world.target.X.toarray()), torch.tensor(world.reference.X.toarray())
    n, panel, genes = len(x), x.shape[1], v.shape[1]
    side = int(np.sqrt(len(v)))
    spot = torch.tensor(np.minimum((world.target.obsm["spatial"] / PITCH).astype(int), side - 1) @ np.array([side, 1]))

    def xavier(*shape: int) -> torch.Tensor:
        bound = (6 / sum(shape)) ** 0.5
        return (torch.rand(*shape) * 2 - 1).mul(bound).requires_grad_()

    eta, xi = xavier(n, h), xavier(h, genes)
    a, b = torch.ones(n, requires_grad=True), torch.ones(n, requires_grad=True)
    c = torch.randn(panel).requires_grad_()
    optimizer = torch.optim.Adam([eta, xi, a, b, c], lr=0.05)
    began, trace, off_panel = time.process_time(), [], torch.ones(genes - panel)
    for step in range(steps):
        p, q = torch.softmax(eta, 1), torch.softmax(xi, 1)
        w = a.exp()[:, None] * p
        u = torch.zeros(len(v), h).index_add(0, spot, b.exp()[:, None] * p)
        rate_x, rate_v = w @ q[:, :panel], (u @ q) * torch.cat([c.exp(), off_panel])
        poisson = (rate_x - x * torch.log(rate_x + 1e-8)).sum() + (rate_v - v * torch.log(rate_v + 1e-8)).sum()
        entropy = -(p * torch.log_softmax(eta, 1)).sum(1).mean()
        squares = sum((parameter**2).sum() for parameter in (eta, xi, a, b, c))
        loss = poisson + float(np.exp(step / entropy_lambda)) * entropy + 1e-5 * squares
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 0 or step == steps - 1:
            trace.append((step, time.process_time() - began, float(poisson.detach())))
    w, u = w.detach(), u.detach()
    spots = (u / u.sum(1, keepdim=True)).numpy()
    reached = judge(world, (w @ q[:, panel:].detach()).numpy(), (w / w.sum(1, keepdim=True)).numpy(), spots)
    return reached | {"trace": trace}


def ours(world: Simulation, h: int) -> dict[str, Any]:
    """EM alone (its Poisson loss after 20, 60, 180 sweeps), then the whole default fit and its prediction."""
    cells, spots = read_counts(world.target, role="target"), read_counts(world.reference, role="reference")
    data, _, _ = problem(cells, spots, Config(factors=h), lambda line: None)
    em = {}
    for sweeps in (20, 60, 180):
        began = time.process_time()
        start, _, _ = run_em(data, Config(), h, 0.0, 0, sweeps)
        em[sweeps] = (time.process_time() - began, -start.log_likelihood)
    began = time.process_time()
    run = api.fit("siid", target=world.target, reference=world.reference, overrides=[f"factors={h}"])
    seconds = time.process_time() - began
    imputed = run.predict(list(world.truth.var_names), draws=50, truth=world.truth)
    reached = judge(world, imputed.X, imputed.obsm["proportions"], run.proportions(draws=20).X)
    hyper = run.spec.hyper
    extra = {"sparsity": hyper.sparsity, "sweeps": hyper.sweeps, "coverage": float(imputed.var.coverage_90.mean())}
    return reached | extra | {"em": em, "fit_seconds": seconds}


def main(out: str, steps: int) -> None:
    """Append one line per configuration to ``out``."""
    torch.set_num_threads(1)
    for h, squares, rho in itertools.product((4, 8, 16), (10, 20), (0.25, 0.5, 1.0, 2.0)):
        world = checkerboard(seed=0, n_types=h, squares=squares, rho=rho)
        oracle = float(metrics.r2(world.truth.X.toarray(), world.truth.layers["rate"]).mean())
        row = {
            "h": h,
            "l": squares,
            "rho": rho,
            "oracle": oracle,
            "ours": ours(world, h),
            "adam": adam(world, h, steps),
        }
        with open(out, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 5000)
