"""What every suite says of its checks: one line each, for people and for the one who counts."""

import sys
import time
import traceback


class Skip(Exception):
    """A check that cannot be made here; the text says why."""


class Report:
    """Runs checks and prints what became of them."""

    def __init__(self, suite, only=None):
        self.suite, self.only = suite, only

    def line(self, outcome, name, detail="", seconds=None):
        took = "" if seconds is None else f"{seconds:.2f}s"
        text = " ".join(str(detail).split())
        print("\t".join(("check", outcome, self.suite, name, took, text)), flush=True)

    def check(self, name, work, *arguments):
        """Runs one check. An exception is a failure, and is told; others go on. One that is not wanted counts as passed."""
        if self.only is not None and name not in self.only:
            return True
        began = time.monotonic()
        try:
            detail = work(*arguments)
        except Skip as why:
            self.line("skipped", name, why)
            return False
        except Exception as error:  # pylint: disable=broad-except
            traceback.print_exc(file=sys.stderr)
            self.line("failed", name, f"{type(error).__name__}: {error}", time.monotonic() - began)
            return False
        self.line("passed", name, detail or "", time.monotonic() - began)
        return True

    def skip(self, name, why):
        self.line("skipped", name, why)


def equal(seen, expected, what=""):
    """Fails unless both are alike."""
    if seen != expected:
        raise AssertionError(f"{what + ': ' if what else ''}{seen!r} instead of {expected!r}")


def holds(condition, what):
    """Fails unless it is so."""
    if not condition:
        raise AssertionError(what)


def until(what, condition, seconds=30.0):
    """Waits for a condition; answers what it said last."""
    end = time.monotonic() + seconds
    while True:
        said = condition()
        if said:
            return said
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.05)
