"""Tasks behind the executor interface of concurrent.futures: processes here, or a Dask cluster.

    with workers.processes(2) as executor:
        workers.complete(executor, function, {index: arguments}, show)

A process that dies loses its own task and no other; that task is submitted again.  Held by
tests/test_audit.py, which kills a process, and tests/test_cluster.py, which kills a Dask worker.
"""

import contextlib
import logging
import multiprocessing
import os
import pickle
import queue
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection

from command.errors import UserError

AGAIN = 2  # times that the task of a dead worker is submitted again
POLL = 0.5  # seconds between two looks at the progress
ANSWER = 10  # seconds that a Dask scheduler has to answer


class WorkerDied(Exception):
    """The process that had a task is gone, the task may be submitted again."""


class Processes(futures.Executor):
    """`jobs` processes, each a pool of its own: one that dies does not take the others with it."""

    def __init__(self, jobs: int):
        self.threads = futures.ThreadPoolExecutor(jobs)
        self.pools: queue.SimpleQueue = queue.SimpleQueue()  # those at rest; None is not begun yet
        self.running: set[int] = set()  # process ids
        self.jobs = jobs
        for _ in range(jobs):
            self.pools.put(None)

    def submit(self, function, /, *args) -> futures.Future:
        """A future of function(*args) in one of the processes."""
        return self.threads.submit(self._run, function, args)

    def _run(self, function, args):
        pool = self.pools.get()
        try:
            if pool is None:
                spawn = multiprocessing.get_context("spawn")  # a fork would copy torch's threads
                pool = futures.ProcessPoolExecutor(1, spawn, _begin)
            process = pool.submit(os.getpid).result()
            self.running.add(process)
            try:
                return pool.submit(function, *args).result()
            finally:
                self.running.discard(process)
        except BrokenProcessPool:
            pool.shutdown(wait=False)
            pool = None
            raise WorkerDied from None
        finally:
            self.pools.put(pool)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Wait for the tasks, unless cancelled not only those that run; end the processes."""
        self.threads.shutdown(wait, cancel_futures=cancel_futures)
        for _ in range(self.jobs):
            if (pool := self.pools.get()) is not None:
                pool.shutdown()

    def stop(self) -> None:
        """End the processes that have a task, now."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        for process in list(self.running):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)


def _begin() -> None:
    """In a new process: an interrupt ends it without a word, and so does the end of its parent."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process().sentinel

    def watch() -> None:
        connection.wait([parent])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def processes(jobs: int) -> Iterator[Processes]:
    """An executor of `jobs` local processes; on an error what they do is not waited for."""
    executor = Processes(jobs)
    try:
        yield executor
    except BaseException:
        executor.stop()
        raise
    finally:
        executor.shutdown()


class Cluster(futures.Executor):
    """The workers of a Dask client.  The scheduler needs nothing of ours: tasks are bytes to it."""

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

    Each is started in the repository: python -m dask worker ADDRESS --nthreads 1.  Dask itself
    submits the task of a dead worker again.  Raises UserError without the package or the
    scheduler, also if it goes away, for workers that lack this code, and for a task whose workers
    die every time.
    """
    try:
        from distributed import Client, KilledWorker
    except ImportError:
        raise UserError("--cluster needs a package: pip install distributed") from None
    try:
        _call(address)
        client = Client(address, timeout=ANSWER)
    except (OSError, ValueError, TypeError, ImportError) as error:  # TypeError is of tls://
        raise UserError(f"there is no Dask scheduler at {address}: {error}") from None
    with client:
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


def _call(address: str) -> None:
    """Raise OSError if no scheduler answers at a tcp address: Client itself tries a closed port for
    ANSWER seconds and waits for ever at one that is open and silent.  A scheduler speaks first."""
    from distributed.comm import get_address_host_port, parse_address

    if parse_address(address)[0] == "tcp":
        host_port = get_address_host_port(address)
        with socket.create_connection(host_port, ANSWER) as connection:
            if not connection.recv(1):
                raise OSError("it hung up")


def complete(
    executor: futures.Executor, function: Callable, tasks: dict[int, tuple], show: Callable
) -> None:
    """Run function(*arguments) for every task; calls show() on the way.

    Raises UserError if the workers of one task die AGAIN + 1 times, and what a task raises.
    """
    lost: Counter = Counter()
    waiting = {executor.submit(function, *args): task for task, args in tasks.items()}
    try:
        while waiting:
            done, _ = futures.wait(waiting, POLL, futures.FIRST_COMPLETED)
            for future in done:
                task = waiting.pop(future)
                try:
                    future.result()
                except WorkerDied:
                    lost[task] += 1
                    if lost[task] > AGAIN:
                        raise UserError(
                            f"the process of adapter {task} died {lost[task]} times: "
                            "there may be too little memory, try fewer --jobs"
                        ) from None
                    waiting[executor.submit(function, *tasks[task])] = task
            show()
    finally:
        for future in waiting:
            future.cancel()
