import signal
from multiprocessing import forkserver


def pytest_configure():
    """A shell that starts us in the background has us ignore Ctrl-C, as would the commands that tests interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish(session):
    """Let the process that commands are forked from import what it needs while earlier tests run."""
    used = any(hasattr(getattr(item, "module", None), "commands") for item in session.items)
    if used and not session.config.option.collectonly:
        forkserver.ensure_running()
