"""Open a fresh study from several processes at once."""

import json
import os
import traceback
from pathlib import Path

from asesearch.study.study import Study
from tests.search.fake_search import make_config


def opened_at_once(processes, pairs):
    """Exit codes of processes that wait for each other and then open their study."""
    ready = os.pipe()
    go = os.pipe()
    children = []
    for i in range(processes):
        run_dir, storage = pairs[i % len(pairs)]
        if child := os.fork():
            children.append(child)
            continue
        code = 1
        try:
            os.close(go[1])
            os.write(ready[1], b"x")
            os.read(go[0], 1)
            name = {"name": Path(run_dir).name}
            Study(make_config(name, storage=storage), Path(run_dir))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    for _ in children:
        os.read(ready[0], 1)
    os.close(go[1])
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    for end in (*ready, go[0]):
        os.close(end)
    return codes


def main(processes, cases):
    """Print the exit codes of each case: a list of (run_dir, storage) pairs, given to the processes
    in turn."""
    print(json.dumps([opened_at_once(processes, pairs) for pairs in cases]))
