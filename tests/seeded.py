"""Random numbers of a test's own: `_own_seed = pytest.fixture(own_seed, autouse=True)` gives them to every test of a file."""

import torch


def own_seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
