"""A method with one setting changed at a time, over seeds: means and paired differences to the default with standard errors over seeds.

    OMP_NUM_THREADS=1 python tests/benchmarks/ablation.py METHOD TARGET.h5ad REFERENCE.h5ad OUT.csv graph=none graph=posterior --seeds 5 --folds 2
    # a variant is one or several key=value, separated by blanks; "" is the default and always run

A seed splits the genes anew, and fits: what is compared is what a user with other genes would see. Rows are written as they come; run again to go on.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ppl_st.evaluate import evaluate

METRICS = ("log_pcc", "log_scc", "log_partial_pcc", "log_score", "crps", "coverage_90")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method")
    parser.add_argument("target")
    parser.add_argument("reference")
    parser.add_argument("out", type=Path)
    parser.add_argument("variants", nargs="*")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folds", type=int, default=2, help="of 5, per seed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    done = pd.read_csv(args.out, keep_default_na=False) if args.out.is_file() else pd.DataFrame(columns=["variant", "seed"])
    for seed in range(args.seeds):
        for variant in ("", *args.variants):
            if ((done["variant"] == variant) & (done["seed"] == seed)).any():
                continue
            start = time.process_time()
            scores = evaluate(
                [args.method], args.target, args.reference, max_folds=args.folds, baselines=False, seed=seed,
                overrides=variant.split(), draws=50,
            ).scores  # fmt: skip
            row = {"variant": variant, "seed": seed, "cpu_seconds": time.process_time() - start}
            done = pd.concat([done, pd.DataFrame([row | scores[list(METRICS)].mean().to_dict()])])
            done.to_csv(args.out, index=False)
    wide = done.set_index(["variant", "seed"])[list(METRICS)].astype(float)
    default = wide.loc[""]
    print("| variant | " + " | ".join(METRICS) + " |\n|---" + "|---" * len(METRICS) + "|")
    for variant in ("", *args.variants):
        own = wide.loc[variant]
        difference = own - default
        error = difference.std() / np.sqrt(len(difference))
        cells = [f"{own[m].mean():.4f}" + (f" ({difference[m].mean():+.4f} ± {error[m]:.4f})" if variant else "") for m in METRICS]
        print(f"| {variant or 'default'} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
