"""The policy by itself: declared sizes in, names out."""

import random

import pytest

from flux.memory.residency import ORDER, BaseCopy, BudgetError, Residency

DEV, DEV8, SCHNELL8, SCHNELL = ORDER
FLUX = {DEV: 238, DEV8: 120, SCHNELL8: 120, SCHNELL: 238}  # tenths of a gigabyte
OF_DEV, OF_SCHNELL = BaseCopy("dev"), BaseCopy("schnell")
WITH_BASE = {**FLUX, OF_DEV: 238, OF_SCHNELL: 238}


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (None, {DEV, DEV8, SCHNELL8, SCHNELL}),
        (716, {DEV, DEV8, SCHNELL8, SCHNELL}),
        (600, {DEV, DEV8, SCHNELL8}),
        (400, {DEV, DEV8}),
        (300, {DEV}),
        (238, {DEV}),
        (237, {DEV8}),
        (240, {DEV}),
        (120, {DEV8}),
    ],
)
def test_what_is_there_at_the_start(budget, expected) -> None:
    residency = Residency(FLUX, budget)
    for key in residency.at_start():
        assert residency.admit(key) == []
    assert set(residency.resident) == expected
    if len(expected) > 1:
        assert residency.resident[-1] == DEV  # so that it stays longest


@pytest.mark.parametrize(
    ("precision", "budget", "expected"),
    [
        ("fp8", None, [SCHNELL8, DEV8]),
        ("fp8", 240, [SCHNELL8, DEV8]),
        ("fp8", 239, [DEV8]),
        ("bf16", 600, [SCHNELL, DEV]),
        ("bf16", 400, [DEV]),
    ],
)
def test_the_operator_may_want_one_precision_at_the_start(precision, budget, expected) -> None:
    assert Residency(FLUX, budget).at_start((precision,)) == expected


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (None, [OF_SCHNELL, SCHNELL, SCHNELL8, OF_DEV, DEV8, DEV]),
        (1191, [SCHNELL, SCHNELL8, OF_DEV, DEV8, DEV]),
        (716, [SCHNELL8, OF_DEV, DEV8, DEV]),
        (682, [OF_DEV, DEV8, DEV]),  # an 80 GB card
        (595, [SCHNELL8, DEV8, DEV]),
        (400, [DEV8, DEV]),
        (238, [DEV]),
        (120, [DEV8]),
    ],
)
def test_base_weights_of_dev_come_before_schnell(budget, expected) -> None:
    assert Residency(WITH_BASE, budget).at_start() == expected


def test_a_start_in_float8_alone_brings_no_base_weights() -> None:
    assert Residency(WITH_BASE, None).at_start(("fp8",)) == [SCHNELL8, DEV8]


def test_base_weights_leave_for_a_transformer_and_return_by_use() -> None:
    residency = Residency(WITH_BASE, 600)
    for item in (OF_DEV, DEV8, DEV):
        residency.admit(item)
    assert residency.admit(SCHNELL) == [OF_DEV]
    assert residency.fits_beside(OF_DEV, DEV)
    assert residency.admit(OF_DEV) == [DEV8, DEV]
    assert residency.resident == (SCHNELL, OF_DEV)
    assert Residency(WITH_BASE, 476).fits_beside(OF_DEV, DEV)
    assert not Residency(WITH_BASE, 475).fits_beside(OF_DEV, DEV)


def test_what_is_excluded_is_never_counted_again() -> None:
    residency = Residency(WITH_BASE, 600)
    residency.admit(OF_DEV)
    residency.exclude(OF_DEV)
    assert residency.resident == ()
    assert residency.at_start() == [SCHNELL8, DEV8, DEV]


def test_a_device_too_small_for_the_precision_that_is_wanted_says_so() -> None:
    with pytest.raises(BudgetError, match=r"dev bf16 takes .* use the other precision"):
        Residency(FLUX, 200).at_start(("bf16",))


@pytest.mark.parametrize("budget", [119, 0, -5])
def test_a_device_too_small_for_any_says_so(budget) -> None:
    with pytest.raises(BudgetError, match=r"dev fp8 takes .* FLUX_DEVICE_MEMORY_GB"):
        Residency(FLUX, budget).at_start()


def test_the_least_recently_used_makes_room() -> None:
    residency = Residency(FLUX, 600)
    for key in residency.at_start():
        residency.admit(key)
    assert residency.admit(DEV8) == []
    assert residency.admit(SCHNELL) == [SCHNELL8]
    assert residency.resident == (DEV, DEV8, SCHNELL)
    assert residency.admit(DEV) == []
    assert residency.admit(SCHNELL8) == [DEV8]
    assert residency.resident == (SCHNELL, DEV, SCHNELL8)


def test_a_refusal_changes_nothing() -> None:
    residency = Residency(FLUX, 237)
    residency.admit(SCHNELL8)
    with pytest.raises(BudgetError, match="schnell bf16"):
        residency.admit(SCHNELL)
    assert residency.resident == (SCHNELL8,)


@pytest.mark.parametrize("budget", [238, 240, 358, 360, 478, 500, 600, 716])
def test_no_budget_is_ever_passed_and_nothing_comes_twice(budget) -> None:
    rng = random.Random(budget)
    residency, device = Residency(FLUX, budget), set()
    for _ in range(500):
        key = rng.choice(ORDER)
        leaving = residency.admit(key)
        assert device >= set(leaving)
        assert key not in leaving
        if key in device:
            assert leaving == []
        device = (device - set(leaving)) | {key}
        assert set(residency.resident) == device
        assert residency.used == sum(FLUX[k] for k in device) <= budget
        if rng.random() < 0.1:
            gone = rng.choice(ORDER)
            residency.drop(gone)
            device.discard(gone)
