"""A program that forks writers, kills them at random moments, and says what they left: `kill_harness.py MODE FOLDER`.

Modes: "checkpoint" and "planted" (a writer that is not atomic, which must be found out) save numbered states for ever;
"trainer" trains, resumes what was killed and goes on until the run is complete. Prints one JSON object. The processes
are forked, not started, because importing torch takes longer than everything that is tested here.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch

from coterie.models.config import TransformerConfig
from coterie.models.transformer import Transformer
from coterie.training import Batches, TrainConfig, Trainer, checkpoint, load_checkpoint, read_log, save_checkpoint

KILLS = {"checkpoint": 60, "planted": 60, "trainer": 15}
LEAST_CHANGED = 10  # kills that came while it saved, not before it began
STEPS = 60


def kill_after(seconds, work):
    """Run `work(report)` in a fork and kill it after `seconds` (None: never).

    Returns the numbers that it reported, and whether it was the signal that ended it.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            work(lambda number: os.write(writing, number.to_bytes(8, "little")))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writing)
    first = os.read(reading, 8)  # it has begun
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("the work failed")
    with os.fdopen(reading, "rb") as pipe:
        data = first + pipe.read()
    numbers = [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data) - 7, 8)]
    return numbers, os.WIFSIGNALED(status)


def state_number(number):
    return {"a": torch.full((300_000,), float(number)), "b": torch.full((3, 1000), number)}


def write_in_place(path, write):
    """What write_atomically would be without its care."""
    write(path)


def kill_writers(folder, kills):
    """Every time: the last state that was reported as saved, or the next one, whole."""
    path = folder / "checkpoint.safetensors"
    times = []
    for _ in range(5):
        started = time.perf_counter()
        save_checkpoint(path, state_number(0), {"number": 0})
        times.append(time.perf_counter() - started)
    seconds = 3 * min(times)
    last, failures, saves, changed, done = 0, [], 0, 0, 0

    def write(report):
        number = last
        report(number)
        while True:
            number += 1
            save_checkpoint(path, state_number(number), {"number": number})
            report(number)

    # Where other work has the cores, writers are slow to begin, and more of them die before they save.
    while done < kills or (changed < LEAST_CHANGED and done < 10 * kills):
        done += 1
        numbers, killed = kill_after(random.uniform(0, seconds), write)
        saves += len(numbers) - 1
        try:
            tensors, state = load_checkpoint(path)
        except Exception as error:
            failures.append(f"not loadable: {error}")
            save_checkpoint(path, state_number(last), {"number": last})
            continue
        number = state["number"]
        changed += number != last
        whole = all(torch.equal(tensors[name], right) for name, right in state_number(number).items())
        if not killed or not whole or number not in (numbers[-1], numbers[-1] + 1):
            failures.append(f"state {number} after {numbers[-1]} was saved; whole: {whole}, killed: {killed}")
        last = number
    return {"kills": done, "saves": saves, "changed": changed, "failures": failures, "files": os.listdir(folder)}


def make_trainer(folder, **options):
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=256,
        dim=16,
        num_layers=1,
        num_heads=2,
        num_experts=4,
        top_k=2,
        expert_hidden_dim=8,
        router_score="sigmoid",
        selection_bias=True,
    )
    train = TrainConfig(
        steps=STEPS,
        batch_size=2,
        length=16,
        eval_every=20,
        eval_batches=1,
        checkpoint_every=2,
        selection_bias_rate=0.01,
    )
    corpus = np.random.default_rng(0).integers(97, 123, size=5000).astype(np.uint8)
    return Trainer(Transformer(config), train, Batches(corpus, 2, 16), corpus[:200], folder, **options)


def timeless(records):
    """Records without what the clock says."""
    clock = ("seconds", "tokens_per_second")
    return [{name: value for name, value in record.items() if name not in clock} for record in records]


def kill_trainers(folder):
    """The run that was killed again and again, and resumed, is the run that never was."""

    def train(report):
        begun = (folder / "killed" / "checkpoint.safetensors").exists()
        trainer = make_trainer(folder / "killed", resume=begun, overwrite=not begun)
        report(trainer.current_step)
        while trainer.current_step < STEPS:
            trainer.step()
        report(STEPS)

    make_trainer(folder / "warm-up").step()  # what torch imports late is imported before the first fork
    straight = make_trainer(folder / "straight")
    started = time.perf_counter()
    straight.train(progress=False)
    kills, patience = 0, (time.perf_counter() - started) / 6  # however fast the machine, several kills a run
    for _ in range(KILLS["trainer"]):
        numbers, killed = kill_after(random.uniform(0, patience), train)
        kills += killed
        if numbers[-1] == STEPS:
            break
        patience *= 1.1  # a busy machine may not get through its first step
    else:
        kill_after(None, train)
    (one, state), (other, other_state) = (
        load_checkpoint(folder / name / "checkpoint.safetensors") for name in ("straight", "killed")
    )
    same = one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    logs = [timeless(read_log(folder / name / "log.jsonl")) for name in ("straight", "killed")]
    del state["seconds"], other_state["seconds"]
    return {
        "kills": kills,
        "same_tensors": same,
        "same_state": state == other_state,
        "same_log": logs[0] == logs[1],
        "records": len(logs[1]),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    mode, folder = sys.argv[1], Path(sys.argv[2])
    random.seed(int(sys.argv[3]) if len(sys.argv) > 3 else None)
    if mode == "trainer":
        result = kill_trainers(folder)
    else:
        if mode == "planted":
            checkpoint.write_atomically = write_in_place
        result = kill_writers(folder, KILLS[mode])
    print(json.dumps(result))
