"""XFuse's settings: what is refused, what goes with what is off, and what the published networks have."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from ppl_st.errors import UserError
from ppl_st.inference.ensemble import chains_of
from ppl_st.inference.svi import fit
from ppl_st.models import xfuse
from ppl_st.models.xfuse import warm_start
from ppl_st.models.xfuse.model import COMPONENTS, FIELDS, Spec, sides
from ppl_st.models.xfuse.patches import tissue
from xfuse_sections import quiet, settings, two_sections

data = pytest.fixture(two_sections, scope="module")


# ---- settings ----


def test_a_split_that_no_round_would_make_is_refused():
    with pytest.raises(UserError, match=r"never splits: purge_every=500 is more than half of fit\.steps=200; set purge_every to at most 100"):
        settings("selection=split", "fit.steps=200")
    assert settings("selection=split", "purge_every=100", "fit.steps=200").selection == "split"
    assert settings("purge_every=500", "fit.steps=200").purge_every == 500  # of no meaning without splits
    with pytest.raises(UserError, match=r"drops metagenes at the last step.*set fit\.patience=0"):
        settings("selection=split", "purge_every=2", "fit.steps=4", "fit.patience=2")


@pytest.mark.parametrize("off", [["fields=false"], ["fields=false", "nugget=false"], ["nugget=false"]])
def test_without_fields_or_effects_the_default_preset_is_fitted(data, off):
    config = settings(*off, "fit.steps=2")
    pair, _ = xfuse.start(data, config, 0, quiet)
    _, info = fit(pair, xfuse.batches(data, config, 0), config.fit, scale=1e-3)
    assert np.isfinite(info.losses).all() and not info.skipped
    if off == ["fields=false"]:  # no closed form has found the sds of location effects: they leave their .1
        assert (sides(chains_of(pair)[0])[0].log_nugget - np.log(0.1)).abs().min() > 1e-3


def test_learning_rates_of_what_is_off_are_left_out_and_no_others():
    groups = xfuse.PRESETS["default"].fit.lr_groups
    assert {FIELDS, COMPONENTS} <= set(groups)
    # sds of location effects that no closed form has found are learned
    assert settings("fields=false").fit.lr_groups == {name: factor for name, factor in groups.items() if name not in (FIELDS, COMPONENTS)}
    assert settings("nugget=false").fit.lr_groups == groups
    config = settings("fields=false", "nugget=false", "fit.lr_groups={nothing=2.0}")
    assert replace(config, hide=0.1).fit.lr_groups == {"nothing": 2.0}  # a mistake of one's own is still said


# ---- published networks ----


def published(metagenes=7):
    config = replace(xfuse.PRESETS["paper"], metagenes=metagenes)
    return config, Spec(10, ["a"], [[]], [None], 0.0, [(0, 0, 0.0)], [5], [2], [[0]], 1.0, 1.0)


def test_the_published_networks_have_as_many_parameters_as_published():
    config, spec = published()
    with torch.device("meta"):
        model, guide = sides(xfuse.build(config, spec))

    def size(*parts):
        return sum(parameter.numel() for part in parts for parameter in part.parameters())

    assert round(size(guide.recognition, model.generator) / 1e6, 1) == 24.3
    c, m = config.channels, config.metagenes
    hidden = c**2 + 2 * c  # 1x1 convolution and batch norm
    assert size(model.expression) == 2 * hidden + (1 + m) * (c + 1)  # the scale's and the metagenes'
    for i, head in enumerate(guide.recognition.heads):
        width = c * 2**i
        assert size(head) == 2 * (width**2 + 2 * width + width**2 + width)


def test_scale_and_metagenes_read_a_hidden_layer_each():
    config, spec = published()
    model, _ = sides(xfuse.build(replace(config, depth=1), spec))
    model.active[:] = True
    torch.nn.init.normal_(model.expression[1].weight)
    hidden = model.hidden(torch.randn(2, config.channels, 3, 3))
    other = hidden.clone()
    other[:, config.channels :] += torch.randn(config.channels)
    one, changed = (model.activity(values, None) for values in (hidden, other))
    torch.testing.assert_close(one.sum(1), changed.sum(1))
    assert not torch.allclose(one, changed, rtol=0.1)
    other = hidden.clone()
    other[:, : config.channels] += 1
    changed = model.activity(other, None)
    torch.testing.assert_close(one / one.sum(1, keepdim=True), changed / changed.sum(1, keepdim=True))


def test_published_learning_rates_reach_metagenes_and_effects_alike():
    config, spec = published()
    _, guide = sides(xfuse.build(replace(config, depth=1, channels=4), spec))
    pattern = next(name for name, factor in config.fit.lr_groups.items() if factor == 2)
    hit = {name for name, _ in guide.named_parameters() if re.search(pattern, name)}
    assert hit == {f"{site}_{part}" for site in ("metagenes", "level_0", "logit_0") for part in ("loc", "log_sd")}


# ---- start ----


def test_lengths_are_learned_without_dense_residuals_of_every_spot(data, monkeypatch):
    spots = warm_start.gather(data, [tissue(one) for one in data.sections])
    seen, residuals = [], warm_start.residuals
    monkeypatch.setattr(warm_start, "residuals", lambda some: seen.append(len(some.section)) or residuals(some))
    monkeypatch.setattr(warm_start, "fit_kernel", lambda space, image, scores: seen.append((len(space), len(image), len(scores))))
    warm_start.learn_kernel(spots, np.random.default_rng(0), 20)
    monkeypatch.setattr(warm_start, "MOST_SPOTS", 40)
    warm_start.learn_kernel(spots, np.random.default_rng(0), 20)
    assert seen == [60, (20, 20, 20), 40, (20, 20, 20)]
