"""Turns of adapters with the slots of the engine."""

from __future__ import annotations

from flora_train.serving.slot_turns import SlotTurns


def test_nobody_gives_way_while_nobody_waits() -> None:
    turns: SlotTurns[str] = SlotTurns(10)
    turns.serve("a", 100)
    assert not turns.used_up("a")
    turns.wait("r")
    assert not turns.used_up("a")


def test_an_adapter_gives_way_after_its_lead() -> None:
    turns: SlotTurns[str] = SlotTurns(10)
    turns.wait("r")
    turns.serve("a", 10)
    turns.serve("b", 4)
    assert not turns.used_up("a")
    turns.serve("a", 1)
    assert turns.used_up("a")
    assert not turns.used_up("b")
    # who waits later does not prolong the lead of those in slots
    turns.wait("s")
    assert turns.waiting == "r"
    assert turns.used_up("a")


def test_the_next_that_waits_counts_anew() -> None:
    turns: SlotTurns[str] = SlotTurns(10)
    turns.wait("r")
    turns.serve("a", 11)
    turns.done()
    assert not turns.used_up("a")
    turns.wait("s")
    assert not turns.used_up("a")
    turns.serve("a", 11)
    assert turns.used_up("a")


def test_without_a_lead_the_first_charge_is_enough() -> None:
    turns: SlotTurns[str] = SlotTurns(0)
    turns.wait("r")
    turns.serve("a", 0.5)
    assert turns.used_up("a")
