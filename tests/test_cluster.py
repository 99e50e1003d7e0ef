"""audit.py --cluster: a Dask scheduler and workers in processes of their own, one worker killed in
the middle of an adapter, and what a user is told when something of it is not there."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import audit
from attacks import workers
from command.errors import UserError, one_line_errors
from command.whole_files import read_json

ROOT = Path(audit.__file__).parent
FLAGS = {"method": "lora", "adapters": 4, "rank": 2, "alpha": 4.0, "batch_size": 4, "lr": 0.02}
FLAGS |= {"steps": 8, "save_every": 4, "pool": 10}


@pytest.fixture
def dask(tmp_path):
    """Starts `python -m dask ...` in a folder, as a user would; they end with the test."""
    pytest.importorskip("distributed")
    begun = []

    def start(folder: Path, *words: str, **environment: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "dask", *words, "--no-dashboard"]
        with open(tmp_path / "dask.log", "a") as log:
            process = subprocess.Popen(
                command, cwd=folder, env=os.environ | environment, stdout=log, stderr=log
            )
        begun.append(process)
        return process

    yield start
    for process in begun:
        process.kill()
        process.wait()


@pytest.fixture
def scheduler(dask, tmp_path):
    """Starts a scheduler where none of our modules are: its process and its address."""

    def start(**environment: str) -> tuple[subprocess.Popen, str]:
        file = tmp_path / "scheduler.json"
        where = "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file)
        forgotten = "--idle-timeout", "10 minutes"
        process = dask(tmp_path, "scheduler", *where, *forgotten, **environment)
        while True:  # the file may be there before its content
            with contextlib.suppress(OSError, ValueError):
                return process, json.loads(file.read_text())["address"]
            assert process.poll() is None, (tmp_path / "dask.log").read_text()
            time.sleep(0.05)

    return start


@pytest.fixture
def worker(dask, tmp_path):
    """Starts a worker of one thread in the repository; nothing starts it again after its end."""

    def start(address: str, *words: str) -> subprocess.Popen:
        given = "--nthreads", "1", "--local-directory", str(tmp_path), *words
        return dask(ROOT, "worker", address, "--no-nanny", *given)

    return start


# --------------------------------------------------------------------------------------------------
# An audit


def begin(out: Path, **flags) -> subprocess.Popen:
    """`python audit.py` with these flags, its bar in audit.log beside `out`."""
    command = [sys.executable, str(ROOT / "audit.py"), "--out", str(out)]
    for name, value in (FLAGS | flags).items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    with open(out.with_name("audit.log"), "w") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


# What a worker runs first: it writes down which adapters it trains.  One of two is held in the
# middle of its first one until it is killed, and the other one does not begin before that.
PRELOADED = """
import time
from pathlib import Path

from attacks import audit_tasks

doomed, killed = Path("{tmp}/doomed"), Path("{tmp}/dead")


def dask_setup(_):
    ask, training = audit_tasks.ask, audit_tasks._training

    def trained(*given):
        with open("{tmp}/trained", "a") as file:
            print(given[-1].seed, file=file)
        while not {held} and not killed.exists():
            time.sleep(0.05)
        return training(*given)

    def hold(*_):
        doomed.touch()
        time.sleep(600)

    audit_tasks._training, audit_tasks.ask = trained, hold if {held} else ask
"""


def assert_equal_audits(found: Path, wanted: Path) -> None:
    """The same record but for where and when, and the same bits in the scores."""
    one, two = (json.loads((out / "audit.json").read_text()) for out in (found, wanted))
    for record in (one, two):
        assert record.pop("seconds")["training"] > 0
        del record["provenance"]
        for flag in ("out", "jobs", "cluster"):
            del record["settings"][flag]
    assert one == two
    with np.load(found / "scores.npz") as a, np.load(wanted / "scores.npz") as b:
        assert a.files == b.files and len(a.files) > 10
        for name in a.files:
            assert a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes()


@pytest.mark.timeout(600)
def test_a_killed_worker(scheduler, worker, tiny_base, image_folder, tmp_path, in_thread):
    """One of two goes away in the middle of an adapter: the other one trains that again and no
    more, and the audit is the same as one in this process.
    """
    _, address = scheduler()
    preloaded = tmp_path / "free.py", tmp_path / "doomed.py"
    for file in preloaded:
        file.write_text(PRELOADED.format(tmp=tmp_path, held=file.stem == "doomed"))
    _, doomed = (worker(address, "--preload", str(file)) for file in preloaded)
    given = {"model": tiny_base, "data": image_folder}
    audit.audit(audit.Audit(**FLAGS | given, out=str(tmp_path / "quiet")))
    with pytest.importorskip("distributed").Client(address) as client:
        client.wait_for_workers(2, timeout=240)
    process = begin(tmp_path / "killed", cluster=address, **given)
    begun = []
    while process.poll() is None and not ((tmp_path / "doomed").exists() and len(begun) == 2):
        time.sleep(0.05)
        begun = [folder.name for folder in tmp_path.glob("killed/adapters/*")]
    doomed.kill()
    (tmp_path / "dead").touch()
    process.wait()
    log, trained = (tmp_path / "audit.log").read_text(), (tmp_path / "trained").read_text().split()
    assert process.returncode == 0, log
    assert len(begun) == 2 and doomed.wait() == -9
    assert len(trained) == 5 and {*trained} == {*"0123"} and "Traceback" not in log
    assert len(list(tmp_path.glob("killed/adapters/*/answers.npz"))) == 4
    assert not list(tmp_path.glob("killed/adapters/*/*.tmp"))
    assert_equal_audits(tmp_path / "killed", tmp_path / "quiet")


# --------------------------------------------------------------------------------------------------
# What a user is told


def free_port() -> int:
    """A port at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_no_scheduler(tiny_base, image_folder, tmp_path, capsys):
    """One line, exit code 2, nothing left behind; at once if the port is closed."""
    pytest.importorskip("distributed")
    address = f"tcp://127.0.0.1:{free_port()}"
    flags = FLAGS | {"model": tiny_base, "data": image_folder, "out": str(tmp_path / "x")}
    with pytest.raises(SystemExit) as stop, one_line_errors():
        audit.audit(audit.Audit(**flags, cluster=address))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1
    assert lines[0].startswith(f"error: there is no Dask scheduler at {address}: ")
    assert not (tmp_path / "x").exists()
    began = time.monotonic()
    with pytest.raises(UserError, match="refused"), workers.cluster(address):
        pass
    assert time.monotonic() - began < workers.ANSWER / 2


def test_a_busy_machine(scheduler, monkeypatch):
    """Where Dask's own thread does not start in time, it is asked once more."""
    _, address = scheduler()
    from distributed.utils import LoopRunner

    start, tried = LoopRunner._start_unlocked, []

    def busy(runner):
        tried.append(runner)
        assert len(tried) > 1
        start(runner)

    monkeypatch.setattr(LoopRunner, "_start_unlocked", busy)
    with workers.cluster(address):
        assert len(tried) == 2


@pytest.mark.timeout(60)
def test_a_port_of_something_else(monkeypatch):
    """A port that is open and silent is not waited for longer than ANSWER."""
    pytest.importorskip("distributed")
    monkeypatch.setattr(workers, "ANSWER", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UserError, match="no Dask scheduler"), workers.cluster(address):
            pass


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "host:port", "http://127.0.0.1:8787", "tls://h:1"]
)
def test_not_an_address(address):
    """Is one sentence, whatever Dask raises."""
    pytest.importorskip("distributed")
    with pytest.raises(UserError, match="no Dask scheduler at"), workers.cluster(address):
        pass


def test_no_package(monkeypatch):
    """The sentence names what to install."""
    for name in ("distributed", "distributed.comm"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="pip install distributed"), workers.cluster("127.0.0.1:1"):
        pass


def run(address: str, function, *args) -> list[bool]:
    """Whether show() was called, after function(*args) on a cluster; it raises what that does."""
    shown = []
    with workers.cluster(address) as executor:
        workers.complete(executor, function, {5: args}, lambda: shown.append(True))
    return shown


def unknown_to_workers():
    """The module of this function is not on the path of a worker."""


def test_faults_of_workers(scheduler, worker, tmp_path, capsys):
    """What a task raises comes through; a worker without the code, and one that always dies, are
    one sentence."""
    _, address = scheduler(DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="0")
    worker(address)
    with pytest.raises(UserError, match=r"cannot read .*nothing\.json"):
        run(address, read_json, tmp_path / "nothing.json")
    with pytest.raises(UserError, match=r"test_cluster.*python -m dask worker"):
        run(address, unknown_to_workers)
    capsys.readouterr()
    assert run(address, os.getpid) and not capsys.readouterr().out  # no note on missing workers
    with pytest.raises(UserError, match="workers died every time"):
        run(address, os._exit, 1)


@pytest.mark.timeout(60)
def test_the_scheduler_goes_away(scheduler, capsys, caplog):
    """While the audit waits for workers, which it says: one sentence, soon, and no traceback."""
    process, address = scheduler()
    calls = []

    def show():
        calls.append(time.monotonic())
        process.kill()

    with (
        pytest.raises(UserError, match=f"scheduler at {address} went away"),
        workers.cluster(address) as executor,
    ):
        workers.complete(executor, os.getpid, {0: (), 1: ()}, show)
    assert time.monotonic() - calls[0] < 30
    assert f"{address} has no workers yet" in capsys.readouterr().out
    assert "distributed.client" not in {record.name for record in caplog.records}
