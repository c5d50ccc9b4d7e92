"""A likelihood by name, and a user's own function: through the whole of SIID, stored, and found again by its name."""

import functools
import sys

import anndata
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from typer.testing import CliRunner

import ppl_st
from ppl_st.cli import app
from ppl_st.config import merge
from ppl_st.errors import UserError
from ppl_st.inference import hyperpriors
from ppl_st.likelihoods import NegativeBinomial
from ppl_st.models import siid
from ppl_st.models.siid.model import RESERVED
from ppl_st.observation import BUILT_IN, find, name_of
from ppl_st.simulate import checkerboard, spatial_field

torch.set_num_threads(1)
FAST = ["factors=4", "chains=2", "sparsity=0.0", "sweeps=6", "batch_spots=9", "fit.steps=6"]

# What a user keeps in a file of his own: Poisson counts whose rate is log-normal around the mean, by a sum over 9 nodes.
MODULE = '''
import torch
import pyro.distributions as dist
from numpy.polynomial.hermite_e import hermegauss

nodes, weights = (torch.tensor(a, dtype=torch.float32) for a in hermegauss(9))


def log_normal_poisson(mean, log_sd=(-1.0, 0.5)):
    sd = log_sd.exp().to(mean.dtype)
    components = mean.unsqueeze(-1) * (sd.unsqueeze(-1) * nodes.to(mean.dtype) - 0.5 * sd.unsqueeze(-1) ** 2).exp()
    return dist.MixtureSameFamily(dist.Categorical(weights.to(mean.dtype).expand(components.shape)), dist.Poisson(components))
'''


def own_nb(mean, log_theta=(1.0, 1.0)):
    """The built-in one, but the machinery does not know it."""
    return NegativeBinomial(mean, log_theta=log_theta)


class Counted(NegativeBinomial):
    """The built-in one that counts how it is used."""

    scored = with_gradient = drawn = 0

    def log_prob(self, value):
        out = super().log_prob(value)
        Counted.scored += 1
        Counted.with_gradient += out.requires_grad
        return out

    def sample(self, sample_shape=()):
        Counted.drawn += 1
        return super().sample(sample_shape)


def own_counted(mean, log_theta=(1.0, 1.0)):
    return Counted(mean, log_theta=log_theta)


def no_prior(mean, theta):
    return NegativeBinomial(mean, theta)


def taken(mean, activity=(0.0, 1.0)):
    return NegativeBinomial(mean, log_theta=activity)


def without_variance(mean, log_theta=(0.0, 1.0)):
    class Some(NegativeBinomial):
        @property
        def variance(self):
            raise NotImplementedError

    return Some(mean, log_theta=log_theta)


def one_event(mean, log_theta=(0.0, 1.0)):
    return NegativeBinomial(mean, log_theta=log_theta).to_event(1)


def plain_torch(mean, log_rate=(0.0, 1.0)):
    return torch.distributions.Poisson(mean * log_rate.exp())


def not_finite(mean, log_rate=(0.0, 1.0)):
    return dist.Poisson(mean * float("inf"))


class MeanOf(NegativeBinomial):
    value = float("inf")

    @property
    def mean(self):
        return torch.full(self.batch_shape, self.value)


def infinite_mean(mean, log_theta=(0.0, 1.0)):
    return MeanOf(mean, log_theta=log_theta)


def no_mean(mean, log_theta=(0.0, 1.0)):
    class Zero(MeanOf):
        value = 0.0

    return Zero(mean, log_theta=log_theta)


def of_reals(mean, log_sd=(0.0, 1.0)):
    return dist.Normal(mean, log_sd.exp())


def nothing(mean, log_theta=(0.0, 1.0)):
    NegativeBinomial(mean, log_theta=log_theta)


def untold(mean, log_rate=(0.0, 1.0)):
    class Untold(dist.Poisson):
        support = None

    return Untold(mean * log_rate.exp(), validate_args=False)


def mixed(mean, log_rate=(0.0, 1.0)):
    components = (mean * log_rate.exp()).unsqueeze(-1) * torch.tensor([0.5, 1.5])
    return dist.MixtureSameFamily(dist.Categorical(torch.ones_like(components)), dist.Poisson(components))


def two_parameters(mean, log_theta=(0.0, 1.0), log_other=(0.0, 1.0)):
    return NegativeBinomial(mean, log_theta=log_theta + log_other)


def data_of(**settings):
    return checkerboard(
        **{"seed": 0, "n_cells": 300, "side": 6, "squares": 6, "n_types": 4, "n_genes": 40, "n_panel": 30, "contrast": 1.0, **settings}
    )


def test_built_in_names_and_their_priors():
    assert find("poisson").priors == {} and set(find("zinb").priors) == {"log_theta", "gate_logits"}
    grid = find("nb").grid("log_theta")
    assert (grid[0], grid[-1], len(grid)) == (-4, 6, 41)
    mean = torch.rand(5, 3)
    for name in BUILT_IN:
        d = find(name)(mean, {"log_theta": torch.zeros(3), "gate_logits": torch.zeros(3), "other": torch.zeros(1)})
        assert d.batch_shape == (5, 3) and d.log_prob(torch.ones(5, 3)).isfinite().all()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (no_prior, r"argument 'theta' must be its prior \(location, scale\)"),
        (taken, "'activity': the name is taken by the method"),
        (without_variance, "variance fails on a mean of shape"),
        (one_event, r"event_shape \(3,\)"),
        (plain_torch, "to_event fails"),
        (not_finite, "not finite"),
        (infinite_mean, "mean is not finite and positive at the prior's location; SIID and VISTA need one"),
        (no_mean, "mean is not finite and positive"),
        (of_reals, r"of_reals': Normal has support Real\(\), which holds more than the counts 0, 1, 2, "),
        (nothing, "calling it fails .* it returned None, not a distribution"),
    ],
)
def test_what_a_method_cannot_use_is_refused_with_the_reason(function, message):
    before = torch.get_rng_state()
    with pytest.raises(UserError, match=message):
        find(name_of(function), ("activity",))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("function", [mixed, untold, own_nb])
def test_a_law_of_counts_or_of_untold_support_is_taken(function):
    assert len(find(name_of(function)).priors) == 1


def test_names_of_siids_own_effects_are_taken():
    assert {"phi", "log_phi", "xi"} <= set(RESERVED)  # a parameter phi would have been given the gains' phi_loc


def test_only_functions_that_can_be_found_again_have_a_name():
    assert find(name_of(own_nb)).make is own_nb
    with pytest.raises(UserError, match="at the top level"):
        name_of(lambda mean: dist.Poisson(mean))
    with pytest.raises(UserError, match="at the top level"):
        name_of(functools.partial(own_nb, log_theta=(0.0, 2.0)))


def test_settings_take_names_only():
    config = merge(siid.Config(), {"likelihood": "my_module:f"})
    assert config.likelihood == "my_module:f"
    with pytest.raises(UserError, match="'nb', 'poisson', 'zinb' or 'module:function', got 'zimb'; did you mean 'zinb'"):
        merge(siid.Config(), {"likelihood": "zimb"})
    with pytest.raises(UserError, match="PYTHONPATH"):
        find("no_such_module_here:f")
    with pytest.raises(UserError, match="no function 'missing'"):
        find("dataclasses:missing")


def test_a_users_own_likelihood_goes_through_siid_and_is_found_again_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "my_likelihoods.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    import my_likelihoods

    world, lines = data_of(n_cells=120, side=4, n_genes=24, n_panel=18), []
    run = ppl_st.fit(
        "siid", target=world.target, reference=world.reference, likelihood=my_likelihoods.log_normal_poisson, overrides=FAST,
        out=tmp_path / "run", say=lines.append,
    )  # fmt: skip
    assert 'likelihood = "my_likelihoods:log_normal_poisson"' in (tmp_path / "run" / "config.toml").read_text()
    *_, s = run.spec.hyper.parameters["log_sd"]
    assert s > 0 and any("log_sd" in line for line in lines)
    imputed = run.predict(draws=10, truth=world.truth)
    assert np.isfinite(imputed.var["log_score"]).all() and (imputed.layers["count_sd"] > imputed.layers["rate_sd"]).all()
    # Another process knows neither the module nor its function: both are imported anew, by the name that the run stores.
    monkeypatch.delitem(sys.modules, "my_likelihoods")
    loaded = ppl_st.load(tmp_path / "run")
    assert sys.modules["my_likelihoods"] is not my_likelihoods
    np.testing.assert_array_equal(loaded.predict(draws=10).layers["q95"], imputed.layers["q95"])
    # The function got another parameter since: said, not fitted. And its module is gone.
    monkeypatch.setattr(sys.modules["my_likelihoods"], "log_normal_poisson", two_parameters)
    with pytest.raises(UserError, match=r"\['log_other', 'log_theta'\], the run was fitted with \['log_sd'\]"):
        ppl_st.load(tmp_path / "run")
    monkeypatch.delitem(sys.modules, "my_likelihoods")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path)])
    with pytest.raises(UserError, match=r"make module 'my_likelihoods' importable \(its folder on PYTHONPATH\)"):
        ppl_st.load(tmp_path / "run")


FIELD = ["chains=1", "penalty=3", "reweight=false", "fit.steps=4", "batch_cells=64", "neighbors=6"]


def field_of():
    return spatial_field(seed=1, n_cells=120, n_reference=100, n_genes=30, n_panel=18, n_types=4, rho=3.0, spatial=1.0, length=500.0)


def test_a_users_own_likelihood_goes_through_vista_from_the_command_line_as_from_python(tmp_path, monkeypatch):
    (tmp_path / "my_likelihoods.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_likelihoods", raising=False)
    import my_likelihoods

    world, likelihood = field_of(), "my_likelihoods:log_normal_poisson"
    world.target.write_h5ad(tmp_path / "target.h5ad")
    world.reference.write_h5ad(tmp_path / "reference.h5ad")

    def shell(*arguments):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="ppl-st")
        assert done.exit_code == 0, done.output
        return done.output

    out = tmp_path / "run"
    said = shell(
        "fit", "vista", "--target", tmp_path / "target.h5ad", "--reference", tmp_path / "reference.h5ad", "--out", out,
        *(word for setting in [*FIELD, f"likelihood={likelihood}"] for word in ("--set", setting)),
    )  # fmt: skip
    assert "log_sd" in said and f'likelihood = "{likelihood}"' in (out / "config.toml").read_text()
    shell("predict", out, "--draws", 6, "--out", tmp_path / "imputed.h5ad")
    imputed = anndata.read_h5ad(tmp_path / "imputed.h5ad")
    assert (imputed.layers["count_sd"] > imputed.layers["rate_sd"]).all()
    run = ppl_st.fit(
        "vista", target=world.target, reference=world.reference, likelihood=my_likelihoods.log_normal_poisson, overrides=FIELD
    )
    np.testing.assert_array_equal(run.predict(draws=6).layers["q95"], imputed.layers["q95"])


@pytest.mark.parametrize(("method", "make", "settings"), [("siid", data_of, [*FAST, "chains=1"]), ("vista", field_of, FIELD)])
def test_a_users_likelihood_is_the_one_in_the_objective_and_in_the_predictive(method, make, settings, monkeypatch):
    """Scored with gradients in every step, and drawn from; the same function by its built-in name gives the same run."""
    world = make()
    runs = {}
    for given in ("nb", own_counted):
        Counted.scored = Counted.with_gradient = Counted.drawn = 0
        run = ppl_st.fit(method, target=world.target, reference=world.reference, likelihood=given, overrides=settings)
        steps = Counted.with_gradient
        runs[given] = run, run.predict(draws=6)
    assert steps >= run.record["steps"] and Counted.scored > steps and Counted.drawn > 0
    (built_in, a), (own, b) = runs.values()
    # SIID starts the dispersions of measured genes elsewhere for a function that it does not know.
    tolerance = 0.03 if method == "siid" else 1e-4
    np.testing.assert_allclose(own.record["losses"], built_in.record["losses"], rtol=tolerance)
    drawn = "rate_mean" if method == "siid" else "rate_sd"  # VISTA integrates means of the laws that it knows
    np.testing.assert_allclose(b.layers[drawn].mean(0), a.layers[drawn].mean(0), rtol=tolerance)


@pytest.mark.slow
def test_own_parameters_are_learned_as_those_of_the_built_in_likelihood():
    """The same negative binomial by the general route and by its own: hyper-prior, points of measured genes, sites."""
    world = data_of(n_cells=600, rho=3.0, n_genes=60, n_panel=45)
    rng = np.random.default_rng(1)
    theta = np.exp(rng.normal(0.5, 1.0, world.target.n_vars))
    rates = np.maximum(world.target.X.toarray(), 0.3)
    world.target.X = rng.poisson(rng.gamma(theta, 1 / theta, rates.shape) * rates).astype(np.float32)
    settings = [s for s in FAST if "sweeps" not in s] + ["sweeps=10", "chains=1"]
    runs = [
        ppl_st.fit("siid", target=world.target, reference=world.reference, likelihood=given, overrides=settings) for given in ("nb", own_nb)
    ]
    built_in, own = (run.spec.hyper.parameters["log_theta"] for run in runs)
    np.testing.assert_allclose(own, built_in, atol=1e-4)
    panel = runs[1].data.panel
    points = siid.chains_of(runs[1].pair)[0].guide.log_theta_loc.detach().numpy()[panel]
    truth = dict(zip(world.target.var_names, np.log(theta), strict=True))
    assert np.corrcoef(points, [truth[gene] for gene in runs[1].genes[panel]])[0, 1] > 0.5


def test_two_parameters_are_learned_one_after_the_other():
    """Gate and dispersion of zero-inflated counts around known rates."""
    generator = torch.Generator().manual_seed(0)
    rate = torch.rand(1, 800, 12, generator=generator, dtype=torch.float64) * 6 + 1
    gate, likelihood = torch.linspace(-2.5, -0.5, 12, dtype=torch.float64), find("zinb")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        counts = likelihood(rate[0], {"log_theta": torch.full((12,), 1.5).double(), "gate_logits": gate}).sample()
    z = np.linspace(-1, 1, 12)
    learned = hyperpriors.learn_parameters(likelihood, [(counts, rate)], z)
    assert abs(learned["log_theta"][0] - 1.5) < 0.4
    assert abs(learned["gate_logits"][0] + 1.5) < 0.4 and 0.3 < learned["gate_logits"][1] < 1.5


def test_parameters_are_learned_on_cells_of_all_sections():
    """Cells in the order of the file, of two sections that differ: the general route looked at the first 2048 alone."""
    rng, rate = np.random.default_rng(0), np.full((4500, 8), 4.0)
    theta = np.where(np.arange(4500) < 2250, 50.0, 0.3)[:, None]
    counts = torch.from_numpy(rng.poisson(rng.gamma(theta, 1 / theta, rate.shape) * rate).astype(float))
    inner = [(counts, torch.from_numpy(rate)[None])]
    own, built_in = (hyperpriors.learn_parameters(find(name), inner, np.zeros(8))["log_theta"][0] for name in (name_of(own_nb), "nb"))
    assert built_in < 0.5 and own == pytest.approx(built_in, abs=0.1)


def test_a_likelihood_that_is_not_finite_where_it_is_tried_is_refused(monkeypatch):
    """NaN made the search for the hyper-prior end where it began, and nothing was said."""
    monkeypatch.setitem(BUILT_IN, "odd", lambda mean, log_a=(1.0, 1.0): NegativeBinomial(mean, theta=(3.0 - log_a).sqrt()))
    counts = torch.ones(20, 3).double()
    with pytest.raises(UserError, match=r"'odd': log_prob of the counts is not finite at log_a = 3[.\d]*, .* from -4 to 6; .*smaller scale"):
        hyperpriors.learn_parameters(find("odd"), [(counts, counts[None])], np.zeros(3))


def test_parameters_of_the_likelihood_are_sites_of_model_and_guide():
    config = siid.Config(factors=3, chains=1, sweeps=3, sparsity=0.0, likelihood="zinb")
    world = data_of(n_cells=120)
    run = ppl_st.fit("siid", target=world.target, reference=world.reference, overrides=[*FAST, "likelihood=zinb", "chains=1"])
    pair = siid.chains_of(run.pair)[0]
    batch = siid.Batches(run.data, 9, 0).at(0)
    with torch.random.fork_rng(), pyro.validation_enabled(True):
        guide = pyro.poutine.trace(pair.guide).get_trace(batch)
        model = pyro.poutine.trace(pyro.poutine.replay(pair.model, guide)).get_trace(batch)
        drawn = pair.model(batch, observe=False)["x"]
    for name in find(config.likelihood).priors:
        assert guide.nodes[name]["value"].shape == model.nodes[name]["value"].shape == (40,)
        assert torch.isfinite(model.nodes[name]["fn"].log_prob(model.nodes[name]["value"]))
    assert drawn.shape == batch.counts.shape and torch.equal(drawn, drawn.floor())
    idata = run.to_arviz(draws=2)
    assert "gate_logits" in idata["posterior"] and idata["posterior"]["gate_logits"].dims[-1] == "any_gene"
