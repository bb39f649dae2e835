"""Curves for TensorBoard and Weights & Biases: what is written, what is not, and that nothing is loaded when off."""

import dataclasses
import importlib.util
import json
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import fake_run
import numpy as np
import pytest

from grab_jax import session as sessions
from grab_jax.attacks.state import Progress
from grab_jax.config import Config, DataConfig
from grab_jax.trackers import Trackers, check
from grab_jax.types import InputError

SECRET = "confidential"
RECORD = fake_run.record(
    index=2, truths=(f"the {SECRET} cat sat", "a dog ran"), founds=(f"the {SECRET} cat sat", "a bird flew")
)


def config(**run):
    return dataclasses.replace(Config(), run=dataclasses.replace(Config().run, **run))


def track(settings, folder, process=0, said=None):
    """Two batches in two rounds of an attack, one of them without a finite loss; then a finished batch."""
    tracked = Trackers(settings, folder, process)
    if said:
        print(said)
    for round_ in (0, 1):
        tracked.progress([2, 5], Progress(round_, "continuous", 10, 20, np.array([0.5 - round_ / 4, np.nan]), None))
        tracked.progress([2, 5], Progress(round_, "discrete", 1, 2, np.array([9.0, 9.0]), None))
    tracked.progress([2, 5], Progress(0, "rows", 3, 9, np.full(1, np.nan), None))
    tracked.finished(RECORD)
    tracked.close()
    return settings.attack.steps


def events(folder):
    """(name, step, value) of the scalars in TensorBoard's files."""
    from tensorboardX.proto import event_pb2

    (file,) = folder.iterdir()
    content, found = file.read_bytes(), []
    while content:  # records: length, its checksum, the event, its checksum
        (length,) = struct.unpack("<Q", content[:8])
        event = event_pb2.Event.FromString(content[12 : 12 + length])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        content = content[16 + length :]
    return found


def test_tensorboard_gets_loss_and_leakage(tmp_path):
    pytest.importorskip("tensorboardX")
    steps = track(config(tensorboard=True), tmp_path)
    found = events(tmp_path / "tensorboard")
    assert [(name, step) for name, step, _ in found[:2]] == [("loss/2", 10), ("loss/2", steps + 10)]
    assert [value for *_, value in found[:2]] == [0.5, 0.25]
    leakage = {name: value for name, step, value in found[2:] if step == 2}
    assert leakage.keys() == {"leakage/rougeL", "leakage/token_accuracy", "leakage/exact_match"}
    assert leakage["leakage/exact_match"] == 50.0
    assert leakage["leakage/rougeL"] == pytest.approx((100 + 100 / 3) / 2)


def leveldb(content, block=32768):
    """The records of a file in LevelDB's log format behind a header of seven bytes, as W&B writes."""
    place, parts = 7, b""
    while place + 7 <= len(content):
        if block - place % block < 7:  # no room for a header: filled up
            place += block - place % block
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@pytest.mark.long
def test_wandb_offline_keeps_numbers_and_settings_only(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = config(wandb="audits")
    private = tmp_path / SECRET
    told = dataclasses.replace(settings, data=DataConfig(name=str(private / "mails.txt")))
    steps = track(told, tmp_path, said=SECRET)
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    rows, kinds = [], set()
    deadline = time.monotonic() + 60
    while "exit" not in kinds:  # written by a process of its own, which may end a little later
        assert time.monotonic() < deadline
        found = [wandb_internal_pb2.Record.FromString(data) for data in leveldb(file.read_bytes())]
        kinds = {record.WhichOneof("record_type") for record in found}
        time.sleep(0.1)
    for record in found:
        rows += [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}]
    rows = [row for row in rows if row]
    assert [row["loss/2"] for row in rows[:2]] == [0.5, 0.25]
    assert [row["step"] for row in rows[:2]] == [10, steps + 10]
    assert (rows[2]["batch"], rows[2]["leakage/exact_match"]) == (2, 50.0)
    assert {"run", "history", "config"} & kinds
    assert not {"output", "output_raw"} & kinds, "what the program prints stays here"
    assert "stats" not in kinds
    content = file.read_bytes()
    for private in (SECRET, socket.gethostname(), str(tmp_path)):
        assert private.encode() not in content
    assert b"mails.txt" in content
    assert not list(tmp_path.rglob("requirements.txt"))
    assert not list(tmp_path.rglob("wandb-metadata.json"))


def test_only_the_first_process_writes(tmp_path):
    pytest.importorskip("tensorboardX")
    track(config(tensorboard=True, wandb="audits"), tmp_path, process=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "flag"), [({"tensorboard": True}, "--run_tensorboard"), ({"wandb": "p"}, "--run_wandb")]
)
def test_a_missing_library_is_said_before_anything_runs(settings, flag, monkeypatch):
    find = importlib.util.find_spec
    hidden = lambda name, *args: None if name in ("tensorboardX", "wandb") else find(name, *args)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    for refuse in (check, sessions.prepare):
        with pytest.raises(InputError, match=rf"^{flag} needs \w+, .* pip install 'grab-jax\[trackers\]'$"):
            refuse(config(**settings))


def test_nothing_is_loaded_when_off():
    code = """
import sys
from pathlib import Path
from grab_jax import run
from grab_jax.config import Config
from grab_jax.trackers import Trackers, check
check(Config())
Trackers(Config(), Path("nowhere")).close()
print([name for name in ("tensorboardX", "wandb") if name in sys.modules], Path("nowhere").exists())
"""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[] False"
