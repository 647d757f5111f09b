import signal
from multiprocessing import forkserver


def pytest_configure():
    """A shell that starts us in the background has us ignore Ctrl-C, nohup a closed terminal; the commands that tests
    interrupt would ignore them as well."""
    for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, default)


def pytest_collection_finish(session):
    """Let the process that commands are forked from import what it needs while earlier tests run."""
    used = any(hasattr(getattr(item, "module", None), "commands") for item in session.items)
    if used and not session.config.option.collectonly:
        forkserver.ensure_running()
