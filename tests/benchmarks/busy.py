"""What training loses where another program keeps a processor busy, by how many threads there are and how they wait.

    make quickstart; python -m tests.benchmarks.busy [--config FILE] [--rounds N] [--seconds S] [--pin]

A process for each row takes training steps of the config (default: the quickstart's) in turns with the others, on an
idle machine and beside a process that spins (``--pin``: on the last processor), which it was started beside; ``chosen``
is what ``train run`` does there. Images a second, medians of the rounds; ratios are medians of the rounds' ratios to
the first row.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nanodit.openmp import VARIABLES, let_threads_sleep

ROWS = {  # name -> threads (null: as many as torch takes), variables
    "one": ("1", {"OMP_WAIT_POLICY": "PASSIVE"}),
    "passive": ("null", {"OMP_WAIT_POLICY": "PASSIVE"}),
    **{f"spin-{count}": ("null", {"GOMP_SPINCOUNT": str(count)}) for count in (1000, 3000, 10000, 30000)},
    "default": ("null", {}),
    "chosen": ("null", {}),
}
SPIN = "import os, sys\nif sys.argv[1:]: os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
PLACES = ("idle", "busy")
WARM_UP = 2


def child(config_file: str, threads: str, choose: bool) -> None:
    """Take steps for as many seconds as each line of stdin says, one at least, and print images a second."""
    if choose:
        let_threads_sleep()
    import torch

    from nanodit.config import load_config
    from prep.dataset.reader import Dataset
    from train.checkpoint.run_folder import StopRequest
    from train.config import TrainConfig
    from train.loop.trainer import Trainer

    with tempfile.TemporaryDirectory() as output:
        config = load_config(TrainConfig, config_file, [f"output={output}", f"train.threads={threads}"])
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        trainer = Trainer(config, Dataset(config.dataset), torch.device("cpu"))
        made = {i: trainer.batches.make(i) for i in range(WARM_UP)}
        number = config.train.grad_accumulation_steps

        def step(i: int) -> None:
            trainer.update(trainer.accumulate(iter([made[i % WARM_UP]] * number), StopRequest()))

        for i in range(WARM_UP):
            step(i)
        print("ready", flush=True)
        for line in sys.stdin:
            start, done = time.perf_counter(), 0
            while done < 1 or time.perf_counter() - start < float(line):
                step(done)
                done += 1
            print(done * trainer.images_per_step / (time.perf_counter() - start), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/train/quickstart.yaml")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--pin", action="store_true")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES))
    parser.add_argument("--child", metavar="THREADS")
    parser.add_argument("--choose", action="store_true", help="of a child: as train run does")
    options = parser.parse_args()
    if options.child:
        child(options.config, options.child, options.choose)
        return
    clean = {name: value for name, value in os.environ.items() if name not in (*VARIABLES, "OMP_NUM_THREADS")}
    rates: dict[tuple[str, str], list[float]] = {}
    for place in options.places:
        spinner, workers = None, {}
        try:
            if place == "busy":
                cpu = [str(max(os.sched_getaffinity(0)))] if options.pin else []
                spinner = subprocess.Popen([sys.executable, "-c", SPIN, *cpu])
            for name in options.rows:  # one after another: they compile
                threads, variables = ROWS[name]
                command = [
                    sys.executable,
                    "-m",
                    "tests.benchmarks.busy",
                    "--config",
                    options.config,
                    "--child",
                    threads,
                ]
                command += ["--choose"] if name == "chosen" else []
                workers[name] = subprocess.Popen(
                    command, env=clean | variables, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
                while workers[name].stdout.readline().strip() != "ready":
                    assert workers[name].poll() is None, f"{name} failed"
            for _ in range(options.rounds):
                for name, worker in workers.items():
                    worker.stdin.write(f"{options.seconds}\n")
                    worker.stdin.flush()
                    rates.setdefault((name, place), []).append(float(worker.stdout.readline()))
                    print(f"{name}, {place}: {rates[name, place][-1]:.3g}", file=sys.stderr, flush=True)
        finally:
            for process in (*workers.values(), *([spinner] if spinner else [])):
                process.kill()
                process.wait()
    print(f"| threads |{''.join(f' {place} | of the first |' for place in options.places)}")
    print(f"|---{'|---|---' * len(options.places)}|")
    for name in options.rows:
        cells = []
        for place in options.places:
            ratio = statistics.median(a / b for a, b in zip(rates[name, place], rates[options.rows[0], place]))
            cells += [f"{statistics.median(rates[name, place]):.3g}", f"{ratio:.2f}"]
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"({options.rounds} rounds of {options.seconds:g} s; load {Path('/proc/loadavg').read_text().split()[0]})")


if __name__ == "__main__":
    main()
