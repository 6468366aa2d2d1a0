"""Eight host devices for the whole run, set before jax starts.

Sites of tests are too small to pay in time: they are judged by bytes.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HIRE_REWRITE_MACHINE"] = "bytes"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
