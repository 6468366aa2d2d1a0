"""The file of tests to copy passes."""

from examples.test_my_model import *  # noqa: F403
