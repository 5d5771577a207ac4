"""The search: Algorithm 1 as printed, its mended endings, and the journal."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import polarfast as pf


def trains(response, calls=None, epochs=12):
    """A training whose share cut rises to response(λ, t) and stays there."""

    def train(lam, t):
        if calls is not None:
            calls.append((lam, t))
        for epoch in range(1, 1000):
            yield response(lam, t) * min(1.0, epoch / epochs)

    return train


def algorithm_1(response, goal, delta=0.05):
    """Algorithm 1, word for word."""
    visited = []

    def f(lam, t):
        visited.append((lam, t))
        return response(lam, t)

    lam_l, lam_u, t = 0.0, 2e-4, 1.2
    while True:
        lam = (lam_l + lam_u) / 2
        share = f(lam, t)
        if share - goal >= 2 * delta:
            lam_u = lam
        elif share - goal <= -2 * delta:
            lam_l = lam
        if abs(share - goal) < 2 * delta:
            break
    while abs(share - goal) >= delta:
        t = t - 0.1 if share - goal >= delta else t + 0.1
        share = f(lam, t)
    return visited


def nominal(middle):
    """F grows with λ and, by some points each tenth, with t, as in the paper's Fig. 3."""

    def response(lam, t):
        return max(0.0, min(0.95, 0.9 * lam / (lam + middle) + 0.4 * (t - 1.2)))

    return response


@pytest.mark.parametrize("middle", [2e-5, 5e-5, 1e-4, 1.5e-4])
@pytest.mark.parametrize("goal", [0.3, 0.42, 0.5, 0.54])
def test_nominal_responses_are_searched_as_algorithm_1_says(middle, goal):
    response = nominal(middle)
    wanted = algorithm_1(response, goal)
    calls = []
    result = pf.search(trains(response, calls), cut=goal)
    assert calls == wanted == [(trial.lam, trial.t) for trial in result.trials]
    assert result.converged and abs(result.cut - goal) < 0.05
    assert result.cut == pytest.approx(response(result.lam, result.t))


@pytest.mark.parametrize("start", [1e-7, 2e-5, 5e-3])
@pytest.mark.parametrize("goal", [0.3, 0.5])
def test_from_a_lam_it_goes_outward_and_then_between(start, goal):
    calls = []
    result = pf.search(trains(nominal(5e-5), calls), cut=goal, lam=start)
    assert result.converged and calls[0] == (start, 1.2)
    assert len(calls) <= 10
    lams = [lam for lam, _ in calls]
    ratios = [after / before for before, after in itertools.pairwise(lams)]
    first = next((i for i, r in enumerate(ratios) if r not in (4.0, 0.25)), len(ratios))
    assert len(set(ratios[:first])) <= 1, "one way until the share is passed"


def test_from_a_lam_a_trial_ends_when_it_cuts_too_much():
    lengths = {}
    for name, options in {"outward": {"lam": 1e-2}, "printed": {"lam_high": 2e-2}}.items():
        result = pf.search(trains(nominal(1e-4), epochs=40), cut=0.3, **options)
        lengths[name] = result.trials[0].epochs
    assert lengths["outward"] < 20 < lengths["printed"]


def test_where_lam_does_not_matter_t_takes_over():
    result = pf.search(trains(lambda lam, t: 0.3 * t), cut=0.42, tol=0.01, lam=1e-3)
    assert result.converged and result.t == pytest.approx(1.4)


def test_a_search_has_one_start():
    with pytest.raises(pf.ArgumentError, match="leave one of them out"):
        pf.search(trains(nominal(1e-4)), lam=1e-3, lam_high=1e-2)
    with pytest.raises(pf.ArgumentError, match="lam=0"):
        pf.search(trains(nominal(1e-4)), lam=0.0)


def test_the_nominal_cases_need_both_loops():
    lengths = [
        [len({x[i] for x in algorithm_1(nominal(m), g)}) for i in (0, 1)]
        for m in (2e-5, 5e-5, 1e-4, 1.5e-4)
        for g in (0.3, 0.42, 0.5, 0.54)
    ]
    assert max(lams for lams, _ in lengths) > 2 and max(ts for _, ts in lengths) > 1


def test_a_trial_ends_when_f_is_stable_and_the_generator_is_closed():
    closed = []

    def train(lam, t):
        try:
            for epoch in range(1000):
                yield min(0.5, epoch * 0.05)
        finally:
            closed.append(lam)

    result = pf.search(train, cut=0.5)
    assert closed == [1e-4]
    assert result.trials[0].epochs == 15  # 0.5 since the 11th; five values within 0.01
    stability = pf.Stability(window=2, spread=0.1, least=3)
    assert pf.search(train, cut=0.1, stability=stability).trials[0].epochs == 3


def test_nothing_cut_yet_is_not_stable_at_once():
    result = pf.search(lambda lam, t: iter([0.0] * 20 + [0.5] * 20), cut=0.5)
    assert result.trials[0].epochs == 25


def test_a_training_that_ends_by_itself_counts_with_its_last_value():
    result = pf.search(lambda lam, t: [0.1, 0.52], cut=0.5)
    assert result.trials == (pf.Trial(1e-4, 1.2, 0.52, 2),)


def test_a_bracket_of_lam_that_is_too_small_grows():
    result = pf.search(trains(nominal(5e-3)), cut=0.5)
    assert result.converged and result.lam > 2e-4


def test_t_that_oscillates_is_bisected():
    """Steep in t: a step of 0.1 jumps over the target again and again."""

    def response(lam, t):
        return 0.5 + 0.4 * math.tanh(40 * (t - 1.147)) * (0.2 if abs(t - 1.2) < 1e-9 else 1)

    calls = []
    result = pf.search(trains(response, calls), cut=0.5)
    assert result.converged and abs(result.t - 1.147) < 0.01
    assert len(calls) == len(set(calls))


def test_what_cannot_be_reached_is_reported_with_all_trials():
    calls = []
    with pytest.raises(pf.SearchError) as error:
        pf.search(trains(lambda lam, t: 0.2, calls), cut=0.8)
    assert len(calls) <= 20
    message = str(error.value)
    assert message.count("cut after") == len(calls) and "0.8" in message and "t=" in message
    with pytest.raises(pf.SearchError, match="limit"):
        pf.search(trains(lambda lam, t: 0.9), cut=0.2, max_trials=100)


def test_a_jump_over_the_share_is_reported_or_nearly_met():
    def response(lam, t):
        return 0.57 if t > 1.15 else 0.42

    result = pf.search(trains(response), cut=0.5)
    assert not result.converged and result.cut == pytest.approx(0.57)
    assert len(result.trials) < 20


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    noise=st.floats(0, 0.5),
    slope=st.floats(-2, 2),
    goal=st.floats(0.05, 0.95),
    tol=st.floats(1e-4, 0.3),
    cap=st.integers(1, 15),
)
def test_it_always_ends(seed, noise, slope, goal, tol, cap):
    def response(lam, t):
        wobble = math.sin(seed + 1e7 * lam + 1e3 * t)  # any function of λ and t
        return min(1.0, max(0.0, 0.3 + slope * (t - 1.0) + 1e3 * lam + noise * wobble))

    calls = []
    try:
        result = pf.search(trains(response, calls, epochs=1), goal, tol, max_trials=cap)
    except pf.SearchError as error:
        assert str(error).count("cut after") == len(calls)
        closest = min(abs(response(*call) - goal) for call in calls)
        assert closest >= 2 * tol - 1e-12
    else:
        assert result.converged == (abs(result.cut - goal) < tol)
        assert abs(result.cut - goal) < 2 * tol
    assert 1 <= len(calls) <= cap


def test_a_journal_saves_finished_trials(tmp_path):
    path = tmp_path / "search.jsonl"
    response = nominal(2e-5)
    first, second = [], []
    result = pf.search(trains(response, first), cut=0.42, journal=path)
    assert len(first) > 2
    assert pf.search(trains(response, second), cut=0.42, journal=path) == result and not second
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + len(first)
    assert json.loads(lines[1])["lam"] == 1e-4
    path.write_bytes(b"".join(lines[:-1]))
    assert pf.search(trains(response, second), cut=0.42, journal=path) == result
    assert second == first[-1:]


def test_a_torn_last_line_is_dropped(tmp_path, caplog):
    path = tmp_path / "search.jsonl"
    response = nominal(2e-5)
    result = pf.search(trains(response), cut=0.42, journal=path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    calls = []
    assert pf.search(trains(response, calls), cut=0.42, journal=path) == result
    assert len(calls) == 1 and "dropped" in caplog.text
    assert path.read_bytes() == whole


def test_journals_of_others_and_damaged_ones_are_refused(tmp_path):
    path = tmp_path / "search.jsonl"
    response = nominal(2e-5)
    pf.search(trains(response), cut=0.42, journal=path)
    with pytest.raises(pf.ArgumentError, match=r"cut \(0.42, now 0.5\)"):
        pf.search(trains(response), cut=0.5, journal=path)
    with pytest.raises(pf.ArgumentError, match="stability"):
        pf.search(trains(response), 0.42, journal=path, stability=pf.Stability(least=3))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"{oops\n" + lines[2])
    with pytest.raises(pf.FileFormatError, match="line 2"):
        pf.search(trains(response), cut=0.42, journal=path)
    path.write_bytes(lines[0] + lines[2])
    with pytest.raises(pf.ArgumentError, match="trial 1 is of"):
        pf.search(trains(response), cut=0.42, journal=path)
    path.write_bytes(lines[0] + b'{"lam": 1}\n')
    with pytest.raises(pf.FileFormatError, match="not a trial"):
        pf.search(trains(response), cut=0.42, journal=path)


@pytest.mark.parametrize(
    "content", [b"hello\n", b"hello", b"hello\nworld", b'{"format": "another"}\n{"a', b"[1]\n"]
)
def test_a_file_that_is_no_journal_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(pf.FileFormatError, match="name another file"):
        pf.search(trains(nominal(2e-5)), cut=0.42, journal=path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("length", [0, 1, 20, 60])
def test_a_torn_header_is_written_anew(tmp_path, length):
    path = tmp_path / "search.jsonl"
    result = pf.search(trains(nominal(2e-5)), cut=0.42, journal=path)
    whole = path.read_bytes()
    path.write_bytes(whole[:length])
    assert pf.search(trains(nominal(2e-5)), cut=0.42, journal=path) == result
    assert path.read_bytes() == whole


@pytest.mark.slow
def test_killed_and_restarted_finished_trials_are_not_run_again(tmp_path):
    script = textwrap.dedent(
        """
        import sys, time
        import polarfast as pf

        trials = []

        def train(lam, t):
            print(lam, t, flush=True)
            trials.append((lam, t))
            for epoch in range(12):
                if epoch == 6 and len(trials) == 2 and "wait" in sys.argv:
                    print("in the middle", flush=True)
                    time.sleep(600)
                yield max(0.0, min(0.95, 0.9 * lam / (lam + 2e-5) + 0.4 * (t - 1.2)))

        print(pf.search(train, cut=0.42, journal=sys.argv[1]).trials, flush=True)
        """
    )
    journal = tmp_path / "search.jsonl"
    command = [sys.executable, "-c", script, str(journal)]
    started: list[str] = []
    for _ in range(2):  # each dies in the middle of its second trial
        process = subprocess.Popen([*command, "wait"], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        *seen, middle = [process.stdout.readline() for _ in range(3)]
        assert middle == "in the middle\n"
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        started += seen
    done = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    wanted = [f"{lam} {t}" for lam, t in algorithm_1(nominal(2e-5), 0.42)]
    assert len(wanted) > 3
    # The second and the third start were of the trial that the kill before had cut off.
    assert [line.strip() for line in started] + done[:-1] == [
        *wanted[:2], *wanted[1:3], *wanted[2:]
    ]  # fmt: skip
    uninterrupted = pf.search(trains(nominal(2e-5), epochs=1), cut=0.42)
    assert done[-1].count("Trial(") == len(uninterrupted.trials)


@pytest.mark.parametrize("value", [float("nan"), 1.5, -0.5, "0.5", None, 1j, torch.rand(3)])
def test_trainings_that_yield_no_share_are_told(value):
    with pytest.raises(pf.SearchError, match="yield the share"):
        pf.search(lambda lam, t: iter([value]), cut=0.5)
    with pytest.raises(pf.SearchError, match="yielded nothing"):
        pf.search(lambda lam, t: iter([]), cut=0.5)


def test_arguments_are_checked():
    train = trains(nominal(5e-5))
    for name, value in [
        ("cut", 0.0), ("cut", 1.0), ("tol", 0.0), ("lam_high", 0.0), ("lam_high", math.inf),
        ("t", 2.5), ("t_step", -0.1), ("max_trials", 0), ("cut", "a"), ("tol", None), ("t", "1.2"),
    ]:  # fmt: skip
        with pytest.raises(pf.ArgumentError, match=name):
            pf.search(train, **{name: value})


@pytest.mark.parametrize("kind", ["torch.tensor", "numpy.float32", "numpy.array"])
def test_shares_may_be_numbers_of_any_kind(kind, tmp_path):
    module, _, name = kind.partition(".")
    kind = getattr(pytest.importorskip(module), name)
    journal = tmp_path / "journal"
    found = pf.search(lambda lam, t: iter([kind(0.5)]), cut=0.5, journal=journal)
    assert found.cut == 0.5 and type(found.cut) is float
    assert json.loads(journal.read_text().splitlines()[1])["cut"] == 0.5


def test_a_journal_in_no_folder_is_refused_before_any_training(tmp_path):
    started = []

    def train(lam, t):
        started.append(lam)
        yield 0.5

    with pytest.raises(pf.ArgumentError, match="there is no folder .*missing"):
        pf.search(train, cut=0.5, journal=tmp_path / "missing" / "journal")
    with pytest.raises(pf.ArgumentError, match="is a folder"):
        pf.search(train, cut=0.5, journal=tmp_path)
    assert not started and not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="folders are synced on POSIX only")
def test_the_name_of_a_new_journal_is_brought_to_disk(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync

    def recording(descriptor):
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recording)
    journal = tmp_path / "journal"
    pf.search(lambda lam, t: iter([0.5]), cut=0.5, journal=journal)
    file, folder = journal.stat().st_ino, tmp_path.stat().st_ino
    assert synced == [file, folder, file]
