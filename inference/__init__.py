"""Fitting and predicting: the one training loop, its checkpoints, streamed posterior predictive.

The folder lies at the top of the repository for readers; its only import name is ``ppl_st.inference``. A
second copy under the bare name ``inference`` would hold its own classes and settings, so it is refused.
Nothing heavy is imported here.
"""

if __name__ != "ppl_st.inference":
    raise ImportError(
        "import ppl_st.inference, not inference: the bare name would load a second copy of every module"
    )
