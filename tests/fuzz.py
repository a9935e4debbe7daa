"""How many examples a property test draws: all of them with `--all`, a tenth of them in slow tests without it."""

import os

from hypothesis import settings


def fuzz(examples: int, **options) -> settings:
    """Returns settings for a slow property test: `examples` with `--all`, a tenth of them (at least 3) without it."""
    if not os.environ.get("LLAMAJAX_TEST_ALL"):
        examples = max(3, examples // 10)
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, **options)
