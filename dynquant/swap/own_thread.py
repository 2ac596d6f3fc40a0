"""Work that leaves no started thread pool behind, so that the process can still fork."""

import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

_of_thread = threading.local()  # is_interrupted: an Event, where a caller waits for this thread


def on_own_thread(function):
    """Makes the function run on a thread of its own, which has ended when it returns.

    torch's operators start a pool of threads for the thread that calls them first. A child of
    fork() has none of the pool's threads but waits for them: a server that makes its model and
    then forks would hang at the first call. The pool of a thread that has ended is gone as well.

    Where CUDA is in use, which no forked child can use anyway, the caller's thread does it, since
    the current stream and device belong to that.

    An interrupt reaches the caller's thread alone; the other one sees it in stop_if_interrupted().
    """

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        is_there = hasattr(_of_thread, "is_interrupted")
        if is_there or torch.get_num_threads() == 1 or torch.cuda.is_initialized():
            return function(*args, **kwargs)
        is_interrupted = threading.Event()

        def run():
            _of_thread.is_interrupted = is_interrupted
            return function(*args, **kwargs)

        with ThreadPoolExecutor(1, thread_name_prefix=function.__name__) as executor:
            try:
                return executor.submit(run).result()
            except BaseException:
                is_interrupted.set()
                raise

    return wrapped


def stop_if_interrupted():
    """Raises KeyboardInterrupt in a thread of on_own_thread whose caller waits no more."""
    is_interrupted = getattr(_of_thread, "is_interrupted", None)
    if is_interrupted is not None and is_interrupted.is_set():
        raise KeyboardInterrupt
