"""Lines in processes of their own: a crash, a time limit, memory, resuming, and what is measured again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gpu_acceptance import goals, judge
from gpu_acceptance.lines import Line
from gpu_acceptance.runner import Runner, locked

from qpert.runtime.errors import InputError

CRASH = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
FINE = "print('noise'); print('{\"n\": 1}')"


def line(name, program, *, needs=(), minutes=1.0, makes=None):
    command = (sys.executable, "-c", program)
    return Line(name, "Section", name, command, judge.ended_well, goals.ENDS_WELL, needs, makes, minutes)


def counting(path, name="counted", **options):
    """A line that notes each of its runs."""
    return line(name, f"open({str(path)!r}, 'a').write('x'); {FINE}", **options)


def run(work, lines, fingerprint="f", again=("skipped",)):
    work.mkdir(exist_ok=True)
    results = Runner(work, fingerprint, frozenset(again), say=lambda text: None).run(lines)
    return {result.name: result for result in results}


def test_a_crash_a_time_limit_and_memory_are_failed_lines_and_the_rest_goes_on(tmp_path):
    memory = "import sys; sys.exit('error: GPU memory is too small: 3 MiB of 4 are free')"
    found = run(
        tmp_path / "work",
        [
            line("crash", CRASH),
            line("slow", "import time; time.sleep(60)", minutes=0.01),
            line("memory", memory),
            line("bug", "import json; json.loads('{')"),
            line("silent", "pass"),
            line("odd", "print('[1]')"),
            line("fine", FINE),
        ],
    )
    assert {name: result.status for name, result in found.items()} == dict.fromkeys(
        ("crash", "slow", "memory", "bug", "silent", "odd"), "failed"
    ) | {"fine": "passed"}
    assert "SIGSEGV" in found["crash"].reason
    assert "longer than its limit" in found["slow"].reason
    assert found["slow"].seconds < 30
    assert found["memory"].reason.startswith("out of memory: GPU memory is too small")
    assert "JSONDecodeError" in found["bug"].reason
    assert "no JSON document" in found["silent"].reason
    assert found["fine"].figures == {"n": 1}
    assert all(result.checks[0].goal == "at most 0" for result in found.values())


def test_a_document_that_cannot_be_judged_is_a_failure(tmp_path):
    command = (sys.executable, "-c", FINE)
    found = run(tmp_path / "work", [Line("a", "Section", "a", command, judge.verified, goals.GATES)])
    assert found["a"].status == "failed"
    assert "gates" in found["a"].reason


def test_what_needs_a_line_that_did_not_pass_is_skipped_with_the_first_cause(tmp_path):
    never = tmp_path / "never"
    skips = 'print(\'{"skipped": "no TensorRT for sm90"}\')'
    found = run(
        tmp_path / "work",
        [
            line("builds", skips),
            counting(never, "runs", needs=("builds",)),
            counting(never, "measures", needs=("runs",)),
            line("breaks", CRASH),
            counting(never, "after", needs=("breaks",)),
        ],
    )
    assert not never.exists()
    assert found["builds"].reason == "no TensorRT for sm90"
    assert found["measures"].reason == "needs builds, which was skipped: no TensorRT for sm90"
    assert found["after"].status == "skipped"
    assert found["after"].reason == "needs breaks, which failed"


def test_a_second_run_measures_only_what_is_not_done(tmp_path):
    counted, work = tmp_path / "counted", tmp_path / "work"
    lines = [counting(counted), line("breaks", CRASH)]
    run(work, lines)
    assert run(work, lines)["counted"].status == "passed"
    assert counted.read_text() == "x"
    crashed = (work / "results" / "breaks.json").stat().st_mtime_ns
    run(work, lines)
    assert (work / "results" / "breaks.json").stat().st_mtime_ns == crashed, "a failure is a result"
    run(work, lines, again=("skipped", "failed"))
    assert (work / "results" / "breaks.json").stat().st_mtime_ns > crashed
    assert counted.read_text() == "x"


def test_another_commit_driver_or_gpu_measures_again(tmp_path):
    counted, work = tmp_path / "counted", tmp_path / "work"
    run(work, [counting(counted)], "one driver")
    run(work, [counting(counted)], "another driver")
    assert counted.read_text() == "xx"


def test_a_line_whose_product_is_gone_is_run_again_and_all_that_need_it(tmp_path):
    made, counted, work = tmp_path / "made", tmp_path / "counted", tmp_path / "work"
    lines = [line("makes", f"open({str(made)!r}, 'w'); {FINE}", makes=made), counting(counted, needs=("makes",))]
    run(work, lines)
    run(work, lines)
    assert counted.read_text() == "x"
    made.unlink()
    run(work, lines)
    assert made.exists()
    assert counted.read_text() == "xx"


def test_a_result_that_cannot_be_read_is_measured_again(tmp_path):
    counted, work = tmp_path / "counted", tmp_path / "work"
    run(work, [counting(counted)])
    (work / "results" / "counted.json").write_text('{"name": ')
    assert run(work, [counting(counted)])["counted"].status == "passed"
    assert counted.read_text() == "xx"


def test_two_runs_do_not_share_a_work_folder(tmp_path):
    with locked(tmp_path), pytest.raises(InputError) as error, locked(tmp_path):
        pass
    assert error.value.code == "work-in-use"


def test_a_line_dies_with_its_runner(tmp_path):
    """SIGKILL, which nobody can handle: a process that went on would hold the GPU of the next run."""
    started = tmp_path / "started"
    program = f"import os, time; open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(300)"
    script = (
        "import sys\nfrom pathlib import Path\nfrom gpu_acceptance import process\n"
        f"process.run([sys.executable, '-c', {program!r}], Path({str(tmp_path / 'log')!r}), minutes=9, "
        "exit_codes=(0,), environment={})\n"
    )
    paths = os.pathsep.join(str(Path(__file__).parents[2] / name) for name in ("benchmarks", "src"))
    runner = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": paths})
    wait_for(lambda: started.exists() and started.read_text())
    pid = int(started.read_text())
    runner.kill()
    runner.wait()
    wait_for(lambda: not alive(pid))


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_results_hold_what_the_report_needs(tmp_path):
    work = tmp_path / "work"
    run(work, [line("fine", FINE)])
    kept = json.loads((work / "results" / "fine.json").read_text())
    assert kept["status"] == "passed"
    assert kept["fingerprint"] == "f"
    assert kept["checks"][0] | {"why": ""} == {
        "what": "the command's exit code",
        "goal": "at most 0",
        "why": "",
        "value": 0,
        "unit": "",
        "status": "passed",
        "reason": "",
    }
