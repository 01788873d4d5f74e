"""What applies to every test: the order, and the one reason to skip.

Skips are listed in tests/SKIPS.md with the condition that ends them; there are no retries.
"""

from __future__ import annotations

import hypothesis
import matplotlib
import pytest
import torch

torch.set_num_threads(1)  # tensors of tests are too small to share
matplotlib.use("agg")
# Same examples on every run, and no time limit on one: a busy machine is not a wrong result.
hypothesis.settings.register_profile("kexa", derandomize=True, deadline=None)
hypothesis.settings.load_profile("kexa")


@pytest.fixture(autouse=True)
def one_setting_of_torch():
    """What a test runs may set threads and determinism for its process; the next begins as it did.

    Sums over two threads differ in bits from those of one.
    """
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def pytest_collection_modifyitems(items):
    """The notebooks last: a unit test that fails says more, sooner. GPU tests run where one is."""
    items.sort(key=lambda item: item.get_closest_marker("notebooks") is not None)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))
