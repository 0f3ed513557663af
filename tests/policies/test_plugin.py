"""A policy that somebody else installed: a package with an entry point, found as pip would have left it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lethe_compile import policies
from lethe_compile.config import LetheConfig
from lethe_compile.errors import ConfigError
from lethe_compile.policies import make_policy, policy_names
from tests.policies.simulated import Decode, begun

CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"


def example() -> str:
    """The worked example of CONTRIBUTING.md, so that it is known to run."""
    text = CONTRIBUTING.read_text()
    start = text.index("# every_other.py")
    return text[start : text.index("```", start)]


def install(folder: Path, module: str, code: str, entry: str) -> None:
    """What pip leaves of a wheel: a module, and metadata with its entry points."""
    (folder / f"{module}.py").write_text(code)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[lethe_compile.policies]\n{entry}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path; what is imported from it is forgotten."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(policies, "_registry", dict(policies._registry))
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def test_the_worked_example_runs_as_an_installed_plugin(site: Path) -> None:
    install(site, "every_other", example(), "every-other = every_other:EveryOtherPolicy")
    assert "every-other" in policy_names() and "every_other" not in sys.modules, "nothing is imported before it is used"
    config = LetheConfig(
        policy="every-other", policy_options={"stride": 3}, max_tokens=24, prune_interval=4, sink_tokens=2
    )
    decode = Decode(begun(config, 1, 2), [5, 9], [None])
    for lengths in decode.run(12):
        assert (lengths <= 24).all()
    past = [position for position in decode.positions[0][1] if 9 <= position < 40]  # neither prompt nor newest
    assert past and all(position % 3 == 0 for position in past)


def test_its_options_are_checked_like_those_built_in(site: Path) -> None:
    install(site, "every_other", example(), "every-other = every_other:EveryOtherPolicy")
    for options, message in (
        ({"stride": 1}, "stride=1 is not allowed: must be an integer >= 2"),
        ({"strid": 2}, "'strid' is not a setting of policy_options of 'every-other'; the nearest is 'stride'"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_policy(LetheConfig(policy="every-other", policy_options=options, max_tokens=64))


def test_what_is_no_policy_is_refused(site: Path) -> None:
    install(site, "broken", "EveryOther = 3\n", "every-other = broken:EveryOther")
    with pytest.raises(ConfigError, match="installed from broken:EveryOther, which is no subclass of Policy: 3"):
        make_policy(LetheConfig(policy="every-other"))


def test_a_name_that_two_packages_claim_is_refused(site: Path) -> None:
    install(site, "one", "", "every-other = one:Policy")
    install(site, "two", "", "every-other = two:Policy")
    with pytest.raises(ConfigError, match=r"installed twice, from (one|two):Policy and"):
        make_policy(LetheConfig(policy="every-other"))


def test_an_unknown_name_lists_the_installed(site: Path) -> None:
    install(site, "every_other", example(), "every-other = every_other:EveryOtherPolicy")
    with pytest.raises(ConfigError, match=r"must be one of every-other, full, .*did you mean 'every-other'"):
        make_policy(LetheConfig(policy="every_othr"))
