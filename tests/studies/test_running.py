"""Steps of a study: done once, made anew where settings changed, going on after kills; nothing is deleted unasked."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from longvpo_hf.errors import ConfigError
from longvpo_hf.studies.ledger import EARLIER, LOGS, STATE, Ledger
from longvpo_hf.studies.running import Progress, Selection, StepFailed, in_time, run_steps
from longvpo_hf.studies.steps import InRun, Step

ROOT = Path(__file__).resolve().parents[2]
#: Appends a line for each number to its own file, one at a time, and goes on where it was; then says what it read.
PROGRAM = """
import json, signal, sys, time
from pathlib import Path
from longvpo_hf.processes import end_with_parent
end_with_parent()
signal.signal(signal.SIGINT, signal.default_int_handler)
result, journal, number, seconds, *inputs = sys.argv[1:]
journal = Path(journal)
done = len(journal.read_text().splitlines()) if journal.exists() else 0
for index in range(done, int(number)):
    time.sleep(float(seconds))
    with journal.open("a") as file:
        file.write(f"{index}\\n")
    print(f"counting: {100 * index // int(number)}%|##| {index}/{number} [00:01<00:02, 1it/s]", end="\\r", flush=True)
read = [json.loads(Path(path).read_text()) for path in inputs]
Path(result).write_text(json.dumps([int(number), read]))
"""


def step(name: str, number: int = 2, needs: Sequence[str] = (), seconds: float = 0.0, program: str = PROGRAM) -> Step:
    """A step that counts, and reads what those it needs have written."""
    result, journal = InRun(f"{STATE}/{name}.result.json"), InRun(f"{name}.log")
    inputs = [InRun(f"{STATE}/{need}.result.json") for need in needs]
    words = ("-c", program, result, journal, str(number), str(seconds), *inputs)
    return Step(name, "evaluate", words, tuple(needs), {"number": number})


def chain(first: int = 2, second: int = 3, seconds: float = 0.0) -> list[Step]:
    """a → b → c, and d alone."""
    a = step("a", first, seconds=seconds)
    b = step("b", second, ["a"], seconds)
    return [a, b, step("c", 4, ["a", "b"], seconds), step("d", 5, seconds=seconds)]


def run(folder: Path, steps: Sequence[Step], selection: Selection | None = None, **options: object) -> list[list[str]]:
    """Runs steps; which ran at each change."""
    told: list[list[str]] = []

    def tell(running: Sequence[Progress]) -> None:
        told.append([progress.step for progress in running])

    folder.mkdir(exist_ok=True)
    selected = (selection or Selection()).of(steps)
    run_steps(Ledger(folder, steps), selected, **{"delete": False, "on_change": tell, **options})  # type: ignore[arg-type]
    return told


def started(told: Sequence[Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(name for names in told for name in names))


def results(folder: Path, steps: Sequence[Step]) -> dict[str, object]:
    return {one.name: Ledger(folder, steps).result(one.name) for one in steps}


def test_steps_run_once_in_their_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = chain()
    assert started(run(tmp_path / "r", steps)) == ["a", "b", "c", "d"]
    assert results(tmp_path / "r", steps)["c"] == [4, [[2, []], [3, [[2, []]]]]]
    capsys.readouterr()
    assert started(run(tmp_path / "r", steps)) == []
    assert capsys.readouterr().out.splitlines() == [f"[{n}/4] {name}: done" for n, name in enumerate("abcd", 1)]


def test_steps_that_do_not_wait_for_one_another_run_at_once(tmp_path: Path) -> None:
    told = run(tmp_path / "r", chain(seconds=0.3), slots=2)
    assert ["a", "d"] in told
    assert not any({"a", "b"} <= set(names) or {"b", "c"} <= set(names) for names in told)
    assert results(tmp_path / "r", chain()) == results_of_one_slot(tmp_path / "other")


def test_what_is_done_is_not_read_again_while_a_step_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading what steps made may cost seconds: weights and worlds are digested."""

    def reads(seconds: float) -> int:
        asked: list[str] = []
        state = Ledger.state
        with monkeypatch.context() as patch:
            patch.setattr(Ledger, "state", lambda ledger, name: asked.append(name) or state(ledger, name))
            run(tmp_path / str(seconds), [step("a", 1, seconds=seconds), step("b", 1, ["a"])], slots=2)
        return len(asked)

    assert reads(1.5) == reads(0.0)


def results_of_one_slot(folder: Path) -> dict[str, object]:
    run(folder, chain())
    return results(folder, chain())


def test_what_comes_after_a_step_waits_for_it_where_it_runs(tmp_path: Path) -> None:
    steps = [step("look", seconds=0.3), replace(step("work"), after=("look",))]
    told = run(tmp_path / "r", steps, slots=2)
    assert not any({"look", "work"} <= set(names) for names in told)
    assert started(run(tmp_path / "alone", steps, Selection(only="work"))) == ["work"]
    again = [step("look", number=3), steps[1]]
    assert Ledger(tmp_path / "r", again).state("work") == "done"  # it takes nothing from it


def test_a_changed_setting_makes_anew_what_follows_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    run(folder, chain())
    changed = chain(second=7)
    ledger = Ledger(folder, changed)
    assert [ledger.state(name) for name in "abcd"] == ["done", "changed", "changed", "done"]
    assert ledger.why("b") == "number: 3 → 7"
    assert ledger.why("c") == "b changed"
    made = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != LOGS]
    old = {path.relative_to(folder): path.read_bytes() for path in made}
    assert started(run(folder, changed)) == ["b", "c"]
    assert results(folder, changed)["c"] == [4, [[2, []], [7, [[2, []]]]]]
    # Nothing that was there is lost: what is no longer in its place is in earlier/.
    kept = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert all(content in kept for content in old.values())
    # And it comes back with the settings it was made under.
    assert started(run(folder, chain())) == []
    assert results(folder, chain())["c"] == [4, [[2, []], [3, [[2, []]]]]]


def test_with_redo_what_is_replaced_is_deleted(tmp_path: Path) -> None:
    run(tmp_path / "r", chain())
    run(tmp_path / "r", chain(first=9), delete=True)
    assert not (tmp_path / "r" / EARLIER).exists()
    assert results(tmp_path / "r", chain())["a"] == [9, []]


def test_a_result_that_is_gone_is_made_anew_and_what_followed_from_it_stays(tmp_path: Path) -> None:
    steps = chain()
    run(tmp_path / "r", steps)
    (tmp_path / "r" / STATE / "a.result.json").unlink()
    assert Ledger(tmp_path / "r", steps).state("a") == "lost"
    assert started(run(tmp_path / "r", steps)) == ["a"]


def test_a_note_that_cannot_be_read_costs_its_step_alone(tmp_path: Path) -> None:
    steps = chain()
    run(tmp_path / "r", steps)
    (tmp_path / "r" / STATE / "b.json").write_text("{")
    assert started(run(tmp_path / "r", steps)) == ["b"]


def test_a_run_may_be_moved(tmp_path: Path) -> None:
    steps = chain()
    run(tmp_path / "r", steps)
    (tmp_path / "r").rename(tmp_path / "elsewhere")
    assert started(run(tmp_path / "elsewhere", steps)) == []


def test_a_step_that_fails_says_what_it_said_and_the_next_run_goes_on(tmp_path: Path) -> None:
    broken = step("b", 3, ["a"], program="print('25%|##| 1/4 [00:01<00:02]'); raise SystemExit('no such model')")
    steps = [step("a"), broken, step("c", 1, ["b"])]
    with pytest.raises(StepFailed, match=r"b failed with status 1: no such model All it said is in .*b\.log"):
        run(tmp_path / "r", steps)
    mended = [steps[0], step("b", 3, ["a"]), steps[2]]
    assert started(run(tmp_path / "r", mended)) == ["b", "c"]


def test_a_failure_stops_what_runs_beside_it(tmp_path: Path) -> None:
    steps = [step("slow", 1000, seconds=0.1), step("broken", program="raise SystemExit('no')")]
    with pytest.raises(StepFailed, match="broken failed"):
        run(tmp_path / "r", steps, slots=2)
    note = Ledger(tmp_path / "r", steps).note("slow")
    assert note is not None
    with pytest.raises(ProcessLookupError):
        os.killpg(note.process_group, 0)


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection(until="b"), "ab"),
        (Selection(start="d"), "d"),
        (Selection(start="a", until="c"), "abc"),
        (Selection(only="a"), "a"),
    ],
)
def test_until_from_and_only(tmp_path: Path, selection: Selection, expected: str) -> None:
    assert started(run(tmp_path / "r", chain(), selection)) == list(expected)


def test_a_methods_name_alone_is_its_model(tmp_path: Path) -> None:
    steps = [step("stage1-rows"), step("stage1-model"), step("stage2-rows")]
    assert [one.name for one in Selection(until="stage1").of(steps)] == ["stage1-rows", "stage1-model"]
    assert [one.name for one in Selection(until="stage2").of(steps)] == [one.name for one in steps]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (lambda: Selection(until="z"), "--until z is no step of this study; have a, b, c, d"),
        (lambda: Selection(start="c", until="a"), "--until a comes before --from c"),
        (lambda: Selection(only="a", until="b"), "--only runs one step alone"),
    ],
)
def test_a_wrong_selection_is_refused(selection, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        selection().of(chain())


def test_a_step_that_is_not_ready_is_named_with_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match="c needs a, b, which is not done"):
        run(tmp_path / "r", chain(), Selection(only="c"))


def test_memory_and_time_of_a_step_are_noted(tmp_path: Path) -> None:
    program = PROGRAM + "\nheld = b'x' * (150 * 1024**2); time.sleep(2.6)\n"
    steps = [step("big", program=program)]
    run(tmp_path / "r", steps)
    note = Ledger(tmp_path / "r", steps).note("big")
    assert note is not None
    assert note.peak_gib is not None
    assert 0.15 < note.peak_gib < 1
    assert note.seconds > 2.6


# --------------------------------------------------------------------------------------------------------------- kills

RUNNER = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.path[:0] = [{str(ROOT / "tests" / "studies")!r}]
from pathlib import Path
from test_running import chain, run
run(Path(sys.argv[1]), chain(seconds=0.05), slots=int(sys.argv[2]))
"""


def runner(folder: Path, slots: int) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", RUNNER, str(folder), str(slots)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("slots", [1, 2])
def test_killed_at_random_instants_it_ends_with_the_same(tmp_path: Path, slots: int) -> None:
    run(tmp_path / "undisturbed", chain())
    rng = random.Random(slots)
    folder = tmp_path / "killed"
    for _ in range(4):
        process = runner(folder, slots)
        time.sleep(rng.uniform(0.3, 1.8))
        process.kill()
        process.wait()
    process = runner(folder, slots)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert results(folder, chain()) == results(tmp_path / "undisturbed", chain())
    for name, number in {"a": 2, "b": 3, "c": 4, "d": 5}.items():  # nothing was done twice, and never by two at once
        assert (folder / f"{name}.log").read_text().split() == [str(index) for index in range(number)]


def test_an_interrupt_stops_the_steps_and_the_next_run_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    words = [sys.executable, "-c", RUNNER.replace("seconds=0.05", "first=400, seconds=0.05"), str(folder), "1"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    journal = folder / "a.log"
    while not journal.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in said
    done = len(journal.read_text().split())
    time.sleep(0.3)
    assert len(journal.read_text().split()) == done  # nothing works on
    assert json.loads((folder / STATE / "a.json").read_text())["is_finished"] is False


def test_each_steps_output_is_in_its_log_and_progress_is_read_from_its_bar(tmp_path: Path) -> None:
    seen: list[Progress] = []
    steps = [step("a", 30, seconds=0.05), step("b", 1, seconds=1.0)]
    run(tmp_path / "r", steps, slots=2, on_change=lambda running: seen.extend(running))
    assert any(progress.step == "a" and progress.text.startswith("counting") for progress in seen)
    assert (tmp_path / "r" / LOGS / "a.log").read_text().count("counting") == 30


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.2, "4 s"), (99, "99 s"), (130, "2 min"), (5940, "99 min"), (12_000, "3 h 20 min")]
)
def test_times_as_people_say_them(seconds: float, text: str) -> None:
    assert in_time(seconds) == text
