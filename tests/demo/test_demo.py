"""The demo: its streams, its honesty, its command line. Runs here are a task or two long."""

import dataclasses
import importlib.util
import json
import multiprocessing
from itertools import pairwise

import pytest
import torch

import cbp_fast
from cbp_fast.cli import main
from cbp_fast.demo import digits, problems, regression, report, training

load_digits = pytest.importorskip("sklearn.datasets").load_digits
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")


def train(method, name="digits", rule="nature", seed=0, tasks=1, step_size=0.001):
    run = training.Run(name, rule, method, step_size, seed, tasks)
    ((_, history),) = training.train_all([run], 1, lambda run, score: None)
    if isinstance(history, Exception):
        raise history
    return history


@pytest.fixture
def settings(monkeypatch):
    """Changes settings of the problem that the test trains on."""

    def change(name="digits", rule="nature", **changes):
        changed = dataclasses.replace(problems.load(name, rule), **changes)
        monkeypatch.setattr(training, "load", lambda name, rule: changed)
        return changed

    return change


def test_digits_are_the_real_ones_in_a_new_order_of_pixels_and_images_each_task():
    images, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(images).float()
    (x, y), (next_x, next_y) = digits.stream(seed=0, tasks=2)
    for task_x, task_y in ((x, y), (next_x, next_y)):
        assert task_y.sort().values.tolist() == sorted(labels)
        assert task_x.mean().abs() < 1e-5
        assert (task_x.std() - 1).abs() < 1e-5
        # permuting pixels keeps the sorted values of an image
        values = (task_x * images.std() + images.mean()).round().sort(1).values
        assert sorted(values.tolist()) == sorted(images.sort(1).values.tolist())
    assert not x.equal(next_x)
    assert not y.equal(next_y)


def test_digits_of_a_seed_are_always_the_same():
    (x, y), (x_again, y_again), (x_other, _) = (next(digits.stream(seed, 1)) for seed in (3, 3, 4))
    assert x.equal(x_again)
    assert y.equal(y_again)
    assert not x.equal(x_other)


def test_regression_flips_one_slow_bit_between_tasks():
    tasks = [x for x, _ in regression.stream(seed=0, tasks=6)]
    for x in tasks:
        assert x.shape == (1000, 21)
        assert set(x.unique().tolist()) == {0, 1}
        assert (x[:, :15] == x[0, :15]).all()
        assert ((x[:, 15:20].mean(0) - 0.5).abs() < 0.1).all()
        assert (x[:, 20] == 1).all()
    flips = [(x[0, :15] != next_x[0, :15]).sum().item() for x, next_x in pairwise(tasks)]
    assert flips == [1] * 5


def test_regression_target_is_one_fixed_function_of_the_bits():
    seen = {}
    for x, y in regression.stream(seed=1, tasks=3):
        assert y.shape == (1000, 1)
        assert y.equal(y.round())  # a sum of -1 and 1
        assert y.abs().max() <= 100
        for bits, target in zip(x.tolist(), y.flatten().tolist(), strict=True):
            assert seen.setdefault(tuple(bits), target) == target
    assert len(set(seen.values())) > 3


def test_every_example_is_scored_before_the_update_on_it(settings):
    # one batch a task, so that the score is the untrained network's
    network = settings(batch_size=1797).network(0)
    x, y = next(digits.stream(seed=0, tasks=1))
    assert train("backprop", step_size=0.1).scores == [digits.accuracy(network(x), y).item()]


def test_plain_backprop_depends_neither_on_the_rule_nor_on_what_ran_before():
    before = train("backprop")
    cbp = train("cbp", rule="gnt", tasks=2)
    after = train("backprop", rule="gnt", tasks=2)
    assert after.scores[:1] == before.scores
    assert cbp.scores != after.scores
    assert (before.backend, cbp.backend) == (None, "cpp")


def test_continual_backprop_that_replaces_nothing_is_plain_backprop(settings):
    settings(replacement_rate=0.0)
    plain, cbp = train("backprop", tasks=2), train("cbp", tasks=2)
    assert cbp.scores == plain.scores
    assert (cbp.dormant, cbp.effective_rank) == (plain.dormant, plain.effective_rank)


@pytest.mark.parametrize("rule", ["nature", "gnt", "clarena"])
@pytest.mark.parametrize("name", ["digits", "regression"])
def test_every_rule_replaces_units_in_every_group(name, rule, settings, monkeypatch):
    attached = []

    def attach(*args, **kwargs):
        attached.append(cbp_fast.ContinualBackprop(*args, **kwargs))
        return attached[0]

    monkeypatch.setattr(training, "ContinualBackprop", attach)
    rate = max(problems.load(name, rule).replacement_rate, 1e-3)
    settings(name, rule, maturity_threshold=20, replacement_rate=rate)
    train("cbp", name, rule)
    assert all(n > 0 for n in attached[0].num_replaced.values())


@pytest.mark.slow
def test_workers_give_what_one_process_gives():
    runs = [training.Run("digits", "nature", method, 0.001, 0, 2) for method in report.METHODS]
    told = []
    alone = dict(training.train_all(runs, 1, lambda run, score: None))
    together = dict(training.train_all(runs, 2, lambda run, score: told.append((run.method, score))))
    assert [together[run].scores for run in runs] == [alone[run].scores for run in runs]
    for run, history in together.items():
        assert [score for method, score in told if method == run.method] == history.scores


@pytest.mark.slow
def test_an_interrupt_here_stops_the_workers():
    def interrupt(run, score):
        raise KeyboardInterrupt

    # far too long to wait for
    runs = [training.Run("digits", "nature", method, 0.001, 0, 100_000) for method in (*report.METHODS, "backprop")]
    with pytest.raises(KeyboardInterrupt):
        list(training.train_all(runs, 2, interrupt))
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_run_that_fails_in_a_worker_stops_no_other():
    runs = [training.Run(name, "nature", "backprop", 0.001, 0, 1) for name in ("mnist", "digits")]
    outcomes = dict(training.train_all(runs, 2, lambda run, score: None))
    assert isinstance(outcomes[runs[0]], KeyError)
    assert len(outcomes[runs[1]].scores) == 1


def test_training_here_gives_the_threads_back():
    threads = torch.get_num_threads()
    run = training.Run("mnist", "nature", "cbp", 0.1, 0, 1)
    ((_, error),) = training.train_all([run], 1, lambda run, score: None)
    assert isinstance(error, KeyError)
    assert torch.get_num_threads() == threads


def history(*scores):
    return training.History(list(scores), dormant=0.5, effective_rank=2.0, seconds_per_step=0.001)


def test_a_row_is_the_mean_over_seeds_with_their_deviation():
    numbers = report.Row("cbp", 0.1, [history(*range(20)), history(*range(2, 22))]).to_json()
    assert numbers["first"] == 1.5
    assert numbers["last"] == 19.5
    assert numbers["mean"] == 10.5
    assert numbers["std"] == pytest.approx({"first": 2**0.5, "last": 2**0.5})
    assert report.Row("cbp", 0.1, [history(1.0)]).to_json()["std"] == {"first": None, "last": None}


@pytest.mark.parametrize(("name", "chosen"), [("digits", 0.1), ("regression", 0.2)])
def test_plain_backprop_chooses_the_step_size_by_its_mean_over_the_whole_stream(name, chosen):
    # 0.1 begins better and ends worse than 0.2; continual backprop would choose otherwise
    scores = {("backprop", 0.1): (9, 5), ("backprop", 0.2): (5, 8), ("cbp", 0.1): (1, 1), ("cbp", 0.2): (2, 2)}
    if name == "regression":
        scores["cbp", 0.2] = (0, 0)
    rows = [report.Row(method, size, [history(*values)]) for (method, size), values in scores.items()]
    both = report.compared(problems.load(name, "nature"), rows)
    assert {method: row.step_size for method, row in both.items()} == {"backprop": chosen, "cbp": chosen}


def test_demo_writes_json_picture_and_table(tmp_path, capsys):
    target = tmp_path / "new" / "pictures"
    assert main(["demo", "--tasks=1", "--seeds=2", f"--out={target}", f"--json={tmp_path / 'r.json'}"]) == 0
    out, err = capsys.readouterr()
    written = json.loads((tmp_path / "r.json").read_text())
    for method in ("backprop", "cbp"):
        numbers = written["results"][method]
        assert 0.3 < numbers["first"] == numbers["last"] < 1
        assert numbers["std"]["first"] == numbers["std"]["last"] > 0
    assert written["settings"]["tasks"] == 1
    assert written["settings"]["seeds"] == [0, 1]
    # every step size tried is shown, for both methods
    sizes = written["settings"]["step_sizes"]
    assert [(row["method"], row["step_size"]) for row in written["tried"]] == [
        (method, size) for method in ("backprop", "cbp") for size in sizes
    ]
    for row in written["tried"]:
        assert any(f"{row['method']} " in line and f"{row['step_size']:g} " in line for line in out.splitlines())
    assert out.count("* ") == 3  # two rows, and what the star means
    assert (target / "demo_digits.png").read_bytes().startswith(b"\x89PNG")
    assert "backprop=0." in err


@pytest.fixture
def broken(monkeypatch):
    """Lets the training of one network end with an error, after a task of it; the others are not trained at all."""

    def break_(which, error):
        def train(run, on_task):
            on_task(run, 0.5)
            if (run.method, run.step_size, run.seed) == which:
                raise error
            on_task(run, 0.75)
            return training.History([0.5, 0.75], 0.1, 5.0, 1e-3, "cpp" if run.method == "cbp" else None)

        monkeypatch.setattr(training, "train", train)

    return break_


def test_networks_that_fail_are_named_and_the_others_compared(broken, tmp_path, capsys):
    broken(("cbp", 0.001, 1), MemoryError("no room"))
    results = tmp_path / "r.json"
    assert main(["demo", "--tasks=2", "--seeds=2", f"--out={tmp_path / 'p.svg'}", f"--json={results}"]) == 1
    out, err = capsys.readouterr()
    assert "error: cbp, step size 0.001, seed 1: MemoryError: no room" in err
    written = json.loads(results.read_text())
    (unfinished,) = written["unfinished"]
    assert unfinished["error"] == "MemoryError: no room"
    assert (unfinished["seed"], unfinished["scores"]) == (1, [0.5])
    assert [row["networks"] for row in written["tried"]] == [2, 2, 2, 2, 1, 2]
    assert written["results"]["cbp"]["mean"] == 0.625
    assert (tmp_path / "p.svg").read_text().startswith("<?xml")
    assert "dormant" in out


@pytest.mark.parametrize("seed", [0, 1])
def test_an_interrupt_keeps_what_there_is(seed, broken, tmp_path, capsys):
    broken(("cbp", 0.001, seed), KeyboardInterrupt())
    results, picture = tmp_path / "r.json", tmp_path / "new" / "p.png"
    assert main(["demo", "--tasks=2", "--seeds=2", f"--out={picture}", f"--json={results}"]) == 130
    out, err = capsys.readouterr()
    written = json.loads(results.read_text())
    finished = 3 + 6 * seed
    assert f"interrupted with {finished} of 12 networks trained; what there is is in {results}" in err
    assert "Traceback" not in err
    assert len(written["unfinished"]) == 12 - finished
    assert [run["scores"] for run in written["unfinished"]] == [[0.5], *[[]] * (11 - finished)]
    # once there is a network of every kind they are compared
    assert bool(written["results"]) == picture.exists() == bool(seed)
    assert ("score so far" in out) != bool(seed)


def test_an_interrupt_before_the_first_score_writes_nothing(monkeypatch, tmp_path, capsys):
    def interrupted(run, on_task):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupted)
    assert main(["demo", "--tasks=2", f"--out={tmp_path / 'new'}", f"--json={tmp_path / 'r.json'}"]) == 130
    assert list(tmp_path.iterdir()) == []
    assert "interrupted before there was a result" in capsys.readouterr().err


def test_demo_prints_json_alone_on_stdout(tmp_path, capsys):
    picture = tmp_path / "bits.png"
    assert main(["demo", "--problem=regression", "--tasks=1", "--seeds=1", "--out", str(picture), "--json"]) == 0
    out, err = capsys.readouterr()
    results = json.loads(out)["results"]
    assert results["backprop"]["last"] > 0
    assert results["cbp"]["std"] == {"first": None, "last": None}
    assert "step size" in err
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tasks", "0"], "argument --tasks: '0' must be a whole number, at least 1"),
        (["--seeds", "two"], "argument --seeds: 'two' must be a whole number, at least 1"),
        (["--problem", "mnist"], "choose from"),
        (["--rule", "redo"], "choose from"),
        (["--device", "tpu"], "'tpu' must be cpu or cuda"),
        (["--device", "cuda:99"], "CUDA devices; use cpu"),
    ],
    ids=" ".join,
)
def test_bad_arguments_say_what_would_be_right(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["demo", *argv])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--out", "--json"])
def test_a_place_that_cannot_be_written_ends_it_before_training(option, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    # the last --out counts
    assert main(["demo", f"--out={tmp_path}", option, str(tmp_path / "file" / "inside.png")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_a_missing_package_is_named_with_its_extra(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else found(name))
    assert main(["demo"]) == 2
    assert capsys.readouterr().err.endswith("the demo needs scikit-learn: pip install 'cbp_fast[demo]'\n")
