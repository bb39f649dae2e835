"""Signals: at once outside an attack, at the next progress inside one, and a second one at once."""

import os
import signal

import pytest

from grab_jax import interrupts


@pytest.fixture(params=interrupts.SIGNALS)
def ask(request):
    """Sends this process a signal, with the program's handlers in place."""
    before = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
    interrupts.install()
    yield lambda: os.kill(os.getpid(), request.param)
    for number, handler in before.items():
        signal.signal(number, handler)


def reached(parts) -> list[str]:
    """The names that an attack yields before KeyboardInterrupt ends it."""
    names = []

    def attack():
        with interrupts.deferred():
            names.extend(parts)
        names.append("after the attack")

    with pytest.raises(KeyboardInterrupt):
        attack()
    return names


def test_outside_an_attack_at_once(ask):
    with pytest.raises(KeyboardInterrupt):
        ask()


def test_in_an_attack_at_the_next_progress(ask, capfd):
    def parts():
        interrupts.check()
        ask()
        yield "after the signal"
        interrupts.check()
        yield "after the progress"

    assert reached(parts()) == ["after the signal"]
    assert "once more stops at once" in capfd.readouterr().err


def test_a_second_one_at_once(ask):
    def parts():
        ask()
        yield "after the first"
        ask()
        yield "after the second"

    assert reached(parts()) == ["after the first"]


def test_with_no_progress_left_at_the_end(ask):
    def parts():
        ask()
        yield "the end of the attack"

    assert reached(parts()) == ["the end of the attack"]


def test_an_error_is_not_replaced_and_the_next_attack_starts_afresh(ask):
    def attack():
        with interrupts.deferred():
            ask()
            raise ValueError("of the attack")

    with pytest.raises(ValueError, match="of the attack"):
        attack()
    with interrupts.deferred():
        interrupts.check()
