"""The one table of named things: discovery by file name, entries from outside, clashes."""

import pytest

from moejax import ConfigError, MoejaxError
from moejax.registry import Registry


def thing() -> None:
    """Something to register."""


def other() -> None:
    """Something else."""


def test_a_decorator_enters_under_every_name_and_returns_what_it_decorates() -> None:
    table: Registry = Registry("thing")
    assert table.register("one", "two")(thing) is thing
    assert dict(table) == {"one": thing, "two": thing}
    assert table.find("one") is thing
    assert repr(table) == "Registry(thing: one, two)"


def test_unknown_names_are_refused_with_those_that_exist() -> None:
    table: Registry = Registry("thing", error=ConfigError)
    table.register("one")(thing)
    with pytest.raises(ConfigError, match="thing 'three' is unknown; choose from one"):
        table.find("three")
    with pytest.raises(MoejaxError, match="thing 3 is unknown"):
        table.find(3)
    assert "three" not in table
    assert table.get("three") is None


def test_a_clash_registers_nothing_and_the_same_thing_again_replaces_itself() -> None:
    table: Registry = Registry("thing")
    table.register("one")(thing)
    with pytest.raises(ConfigError, match=r"a thing 'one' is registered already: .*test_registry\.thing"):
        table.register("two", "one")(other)
    assert list(table) == ["one"]
    table.register("one")(thing)
    with pytest.raises(ConfigError, match="give the thing a name"):
        table.register()
    with pytest.raises(ConfigError, match="give the thing a name, not ''"):
        table.register("")(other)


def test_entries_on_trial_are_gone_afterwards() -> None:
    table: Registry = Registry("thing")
    with table.restored():
        table.register("one")(thing)
        assert "one" in table
    assert list(table) == []


def test_files_of_the_package_are_entries_and_come_before_those_from_outside() -> None:
    from moejax.layers.feed_forward.registry import LAYERS

    fresh: Registry = Registry("MoE layer", "moejax.layers.feed_forward.variants", ConfigError)
    assert "smoe" in LAYERS
    # the package's modules are imported already and entered themselves into the shared table, not this one
    assert "smoe" not in fresh
    with pytest.raises(ConfigError, match="'smoe' is registered already"):
        LAYERS.register("smoe")(thing)
