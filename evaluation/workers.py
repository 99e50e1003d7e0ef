"""Tasks behind the executor interface of concurrent.futures: processes here, or a Dask cluster.

    with workers.processes(2) as executor:
        workers.complete(executor, function, {index: arguments}, show)

A process that dies loses its own task and no other; that task is submitted again.  Held by
tests/test_audit.py, which kills one.
"""

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection

from cli import UserError

AGAIN = 2  # times that the task of a dead worker is submitted again
POLL = 0.5  # seconds between two looks at the progress


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


@contextlib.contextmanager
def cluster(address: str) -> Iterator[futures.Executor]:
    """The workers of a Dask scheduler; they must see the same files and have this code.

    Dask itself submits the task of a dead worker again.  Raises UserError without the package or
    the scheduler, and for a task whose workers die every time.
    """
    try:
        from distributed import Client, KilledWorker
    except ImportError:
        raise UserError("--cluster needs a package: pip install distributed") from None
    try:
        client = Client(address, timeout=10)
    except (OSError, ValueError) as error:
        raise UserError(f"there is no Dask scheduler at {address}: {error}") from None
    with client:
        try:
            yield client.get_executor(pure=False)
        except KilledWorker as error:
            raise UserError(f"an adapter's workers died every time: {error}") from None


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
