"""Child processes."""

import multiprocessing
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
