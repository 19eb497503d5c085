"""Two processes that want one folder at the same moment: exactly one gets it."""

import json
import subprocess
import sys

from tests import ROOT
from tests.reliability.campaign import tries

# Each round forks two processes that wait for one closing pipe, then try. The winner reports and
# holds; once both have reported it is killed in odd rounds and leaves in even ones.
RACES = """
import json, os, signal, sys
from pathlib import Path
from niels_gpt.files.durable import FolderInUseError, lock_folder

folder, rounds = Path(sys.argv[1]), int(sys.argv[2])


def contend(start, report, release):
    os.read(start, 1)
    try:
        with lock_folder(folder):
            os.write(report, json.dumps([os.getpid(), "won", None]).encode() + b"\\n")
            os.read(release, 1)
    except FolderInUseError as error:
        os.write(report, json.dumps([os.getpid(), "refused", error.holder]).encode() + b"\\n")


for number in range(rounds):
    start, go = os.pipe()
    reports, report = os.pipe()
    release, let_go = os.pipe()
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            os.close(go)
            os.close(let_go)
            contend(start, report, release)
            os._exit(0)
        children.append(child)
    os.close(go)
    lines = b""
    while lines.count(b"\\n") < 2:
        lines += os.read(reports, 1000)
    outcomes = [json.loads(line) for line in lines.splitlines()]
    if number % 2:
        for pid, outcome, _ in outcomes:
            if outcome == "won":
                os.kill(pid, signal.SIGKILL)
    os.close(let_go)
    for child in children:
        os.waitpid(child, 0)
    for fd in (start, reports, report, release):
        os.close(fd)
    print(json.dumps(outcomes))
"""


@tries(20, 200)
def test_one_winner_in_every_race(tmp_path, tries, record_property):
    run = subprocess.run(
        [sys.executable, "-c", RACES, str(tmp_path), str(tries)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    rounds = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(rounds) == tries
    named = 0
    for outcomes in rounds:
        assert sorted(outcome for _, outcome, _ in outcomes) == ["refused", "won"]
        winner = next(pid for pid, outcome, _ in outcomes if outcome == "won")
        holder = next(pid for _, outcome, pid in outcomes if outcome == "refused")
        assert holder in (winner, None)  # None: it had won but not yet written its pid
        named += holder == winner
    record_property("races", tries)
    print(f"{tries} races, the refused one could name the winner in {named}")
