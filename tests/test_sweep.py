"""Sweeps: cells, resuming, failures, the table and the page, with runs replaced; and (long) real ones, killed."""

import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import pytest
from absl import flags as absl_flags

from grab_jax import comparison, flags, folder, main, run, sweep, sweep_chart, sweep_page, sweep_table, utility
from grab_jax import session as sessions
from grab_jax.config import ClientConfig, Config, DefenseConfig, UtilityConfig
from grab_jax.types import InputError

ROOT = Path(__file__).parents[1]
SUMMARY = {
    "outcome": "leak shown", "reason": "", "n_sentences": 2, "n_batches": 2, "certified": 1, "exact_match": 50.0,
    "token_accuracy": 60.0, "rouge": {"one_to_one": {"rouge1": 70.0, "rouge2": 30.0, "rougeL": 65.0}},
    "intervals": {"rougeL": [40.0, 80.0], "exact_match": None}, "baseline": {"rougeL": 9.0},
    "seconds": {"compile": 1.0, "attack": 2.0}, "masks_auc": None,
}  # fmt: skip


def parsed(*args):
    values = absl_flags.FlagValues()
    flags.define(Config(), values)
    values(["grab_jax", *map(str, args)])
    return values


def cells(*args):
    values = parsed(*args)
    return sweep.cells(flags.swept(values), lambda changed: flags.parsed(values, changed=changed))


# --- flags ---------------------------------------------------------------------------------------------------


def test_every_setting_that_changes_a_result_can_be_swept():
    names = set(parsed())
    for leaf in flags.leaves(Config()):
        assert (f"sweep_{leaf.flag}" in names) == (leaf.path[0] not in ("mode", "utility", "run", "report", "dry_run"))


def test_the_help_does_not_list_them():
    values = parsed()
    assert "--client_dropout" in values.main_module_help() + values.get_help()
    assert "sweep_" not in values.get_help()
    assert "--sweep_<flag>=a,b,c" in main.__doc__


def test_cells_are_the_product_and_validated_by_the_settings():
    found = cells("--sweep_client_dropout=0,0.1,0.3", "--sweep_attack_view=all,unpruned", "--seed=4")
    assert [(c.config.client.dropout, c.config.attack.view, c.config.seed) for c in found] == [
        (rate, view, 4) for rate in (0.0, 0.1, 0.3) for view in ("all", "unpruned")
    ]
    assert len({c.id for c in found}) == 6
    assert [c.id for c in cells("--sweep_client_dropout=0.3,0.1", "--sweep_attack_view=all", "--seed=4")] == [
        found[4].id, found[2].id,
    ]  # fmt: skip


def test_values_are_parsed_as_their_flag_does():
    (found,) = {c.config for c in cells("--sweep_known_labels=false")}
    assert found.known.labels is False
    assert [c.config.attack.clip for c in cells("--sweep_attack_clip=none,0.5")] == [None, 0.5]
    assert [c.config.batch_size for c in cells("--sweep_batch_size=2, 1,2")] == [2, 1]


def test_a_swept_attack_has_its_own_settings():
    found = cells("--sweep_attack=grab,lamp,span", "--attack_init=span")
    assert [(c.config.attack.name, c.config.attack.init) for c in found] == [
        ("grab", "span"), ("lamp", "none"), ("span", "none"),
    ]  # fmt: skip
    assert [c.config.attack.moves for c in found] == [0, 200, 0]
    assert [c.config.attack.name for c in cells("--attack=grab,span", "--sweep_seed=1")] == ["grab", "span"]


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--sweep_client_dropout=0,x"], ("--sweep_client_dropout", "'x'", "float")),
        (["--sweep_client_dropout=0,1.5"], ("client_dropout=1.5", "--client_dropout=1.5", "expected a rate")),
        (["--sweep_client_dropout="], ("--sweep_client_dropout is empty",)),
        (["--sweep_attack_view=all,some"], ("--sweep_attack_view", "'some'", "unpruned")),
        (["--sweep_attack=grab,grap"], ("--sweep_attack", "'grap'", "dager")),
        (["--attack=auto", "--sweep_seed=1,2"], ("--attack=auto", "--sweep_attack=span,grab")),
        (["--attack=grab,span", "--sweep_attack=lamp"], ("--sweep_attack", "one of the two")),
        (["--sweep_attack_masks=true,learn", "--attack_init=span"], ("attack_masks=true", "--attack_init=span")),
    ],
)
def test_refused(args, parts):
    with pytest.raises(InputError) as caught:
        cells(*args)
    said = str(caught.value)
    assert "\n" not in said
    for part in parts:
        assert part in said


@pytest.mark.parametrize(("given", "meant"), [("sweep_client_dropuot", "sweep_client_dropout"), ("sweep_sed", "seed")])
def test_a_wrong_field_is_told_the_closest(given, meant):
    with pytest.raises(absl_flags.Error, match=rf"{given}.*{meant}"):
        parsed(f"--{given}=1,2")


# --- running, with the attack replaced -----------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch):
    """Runs that write what a run leaves behind; `ran` lists their folders, those in `broken` fail that often."""
    ran, broken = [], {}

    def prepare(config):
        if config.batch_size > 9:
            raise InputError("too few sentences")
        group = type("Group", (), {"members": (0,), "shape": (1, 8)})
        loaded = type("Loaded", (), {"model": "bert"})
        plan = type("Plan", (), {"groups": [group]})
        return type("Session", (), {"ids": ["a", "b"], "loaded": loaded, "plan": plan, "trainable": {}})

    def work(config):
        place = Path(config.run.dir)
        place.mkdir(exist_ok=True)
        ran.append(place.name)
        if broken.get(config.seed, 0):
            broken[config.seed] -= 1
            raise ValueError("it broke\nbadly")
        (place / "results.jsonl").write_text('{"id": "a"}\n{"id": "b"}\n')
        folder.write_json(place / "summary.json", SUMMARY | {"rouge": {"one_to_one": {
            "rouge1": 1.0, "rouge2": 1.0, "rougeL": 100.0 * config.client.dropout}}})  # fmt: skip
        folder.write_json(place / "run.json", {"ids": ["a", "b"], "model": "tiny", "data": "none"})
        (place / "report.html").write_text("a page")
        if config.utility.on:
            shares = dict.fromkeys(("accuracy", "accuracy_low", "accuracy_high", "accuracy_before", "majority"), 50.0)
            folder.write_json(place / utility.FILE, {"settings": utility.settings(config)} | shares)

    monkeypatch.setattr(sessions, "prepare", prepare)
    monkeypatch.setattr(run, "run", work)
    umask = os.umask(0o022)
    yield ran, broken
    os.umask(umask)


def do(*args):
    values = parsed(*args)
    return sweep.start(flags.swept(values), lambda changed: flags.parsed(values, changed=changed))


def test_a_finished_sweep(fake, tmp_path, capsys):
    base, args = tmp_path / "s", ["--sweep_client_dropout=0.1,0.3", "--sweep_seed=1,2", f"--run_dir={tmp_path / 's'}"]
    assert do(*args) == 0
    assert len(fake[0]) == len(set(fake[0])) == 4
    said = capsys.readouterr().out
    assert re.search(r"^client_dropout +seed +ROUGE-L", said, re.M)
    assert re.search(r"^0\.3 +2 +30\.0 \[40\.0, 80\.0\] +50\.0 ", said, re.M)
    assert re.search(r"compiled now: \d+ programs for 1 shape", said)
    table = list(csv.DictReader((base / "sweep.csv").open()))
    found = [(row["client_dropout"], row["seed"], row["rougeL"], row["state"]) for row in table]
    assert found == [(rate, seed, f"{100 * float(rate)}", "done") for rate in ("0.1", "0.3") for seed in ("1", "2")]
    kept = json.loads((base / "sweep.json").read_text())
    assert kept["swept"] == {"client_dropout": [0.1, 0.3], "seed": [1, 2]}
    assert [row["rougeL_high"] for row in kept["cells"]] == [80.0] * 4
    assert do(*args) == 0
    assert len(fake[0]) == 4
    assert capsys.readouterr().out.count("already done") == 4
    assert do(*args[1:], "--sweep_client_dropout=0.1,0.3,0.2") == 0
    assert len(fake[0]) == 6
    for path in [base, *base.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0 or path.parent == tmp_path, path


def test_a_failed_cell_is_tried_again_and_the_others_go_on(fake, tmp_path, capsys):
    ran, broken = fake
    broken.update({1: 1, 2: 2})
    args = ["--sweep_seed=1,2,3", f"--run_dir={tmp_path / 's'}"]
    assert do(*args) == 1
    by_seed = {row["values"]["seed"]: row for row in sweep_table.collect(tmp_path / "s")}
    assert [by_seed[seed]["state"] for seed in (1, 2, 3)] == ["done", "failed", "done"]
    assert [by_seed[seed]["tries"] for seed in (1, 2, 3)] == [2, 2, 1]
    assert by_seed[2]["error"] == "ValueError: it broke badly"
    assert ran.index(by_seed[3]["id"]) < len(ran) - 2  # before the second tries
    assert "Traceback" in (tmp_path / "s" / by_seed[2]["id"] / "log.txt").read_text()
    assert "failed: ValueError: it broke badly" in capsys.readouterr().out
    before = len(ran)
    assert do(*args) == 0
    assert len(ran) == before + 1


def test_an_interrupted_sweep_goes_on(fake, tmp_path, monkeypatch):
    ran, work = fake[0], run.run

    def stopped(config):
        if len(ran) == 2:
            raise KeyboardInterrupt
        work(config)

    args = ["--sweep_seed=1,2,3,4", f"--run_dir={tmp_path / 's'}"]
    with monkeypatch.context() as patch:
        patch.setattr(run, "run", stopped)
        with pytest.raises(KeyboardInterrupt):
            do(*args)
    assert [row["state"] for row in sweep_table.collect(tmp_path / "s")] == ["done", "done", "pending", "pending"]
    assert "about" in sweep_table.status(tmp_path / "s")
    assert do(*args) == 0
    assert len(ran) == len(set(ran)) == 4


def test_utility_is_measured_in_a_finished_sweep(fake, tmp_path):
    """Added later, or with other settings; known, it is not measured again."""
    args = ["--sweep_seed=1,2", f"--run_dir={tmp_path / 's'}"]
    for more, runs in (([], 2), (["--utility"], 4), (["--utility"], 4), (["--utility", "--utility_rounds=3"], 6)):
        assert do(*args, *more) == 0
        assert len(fake[0]) == runs
    assert "accuracy" in (tmp_path / "s" / "sweep.csv").read_text()


def test_a_cell_that_kills_its_process_comes_last(fake, tmp_path, monkeypatch):
    """It would otherwise end every start of the command before the others run."""
    ran, work = fake[0], run.run

    def killing(config):
        if config.seed == 1:
            raise SystemExit  # of a process that is killed nothing is noted either
        work(config)

    monkeypatch.setattr(run, "run", killing)
    args = ["--sweep_seed=1,2,3", f"--run_dir={tmp_path / 's'}"]
    for done in (0, 2):
        with pytest.raises(SystemExit):
            do(*args)
        assert len(ran) == done


def test_a_bad_cell_of_another_process_takes_nobody_along(fake, tmp_path, monkeypatch, capsys):
    """The first of two has the good cells: it does them, says what is wrong with the other, and makes the table."""
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    assert do("--sweep_batch_size=1,10,2", f"--run_dir={tmp_path / 's'}") == 1
    said = capsys.readouterr().out
    assert "not run: cell batch_size=10 of the sweep: too few sentences" in said
    assert "sweep: " in said
    assert len(fake[0]) == 2


def test_cells_of_an_earlier_command_stay_listed(fake, tmp_path):
    base = tmp_path / "s"
    for seeds in ("1,2", "3", "2,3,4"):
        assert do(f"--sweep_seed={seeds}", f"--run_dir={base}") == 0
    rows = sweep_table.collect(base)
    assert [row["values"]["seed"] for row in rows] == [2, 3, 4, 1]
    assert {row["state"] for row in rows} == {"done"}
    assert len((base / "sweep.csv").read_text().splitlines()) == 5
    assert json.loads((base / "sweep.json").read_text())["swept"] == {"seed": [2, 3, 4, 1]}
    assert len(fake[0]) == 4


@pytest.mark.parametrize("other", ["--sweep_seed=1,2 --batch_size=2", "--sweep_batch_size=1,2"])
def test_one_table_has_cells_of_one_sweep(fake, tmp_path, other):
    assert do("--sweep_seed=1", f"--run_dir={tmp_path / 's'}") == 0
    with pytest.raises(InputError, match=r"holds a sweep with other settings \(its cell seed=1 is none of these\)"):
        do(*other.split(), f"--run_dir={tmp_path / 's'}")
    assert len(sweep_table.collect(tmp_path / "s")) == 1


def test_all_cells_are_checked_before_the_first_runs(fake, tmp_path):
    with pytest.raises(InputError, match=r"batch_size=10.*too few sentences"):
        do("--sweep_batch_size=1,10", f"--run_dir={tmp_path / 's'}")
    assert not fake[0]
    assert not (tmp_path / "s").exists()


def test_a_cell_held_by_another_process_is_left_to_it(fake, tmp_path, capsys):
    args = ["--sweep_seed=1,2", f"--run_dir={tmp_path / 's'}"]
    held = cells(*args)[0]
    with folder.alone(sweep_table.lock(tmp_path / "s", held.id)) as mine:
        assert mine
        (tmp_path / "s" / "sweep.json").write_text("{}")
        do(*args)
        said = sweep_table.status(tmp_path / "s")
    assert held.id not in fake[0]
    assert "another process runs it" in capsys.readouterr().out
    assert "1 done, 1 running, 0 failed, 0 pending" in said
    assert "1 pending" in sweep_table.status(tmp_path / "s")


def test_one_of_several_begins_with_its_share_and_helps_with_what_nobody_began(fake, tmp_path, monkeypatch, capsys):
    """The second of two: not the cell in which the first one died, which is left to the next start."""
    base, args = tmp_path / "s", ["--sweep_seed=1,2,3,4", f"--run_dir={tmp_path / 's'}"]
    ids = [cell.id for cell in cells(*args)]
    base.mkdir()
    sweep_table.enlist(base, {"seed": [1]}, {})
    (base / "cells").mkdir()
    sweep_table.note(base, ids[0], {"state": sweep_table.BEGUN})
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    assert do(*args, "--dry_run") == 0
    assert do(*args, "--mode=status") == 0
    assert capsys.readouterr().out == ""
    assert do(*args) == 0
    assert fake[0] == [ids[1], ids[3], ids[2]]
    assert [row["state"] for row in sweep_table.collect(base)] == ["pending", "done", "done", "done"]
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    assert do(*args) == 0
    assert fake[0][3:] == [ids[0]]


def test_several_attacks_on_one_page_are_no_work_for_several_processes(monkeypatch):
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    values = parsed("--attack=span,grab")
    with pytest.raises(InputError, match="--sweep_attack"):
        comparison.start(flags.attacks(values), lambda name: flags.parsed(values, attack=name))


def test_the_state_of_several_attacks_is_shown_and_nothing_runs(fake, tmp_path, capsys):
    args = ["--attack=span,grab", "--mode=status", f"--run_dir={tmp_path}"]
    values = parsed(*args)

    def ask():
        return comparison.start(flags.attacks(values), lambda name: flags.parsed(values, attack=name))

    with pytest.raises(InputError, match=r"no comparison\.json"):
        ask()
    folder.write_json(tmp_path / comparison.LISTED, {"attacks": ["span"], "skipped": {}})
    for name, found in (("span", "ab"), ("grab", "a")):
        (tmp_path / name).mkdir()
        folder.write_json(tmp_path / name / "run.json", {"ids": ["a", "b"]})
        for one in found:
            folder.append(tmp_path / name, {"id": one})
    ask()
    said = [f"{tmp_path / name}: {done} of 2 batches are done" for name, done in (("grab", 1), ("span", 2))]
    assert capsys.readouterr().out.splitlines() == said
    assert not fake[0]


def test_it_takes_no_folder_of_something_else(fake, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="holds something else"):
        do("--sweep_seed=1,2", f"--run_dir={tmp_path}")
    with pytest.raises(InputError, match=r"no sweep\.json"):
        sweep_table.status(tmp_path)


# --- the page ------------------------------------------------------------------------------------------------


def row(values, score, **more):
    base = {"id": "-".join(map(str, values.values())), "values": values, "state": "done", "error": None, "tries": 1}
    base |= {"seconds": 2.0, "compiled": 3, "from_cache": 0, "outcome": "leak shown", "n_sentences": 4}
    return base | {"rougeL": score, "rougeL_low": score - 5, "rougeL_high": score + 5, "baseline_rougeL": 10.0} | more


SWEPT = {"attack": ["grab", "span"], "client_dropout": [0.3, 0.0, 0.1]}
ROWS = [
    row({"attack": attack, "client_dropout": rate}, 90 - 100 * rate - (20 if attack == "grab" else 0))
    for attack in SWEPT["attack"]
    for rate in SWEPT["client_dropout"]
]


def test_curves():
    """Numbers lie along the axis by size; 0 % at the floor, 100 % at the top."""
    assert sweep_chart.axes(SWEPT) == ["client_dropout", "attack"]
    (chart,) = sweep_chart.charts(SWEPT, ROWS)
    (panel,) = chart["panels"]
    assert [label for _, label in panel["places"]] == ["0", "0.1", "0.3"]
    assert [one["label"] for one in panel["series"]] == ["attack grab", "attack span"]
    _, height, _, top, floor = panel["size"]
    span = panel["series"][1]["points"]
    assert [point["y"] for point in span] == pytest.approx([floor - (floor - top) * v / 100 for v in (90, 80, 60)])
    assert span[0]["ends"] == pytest.approx([floor - (floor - top) * v / 100 for v in (85, 95)])
    assert [point["x"] for point in span] == sorted(point["x"] for point in span)
    assert floor < height


def test_many_lines_become_several_charts():
    swept = {"seed": [1, 2, 3], "client_dropout": [0.0, 0.1, 0.2, 0.3], "batch_size": [1, 2, 4]}
    rows = [
        row({"seed": s, "client_dropout": d, "batch_size": b}, 50.0)
        for s in swept["seed"] for d in swept["client_dropout"] for b in swept["batch_size"]
    ]  # fmt: skip
    found = sweep_chart.charts(swept, rows)
    assert [chart["title"] for chart in found] == ["batch_size 1", "batch_size 2", "batch_size 4"]
    assert all(len(one["points"]) == 4 for chart in found for one in chart["panels"][0]["series"])


def test_heat_map():
    (found,) = sweep_chart.heat(SWEPT, [*ROWS[:-1], ROWS[-1] | {"state": "failed", "rougeL": None}])
    assert (found["across"], found["columns"]) == ("client_dropout", ["0", "0.1", "0.3"])
    assert [[cell["value"] for cell in line["cells"]] for line in found["rows"]] == [[70, 60, 40], [90, None, 60]]
    assert not sweep_chart.heat({"seed": [1, 2]}, [])


def test_page(tmp_path, monkeypatch):
    """Self-contained, with the table and the links to pages that exist."""
    monkeypatch.setattr(sweep_table, "collect", lambda _base: [*ROWS[:-1], ROWS[-1] | {"error": "a <b>"}])
    (tmp_path / "grab-0.3").mkdir()
    (tmp_path / "grab-0.3" / "report.html").touch()
    folder.write_json(tmp_path / "sweep.json", {"swept": SWEPT})
    page = sweep_page.render(tmp_path).read_text()
    assert page.count('href="grab-0.3/report.html"') == 2
    assert page.count("href=") == 2
    assert "6 of 6 settings leak" in page
    assert "a &lt;b&gt;" in page
    assert "prefers-color-scheme: dark" in page
    assert not re.search(r"<script|src=|url\(|@import", page)
    assert page.count("<circle") == 6 + 2  # points, and the legend


def test_left(tmp_path):
    """Two cells took 10 s, two are left, one of them half done: 15 s."""
    sweep_table.enlist(tmp_path, {"seed": [1, 2, 3, 4]}, {str(s): {"seed": s} for s in (1, 2, 3, 4)})
    (tmp_path / "cells").mkdir()
    for cell in ("1", "2"):
        sweep_table.note(tmp_path, cell, {"state": "done", "seconds": 10.0, "compiled": 1, "from_cache": 0})
    (tmp_path / "3").mkdir()
    folder.write_json(tmp_path / "3" / "run.json", {"ids": ["a", "b"]})
    (tmp_path / "3" / "results.jsonl").write_text('{"id": "a"}\n{"id"')
    said = sweep_table.status(tmp_path)
    assert "2 done, 0 running, 0 failed, 2 pending; about 15.0 s left, but no process runs it" in said
    assert "seed=3: 1 of 2 batches" in said


# --- long: a real sweep, killed ------------------------------------------------------------------------------

SMALL = """--model=builtin:bert-mini --num_batches=2 --attack=grab --attack_rounds=1 --attack_steps=20 --attack_sweeps=1
    --attack_candidates=4 --attack_permutations=4 --attack_beam=2 --run_progress=off --defense_noise=0.01"""


@pytest.mark.long
def test_a_killed_sweep_redoes_no_cell_and_compiles_once_per_shape(tmp_path):
    """3 x 3: noise and seed change data only. Killed in the fifth cell, the command goes on there."""
    base, cache = tmp_path / "s", tmp_path / "xla"
    args = [
        sys.executable, "-m", "grab_jax.main", *SMALL.split(), "--sweep_defense_noise=0.001,0.01,0.05",
        "--sweep_seed=0,1,2", f"--run_dir={base}",
    ]  # fmt: skip
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "HF_HUB_OFFLINE": "1"}
    first = subprocess.Popen(args, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    while len(done := [c for c in sweep_rows(base) if c["state"] == "done"]) < 4:
        assert first.poll() is None
        time.sleep(0.2)
    time.sleep(1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = [c for c in sweep_rows(base) if c["state"] == "done"]
    stamps = {c["id"]: (base / c["id"] / "results.jsonl").stat().st_mtime_ns for c in done}
    assert 4 <= len(done) < 9
    said = subprocess.run(args, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    assert said.count("already done") == len(done)
    rows = sweep_rows(base)
    assert [c["state"] for c in rows] == ["done"] * 9
    assert {c: (base / c / "results.jsonl").stat().st_mtime_ns for c in stamps} == stamps
    assert re.search(r"compiled now: \d+ programs for 1 shape", said)
    # The first cell of each process compiles (or reads) the programs; the others nothing.
    busy = sorted(c["compiled"] + c["from_cache"] for c in rows)
    assert busy[:7] == [0] * 7
    assert len({(base / c["id"] / "results.jsonl").read_text() for c in rows}) == 9


def sweep_rows(base):
    if not (base / "sweep.json").is_file():
        return []
    return sweep_table.collect(base)


def test_identity_leaves_out_what_changes_no_attack():
    (one,) = cells("--sweep_seed=1")
    (other,) = cells("--sweep_seed=1", "--utility", "--run_group=2", "--noreport_redact")
    assert one.id == other.id
    assert dataclasses.replace(other.config, run=one.config.run) != one.config


def test_the_server_adds_changes_of_the_weights_and_descends_gradients():
    """Of one tensor at 1, sent 0.5: a change is added; of signs the size is the server's own rate."""
    weights, sent = {"w": jnp.ones(2)}, {"w": jnp.full(2, 0.5)}

    def after(algorithm, **defense):
        client, costs = ClientConfig(algorithm=algorithm), UtilityConfig(optimizer="sgd", lr=0.1)
        config = Config(client=client, defense=DefenseConfig(**defense), utility=costs)
        optimizer = utility._optimizer(config)
        return float(utility._apply(optimizer, optimizer.init(weights), weights, sent)[1]["w"][0])

    assert after("fedsgd") == pytest.approx(0.95)
    assert after("fedavg") == pytest.approx(1.5)
    assert after("fedavg", noise=0.1, noise_on="raw") == pytest.approx(1.5)
    assert after("fedavg", sign=True) == pytest.approx(1.05)
    assert after("fedavg", noise=0.1) == pytest.approx(1.05)
