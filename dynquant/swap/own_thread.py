"""Work that leaves no started thread pool behind, so that the process can still fork."""

import functools
from concurrent.futures import ThreadPoolExecutor

import torch


def on_own_thread(function):
    """Makes the function run on a thread of its own, which has ended when it returns.

    torch's operators start a pool of threads for the thread that calls them first. A child of
    fork() has none of the pool's threads but waits for them: a server that makes its model and
    then forks would hang at the first call. The pool of a thread that has ended is gone as well.

    Where CUDA is in use, which no forked child can use anyway, the caller's thread does it, since
    the current stream and device belong to that.
    """

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        if torch.get_num_threads() == 1 or torch.cuda.is_initialized():
            return function(*args, **kwargs)
        with ThreadPoolExecutor(1, thread_name_prefix=function.__name__) as executor:
            return executor.submit(function, *args, **kwargs).result()

    return wrapped
