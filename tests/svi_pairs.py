"""Two small pairs, their minibatches and settings, for the tests of the training loop."""

import json
import math
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

from ppl_st.inference.svi import FitConfig, Pair, epoch_order, rng_scope

POSITIVE = dist.constraints.positive


class Batch(NamedTuple):
    x: Tensor  # [B] or [B, G]
    idx: Tensor  # [B]
    size: int
    step: int


class Rows:
    """Minibatches of a tensor; `spoil` maps a step to a change of its batch, `hook` sees every step."""

    def __init__(self, x, batch_size=None, seed=0, spoil=None, hook=None):
        self.x, self.seed = x, seed
        self.batch_size = batch_size or len(x)
        self.spoil, self.hook = spoil or {}, hook or (lambda step: None)

    def __len__(self):
        return -(-len(self.x) // self.batch_size)

    def at(self, step):
        self.hook(step)
        idx = torch.as_tensor(epoch_order(len(self.x), self.batch_size, self.seed, step))
        return Batch(self.spoil.get(step, lambda x: x)(self.x[idx]), idx, len(self.x), step)


class NormalModel(PyroModule):
    """m ~ N(0, 2), x_i ~ N(m, 1), with a factor -gamma m^2 when gamma > 0."""

    def __init__(self, gamma=0.0):
        super().__init__()
        self.gamma = gamma

    def forward(self, batch, *, observe=True):
        m = pyro.sample("m", dist.Normal(0.0, 2.0))
        if self.gamma:
            pyro.factor("pull", -self.gamma * m**2)
        with pyro.plate("cells", batch.size, subsample=batch.idx):
            pyro.sample("x", dist.Normal(m, 1.0), obs=batch.x if observe else None)


class NormalGuide(PyroModule):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.5))
        self.scale = PyroParam(torch.tensor(0.7), POSITIVE)

    def forward(self, batch, *, observe=True):
        pyro.sample("m", dist.Normal(self.loc, self.scale))


def normal_pair(gamma=0.0):
    return Pair(NormalModel(gamma), NormalGuide())


class NetModel(PyroModule):
    """A small VAE with one global latent: every kind of state that resuming must carry."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5))

    def forward(self, batch, *, observe=True):
        theta = pyro.sample("theta", dist.Gamma(2.0, 1.0))
        with pyro.plate("cells", batch.size, subsample=batch.idx):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))  # [B, 2]
            mean = self.decoder(z).exp()
            x = batch.x if observe else None
            pyro.sample("x", dist.GammaPoisson(theta, theta / mean).to_event(1), obs=x)  # [B, 5]


class NetGuide(PyroModule):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 4))
        self.loc = nn.Parameter(torch.tensor(0.0))

    def forward(self, batch, *, observe=True):
        pyro.sample("theta", dist.LogNormal(self.loc, 0.1))
        with pyro.plate("cells", batch.size, subsample=batch.idx):
            loc, log_scale = self.encoder(batch.x.log1p()).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, (0.1 * log_scale).exp()).to_event(1))


def net_pair(seed=0):
    with rng_scope(seed, "init"):
        return Pair(NetModel(), NetGuide())


def counts(n=23, seed=0):
    return torch.as_tensor(np.random.default_rng(seed).poisson(3.0, (n, 5)), dtype=torch.float32)


def net_rows(**options):
    return Rows(counts(), batch_size=8, seed=3, **options)  # 3 steps per epoch, the last with 7 rows


NET = FitConfig(
    steps=10,
    lr=0.02,
    lr_groups={r"guide\.encoder": 0.5},
    schedule="cosine",
    warmup_steps=3,
    kl_warmup_steps=8,
    window=2,
    patience=50,
    clip_norm=1.0,
    checkpoint_every=5,
    log_every=2,
    device="cpu",
)


def same(a, b):
    """Whether two fit states are equal bit for bit."""
    pairs = [(a.model, b.model), (a.guide, b.guide)]
    pairs += [(a.optimizer[name], b.optimizer.get(name, {})) for name in a.optimizer]
    tensors = all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in pairs)
    return tensors and a.optimizer.keys() == b.optimizer.keys() and a.tally == b.tally


def nan(x):
    return torch.full_like(x, math.nan)


def log_of(folder):
    text = (folder / "log.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def empty_store():
    yield
    assert not list(pyro.get_param_store()), "something reached Pyro's global store"
