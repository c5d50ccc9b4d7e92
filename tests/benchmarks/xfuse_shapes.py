"""XFuse on harder simulated shapes: the demonstration's fit (4 sections, one seen as an image only) with one thing made harder at a time.

    python tests/benchmarks/xfuse_shapes.py [VARIANT ...] [key=value ...]     # prints a line per variant; about a cpu minute each
"""

import sys
import tempfile
import time
from pathlib import Path

import torch

from ppl_st import demo_images

VARIANTS = {
    "plain": {},
    "same color": {"color": "same"},
    "tiles": {"spots": "tiles"},
    "misaligned by 1 radius": {"misalignment": 1.0},
    "misaligned by 2 radii": {"misalignment": 2.0},
    "occlusion 20%": {"occlusion": 0.2},
    "2 batches": {"batches": 2},
}


def main(names, overrides):
    knobs = dict(demo_images.KNOBS)
    print("variant | AUC fitted, unseen | wrong calls at sd below median, in top tenth | Pearson hidden, unseen (GPs) | coverage 90%")
    for name in names or VARIANTS:
        demo_images.KNOBS = {**knobs, **VARIANTS[name]}
        began = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            scores, facts, _, _ = demo_images.demo_images("xfuse", out=Path(folder) / "demo", overrides=overrides)
        value = facts["value"].to_numpy()
        own = scores[scores.index == "xfuse"]
        seen, unseen = own.iloc[0], own.iloc[1]
        gp = scores.loc["gp_space_image", "PCC"], scores[scores["where"].str.startswith("unseen")].loc["gp_image", "PCC"]
        print(
            f"{name} | {value[0]:.3f}, {value[3]:.3f} | {value[1]:.3f}, {value[2]:.3f} | {seen['PCC']:.3f}, {unseen['PCC']:.3f} "
            f"({gp[0]:.3f}, {gp[1]:.3f}) | {seen['coverage 90 %']:.3f}, {unseen['coverage 90 %']:.3f} | {time.process_time() - began:.0f} cpu s",
            flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    main([one for one in sys.argv[1:] if "=" not in one], [one for one in sys.argv[1:] if "=" in one])
