"""Programs are traced without garbage collection and long locations, and both settings return afterwards."""

import gc
import threading

import jax
import jax.numpy as jnp
import pytest

from moejax.program import Program, fast_tracing

_FRAMES = "jax_traceback_in_locations_limit"


@pytest.fixture(autouse=True)
def untouched():
    before = getattr(jax.config, _FRAMES), gc.isenabled()
    yield
    assert (getattr(jax.config, _FRAMES), gc.isenabled()) == before


def _double(x):
    return x + x


def test_a_program_has_the_names_of_its_operations_and_no_line_of_ours():
    text = Program(_double).lower(jnp.ones(3)).as_text(debug_info=True)
    assert "jit(_double)" in text
    assert "test_program.py" not in text
    # what JAX does by itself; another function, since lowerings are kept
    assert "test_program.py" in jax.jit(lambda x: x * 2).lower(jnp.ones(3)).as_text(debug_info=True)


def test_a_program_is_what_jit_compiles():
    scaled = Program(lambda x, *, by: x * by, static_argnames="by")
    assert scaled(jnp.arange(3.0), by=2).tolist() == [0, 2, 4]
    assert Program(_double).__name__ == "_double"
    assert jax.grad(lambda x: Program(_double)(x).sum())(jnp.ones(3)).tolist() == [2, 2, 2]


def test_an_error_leaves_nothing_behind():
    def fail(x):
        assert not gc.isenabled()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Program(fail)(jnp.ones(3))


def test_the_last_thread_to_leave_restores():
    entered, leave = threading.Event(), threading.Event()

    def other():
        with fast_tracing:
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with fast_tracing:
        thread.start()
        assert entered.wait(10)
    # the other thread is still in it
    assert not gc.isenabled()
    leave.set()
    thread.join()


@pytest.mark.parametrize(("frames", "collects"), [(7, True), (100, False)])
def test_what_was_set_before_is_set_again(frames, collects):
    before = getattr(jax.config, _FRAMES)
    jax.config.update(_FRAMES, frames)
    if not collects:
        gc.disable()
    try:
        with fast_tracing, fast_tracing:
            assert getattr(jax.config, _FRAMES) == 0
        assert getattr(jax.config, _FRAMES) == frames
        assert gc.isenabled() == collects
    finally:
        jax.config.update(_FRAMES, before)
        gc.enable()
