"""Drawing what is killed when, killing it, running the same command again, and comparing what it made in the end."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.processes import below, handles, left, with_role
from tests.soak.subjects import DONE, FATAL, Subject

LOOK, CLOSE_LOOK = 0.05, 0.002  # seconds between two looks; the second where a place lasts milliseconds
CENSUS = 0.5  # seconds between two looks at which processes there are
LONGEST = 12  # times what the undisturbed run took, after which a command counts as hanging
LEAST = 120.0  # seconds that it may take at least
ONCE = ("a scan", "a publish")  # of which a life has no more
LEFT = 90.0  # seconds in which the last process has to be gone: agents of Ray outlive a killed driver by a minute
NOT_STARTED = b"Ray could not be started on this machine"
RETRIES = 10  # of a command whose Ray did not start in its 30 seconds, which are its own
WORDS = 40  # letters of what it said last
PLACES = 0.35  # share of the kills in a named place
SIGNALS = {"driver": ("SIGKILL", "SIGKILL", "SIGKILL", "SIGTERM", "SIGINT")}
OTHERS = ("SIGKILL", "SIGKILL", "SIGKILL", "SIGTERM")
NOTHING = "nothing"  # how the words for it begin
ENDED = f"{NOTHING}: had ended"


@dataclass(frozen=True)
class Timeline:
    """An undisturbed run: its seconds, when its progress was first seen to be how much, and what it made."""

    seconds: float
    points: tuple[tuple[float, int], ...]
    outcome: dict[str, Any]

    def at(self, seconds: float) -> tuple[int, float]:
        """Return the progress at a time of the run, and the seconds since it was reached."""
        since, progress = max(point for point in self.points if point[0] <= seconds)
        return progress, seconds - since


@dataclass(frozen=True)
class Moment:
    """Whom to kill with what, once so much is done: a while after, or in the named place that comes next."""

    victim: str
    signal: str
    progress: int
    delay: float = 0.0
    place: str = ""


@dataclass
class Row:
    """What a kill met, and what became of it; ``equal`` None until its run has ended."""

    subject: str
    victim: str
    signal: str
    at_work: str
    exit_code: int | None = None
    back: float | None = None  # seconds until there was new progress; None where it was killed again before
    equal: bool | None = None
    killed_at: float = 0.0
    progress: int = 0

    @property
    def hit(self) -> bool:
        """Whether anything was at work."""
        return not self.at_work.startswith(NOTHING)


def draw(subject: Subject, timeline: Timeline, count: int, seed: int) -> list[Moment]:
    """Draw kills, in lives of three to six: moments uniform over the undisturbed run until all is done, or a place."""
    dice = random.Random(f"{seed} {subject.name}")
    moments: list[Moment] = []
    while len(moments) < count:
        life = []
        for _ in range(min(dice.randint(3, 6), count - len(moments))):
            victim = dice.choices(list(subject.victims), list(subject.victims.values()))[0]
            kind = dice.choice(SIGNALS.get(victim, OTHERS))
            progress, delay = timeline.at(dice.uniform(0, timeline.points[-1][0]))
            place = dice.choice(list(subject.places)) if subject.places and dice.random() < PLACES else ""
            if place in ONCE and any(one.place == place for one in life):
                place = ""
            if place in ONCE:  # the index and dataset.json are still to come
                victim, progress = "driver", 0 if place == "a scan" else timeline.points[-1][1] - 2
            life.append(Moment(victim, kind, progress, 0.0 if place else delay, place))
        order = {"a scan": -1, "a publish": 2}
        moments += sorted(life, key=lambda one: (order.get(one.place, 0), one.progress, one.delay))
    return moments


@dataclass
class Launch:
    """The command once, from its start to its end; ``seen`` are its processes, as far as they were looked at."""

    process: subprocess.Popen[bytes]
    log: Path
    begun: float
    clock: float  # the same moment, as files have it
    progress: int
    rows: list[Row] = field(default_factory=list)
    fatal: bool = False
    census: float = 0.0
    too_busy: bool = False  # Ray did not start in time, which the command says, and asks to be run again


class Soak:
    """One subject, killed again and again below ``folder``; ``say`` tells of each kill."""

    def __init__(
        self, subject: Subject, folder: Path, environment: dict[str, str], say: Callable[[str], None],
        stop: threading.Event,
    ) -> None:  # fmt: skip
        self.subject, self.folder, self.environment, self.say, self.stop = subject, folder, environment, say, stop
        self.rows: list[Row] = []
        self.faults: list[str] = []
        self.seen: set[tuple[int, int]] = set()
        self.launches = self.lives = self.told = 0
        self.retries = RETRIES
        self.output = folder / "undisturbed"
        self.timeline = self._undisturbed()

    def run(self, moments: Sequence[Moment]) -> None:
        """Live through the kills: run, kill, run again; a new life begins where a command ended by itself."""
        waiting = list(moments)
        while waiting:
            self.lives += 1
            self.output = self.folder / f"life-{self.lives:03d}"
            rows: list[Row] = []
            while True:
                launch = self._launch()
                while waiting and not launch.fatal and self._kill(launch, waiting[0], rows):
                    waiting.pop(0)
                    self._tell(rows[-1], len(moments))
                missed = bool(waiting) and not launch.fatal
                code = self._end(launch, rows)
                if launch.too_busy:
                    continue
                if missed:
                    late = waiting.pop(0)
                    rows.append(Row(self.subject.name, late.victim, late.signal, ENDED, exit_code=code))
                    self._tell(rows[-1], len(moments))
                if not launch.fatal or not code:
                    break
            self._compare(rows)
            self.rows += rows

    def _undisturbed(self) -> Timeline:
        while True:
            start, points = time.monotonic(), [(0.0, 0)]
            launch = self._launch()
            while launch.process.poll() is None:
                if (done := self.subject.progress(self.output)) > points[-1][1]:
                    points.append((time.monotonic() - start, done))
                time.sleep(LOOK)
            seconds = time.monotonic() - start
            if not launch.process.returncode:
                self.say(f"{self.subject.name}: undisturbed in {seconds:.1f} s")
                return Timeline(seconds, tuple(points), self.subject.outcome(self.output))
            if NOT_STARTED not in launch.log.read_bytes() or not self.retries:
                raise RuntimeError(f"the undisturbed run ended with {launch.process.returncode}: {launch.log}")
            self.retries -= 1
            shutil.rmtree(self.output, ignore_errors=True)

    @property
    def limit(self) -> float:
        """Seconds after which a command counts as hanging."""
        return max(LEAST, LONGEST * self.timeline.seconds)

    def _launch(self) -> Launch:
        if self.stop.is_set():
            raise KeyboardInterrupt
        command = self.subject.command(self.output)
        self.launches += 1
        clock = time.time()
        log = self.folder / f"launch-{self.launches:03d}.log"
        with open(log, "wb") as file:
            process = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
            )
        return Launch(process, log, time.monotonic(), clock, self.subject.progress(self.output))

    def _look(self, launch: Launch, rows: Sequence[Row]) -> int:
        """Return the progress; note the processes that are there, and which kills are got over."""
        if time.monotonic() - launch.census > CENSUS:
            self.seen |= {(one.pid, one.begun) for one in below(launch.process.pid).values()}
            launch.census = time.monotonic()
        progress, now = self.subject.progress(self.output), time.monotonic()
        for row in rows:
            if row.back is None and row.killed_at and progress != row.progress and row is rows[-1]:
                row.back = now - row.killed_at
        return progress

    def _kill(self, launch: Launch, moment: Moment, rows: list[Row]) -> bool:
        """Wait for the moment and kill; return whether that came before the command's end."""
        # what was done by an earlier launch, or before the kill before this one, is not this one's moment
        before = launch.rows[-1].progress if launch.rows else launch.progress
        reached, looked, progress, close = None, 0.0, launch.progress, ""
        while launch.process.poll() is None:
            now = time.monotonic()
            if now - launch.begun > self.limit:
                self._fault(launch, f"is not at {moment} after {self.limit:.0f} s")
                launch.process.kill()
                return False
            if now - looked >= LOOK and close not in ONCE:  # which are over before all processes are looked at
                looked, progress = now, self._look(launch, rows)
                # three deaths with nothing done between them end a command, which is right
                fresh = progress != before or (not launch.rows and (moment.place or not moment.progress))
                if reached is None and progress >= moment.progress and fresh:
                    reached = now
            close = moment.place if reached is not None else ""
            if close and not self.subject.places[moment.place](self.output, launch.clock):
                time.sleep(CLOSE_LOOK)
                continue
            late = progress > max(moment.progress, before)  # what the delay was drawn for is over
            if reached is None or (now - reached < moment.delay and not late):
                time.sleep(LOOK)
                continue
            if self._send(launch, moment, rows):
                return True
            time.sleep(CLOSE_LOOK)
        return False

    def _send(self, launch: Launch, moment: Moment, rows: list[Row]) -> bool:
        driver, number = launch.process.pid, signal.Signals[moment.signal]
        found = [driver] if moment.victim == "driver" else with_role(moment.victim, driver)
        if not found or (moment.victim == "driver" and not handles(driver, signal.SIGTERM)):
            return False  # not yet, or, of a driver, still Python on its own
        # a place may last milliseconds, in which processes cannot be counted
        words = [] if moment.place in ONCE else [counted(driver), last_words(launch.log)]
        words.insert(0, self.subject.at_work(self.output, launch.clock))
        row = Row(self.subject.name, moment.victim, moment.signal, "; ".join(filter(None, words)))
        try:
            # the raylet forks before it starts a worker
            os.kill(found[0] if moment.victim in FATAL else found[-1], number)
        except ProcessLookupError:
            return False
        row.killed_at, row.progress = time.monotonic(), self.subject.progress(self.output)
        rows.append(row)
        launch.rows.append(row)
        launch.fatal = moment.victim in FATAL
        return True

    def _end(self, launch: Launch, rows: Sequence[Row]) -> int:
        """Wait for the command's end, and check how it ended."""
        deadline = time.monotonic() + self.limit
        while launch.process.poll() is None:
            self._look(launch, rows)
            if time.monotonic() > deadline:
                self._fault(launch, f"still runs {self.limit:.0f} s after its last kill")
                launch.process.kill()
                break
            time.sleep(LOOK)
        code = launch.process.wait()
        self._look(launch, rows)
        for row in launch.rows if not launch.fatal else launch.rows[-1:]:
            row.exit_code = code
        not_started = code == 4 and not launch.fatal and NOT_STARTED in launch.log.read_bytes()
        launch.too_busy = not_started and self.retries > 0
        if launch.too_busy:
            self.retries -= 1
            self.say(f"{self.subject.name}: Ray did not start in time; the same command again")
        elif code not in (wanted_codes(launch.rows[-1]) if launch.fatal else (0,)):
            last = launch.rows[-1] if launch.rows else None
            self._fault(
                launch, f"ended with {code} after {f'{last.signal} to its {last.victim}' if last else 'nothing'}"
            )
        if b"Traceback (most recent call last)" in launch.log.read_bytes():
            self._fault(launch, "printed a traceback")
        return code

    def _compare(self, rows: Sequence[Row]) -> None:
        """Compare what the life made with the undisturbed run, and look for processes that it left."""
        found, expected = self.subject.outcome(self.output), self.timeline.outcome
        names = differing(found, expected)
        for row in rows:
            row.equal = not names
        if names:
            self.faults.append(f"{self.output}: differs in {', '.join(names[:5])} and {len(names)} in all")
        living = left(self.seen, str(self.output), LEFT)
        if living:
            self.faults.append(f"{self.output}: left {', '.join(f'{one.pid} {one.command[:80]}' for one in living)}")
        self.seen.clear()
        if not names:
            shutil.rmtree(self.output, ignore_errors=True)

    def _fault(self, launch: Launch, what: str) -> None:
        lines = launch.log.read_text(errors="replace").strip().splitlines()
        self.faults.append(f"{self.subject.name}, {launch.log}: {what}; it said last: {lines[-1] if lines else ''}")
        self.say(f"fault: {self.faults[-1]}")

    def _tell(self, row: Row, count: int) -> None:
        self.told += 1
        self.say(f"{row.subject} {self.told}/{count}: {row.signal} to {row.victim}: {row.at_work}")


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Return the names of what is not equal, or is on one side alone."""
    return sorted(name for name in found.keys() | expected.keys() if found.get(name, ...) != expected.get(name, ...))


def wanted_codes(row: Row) -> tuple[int, ...]:
    """Return the exit codes that a command may have after this kill; 0 where it had done everything.

    Where it had, Python may have been at its own end, where a signal is what it is to any process.
    """
    if row.victim != "driver":
        return (4, 0)
    dead = -signal.Signals[row.signal]
    if row.signal == "SIGKILL":
        return (dead,)
    return (75, 0, dead) if row.at_work.startswith(DONE) else (75, 0)


def table(rows: Sequence[Row]) -> list[str]:
    """Return the kills as a Markdown table."""
    lines = ["| kill | of | killed | signal | at work | exit code | seconds until back | equal |", "|" + "---|" * 8]
    for number, row in enumerate(rows, 1):
        back = "" if not row.hit else "killed again" if row.back is None else f"{row.back:.1f}"
        equal = {True: "yes", False: "**no**", None: "?"}[row.equal]
        lines.append(
            f"| {number} | {row.subject} | {row.victim} | {row.signal} | {row.at_work} "
            f"| {'went on' if row.exit_code is None else row.exit_code} | {back} | {equal} |"
        )
    return lines


def counted(driver: int) -> str:
    """Return how many processes of which role a command has."""
    roles = [one.role for one in below(driver).values() if one.role]
    return ", ".join(f"{roles.count(role)} {role}" for role in sorted(set(roles)))


def last_words(log: Path) -> str:
    """Return the beginning of the last line that a command printed."""
    said = log.read_text(errors="replace").strip().rpartition("\n")[2].partition(":")[0][:WORDS]
    return f'said "{said}"' if said else ""
