"""What a step, a prediction and a purge of XFuse cost, beside a plain-torch transcription of the published step in the same process.

    python tests/benchmarks/xfuse_speed.py step        # depth 4, 8 channels, patch 256, batch 2, 1,000 genes on MOB1
    python tests/benchmarks/xfuse_speed.py predict     # 1,000 genes x 10 draws, mean and sd of every pixel of 1,000 x 1,000
    python tests/benchmarks/xfuse_speed.py purge       # one ablation round at 5, 10, 20, 40 metagenes

One thread. Times are CPU seconds; memory is the largest resident size of the process (`step ours`, `step published` for each alone). Needs the
olfactory bulb of ``$PPL_ST_DATA`` (default ../shared/data).

The published step: five-fold convolutions, two blocks per resolution, deep posterior heads, batch norm, every block recomputed in the backward
pass, latent noise and a Monte Carlo KL, one 1x1 convolution per metagene, counts of whole spots as a dense negative binomial of the summed
activities, a normal law of every pixel, amsgrad. Written from the equations in the paper's methods; augmentation and data loading are left out.
"""

import dataclasses
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import NegativeBinomial, Normal
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ppl_st.config import with_overrides
from ppl_st.inference.ensemble import chains_of
from ppl_st.inference.svi import fit
from ppl_st.models import xfuse
from ppl_st.models.xfuse.metagenes import contributions
from ppl_st.models.xfuse.patches import Batch, aggregate
from ppl_st.prepare.xfuse import problem
from ppl_st.slides import read_slides

DEPTH, CHANNELS, METAGENES = 4, 8, 20
SETTINGS = [f"depth={DEPTH}", f"channels={CHANNELS}", "patch=256", "batch_patches=2", f"metagenes={METAGENES}", "fit.threads=1"]


def bulb(config):
    folder = Path(os.environ.get("PPL_ST_DATA", "../shared/data")) / "st_olfactory_bulb"
    slides = read_slides([folder / "spatial_MOB1.h5ad"], [folder / "he_MOB1.jpg"], layer=None, gene_key=None)
    return problem(slides, config.input, lambda line: None)[0]


def per_step(run, times=10):
    run()
    began = time.process_time()
    for _ in range(times):
        run()
    return (time.process_time() - began) / times


# ---- the published step ----


def unit(inputs, outputs, kernel=3, stride=1):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2), nn.BatchNorm2d(outputs, momentum=0.05), nn.LeakyReLU(0.2)
    )


def recomputed(module, *x):
    return checkpoint(module, *x, use_reentrant=False)


class Published(nn.Module):
    """Networks, globals and the negative bound of one minibatch."""

    def __init__(self, genes: int, metagenes: int = METAGENES) -> None:
        super().__init__()
        width = [CHANNELS * 2**i for i in range(DEPTH)]
        two = lambda c: nn.Sequential(unit(c, c), unit(c, c))  # noqa: E731
        self.stem = nn.Conv2d(3, width[0], 3, padding=1)
        self.encode = nn.ModuleList(two(c) for c in width)
        self.down = nn.ModuleList(unit(c, 2 * c, 5, 2) for c in width[:-1])
        self.loc = nn.ModuleList(nn.Sequential(unit(c, c, 1), nn.Conv2d(c, c, 1)) for c in width)
        self.sd = nn.ModuleList(nn.Sequential(unit(c, c, 1), nn.Conv2d(c, c, 1), nn.Softplus()) for c in width)
        self.decode = nn.ModuleList(two(c) for c in width)
        self.up = nn.ModuleList(unit(2 * c, c, 5) for c in width[:-1])
        self.combine = nn.ModuleList(unit(2 * c, c) for c in width[:-1])
        self.image = nn.ModuleList(nn.Sequential(unit(width[0], width[0], 1), nn.Conv2d(width[0], 3, 1)) for _ in range(2))
        self.scale = nn.Sequential(unit(width[0], width[0], 1), nn.Conv2d(width[0], 1, 1))
        self.shared = unit(width[0], width[0], 1)
        self.heads = nn.ModuleList(nn.Conv2d(width[0], 1, 1) for _ in range(metagenes))
        self.level, self.odds = nn.Parameter(torch.full((genes,), -6.0)), nn.Parameter(torch.zeros(genes))
        self.loading = nn.ParameterList(nn.Parameter(torch.zeros(genes)) for _ in range(metagenes))
        self.loading_sd = nn.ParameterList(nn.Parameter(torch.full((genes,), -4.0)) for _ in range(metagenes))
        self.prior_sd = nn.Parameter(torch.zeros(genes))

    def forward(self, batch: Batch, counts: Tensor) -> Tensor:
        y, bound, z = self.stem(batch.image), torch.zeros(()), []
        for i, block in enumerate(self.encode):
            y = recomputed(block, recomputed(self.down[i - 1], y) if i else y)
            q = Normal(recomputed(self.loc[i], y), recomputed(self.sd[i], y) + 1e-8)
            z.append(q.rsample())
            bound = bound + (Normal(0.0, 1.0).log_prob(z[i]) - q.log_prob(z[i])).sum()
        y = recomputed(self.decode[-1], z[-1])
        for i in range(DEPTH - 2, -1, -1):
            y = recomputed(self.up[i], F.interpolate(y, scale_factor=2, mode="bilinear"))
            y = recomputed(self.decode[i], recomputed(self.combine[i], torch.cat([y, z[i]], 1)))
        mean, sd = (recomputed(part, y) for part in self.image)
        bound = bound + Normal(mean.tanh(), F.softplus(sd) + 1e-8).log_prob(batch.image).sum()
        hidden = recomputed(self.shared, y)
        activity = torch.softmax(torch.cat([one(hidden) for one in self.heads], 1), 1) * F.softplus(recomputed(self.scale, y))
        loadings = []
        for loc, log_sd in zip(self.loading, self.loading_sd, strict=True):
            q = Normal(loc, log_sd.exp())
            loadings.append(q.rsample())
            bound = bound + (Normal(0.0, self.prior_sd.exp()).log_prob(loadings[-1]) - q.log_prob(loadings[-1])).sum()
        flat = activity.permute(0, 2, 3, 1).flatten(0, 2)
        summed = aggregate(flat[batch.pixels] * batch.pixel_weight[:, None], batch.location, len(batch.weight))
        rate = 1e-8 + summed @ (torch.stack(loadings) + self.level).exp()
        return -(bound + NegativeBinomial(rate, logits=self.odds, validate_args=False).log_prob(counts).sum())


def published_step(batches):
    torch.manual_seed(0)
    batch = batches.at(0)
    net = Published(batch.groups[0].counts.shape[1])
    optimizer = torch.optim.Adam(net.parameters(), 3e-4, amsgrad=True)
    counts = [torch.cat([group.counts.to_dense() for group in batches.at(step).groups]) for step in range(4)]
    step = iter(range(10**6))

    def run():
        k = next(step) % 4
        optimizer.zero_grad(set_to_none=True)
        net(batches.at(k), counts[k]).backward()
        optimizer.step()

    return run


def our_step(pair, batches, config):
    return lambda: fit(pair, batches, dataclasses.replace(config.fit, steps=10), scale=1e-3)


def step(which):
    config = with_overrides(xfuse.PRESETS["default"], SETTINGS)
    data = bulb(config)
    pair, _ = xfuse.start(data, config, 0, print)
    batches = xfuse.batches(data, config, 0)
    for name in which:
        seconds = per_step(published_step(batches)) if name == "published" else per_step(our_step(pair, batches, config), 2) / 10
        print(f"{name}: {seconds:.3f} cpu s per step; {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB at most so far")


def purge():
    for most in (5, 10, 20, 40):
        config = with_overrides(xfuse.PRESETS["default"], [*SETTINGS, f"metagenes={most}"])
        data = bulb(config)
        pair, _ = xfuse.start(data, config, 0, lambda line: None)
        batches = xfuse.batches(data, config, 0)
        chain = chains_of(pair)[0]
        print(f"{most} metagenes: {per_step(lambda c=chain, b=batches: contributions(c, b, range(2), 2, 0), 3) / 4:.3f} cpu s per batch and draw")


def predict():
    """The image enlarged to 1,000 x 1,000 pixels as an unseen section; maps of 1,000 genes with 10 draws, from the images on."""
    from ppl_st.api import fit_sections
    from ppl_st.image_run import ImageRun, spots_of
    from ppl_st.prepare import load_prepare
    from ppl_st.prepare.xfuse import new_image

    config = with_overrides(xfuse.PRESETS["default"], [*SETTINGS, "fit.steps=2"])
    folder = Path(os.environ.get("PPL_ST_DATA", "../shared/data")) / "st_olfactory_bulb"
    slides = read_slides([folder / "spatial_MOB1.h5ad"], [folder / "he_MOB1.jpg"], layer=None, gene_key=None)
    data, kept = load_prepare("xfuse").problem(slides, config.input, lambda line: None)
    run: ImageRun = fit_sections("xfuse", data, spots_of(data, kept), config, {}, None, "quiet", lambda line: None)
    image = np.random.default_rng(0).integers(0, 255, (1000, 1000, 3)).astype(np.uint8)
    tiled = np.tile(data.sections[0].image, (3, 2, 1))[:1000, :1000]
    image[: len(tiled), : tiled.shape[1]] = tiled
    config_none = dataclasses.replace(config.input, mask=("none",))
    section = new_image(image, data, config_none, lambda line: None, scale=1.0)
    with tempfile.TemporaryDirectory() as out:
        began, wall = time.process_time(), time.perf_counter()
        shape = run.looking(section, np.zeros(0, str), np.zeros((0, 2))).maps(Path(out) / "maps.zarr", draws=10)
        print(f"{shape}: {time.process_time() - began:.1f} cpu s, {time.perf_counter() - wall:.1f} s; "
              f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB at most")  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    command = sys.argv[1] if len(sys.argv) > 1 else "step"
    if command == "step":
        step(sys.argv[2:] or ["published", "ours", "published", "ours"])
    else:
        {"purge": purge, "predict": predict}[command]()
