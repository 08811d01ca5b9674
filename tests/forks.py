"""Programs that are killed, run in a fork of the test's process: what it has imported need not be imported again."""

import os
import sys
import tempfile
import traceback
from subprocess import CompletedProcess


def run(program: str, *arguments: object) -> CompletedProcess:
    """Run a program's text with its arguments in a fork; what it patches or prints stays there."""
    with tempfile.TemporaryFile("w+") as output:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                sys.stdout = sys.stderr = output
                sys.argv = ["-c", *map(str, arguments)]
                exec(program, {"__name__": "__main__"})
                status = 0
            except BaseException:
                traceback.print_exc(file=output)
            finally:
                output.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        return CompletedProcess(program, os.waitstatus_to_exitcode(status), output.read(), "")
