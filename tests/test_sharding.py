"""Several processes on one command: how each finds its place, and (long) that nothing is lost, doubled or waited for.

The processes are real ones on this machine, with two devices each.
"""

import collections
import dataclasses
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from grab_jax import folder, sharding, sweep_table
from grab_jax.config import Config, RunConfig
from grab_jax.sharding import World
from grab_jax.types import InputError

ROOT = Path(__file__).parents[1]
NO_TPU = {"TPU_SKIP_MDS_QUERY": "1"}
STEP = {"SLURM_STEP_NODELIST": "n[0-1]", "SLURM_PROCID": "3", "SLURM_NTASKS": "8"}
GKE = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a,b"}


def found(env, wanted="auto"):
    return sharding.initialize(wanted, NO_TPU | env)


@pytest.mark.parametrize(
    ("env", "world"),
    [
        ({}, (0, 1)),
        ({"JAX_PROCESS_ID": "1", "JAX_NUM_PROCESSES": "2"}, (1, 2)),
        (STEP, (3, 8)),
        (STEP | {"SLURM_STEP_NUM_TASKS": "4"}, (3, 4)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1)),  # the batch script, outside any step
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"}, (2, 3)),
        (GKE, (1, 2)),
        (GKE | {"MEGASCALE_SLICE_ID": "2", "MEGASCALE_NUM_SLICES": "3"}, (5, 6)),
        (STEP | {"JAX_PROCESS_ID": "0", "JAX_NUM_PROCESSES": "1"}, (0, 1)),
    ],
)
def test_the_place_is_read_from_the_environment(env, world):
    assert found(env) == world
    assert found(env, "off") == (0, 1)


@pytest.mark.parametrize(
    ("env", "wanted", "said"),
    [
        ({}, "on", "--run_distributed=on finds no launcher"),
        ({"JAX_PROCESS_ID": "1"}, "auto", "JAX_NUM_PROCESSES=None"),
        ({"JAX_NUM_PROCESSES": "4"}, "auto", "JAX_PROCESS_ID=None"),
        ({"JAX_PROCESS_ID": "x", "JAX_NUM_PROCESSES": "4"}, "auto", "JAX_PROCESS_ID=x"),
        ({"JAX_PROCESS_ID": "4", "JAX_NUM_PROCESSES": "4"}, "auto", "process 4 of 4: expected a number from 0 to 3"),
        ({"JAX_PROCESS_ID": "-1", "JAX_NUM_PROCESSES": "4"}, "on", "process -1 of 4"),
    ],
)
def test_what_contradicts_itself_is_refused(env, wanted, said):
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        found(env, wanted)
    assert "start this command on every worker" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def tpu_vm(monkeypatch):
    """The environment of worker 2 of 4 of a Cloud TPU slice of four chips a host, with its metadata server."""

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            attribute = self.path.rpartition("/")[2]
            values = {"agent-worker-number": "2", "worker-network-endpoints": "u:0:a,u:1:b,u:2:c,u:3:d"}
            known = attribute in values and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(values.get(attribute, "").encode())

        def log_message(self, *_args):
            pass

    monkeypatch.setattr(sharding, "_chips", lambda: [Path("/dev/accel0")] * 4)
    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
    server.shutdown()
    server.server_close()


def test_a_worker_of_a_tpu_slice_asks_its_metadata_and_keeps_to_its_chips(tpu_vm):
    assert sharding.initialize("auto", tpu_vm) == (2, 4)
    assert tpu_vm["TPU_PROCESS_BOUNDS"] == "1,1,1"
    assert tpu_vm["TPU_CHIPS_PER_PROCESS_BOUNDS"] == "2,2,1"
    assert tpu_vm["TPU_VISIBLE_CHIPS"] == "0,1,2,3"


@pytest.mark.parametrize(("topology", "own"), [("4x4", "2x2"), ("2x2x4", "2x2x1")])
def test_a_host_of_a_gke_slice_keeps_to_its_chips(monkeypatch, topology, own):
    """GKE's device plugin describes the whole slice, and says that there is no metadata to ask."""
    monkeypatch.setattr(sharding, "_chips", lambda: [Path("/dev/vfio/0")] * 4)
    bounds = {"TPU_HOST_BOUNDS": "2,2,1", "TPU_CHIPS_PER_HOST_BOUNDS": "2,2,1", "TPU_TOPOLOGY": topology}
    env = {"TPU_SKIP_MDS_QUERY": "true", "TPU_TOPOLOGY_WRAP": "true,true,false", "TPU_ACCELERATOR_TYPE": "v5p-32"}
    env |= GKE | bounds | {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}
    assert sharding.initialize("auto", env) == (3, 4)
    assert env == {
        "TPU_SKIP_MDS_QUERY": "true", "TPU_ACCELERATOR_TYPE": "v5p-32", "TPU_VISIBLE_CHIPS": "0,1,2,3",
        "TPU_PROCESS_BOUNDS": "1,1,1", "TPU_CHIPS_PER_PROCESS_BOUNDS": "2,2,1", "TPU_WORKER_ID": "0",
        "TPU_HOST_BOUNDS": "1,1,1", "TPU_CHIPS_PER_HOST_BOUNDS": "2,2,1", "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_TOPOLOGY": own, "TPU_TOPOLOGY_WRAP": "false,false,false",
    }  # fmt: skip


def test_a_tpu_without_metadata_is_alone(tpu_vm):
    env = {"GCE_METADATA_IP": "127.0.0.1:9"}  # nobody answers there
    assert sharding.initialize("auto", env) == (0, 1)
    assert "TPU_PROCESS_BOUNDS" not in env


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
def test_shares_hold_everything_once(count):
    items = list("abcdefghijk")
    shares = [World(process, count).share(items) for process in range(count)]
    assert sorted(item for share in shares for item in share) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_files_of_a_process_are_told_apart_only_where_there_are_others():
    assert World().suffix == ""
    assert World(3, 4).suffix == ".3"


# --- results of several processes ---------------------------------------------------------------------------


def test_results_of_processes_are_merged_when_all_are_there(tmp_path):
    for number, suffix in ((0, ".0"), (1, ".1"), (2, ".0")):
        folder.append(tmp_path, {"id": f"b{number}", "index": number}, suffix)
    (tmp_path / "results.1.jsonl").open("a").write('{"id": "b3", "ind')  # still being written
    assert list(folder.finished(tmp_path)) == ["b1", "b0", "b2"]
    assert not folder.merge(tmp_path, ["b0", "b1", "b2", "b3"])
    assert len(folder.shards(tmp_path)) == 2
    folder.append(tmp_path, {"id": "b3", "index": 3}, ".1")  # what was cut is dropped
    assert folder.merge(tmp_path, ["b0", "b1", "b2", "b3"])
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["b0", "b1", "b2", "b3"]
    assert not folder.shards(tmp_path)


def test_reading_leaves_a_line_that_is_being_written_alone(tmp_path):
    """A reader that cut it would destroy the result of a living process."""
    path = tmp_path / "results.jsonl"
    path.write_text('{"id": "a"}\n{"id": ')
    assert list(folder.records(path)) == ["a"]
    assert path.read_text() == '{"id": "a"}\n{"id": '


def test_a_folder_that_another_process_is_just_beginning_is_taken(tmp_path):
    (tmp_path / "sweep.json.host-7.partial").write_text('{"sche')
    folder.begin_several(tmp_path, "sweep.json")
    assert (tmp_path / "sweep.json.host-7.partial").read_text() == '{"sche', "the other one's"


@pytest.mark.parametrize("name", ["run.json", "sweep.json"])
def test_a_folder_that_another_process_has_just_begun_is_taken(tmp_path, monkeypatch, name):
    """The other one's first file appears between two looks at the folder."""
    looked = folder._fresh

    def begun(place):
        fresh = looked(place)
        (place / name).write_text('{"identity": {}}')
        return fresh and looked(place)

    monkeypatch.setattr(folder, "_fresh", begun)
    monkeypatch.setattr(folder, "_check_same", lambda *_args: None)
    if name == "run.json":
        folder.open_folder(dataclasses.replace(Config(), run=RunConfig(dir=str(tmp_path))), dict)
    else:
        folder.begin_several(tmp_path, name)


def test_a_lock_is_waited_for(tmp_path):
    path, got = tmp_path / "a.lock", []

    def wait():
        with folder.alone(path, patience=30.0) as mine:
            got.append(mine)

    with folder.alone(path):
        with folder.alone(path) as second:
            assert not second
        other = threading.Thread(target=wait)
        other.start()
        time.sleep(0.1)
        assert not got
    other.join()
    assert got == [True]


# --- long: real processes -----------------------------------------------------------------------------------

SMALL = """--model=builtin:bert-mini --batch_size=1 --attack=grab --attack_rounds=1 --attack_steps=20 --attack_sweeps=1
    --attack_candidates=4 --attack_permutations=4 --attack_beam=2 --run_progress=lines --attack_chunk=8"""


TEXTS = [
    f"the {who} {what} the {where} today." for who, what, where in [
        ("farmer", "closed", "gate"), ("teacher", "opened", "door"), ("doctor", "left", "room"), ("boy", "saw", "sea"),
        ("girl", "found", "road"), ("baker", "sold", "house"), ("driver", "cleaned", "car"), ("man", "liked", "park"),
    ]
]  # fmt: skip
"""Of one length, so that they form groups of two."""


@pytest.fixture(scope="module")
def xla(tmp_path_factory):
    """Folder of the compilation cache, which the processes share."""
    return tmp_path_factory.mktemp("xla")


STARTED = []


@pytest.fixture(autouse=True)
def nobody_left():
    """A test that fails leaves no process behind."""
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.kill()
            process.communicate()


def start(xla, args, process=0, count=1):
    """One process of several."""
    env = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(xla), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "HF_HUB_OFFLINE": "1",
        "JAX_PROCESS_ID": str(process), "JAX_NUM_PROCESSES": str(count),
    }  # fmt: skip
    command = [sys.executable, "-m", "grab_jax.main", *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    STARTED.append(subprocess.Popen(command, cwd=ROOT, env=env, text=True, **pipes))
    return STARTED[-1]


def ended(processes):
    """What each said, after all ended well."""
    said = [process.communicate(timeout=1800)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return said


def together(xla, args, count):
    return ended([start(xla, args, process, count) for process in range(count)])


def results(place):
    """The lines of results.jsonl by id, without what a clock says; each id is there once."""
    lines = [json.loads(line) for line in (place / "results.jsonl").read_text().splitlines()]
    assert not [one for one, times in collections.Counter(line["id"] for line in lines).items() if times > 1]
    return {line["id"]: {k: v for k, v in line.items() if k != "seconds"} for line in lines}


@pytest.fixture(scope="module")
def alone(xla, tmp_path_factory):
    """Arguments of a run of 8 batches in groups of 2, and its results in one process."""
    place = tmp_path_factory.mktemp("alone") / "run"
    texts = place.with_name("texts.txt")
    texts.write_text("\n".join(TEXTS))
    args = [*SMALL.split(), f"--data={texts}", "--num_batches=8", "--run_group=2"]
    ended([start(xla, [*args, f"--run_dir={place}"])])
    return args, results(place)


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 4])
def test_processes_find_what_one_does(xla, alone, tmp_path, count):
    """Bit for bit; each batch once; the last one to be done writes the report, the others say so."""
    args, expected = alone
    place = tmp_path / "run"
    said = together(xla, [*args, f"--run_dir={place}"], count)
    assert results(place) == expected
    assert len(expected) == 8
    # Two that end at once may both find every result.
    assert all(("the last one to be done writes the report" in one) != ("\nreport: " in one) for one in said)
    assert any("\nreport: " in one for one in said)
    assert not folder.shards(place)
    summary = json.loads((place / "summary.json").read_text())
    assert summary["n_batches"] == 8
    attacked = [re.findall(r"^batches (\d+), (\d+): 2 x", one, re.M) for one in said]
    assert sorted(int(i) for pairs in attacked for pair in pairs for i in pair) == list(range(8))
    assert all(attacked)
    again = together(xla, [*args, f"--run_dir={place}"], 1)[0]
    assert again.count("already done") == 4


@pytest.mark.long
def test_a_killed_process_takes_nobody_along_and_any_number_goes_on(xla, alone, tmp_path):
    """The first of two is killed in its first group: the second ends well, and three processes do what is missing."""
    args, expected = alone
    place = tmp_path / "run"
    first, second = (start(xla, [*args, f"--run_dir={place}"], process, 2) for process in range(2))
    for line in first.stdout:
        if line.startswith("batches "):
            break
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert "the last one to be done writes the report" in ended([second])[0]
    done = folder.finished(place)
    assert len(done) == 4
    assert not (place / "report.html").exists()
    stamps = {one: json.dumps(line) for one, line in done.items()}
    said = together(xla, [*args, f"--run_dir={place}"], 3)
    assert sum(len(pair) for one in said for pair in re.findall(r"^batches (\d+), (\d+): 2 x", one, re.M)) == 4
    assert results(place).keys() == expected.keys()
    assert {one: json.dumps(line) for one, line in folder.finished(place).items() if one in stamps} == stamps
    predicted = {one: line["predictions"] for one, line in results(place).items()}
    assert predicted == {one: line["predictions"] for one, line in expected.items()}


def cells(base):
    """Cells by state."""
    states = collections.defaultdict(list)
    for row in sweep_table.collect(base):
        states[row["state"]].append(row["id"])
    return states


@pytest.mark.long
def test_a_sweep_loses_only_the_cell_in_which_a_process_was_killed(xla, tmp_path):
    """The last of two is killed in its second cell: the other helps with the rest, and the next start does that one."""
    base = tmp_path / "s"
    args = [
        *SMALL.split(),
        "--num_batches=1",
        "--sweep_seed=0,1,2",
        "--sweep_defense_noise=0,0.001",
        f"--run_dir={base}",
    ]
    first, second = (start(xla, args, process, 2) for process in range(2))
    begun = 0
    for line in second.stdout:
        begun += line.startswith("cell ")
        if begun == 2:
            break
    second.send_signal(signal.SIGKILL)
    second.communicate()
    said = ended([first])[0]
    states = cells(base)
    assert len(states["done"]) == 5
    assert len(states["pending"]) == 1
    assert "of another process" in said
    stamps = {c: (base / c / "results.jsonl").stat().st_mtime_ns for c in states["done"]}
    again = together(xla, args, 2)
    assert len(cells(base)["done"]) == 6
    assert {c: (base / c / "results.jsonl").stat().st_mtime_ns for c in stamps} == stamps
    assert sum(len(re.findall(r"^cell .*: /", one, re.M)) for one in again) == 1
    assert json.loads((base / "sweep.json").read_text())["cells"][0]["state"] == "done"
    alone = [*args[:-1], f"--run_dir={tmp_path / 'alone'}"]
    ended([start(xla, alone)])
    for cell in cells(base)["done"]:
        assert results(base / cell) == results(tmp_path / "alone" / cell)
