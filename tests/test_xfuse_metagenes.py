"""XFuse's metagenes: splits change nothing, ablations are exact, the planted number is found."""

import copy

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from ppl_st.config import with_overrides
from ppl_st.count_likelihoods import SharedOddsNegativeBinomial
from ppl_st.inference.ensemble import chains_of
from ppl_st.inference.svi import fit, load_state, rng_scope, save_state
from ppl_st.models import xfuse
from ppl_st.models.xfuse.data import Data, Section
from ppl_st.models.xfuse.metagenes import contributions, drop, shares, split
from ppl_st.models.xfuse.model import sides
from ppl_st.models.xfuse.patches import aggregate
from xfuse_sections import quiet, settings, start_of, two_sections

data = pytest.fixture(two_sections, scope="module")
started = pytest.fixture(start_of, scope="module")


def rates(pair, data, config, spec):
    """Mean rates at the guide's locations with the same latent image."""
    model, guide = sides(chains_of(pair)[0])
    predictor = xfuse.Predictor(pair, data, config, spec)
    drawn = {name: guide.posterior(name)[0] for name in model.priors()}
    out = []
    for n in range(len(data.sections)):
        local = predictor.local((n, np.zeros(0, np.int64)), 0)
        local = local._replace(latents=[(loc, torch.zeros_like(loc)) for loc, _ in local.latents])
        with torch.no_grad():
            activity, full = predictor._draw(local, 0, drawn)
            shape, odds = model.loadings(full, local.codes)
        out.append((activity.flatten(1).T @ shape) * odds.exp())
    return torch.cat(out)


def test_a_split_changes_no_prediction(data):
    config = settings("metagenes=6")
    pair, spec = xfuse.start(data, config, 0, quiet)
    for side in pair:
        side.eval()
    model, _ = sides(chains_of(pair)[0])
    model.active[4:] = False
    torch.nn.init.normal_(model.expression[-1].weight, std=0.1)
    before = rates(pair, data, config, spec)
    split(chains_of(pair)[0], 1, 4)
    split(chains_of(pair)[0], 1, 5)  # and a half of it again
    after = rates(pair, data, config, spec)
    assert model.active.sum() == 6
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6 * float(before.max()))


def test_a_split_is_exact_in_double_precision(data):
    """Scale and summed activity of every gene are those from before, to 1e-6: what single precision shows is rounding."""
    pair, _ = xfuse.start(data, settings("metagenes=6"), 0, quiet)
    chain = copy.deepcopy(chains_of(pair)[0])
    model, guide = sides(chain)
    model.active[5:] = False
    torch.nn.init.normal_(model.expression[-1].weight, std=0.1)
    batch = xfuse.batches(data, settings(), 0).at(0)
    model.double()
    guide.double()

    def rates():
        drawn = {name: guide.posterior(name)[0] for name in model.priors()}
        blocks = batch.blocks
        table = model.fields(drawn, blocks.features.double(), blocks.where.double(), blocks.parts, model.spec)
        hidden = torch.linspace(-1, 1, 4, dtype=torch.float64).expand(len(table), 4)
        shape, _ = model.loadings(drawn, model.spec.codes[0])
        return model.activity(hidden, table) @ shape

    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            before = rates()
            split(chain, 1, 5)
            after = rates()
    finally:
        torch.set_default_dtype(torch.float32)
    assert model.active.all()
    torch.testing.assert_close(after, before, rtol=1e-12, atol=0)


def test_ablations_come_from_one_decode_and_equal_a_model_without_the_metagene(data, monkeypatch):
    config = settings("nugget=false")
    pair, _ = xfuse.start(data, config, 0, quiet)
    chain = chains_of(pair)[0]
    model, _ = sides(chain)
    batches = xfuse.batches(data, config, 0)
    monkeypatch.setattr("ppl_st.models.xfuse.metagenes.EVALUATED", 1e9)  # every location for each of them
    monkeypatch.setattr("ppl_st.models.xfuse.metagenes._divergences", lambda model, guide: 0.0)
    decodes = []
    decode = type(model).decode
    monkeypatch.setattr(type(model), "decode", lambda self, *args: decodes.append(1) or decode(self, *args))
    gain = contributions(chain, batches, range(1), 1, 0)
    assert len(decodes) == 1

    def likelihood():
        for side in chain:
            side.eval()
        with torch.no_grad(), rng_scope(0, "purge", 0, 0):
            drawn = chain.guide.globals()
            batch = batches.at(0)
            activity = model.decoded(drawn, batch, chain.guide.latents(batch.image, batch.spots))
            summed, total = aggregate(activity, batch.location, len(batch.weight)), 0.0
            for group in batch.groups:
                rows = slice(group.start, group.stop)
                shape, odds = model.loadings(drawn, model.spec.codes[group.section])
                law = SharedOddsNegativeBinomial(summed[rows] @ shape, odds)
                total += float((law.log_prob(group.counts.to_dense()).sum(1) * batch.weight[rows]).sum())
        return total

    whole = likelihood()
    original = type(model).activity
    for m in range(4):  # the same globals, m taken out before the softmax

        def without(self, features, fields, m=m):
            active = self.active.clone()
            self.active[m] = False
            try:
                return original(self, features, fields)
            finally:
                self.active.copy_(active)

        monkeypatch.setattr(type(model), "activity", without)
        assert likelihood() - whole == pytest.approx(float(gain[m]), rel=1e-3, abs=0.05)
        monkeypatch.setattr(type(model), "activity", original)


def test_never_both_halves_of_a_split_nor_the_last_metagene_are_dropped(started):
    pair, _ = started
    model, _ = sides(chains_of(pair)[0])
    saved = model.active.clone(), model.partner.clone()
    model.partner.copy_(torch.tensor([1, 0, -1, -1]))
    assert drop(model, torch.tensor([3.0, 2.0, 1.0, -5.0])) == [0, 2]
    assert drop(model, torch.tensor([3.0, -2.0, -1.0, -5.0])) == [0]
    model.active.copy_(torch.tensor([True, False, False, False]))
    assert drop(model, torch.tensor([3.0, -torch.inf, -torch.inf, -torch.inf])) == []
    model.active.copy_(saved[0]), model.partner.copy_(saved[1])


def test_shares_and_quantities(data, started):
    pair, spec = started
    config = settings()
    total = shares(chains_of(pair)[0], xfuse.batches(data, config, 0), range(6), 0)
    obsm, obs = xfuse.quantities(pair, data, config, spec)
    n = sum(s.counts.shape[0] - 1 for s in data.sections)
    assert obsm["metagenes"].shape == (n, 4) and obs["scale"].shape == (n,)
    np.testing.assert_allclose(total, obs["scale"] @ obsm["metagenes"] / obs["scale"].sum(), atol=0.1)  # patches see most spots
    # both are means over draws of the same sums: those of the metagenes' activities in the spots
    predictor, at = xfuse.Predictor(pair, data, config, spec), 0
    for number, one in enumerate(data.sections):
        drawn = [draw.activity for draw in xfuse.maps(predictor, np.zeros(0, np.int64), 10, config.fit.seed, [number])]
        mean = (sum(drawn) / 10).numpy()
        for row in (0, 7):
            own = mean[:, one.label == row + 1].sum(1)
            np.testing.assert_allclose(obs["scale"][at + row] * obsm["metagenes"][at + row], own, rtol=1e-4)
        at += one.counts.shape[0] - 1


def test_profiles_are_the_shares_of_genes_in_what_a_metagene_makes(data, started):
    pair, spec = started
    config = settings()
    model, guide = sides(chains_of(pair)[0])
    tables, units = xfuse.profiles(pair, config)
    assert set(tables) < set(units) == {*tables, "metagenes", "scale"} and all(one.shape == (12, 4) for one in tables.values())
    np.testing.assert_allclose(tables["metagene_profile_mean"].sum(0), 1, rtol=1e-5)
    rates = (guide.metagenes_loc + model.log_rate).exp().detach().numpy().T
    profile, baseline = rates / rates.sum(0), model.log_rate.softmax(0).detach().numpy()[:, None]
    np.testing.assert_allclose(tables["metagene_log2_fold_mean"], np.log2(profile / baseline), atol=0.1)  # sd of L at the start: .1
    sd = tables["metagene_log2_fold_sd"] * np.log(2)
    assert 0.06 < np.median(sd) < 0.14
    np.testing.assert_allclose(np.median(tables["metagene_profile_sd"] / tables["metagene_profile_mean"]), np.median(sd), rtol=0.1)
    # a metagene has one number everywhere: that of the activities, of the profiles and of the posterior's site
    saved = model.active.clone(), guide.metagenes_loc.detach().clone()
    with torch.no_grad():
        model.active[2] = False
        guide.metagenes_loc[1, 5] += 5.0
    changed, _ = xfuse.profiles(pair, config)
    activity = xfuse.quantities(pair, data, config, spec)[0]["metagenes"]
    assert (activity.max(0) == 0).tolist() == [False, False, True, False]
    assert np.isnan(changed["metagene_profile_sd"]).all(0).tolist() == [False, False, True, False]
    assert np.argmax(np.nan_to_num(changed["metagene_log2_fold_mean"] - tables["metagene_log2_fold_mean"]).max(0)) == 1
    with torch.no_grad():
        model.active.copy_(saved[0]), guide.metagenes_loc.copy_(saved[1])


def test_a_fit_stopped_between_two_rounds_goes_on_as_if_it_had_not(data, tmp_path):
    config = settings("selection=split", "purge_every=2", "fit.steps=6")

    def fitted(pair, state=None, until=None):
        return fit(pair, xfuse.batches(data, config, 0), config.fit, state, scale=1e-3, until=until, edit=xfuse.edit(pair, data, config, 0))[0]

    whole, spec = xfuse.start(data, config, 0, quiet)
    fitted(whole)
    begun, _ = xfuse.start(data, config, 0, quiet)
    save_state(fitted(begun, until=3), tmp_path / "state.pt")
    assert sides(chains_of(begun)[0])[0].active.sum() == 2  # one round is behind it
    resumed = xfuse.empty(config, spec, data, 1)
    fitted(resumed, load_state(tmp_path / "state.pt"))
    assert not torch.equal(sides(chains_of(resumed)[0])[0].bias, sides(chains_of(begun)[0])[0].bias)
    for one, other in zip(whole, resumed, strict=True):
        for (name, value), again in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(value, again), name


# ---- slow: the number of metagenes ----


def planted(programs=3, genes=60, seed=0):
    """Bands of color, each with an expression program of its own."""
    rng = np.random.default_rng(seed)
    height, width = 88, 132
    band = np.minimum(np.arange(width) * programs // width, programs - 1)
    colors = np.array([[200, 120, 120], [120, 200, 120], [120, 120, 200]])
    image = np.clip(colors[band][None] + rng.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)
    profile = np.full((programs, genes), 0.3)
    for k in range(programs):
        profile[k, k * genes // programs : (k + 1) * genes // programs] = 3.0
    profile *= 3 * rng.gamma(4.0, 0.25, genes)
    label, centers, means = np.zeros((height, width), np.int64), [], []
    rows, columns = np.mgrid[:height, :width] + 0.5
    for y in range(6, height - 4, 9):
        for x in range(6, width - 4, 9):
            centers.append((x, y))
            disc = (rows - y) ** 2 + (columns - x) ** 2 <= 12
            label[disc] = len(centers)
            share = np.bincount(np.broadcast_to(band, disc.shape)[disc], minlength=programs) / disc.sum()
            means.append(share @ profile)
    counts = sp.csr_matrix(rng.negative_binomial(np.array(means) / 0.5, 1 / 1.5).astype(np.float32))
    one = Section(
        "p", image, label, counts, -1, np.ones(label.shape, bool), np.array(centers, float), 3.5, np.zeros(0, np.int64), None
    )  # fmt: skip
    return Data((one,), np.array([f"g{i}" for i in range(genes)]), {})


@pytest.mark.slow
@pytest.mark.parametrize(("selection", "steps"), [("split", 600), ("ard", 400)])
def test_the_planted_number_of_metagenes_is_found(selection, steps):
    data = planted()
    sets = [
        "patch=80", "depth=1", "channels=2", "image_weight=0.1", "functions=48", "metagenes=8", f"selection={selection}", "purge_every=100",
        f"fit.steps={steps}", "fit.lr=0.03", "fit.lr_groups={}", "batch_patches=1",
    ]  # fmt: skip
    config = with_overrides(xfuse.PRESETS["default"], sets)
    pair, _ = xfuse.start(data, config, 0, quiet)
    batches = xfuse.batches(data, config, 0)
    fit(pair, batches, config.fit, scale=1 / data.sections[0].counts.shape[0] / 60, edit=xfuse.edit(pair, data, config, 0))
    used = shares(chains_of(pair)[0], batches, range(3), 0)
    assert int((used > 0.02).sum()) == 3
    if selection == "split":
        assert int(sides(chains_of(pair)[0])[0].active.sum()) == 3
