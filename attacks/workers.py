"""Tasks behind the executor interface of concurrent.futures: processes here, or a Dask cluster.

    with workers.processes(2) as executor:
        workers.complete(executor, function, {index: arguments}, show)

A task must be idempotent: after the death of a process, unfinished tasks are submitted again.
Tested in tests/test_audit.py, which kills a process, and tests/test_cluster.py, which kills a Dask
worker.
"""

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection

from command.errors import UserError

TRIES = 3  # of a round of tasks in which a process dies before any task is finished
POLL = 0.5  # seconds between two calls of show()
ANSWER = 10  # seconds that a Dask scheduler has to answer


def complete(
    executor: futures.Executor, function: Callable, tasks: dict[int, tuple], show: Callable
) -> None:
    """Run function(*arguments) for every task; calls show() on the way.

    Raises what a task raises, and UserError if processes keep dying and no task is finished.
    """
    left, deaths = dict(tasks), 0
    while left:
        count = len(left)
        waiting = {executor.submit(function, *args): task for task, args in left.items()}
        try:
            while waiting:
                done, _ = futures.wait(waiting, POLL, futures.FIRST_COMPLETED)
                for future in done:
                    future.result()
                    del left[waiting.pop(future)]
                show()
        except BrokenProcessPool:
            futures.wait(waiting)  # no task may run twice at a time
            deaths = deaths + 1 if len(left) == count else 1
            if deaths == TRIES:
                raise UserError(
                    f"a process died {TRIES} times before a task was finished: "
                    "there may be too little memory, try fewer --jobs"
                ) from None


# --------------------------------------------------------------------------------------------------
# Processes of this machine


class Processes:
    """An executor of up to `jobs` local processes, started anew when one of them has died."""

    def __init__(self, jobs: int):
        self.jobs = jobs

    def __enter__(self):
        spawn = multiprocessing.get_context("spawn")  # a fork would copy torch's threads
        self.pool = futures.ProcessPoolExecutor(self.jobs, spawn, _initialise)
        return self

    def __exit__(self, error, *_) -> None:
        if error:  # what the processes do is not waited for
            for process in multiprocessing.active_children():
                process.terminate()
        self.pool.shutdown()

    def submit(self, function: Callable, /, *args) -> futures.Future:
        """A future of function(*args) in one of the processes."""
        try:
            return self.pool.submit(_run, function, args)
        except BrokenProcessPool:
            self.pool.shutdown()
            self.__enter__()
            return self.pool.submit(_run, function, args)


processes = Processes  # called as `cluster` is


def _initialise() -> None:
    """In a new process: an interrupt ends it without a traceback; so does its parent's death."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process().sentinel

    def watch() -> None:
        connection.wait([parent])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run(function: Callable, args: tuple):
    """function(*args); SystemExit ends the process, which would else take another task."""
    try:
        return function(*args)
    except SystemExit:
        os._exit(1)


# --------------------------------------------------------------------------------------------------
# Workers of a Dask scheduler


class Cluster(futures.Executor):
    """The workers of a Dask client.  The scheduler needs none of our modules: a task is bytes."""

    def __init__(self, client):
        self.executor = client.get_executor(pure=False)

    def submit(self, function, /, *args) -> futures.Future:
        """A future of function(*args) in one of the workers."""

        def run(task: bytes):  # nested: sent by value, so that the scheduler can read it
            function, args = pickle.loads(task)
            return function(*args)

        return self.executor.submit(run, pickle.dumps((function, args)))


@contextlib.contextmanager
def cluster(address: str) -> Iterator[Cluster]:
    """The workers of a Dask scheduler; they must see the same files, at the same paths.

    Start each in the repository: python -m dask worker ADDRESS --nthreads 1.  Dask itself submits
    the task of a dead worker again.  Raises UserError without the package or the scheduler, also
    if it goes away, for workers that lack this code, and for a task whose workers die every time.
    """
    require_scheduler(address)
    from distributed import KilledWorker

    with _client(address) as client:
        if not client.scheduler_info()["workers"]:
            print(f"note: {address} has no workers yet, the audit waits for them")
        try:
            yield Cluster(client)
        except KilledWorker as error:
            raise UserError(f"an adapter's workers died every time: {error}") from None
        except futures.CancelledError:
            logging.getLogger("distributed.client").disabled = True  # it would log a traceback
            raise UserError(
                f"the Dask scheduler at {address} went away: start the audit again when it is back"
            ) from None
        except ImportError as error:
            raise UserError(
                f"a worker of {address} cannot run this code ({error}): "
                "start it as `python -m dask worker` in this folder"
            ) from None


def _client(address: str):
    """A Dask client; where the machine is so busy that its thread has not started after ten
    seconds, which Dask asserts, another one.
    """
    from distributed import Client

    with _reaching(address):
        try:
            return Client(address, timeout=ANSWER)
        except AssertionError:
            return Client(address, timeout=ANSWER)


@contextlib.contextmanager
def _reaching(address: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, ImportError) as error:  # TypeError is of tls://
        raise UserError(f"there is no Dask scheduler at {address}: {error}") from None


def require_scheduler(address: str) -> None:
    """Raises UserError without Dask, or if no scheduler answers at a tcp address.

    Client itself tries a closed port for ANSWER seconds and waits for ever at one that is open and
    silent.  A scheduler speaks first.
    """
    try:
        from distributed.comm import get_address_host_port, parse_address
    except ImportError:
        raise UserError("--cluster needs a package: pip install distributed") from None
    with _reaching(address):
        if parse_address(address)[0] == "tcp":
            host_port = get_address_host_port(address)
            with socket.create_connection(host_port, ANSWER) as connection:
                if not connection.recv(1):
                    raise OSError("it hung up")
