"""Child processes."""

import multiprocessing
import os
import signal
import time
import traceback

TIMEOUT = 60


def result_of(method, function, *arguments):
    """What function(*arguments) gives in a child: a tensor.

    Args:
        method: "fork" or "spawn".
        function: of the top level of its module.
    """
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_run, args=(queue, function, arguments), daemon=True)
    process.start()
    try:
        result, error = queue.get(timeout=TIMEOUT)
    finally:
        process.join(5)
        process.kill()
    assert error is None, error
    return result


def _run(queue, function, arguments):
    try:
        queue.put((function(*arguments).detach().numpy(), None))
    except Exception:
        queue.put((None, traceback.format_exc()))


def forked(function, seconds=20):
    """What function() gives in a child that is forked here and now: True or False.

    Raises:
        TimeoutError: where the child does not end in time; it is killed.
    """
    child = os.fork()
    if child == 0:
        code = 2
        try:
            code = 0 if function() else 1
        finally:
            os._exit(code)
    for _ in range(seconds * 50):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            assert code in (0, 1), f"the child ended with {code}"
            return code == 0
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"the child did not end in {seconds} seconds")
