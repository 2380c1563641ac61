"""Eight CPU devices for every test, set before jax is first imported."""

import importlib
import os

import pytest

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")


@pytest.fixture
def peer():
    """Imports an independent library; its absence skips the test, or fails it where `SPARSEJAX_REQUIRE_PEERS` is 1."""

    def load(name):
        if os.environ.get("SPARSEJAX_REQUIRE_PEERS") == "1":
            return importlib.import_module(name)
        return pytest.importorskip(name)

    return load


from hypothesis import settings  # noqa: E402  (hypothesis does not import jax)

# Unattended runs try the same examples every time; runs by hand look for new ones.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
