"""The pytest plugin `lethe`: the fixture `lethe_compare`. Nothing heavy is imported before a test asks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from lethe_compile.comparison import Comparison


@pytest.fixture
def lethe_compare(pytestconfig: pytest.Config) -> Callable[..., Comparison]:
    """Compare a pruned graph with the unpruned one: ``lethe_compare(model, prompts, max_kl=0.02, …) -> Comparison``.

    `prompts` are as `lethe_compile.compare` takes them, or a prompts file. Limits, by name, come before those under
    ``[tool.lethe.compare]`` of the pyproject.toml in pytest's root directory; `Comparison.passed` says whether they
    hold. To fail with a table of them, call ``lethe_compile.testing.assert_close_to_unpruned``.
    """

    def run(model: Any, prompts: Any, **options: Any) -> Comparison:
        from lethe_compile import testing

        return testing.run(model, prompts, **{"pyproject": pytestconfig.rootpath, **options})

    return run
